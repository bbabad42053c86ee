"""Is the predicted peak the real one? Plans over a zoo of models, against what the tensors of a real window take.

For each model, in float32 and under autocast in bfloat16, one plan is made; then windows are run with three sizes of
the micro-batch, and PyTorch's profiler counts the most that is live at once. Then budgets are drawn at random, the
accumulator plans within each by itself, and what its windows take is compared with the budget.
"""

import os
import random
import sys
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of each start and stop

import torch
from torch import nn

import wholebatch as wb
from page import Bar, arguments, table, tell
from wholebatch.engine import memory
from zoo import MISSING, ZOO, Creature

SIZES = (3, 8, 24)
PAIRS = 200


def resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return what weights, buffers and states take outside of a window."""
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers(), *states])


def real_peak(creature: Creature, precision: Any, micro_batch: Any, rows: int, budget: int | None = None) -> int:
    """Return what the third update takes at most, all in all."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    options = {"micro_batch": micro_batch, "memory": budget, "check": None, "precision": precision, **creature.options}
    accumulator = wb.Accumulator(model, optimizer, creature.loss_fn, **options)
    batch = creature.batch(rows)
    for _ in range(2):
        accumulator.step(batch)
    before = resident(model, optimizer)
    with memory.tensor_peak() as peak:
        accumulator.step(batch)
    return before + peak.peak_bytes


def accuracy(creature: Creature, precision: Any) -> list[tuple[int, int, int]]:
    """Return micro-batch, predicted and real peak."""
    torch.manual_seed(0)
    model = creature.build()
    options = {"logical_batch": 48, "memory": "8GiB", "precision": precision, "timed": False}
    plan = wb.plan(model, creature.optimizer(model.parameters()), creature.loss_fn, creature.batch(4), **options)
    return [(size, plan.peak_at(size), real_peak(creature, precision, wb.Rows(size), 48)) for size in SIZES]


def within(pairs: int, seed: int = 0) -> tuple[float, int, int]:
    """Return the largest share of its budget that a run took, how many ran, and how many were refused."""
    draw = random.Random(seed)
    most, ran, refused = 0.0, 0, 0
    for _ in range(pairs):
        creature = draw.choice(ZOO)
        precision = draw.choice(["fp32", "bf16"])
        torch.manual_seed(0)
        floor = 4 * resident(creature.build(), torch.optim.SGD(creature.build().parameters()))
        budget = round(floor * draw.uniform(0.9, 6))
        try:
            peak = real_peak(creature, precision, "auto", draw.choice([16, 33, 64]), budget)
        except wb.OutOfMemoryError:
            refused += 1
            continue
        ran += 1
        most = max(most, peak / budget)
        if peak > budget:
            print(f"over: {creature.name} {precision} {peak:,} of {budget:,}", file=sys.stderr)
    return most, ran, refused


def main() -> int:
    parser = arguments(__doc__, "benchmarks/plan.py")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of a model and a budget")
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, found = [], []
    for creature in [each for each in ZOO if options.only in each.name]:
        for precision in ("fp32", "bf16"):
            sizes = accuracy(creature, precision)
            off = [predicted / real - 1 for _, predicted, real in sizes]
            reals = [f"{real / 2**20:.2f}" for _, _, real in sizes]
            rows.append([creature.name, precision, *reals, *(f"{100 * each:+.2f} %" for each in off)])
            found.append(
                Bar(f"{creature.name}, {precision}: worst error", max(map(abs, off)), creature.bound, digits=4)
            )
    pairs = 20 if options.quick else options.pairs
    text = ""
    if pairs and not options.only:
        most, ran, refused = within(pairs)
        text = f"\n\nOf {pairs} random pairs {ran} ran and {refused} were refused, since not even one row would fit."
        found.append(Bar("largest share of its budget that a run took", most, 1.0))
    if MISSING:
        text += f"\n\nNot installed, and left out: {', '.join(each.name for each in MISSING)}."
    headings = [
        "model",
        "precision",
        *(f"{size} rows, MiB" for size in SIZES),
        *(f"predicted, {size}" for size in SIZES),
    ]
    return tell(
        "Predicted against real peak", "plan", options, ["wholebatch", "torch"], table(headings, rows) + text, found
    )


if __name__ == "__main__":
    sys.exit(main())
