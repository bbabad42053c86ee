"""What does a micro-batch cost more than in the hand-written loop?

CPU time per micro-batch, on one thread, of `wb.Accumulator` in its three ways, of the loop that one would write (loss
/ k, backward, step every k, zero_grad), of Accelerate (accelerator.accumulate), Lightning (accumulate_grad_batches) and
the Hugging Face Trainer (gradient_accumulation_steps), as documented and without logs and checkpoints (peers.py). Two
models: one whose micro-batch takes the hand-written loop about 0.3 ms, one with about 10 ms, sized on the spot. All
take turns, in a new order each round; a figure is the median over the rounds of the ratio to the hand-written loop of
the same round.

`step` cuts a logical batch, and so does the hand-written loop that it is compared with; the others take micro-batches
that lie ready. The wrapped loaders of the peers are left out, in their favour. Lightning and the Trainer own their
loop: each round fits anew, and what counts is the time between its updates, from the first on. The record that the
accumulator makes of each update (loss, gradient norm, peak memory, whether all was finite) is part of its time; the
others make none.

Takes about five minutes of one core.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import peers
import wholebatch as wb
from page import Bar, arguments, spread, table, tell

MICRO_BATCHES = 32
"""Micro-batches in a window, where a bar is judged: it is for a micro-batch, and so many spread a window's cost."""

FEW = 8
"""Micro-batches in a window, where it is shown what a short window costs."""

SLICED, LISTED = "hand-written loop, slices", "hand-written loop, list"
ACCELERATE, LIGHTNING, TRAINER = "Accelerate", "Lightning", "Hugging Face Trainer"
STEP, UPDATES, WINDOW = "wb step(batch)", "wb updates(list)", "wb window()"
PEERS = (ACCELERATE, LIGHTNING, TRAINER)
COMPARED = {STEP: SLICED} | dict.fromkeys((UPDATES, WINDOW, *PEERS), LISTED)
"""Which hand-written loop does the same work."""

Batch = dict[str, Tensor]
Contender = Callable[[int], float]
"""Makes the updates of so many windows, and returns the CPU seconds of a window, averaged over them."""


