"""One rank of several that explore: a program, and the rows that each of them sees.

The model is a line, so that the equations can be written down without it: see test_exploration.py.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

import wholebatch as wb
from wholebatch.engine.ranks import served

ETA = 0.05
COEFFICIENTS = 4
STEPS = (7, 5, 3)
"""Local steps of each of three ranks in an epoch: none is like another."""
TURNS = (0, 1, 1, 2, 0, 2, 2, 1, 0)
"""In which order ranks commit, where that is prescribed."""


def rows(rank, step, epoch=0):
    """Return what a rank sees in a step: inputs ``[rows, coefficients]`` and outputs ``[rows, 1]``."""
    draw = torch.Generator().manual_seed(1000 * epoch + 100 * rank + step)
    count = 2 + (rank + step) % 3
    x = torch.randn(count, COEFFICIENTS, generator=draw, dtype=torch.float64)
    return x, torch.randn(count, 1, generator=draw, dtype=torch.float64)


def line(rank=0):
    torch.manual_seed(rank)  # each rank begins elsewhere, until it has pulled
    return nn.Linear(COEFFICIENTS, 1, bias=False, dtype=torch.float64)


def squares(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def explorer(model, loss_fn=squares, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA)
    return wb.AccumulatedGradientNormalization(model, optimizer, loss_fn, **{"local_steps": 2, **options})


def weights(model):
    return model.weight.detach().flatten().tolist()


def two_epochs(rank, **options):
    """Ranks make different numbers of steps; returns the weights after each of two epochs."""
    model, found = line(rank), []
    with explorer(model, **options) as exploring:
        for epoch in range(2):
            for step in range(STEPS[rank]):
                exploring.step(rows(rank, step, epoch))
            exploring.finish()
            found.append(weights(model))
    return found


def in_turn(rank, store):
    """Ranks commit in a prescribed order; returns what each commit did not know of, and the last weights."""
    model, stale = line(rank), []
    with explorer(model, synchronous=False) as exploring:
        distributed.barrier()
        for turn, whose in enumerate(TURNS):
            if whose == rank:
                while store.add("turn", 0) < turn:
                    time.sleep(0.001)
                for step in range(2):
                    made = exploring.step(rows(rank, 10 * turn + step))
                stale.append(made.stale)
                store.add("turn", 1)
    return {"stale": stale, "weights": weights(model)}


def at_will(rank):
    """Ranks commit whenever they like; the gradient is the same everywhere, so that the order does not matter."""
    model = line(rank)
    slope = torch.arange(1.0, COEFFICIENTS + 1, dtype=torch.float64)
    with explorer(model, lambda model, batch: (model.weight @ slope).sum() * batch, synchronous=False) as exploring:
        for _ in range(20 * (rank + 1)):
            exploring.step(torch.ones((), dtype=torch.float64))
    return weights(model)


def one_overflows(rank):
    """One rank's second exploration is infinite."""
    model, skipped = line(rank), []
    with explorer(model) as exploring:
        for step in range(4):
            x, y = rows(rank, step)
            made = exploring.step((x * float("inf") if (rank, step) == (1, 3) else x, y))
            skipped.append(made.skipped)
    return {"skipped": skipped, "weights": weights(model)}


def only_serves(rank):
    """Rank 0 holds the center and has no rows, and rank 2 has none either."""
    model = line(rank)
    with explorer(model, synchronous=False) as exploring:
        for step in range(5 if rank == 1 else 0):
            exploring.step(rows(1, step))
    return weights(model)


def one_fails(rank, steps=(4, 6, 6), **options):
    """Rank 1 raises in its fourth step; says what each rank came to see."""

    def failing(model, batch):
        step, *batch = batch
        if rank == 1 and step == 3:
            raise KeyError("no such column")
        return squares(model, batch)

    try:
        with explorer(line(rank), failing, **options) as exploring:
            for step in range(steps[rank]):
                exploring.step((step, *rows(rank, step)))
    except (KeyError, wb.RankError) as error:
        return {"error": type(error).__name__, "said": str(error)}


def wrapped(rank):
    try:
        explorer(nn.parallel.DistributedDataParallel(line(rank)))
    except wb.OptimizerError as error:
        return str(error)


LENGTHS = (9, 2, 3, 4, 8, 1, 5)
"""The data of logical batches: 7 rows, in batches of 3, so that two of three ranks have nothing of the last."""


def shared_out(rank):
    """Each logical batch is shared out between ranks by cost; the update is that of the whole."""
    data = [rows(0, length) for length in LENGTHS]
    batches = wb.LogicalBatches(LENGTHS, rows=3)
    model = line()
    accumulator = wb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=ETA),
        lambda model, batch: ((model(batch[0]) - batch[1]).square().sum(), len(batch[0])),
        collate=lambda parts: tuple(map(torch.cat, zip(*parts, strict=True))),
        micro_batch=wb.Rows(1),
    )
    made = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in DataLoader(data, batch_sampler=batches, collate_fn=list):
            update = accumulator.step(batch)
            made.append((len(batch), update.rows))
    return {"made": made, "weights": weights(model)}


def repeating(rank):
    """A loader with PyTorch's own sampler for ranks, which repeats rows."""
    model = line()
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=ETA), squares)
    data = [rows(0, step) for step in range(4)]
    loader = DataLoader(data, sampler=DistributedSampler(data), batch_size=None)
    for _ in accumulator.updates(loader, micro_batches=2):
        pass
    return accumulator.reasons


if __name__ == "__main__":
    distributed.init_process_group("gloo")  # from the environment, as under torchrun
    rank = distributed.get_rank()
    torch.set_num_threads(1)
    served._FAREWELL_SECONDS = 1000  # who waits so long is never waited for here
    store = distributed.PrefixStore("turns", distributed.distributed_c10d._get_default_store())
    answers = {
        "synchronous": two_epochs(rank),
        "synchronous, long": two_epochs(rank, local_steps=3),
        "not normalized": two_epochs(rank, normalize=False),
        "one overflows": one_overflows(rank),
        "wrapped": wrapped(rank),
        "in turn": in_turn(rank, store),
        "at will": at_will(rank),
        "one fails": one_fails(rank),
        "one fails, asynchronous": one_fails(rank, synchronous=False),
        "one fails, others wait": one_fails(rank, steps=(0, 4, 0), synchronous=False),
        "only serves": only_serves(rank),  # after ranks have failed
        "shared out": shared_out(rank),
        "repeating": repeating(rank),
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(answers))
    distributed.barrier()
    distributed.destroy_process_group()
