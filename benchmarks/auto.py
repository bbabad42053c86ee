"""Is the chosen micro-batch a good one, and what does it cost to find? Against an exhaustive sweep, and beside a peer.

For each model a budget is set to what a quarter of the logical batch takes. The accumulator chooses by itself; then
every size of a sweep that stays within the budget is timed, alternating, and the throughput of the choice is compared
with the best. The cost of choosing is the time of the first update above that of an accumulator that is told the same
micro-batch, in windows: of the first choice in a process, in which other windows have passed, and of a later one. All
times are of the processor. With --quick, pre-trained models are left out.

Beside it how Accelerate, Lightning and the Hugging Face Trainer find a batch size, on a device that holds so many rows
and no more, from the start and from the middle of training on: how often training began anew, how many rows moved the
weights twice or passed through the model for nothing, and how large the batch of an update is in the end.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

import wholebatch as wb
from finders import FINDERS, Device
from page import Bar, arguments, table, tell
from zoo import ZOO, Creature

ROWS = 96
HOPELESS = 1.5
"""A size that takes so many times longer than the best after two rounds is not timed any more."""
PATIENCE = 12.0
"""After so much time, and three rounds, no more of a model are begun. Unit: seconds."""
LONG = 0.5
"""Where a window takes longer, what is done once in a process is next to nothing, and one process is enough.
Unit: seconds."""
SCENES = {
    "A device that holds 13 rows": lambda: Device(13, 13, 0),
    "A device that holds 13 rows, and 6 once the weights have moved over 150": lambda: Device(13, 6, 150),
}


def updating(creature: Creature, **options: Any) -> wb.Accumulator:
    """Return an accumulator of a new model."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    return wb.Accumulator(model, optimizer, creature.loss_fn, check=None, **options, **creature.options)


def seconds_of(creature: Creature, sizes: list[int], rounds: int) -> dict[int, float]:
    """Return the time of an update by its micro-batch: the median of rounds in which the sizes alternate."""
    batch, begun = creature.batch(ROWS), time.monotonic()
    accumulators = {size: updating(creature, micro_batch=wb.Rows(size)) for size in sizes}
    for accumulator in accumulators.values():
        accumulator.step(batch)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size, accumulator in accumulators.items():
            start = time.process_time()
            accumulator.step(batch)
            times[size].append(time.process_time() - start)
        if number == 1:
            best = min(map(min, times.values()))
            accumulators = {size: each for size, each in accumulators.items() if min(times[size]) < HOPELESS * best}
        if number >= 2 and time.monotonic() - begun > PATIENCE:
            break
    return {size: statistics.median(times[size]) for size in accumulators}


def chosen(name: str, budget: int) -> tuple[int, float, float, float]:
    """Return the micro-batch that is chosen within a budget, what the first and the second choice cost, and a window.

    For a process of its own, in which nothing has been planned before.
    """
    torch.set_num_threads(1)
    (creature,) = (each for each in ZOO if each.name == name)
    batch = creature.batch(ROWS)

    def updates(times: int, **options: Any) -> tuple[int, list[float]]:
        """The rows of a micro-batch, and the times of the first updates."""
        accumulator, taken = updating(creature, **options), []
        for _ in range(times):
            start = time.process_time()
            update = accumulator.step(batch)
            taken.append(time.process_time() - start)
        return -(-ROWS // update.micro_batches), taken

    updates(2, micro_batch=wb.Rows(ROWS // 4))  # what PyTorch does once in a process
    rows, (found,) = updates(1, memory=budget)
    _, (again,) = updates(1, memory=budget)
    _, (told, *later) = updates(5, micro_batch=wb.Rows(rows))
    return rows, found - told, again - told, statistics.median(later)


def choices(creature: Creature, budget: int, times: int) -> tuple[int, float, float]:
    """Return the most frequent choice of some processes, and what the first and the second cost, in windows."""
    found = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        while len(found) < times and not any(window > LONG for *_, window in found):
            found.append(pool.submit(chosen, creature.name, budget).result())
    rows, first, later, windows = zip(*found, strict=True)
    window = statistics.median(windows)
    return statistics.mode(rows), statistics.median(first) / window, statistics.median(later) / window


def sweep(creature: Creature, rounds: int, times: int) -> tuple[list[str], float, float, float]:
    """Return a line of the table, the share of the best throughput, and the costs of choosing in windows."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    plan = wb.plan(model, optimizer, creature.loss_fn, creature.batch(4), ROWS, "8GiB", timed=False)
    budget = round(1.06 * plan.peak_at(ROWS // 4)) + (1 << 16)
    rows, first, later = choices(creature, budget, times)
    fitting = [size for size in (1, 2, 4, 8, 12, 16, 24, 32, 48, 96) if plan.peak_at(size) <= budget]
    taken = seconds_of(creature, sorted({*fitting, rows}), rounds)
    best = min(taken, key=taken.__getitem__)
    share = taken[best] / taken[rows] if rows in taken else 1 / HOPELESS
    line = [creature.name, str(rows), str(best), f"{share:.3f}", f"{first:.2f}", f"{later:.2f}"]
    print(" | ".join(line), file=sys.stderr, flush=True)
    return line, share, first, later


def peers() -> str:
    """Return the tables of what happens where too much is tried at first, and where memory is taken away later."""
    headings = [
        "way",
        "began anew",
        "rows that moved the weights twice",
        "rows run for nothing",
        "batch kept",
        "came to its end",
    ]
    parts = []
    for title, made in SCENES.items():
        rows = [find(made()).row(who) for who, find in FINDERS.items()]
        parts.append(f"{title}:\n\n{table(headings, rows)}")
    return "\n\n".join(parts)


def main() -> int:
    parser = arguments(__doc__, "benchmarks/auto.py")
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, times = (2, 1) if options.quick else (15, 3)
    creatures = [each for each in ZOO if options.only in each.name and (each.package == "torch" or not options.quick)]
    lines, shares, first, later = zip(*(sweep(each, rounds, times) for each in creatures), strict=True)
    found = [
        Bar("throughput of the choice against the best that fits, median", statistics.median(shares), 0.95, most=False),
        Bar("cost of the first choice in a process in windows, median", statistics.median(first), 2.0, digits=2),
        Bar("cost of a later choice in windows, most", max(later), 2.0, digits=2),
    ]
    headings = ["model", "chosen rows", "fastest rows", "throughput of best", "first choice, windows", "later choice"]
    text = f"{table(headings, lines)}\n\n{peers()}"
    packages = ["wholebatch", "torch", "accelerate", "lightning", "transformers"]
    return tell("The micro-batch that is chosen", "auto", options, packages, text, found)


if __name__ == "__main__":
    sys.exit(main())