@dataclass(frozen=True)
class Size:
    """A multilayer perceptron and its micro-batch."""

    layers: int
    width: int
    rows: int
    micro_batches: int = MICRO_BATCHES

    def __str__(self) -> str:
        return f"{self.layers} linear layer{'s' * (self.layers > 1)} of width {self.width}, {self.rows} rows"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(self.layers):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def batch(self) -> Batch:
        rows = self.rows * self.micro_batches
        return {"x": torch.randn(rows, self.width), "y": torch.randn(rows, self.width)}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def cut(batch: Batch, rows: int) -> Iterator[Batch]:
    for start in range(0, len(batch["x"]), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def timed(window: Callable[[], object]) -> Contender:
    """Return a contender that runs a window at a time."""

    def run(windows: int) -> float:
        start = time.process_time()
        for _ in range(windows):
            window()
        return (time.process_time() - start) / windows

    return run


def between(fit: Callable[[int], list[float]]) -> Contender:
    """Return a contender that owns its loop: the window up to its first update is not counted."""

    def run(windows: int) -> float:
        updates = fit(windows + 1)[1:]
        return (updates[-1] - updates[0]) / windows

    return run


class Setting:
    """A window of micro-batches, and for each contender a model and an optimizer of its own."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.batch = size.batch()
        self.parts = [{name: tensor.clone() for name, tensor in part.items()} for part in cut(self.batch, size.rows)]

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.size.model()
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    def contenders(self) -> dict[str, Contender]:
        return {
            SLICED: self.sliced(),
            LISTED: self.listed(),
            ACCELERATE: timed(peers.with_accelerate(*self.fresh(), loss_fn, self.parts)),
            LIGHTNING: self.lightning(),
            TRAINER: self.trainer(),
            STEP: self.step(),
            UPDATES: self.updates(),
            WINDOW: self.window(),
        }

    def sliced(self) -> Contender:
        model, optimizer = self.fresh()

        def window() -> None:
            for part in cut(self.batch, self.size.rows):
                loss = loss_fn(model, part) / self.size.micro_batches
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return timed(window)

    def listed(self) -> Contender:
        model, optimizer = self.fresh()

        def window() -> None:
            for place, part in enumerate(self.parts, start=1):
                loss = loss_fn(model, part) / self.size.micro_batches
                loss.backward()
                if place % self.size.micro_batches == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        return timed(window)

    def lightning(self) -> Contender:
        model, optimizer = self.fresh()

        def fit(updates: int) -> list[float]:
            loader = peers.Loader(self.parts * updates)
            return peers.with_lightning(
                model, optimizer, loss_fn, loader, window=self.size.micro_batches, updates=updates
            )

        return between(fit)

    def trainer(self) -> Contender:
        model, optimizer = self.fresh()

        def fit(updates: int) -> list[float]:
            loader = peers.Loader(self.parts * updates)
            return peers.with_trainer(
                model, optimizer, loss_fn, loader, window=self.size.micro_batches, updates=updates
            )

        return between(fit)

    def step(self) -> Contender:
        accumulator = wb.Accumulator(*self.fresh(), loss_fn, micro_batch=wb.Rows(self.size.rows), check=None)
        return timed(lambda: accumulator.step(self.batch))

    def updates(self) -> Contender:
        accumulator = wb.Accumulator(*self.fresh(), loss_fn, check=None)
        return timed(lambda: list(accumulator.updates(self.parts, micro_batches=self.size.micro_batches)))

    def window(self) -> Contender:
        model, optimizer = self.fresh()
        accumulator = wb.Accumulator(model, optimizer, check=None)

        def window() -> None:
            with accumulator.window() as window:
                for part in self.parts:
                    window.backward(loss_fn(model, part), targets=self.size.rows)

        return timed(window)


def hand_written_seconds(size: Size) -> float:
    """Return what a micro-batch takes the hand-written loop."""
    window = Setting(size).listed()
    window(3)
    return statistics.median(window(1) for _ in range(15)) / size.micro_batches


def small_size(target_seconds: float) -> Size:
    """Return the largest of some small models that stays at or below the time, or the smallest of all."""
    sizes = [
        Size(1, 16, 8),
        Size(1, 64, 16),
        Size(1, 128, 32),
        Size(2, 64, 16),
        Size(3, 64, 16),
        Size(4, 64, 16),
        Size(5, 64, 32),
        Size(6, 128, 32),
    ]
    chosen = sizes[0]
    for size in sizes[1:]:
        if hand_written_seconds(size) > target_seconds * 1.1:
            break
        chosen = size
    return chosen


def large_size(target_seconds: float) -> Size:
    """Return a model whose rows are as many as take the time."""
    rows = 64
    for _ in range(3):
        rows = max(1, round(rows * target_seconds / hand_written_seconds(Size(4, 256, rows))))
    return Size(4, 256, rows)


def measure(size: Size, *, rounds: int, windows: int) -> dict[str, list[float]]:
    """Return the CPU seconds of a micro-batch in every round, by contender."""
    contenders = Setting(size).contenders()
    order = list(contenders)
    for name in order:
        contenders[name](5)
    found: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            found[name].append(contenders[name](windows) / size.micro_batches)
    return found


def section(title: str, size: Size, found: dict[str, list[float]]) -> tuple[str, dict[str, float]]:
    """Return the table of one model, and each contender's ratio to its hand-written loop."""
    ratios: dict[str, float] = {}
    rows = []
    for name, taken in found.items():
        cells = [name, f"{statistics.median(taken) * 1e3:.3f}", "1", "", ""]
        if name in COMPARED:
            plain = found[COMPARED[name]]
            each = [a / b for a, b in zip(taken, plain, strict=True)]
            more = statistics.median(a - b for a, b in zip(taken, plain, strict=True))
            ratios[name] = statistics.median(each)
            cells[2:] = [f"{ratios[name]:.3f}", spread(each), f"{more * 1e6:+.0f}"]
        rows.append(cells)
    headings = ["way", "ms a micro-batch", "to the hand-written loop", "middle half of rounds", "us more"]
    return f"## {title}, {size.micro_batches} a window: {size}\n\n{table(headings, rows)}", ratios


def main() -> int:
    parser = arguments(__doc__, "benchmarks/overhead.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, found = [], []
    for label, choose, target, bound, rounds, windows in [
        ("0.3 ms", small_size, 0.3e-3, 1.10, 200, 1),
        ("10 ms", large_size, 10e-3, 1.02, 30, 1),
    ]:
        size = choose(target)
        rounds = max(5, rounds // 10) if options.quick else rounds
        text, ratios = section(f"{label} a micro-batch", size, measure(size, rounds=rounds, windows=windows))
        texts.append(text)
        for name in (STEP, UPDATES, WINDOW):
            found.append(Bar(f"{label}: {name}, to the hand-written loop", ratios[name], bound))
            found += [Bar(f"{label}: {name}, to {peer}", ratios[name] / ratios[peer], 1.0) for peer in PEERS]
    short = replace(small_size(0.3e-3), micro_batches=FEW)
    texts.append(
        section("0.3 ms a micro-batch", short, measure(short, rounds=20 if options.quick else 200, windows=2))[0]
    )
    intro = (
        f"SGD, one thread, CPU time. Bars are judged on windows of {MICRO_BATCHES} micro-batches; the last table shows "
        f"how much more the fixed cost of a window (record, norm, random state, transaction) weighs in one of {FEW}."
    )
    text = "\n\n".join([intro, *texts])
    return tell("Overhead a micro-batch", "overhead", options, ["wholebatch", "torch", *peers.PACKAGES], text, found)


if __name__ == "__main__":
    sys.exit(main())
