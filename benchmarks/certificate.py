"""What does a certificate cost? The processor time of `wb.verify`, in undivided steps of the same model and batch.

A step is a forward and a backward pass of the whole batch, by hand, and plain SGD. Beside it, alternating: the
certificate of model and loss, and that of a clean loop of micro-batches (``step=``), which is run on purpose into a
lack of memory and into a clip. Each certificate must say that the updates are equal, so that dropout is off. With
--quick, fewer models.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import wholebatch as wb
from page import Bar, arguments, spread, table, tell
from zoo import ZOO, Creature

BATCHES = {
    "MLP": (96, 1024, 8192),
    "transformer encoder (torch)": (24,),
    "decoder, fused attention": (24,),
    "decoder, recomputing": (24,),
    "large vocabulary, chunked head": (24,),
    "CNN with group norm": (24,),
    "GRU": (96,),
}
"""Rows of a batch, by model of the zoo."""

QUICK = ("MLP", "GRU")
STEPS = 5.0
"""Undivided steps that a certificate may cost."""


def loss_sum(creature: Creature, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    """Return the sum of the losses of a batch, and the number of its targets."""
    found = creature.loss_fn(model, batch)
    return found if isinstance(found, tuple) else (found * len(batch), len(batch))


def ways(creature: Creature, rows: int) -> dict[str, Callable[[], object]]:
    """Return an undivided step and the two certificates, ready to go."""
    torch.manual_seed(0)
    model, batch = creature.build(), creature.batch(rows)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def undivided() -> None:
        optimizer.zero_grad()
        loss, targets = loss_sum(creature, model, batch)
        (loss / targets).backward()
        optimizer.step()

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Any]) -> None:
        optimizer.zero_grad()
        total = 0
        for micro_batch in micro_batches:
            loss, targets = loss_sum(creature, model, micro_batch)
            total += targets
            loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(total)
        optimizer.step()

    def certify(**options: Any) -> None:
        certificate = wb.verify(model, creature.loss_fn, batch, **options)
        assert certificate.ok, certificate

    return {"step": undivided, "verify": certify, "verify, step=": lambda: certify(step=loop)}


def seconds(way: Callable[[], object]) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start


def main() -> int:
    options = arguments(__doc__, "benchmarks/certificate.py").parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 15
    lines, found = [], []
    for creature in ZOO:
        for rows in BATCHES.get(creature.name, ()) if not options.quick or creature.name in QUICK else ():
            running = ways(creature, rows)
            for way in running.values():
                way()
            times = [{name: seconds(way) for name, way in running.items()} for _ in range(rounds)]
            step = statistics.median(each["step"] for each in times)
            name = f"{creature.name}, {rows:,} rows"
            line = [name, f"{1e3 * step:.1f}"]
            for way in list(running)[1:]:
                costs = [each[way] / step for each in times]
                found.append(Bar(f"{name}: {way}, in undivided steps", statistics.median(costs), STEPS, digits=2))
                line += [f"{statistics.median(costs):.2f}", spread(costs, 2)]
            lines.append(line)
            print(" | ".join(line), file=sys.stderr, flush=True)
    headings = ["model", "a step, ms", "verify, steps", "middle half", "verify(step=), steps", "middle half"]
    return tell(
        "What a certificate costs", "certificate", options, ["wholebatch", "torch"], table(headings, lines), found
    )


if __name__ == "__main__":
    sys.exit(main())
