"""How does each system train on two ranks? The same windows, timed on the wall; started by ``distributed.py``.

All train one model each, equal at the start, on micro-batches that lie ready. Every contender makes some windows when
it is its turn, and returns how long each took on this rank. Lightning owns its loop: each turn fits anew, and what
counts is the time between its updates, from the first on.
"""

import itertools
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peers
import wholebatch as wb

COMPUTE, REDUCTION = "compute", "one reduction"
BARE, WRAPPED = "wholebatch", "wholebatch, DDP"
BY_HAND, EACH = "DDP by hand, no_sync", "DDP, each micro-batch"
ACCELERATE, LIGHTNING = "Accelerate", "Lightning"
CONTENDERS = (BARE, WRAPPED, BY_HAND, ACCELERATE, LIGHTNING, EACH)

Turn = Callable[[int], list[float]]
"""Makes so many windows, and returns the seconds of each."""


class Wait(torch.autograd.Function):
    """Takes a time without using a core, as a host does that waits for its accelerator."""

    @staticmethod
    def forward(context: Any, x: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * context.seconds)
        return gradient, None


class Waiting(nn.Module):
    """A layer that takes a time: a third in the forward pass, two thirds in the backward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return Wait.apply(x, self.seconds / 3) if self.seconds else x


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def built(width: int, layers: int, waits: float = 0.0) -> nn.Module:
    """Return a multilayer perceptron, equal on all ranks.

    Args:
        width: Of its layers.
        layers: How many.
        waits: What a micro-batch takes beside computing, evenly over the layers. Unit: seconds.
    """
    torch.manual_seed(0)
    parts = [each for _ in range(layers) for each in (nn.Linear(width, width), Waiting(waits / layers), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def batch_of(rows: int, width: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, width), "y": torch.randn(rows, width)}


def micro_batch_seconds(width: int, layers: int, rows: int) -> float:
    """Return what a forward and a backward pass take, the shortest of some."""
    model, batch = built(width, layers), batch_of(rows, width)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        loss_fn(model, batch).backward()
        best = min(best, time.perf_counter() - start)
    return best


class Setting:
    """A window of so many micro-batches on this rank, and each contender's model.

    Args:
        width: Of the model's layers.
        layers: How many.
        rows: Of a micro-batch.
        parts: Micro-batches a window.
        waits: What a micro-batch takes beside computing. Unit: seconds.
    """

    def __init__(self, width: int, layers: int, rows: int, parts: int, waits: float) -> None:
        self.width, self.layers, self.rows, self.parts, self.waits = width, layers, rows, parts, waits
        self.batch = batch_of(rows * parts, width)
        self.micro_batches = list(self.cut())

    def cut(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.rows * self.parts, self.rows):
            yield {name: tensor[start : start + self.rows] for name, tensor in self.batch.items()}

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = built(self.width, self.layers, self.waits)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    def contenders(self) -> dict[str, Turn]:
        """Return all, in the order of `CONTENDERS`."""
        made = (self.bare(), self.wrapped(), self.by_hand(), self.accelerate(), self.lightning(), self.each())
        return dict(zip(CONTENDERS, made, strict=True))

    def apart(self) -> tuple[float, float]:
        """Return the seconds of a window's compute, and of one reduction of its gradient, each after a barrier."""
        model, optimizer = self.fresh()
        dist.barrier()
        start = time.perf_counter()
        for micro_batch in self.micro_batches:
            (loss_fn(model, micro_batch) / self.parts).backward()
        optimizer.step()
        compute = time.perf_counter() - start
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        return compute, time.perf_counter() - start

    def bare(self) -> Turn:
        accumulator = wb.Accumulator(*self.fresh(), loss_fn, micro_batch=wb.Rows(self.rows), check=None)
        return timed(lambda: accumulator.step(self.batch))

    def wrapped(self) -> Turn:
        model, optimizer = self.fresh()
        model = DistributedDataParallel(model)
        accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(self.rows), check=None)
        return timed(lambda: accumulator.step(self.batch))

    def by_hand(self) -> Turn:
        model, optimizer = self.fresh()
        ddp = DistributedDataParallel(model)

        def window() -> None:
            with ddp.no_sync():
                for micro_batch in self.micro_batches[:-1]:
                    (loss_fn(ddp, micro_batch) / self.parts).backward()
            (loss_fn(ddp, self.micro_batches[-1]) / self.parts).backward()
            optimizer.step()
            optimizer.zero_grad()

        return timed(window)

    def each(self) -> Turn:
        model, optimizer = self.fresh()
        ddp = DistributedDataParallel(model)

        def window() -> None:
            for micro_batch in self.micro_batches:
                (loss_fn(ddp, micro_batch) / self.parts).backward()
            optimizer.step()
            optimizer.zero_grad()

        return timed(window)

    def accelerate(self) -> Turn:
        return timed(peers.with_accelerate(*self.fresh(), loss_fn, self.micro_batches))

    def lightning(self) -> Turn:
        model, optimizer = self.fresh()

        def fit(windows: int) -> list[float]:
            updates = windows + 1
            times = peers.with_lightning(
                model,
                optimizer,
                loss_fn,
                peers.Loader(self.micro_batches * updates),
                window=self.parts,
                updates=updates,
                now=time.perf_counter,
                trainer={"strategy": "ddp", "num_nodes": dist.get_world_size()},
            )[1:]
            return [late - early for early, late in itertools.pairwise(times)]

        return fit


def timed(window: Callable[[], object]) -> Turn:
    """Return a contender that runs a window at a time."""

    def run(windows: int) -> list[float]:
        taken = []
        for _ in range(windows):
            start = time.perf_counter()
            window()
            taken.append(time.perf_counter() - start)
        return taken

    return run


def measure(setting: Setting, *, rounds: int, windows: int) -> dict[str, list[float]]:
    """Return the seconds of each window, by contender; all take turns, in a new order each round."""
    contenders = setting.contenders()
    order = list(contenders)
    for name in order:
        contenders[name](1)
    setting.apart()
    found: dict[str, list[float]] = {name: [] for name in (*order, COMPUTE, REDUCTION)}
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            dist.barrier()
            found[name] += contenders[name](windows)
        for _ in range(windows):
            for name, seconds in zip((COMPUTE, REDUCTION), setting.apart(), strict=True):
                found[name].append(seconds)
    return found


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        parts: measure(
            Setting(job["width"], job["layers"], job["rows"], parts, job["waits"]), rounds=job["rounds"], windows=2
        )
        for parts in job["parts"]
    }
    Path(job["out"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
