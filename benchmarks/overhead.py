"""What does a micro-batch cost more than in the hand-written loop?

CPU time per micro-batch, on one thread, of `wb.Accumulator` in its three ways, of the loop that one would write (loss
/ k, backward, step every k, zero_grad) and of Accelerate as documented (accelerator.accumulate). Two models: one whose
micro-batch takes the hand-written loop about 0.3 ms, one with about 10 ms, sized on the spot. All take turns, in a new
order each round; a figure is the median over the rounds of the ratio to the hand-written loop of the same round.

`step` cuts a logical batch, and so does the hand-written loop that it is compared with; the others take micro-batches
from a list. Accelerate's wrapped loader is left out, in its favour. The record that the accumulator makes of each
update (loss, gradient norm, peak memory, whether all was finite) is part of its time; the other loops make none.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import wholebatch as wb
from page import Bar, arguments, spread, table, tell

MICRO_BATCHES = 32
"""Micro-batches in a window, where a bar is judged: it is for a micro-batch, and so many spread a window's cost."""

FEW = 8
"""Micro-batches in a window, where it is shown what a short window costs."""

SLICED, LISTED, ACCELERATE = "hand-written loop, slices", "hand-written loop, list", "Accelerate, list"
STEP, UPDATES, WINDOW = "wb step(batch)", "wb updates(list)", "wb window()"
COMPARED = {STEP: SLICED, UPDATES: LISTED, WINDOW: LISTED, ACCELERATE: LISTED}
"""Which hand-written loop does the same work."""

Batch = dict[str, Tensor]
Loop = Callable[[], object]


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


def loops(size: Size) -> dict[str, Loop]:
    """Return the contenders; each call makes one update of one window, with a model and an optimizer of its own."""
    batch = size.batch()
    micro_batches = [{name: tensor.clone() for name, tensor in part.items()} for part in cut(batch, size.rows)]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = size.model()
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    sliced_model, sliced_optimizer = fresh()

    def sliced() -> None:
        for part in cut(batch, size.rows):
            loss = loss_fn(sliced_model, part) / size.micro_batches
            loss.backward()
        sliced_optimizer.step()
        sliced_optimizer.zero_grad()

    listed_model, listed_optimizer = fresh()

    def listed() -> None:
        for place, part in enumerate(micro_batches, start=1):
            loss = loss_fn(listed_model, part) / size.micro_batches
            loss.backward()
            if place % size.micro_batches == 0:
                listed_optimizer.step()
                listed_optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=size.micro_batches)
    peer_model, peer_optimizer = accelerator.prepare(*fresh())

    def peer() -> None:
        for part in micro_batches:
            with accelerator.accumulate(peer_model):
                loss = loss_fn(peer_model, part)
                accelerator.backward(loss)
                peer_optimizer.step()
                peer_optimizer.zero_grad()

    by_step = wb.Accumulator(*fresh(), loss_fn, micro_batch=wb.Rows(size.rows), check=None)
    by_updates = wb.Accumulator(*fresh(), loss_fn, check=None)
    window_model, window_optimizer = fresh()
    by_window = wb.Accumulator(window_model, window_optimizer, check=None)

    def window() -> None:
        with by_window.window() as window:
            for part in micro_batches:
                window.backward(loss_fn(window_model, part), targets=size.rows)

    return {
        SLICED: sliced,
        LISTED: listed,
        ACCELERATE: peer,
        STEP: lambda: by_step.step(batch),
        UPDATES: lambda: list(by_updates.updates(micro_batches, micro_batches=size.micro_batches)),
        WINDOW: window,
    }


def seconds(loop: Loop, micro_batches: int, windows: int = 1) -> float:
    """Return the CPU time of a micro-batch, averaged over some windows."""
    start = time.process_time()
    for _ in range(windows):
        loop()
    return (time.process_time() - start) / (windows * micro_batches)


def hand_written_seconds(size: Size) -> float:
    loop = loops(size)[LISTED]
    seconds(loop, size.micro_batches, 3)
    return statistics.median(seconds(loop, size.micro_batches) for _ in range(15))


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
    contenders = loops(size)
    order = list(contenders)
    for name in order:
        seconds(contenders[name], size.micro_batches, 5)
    found: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            found[name].append(seconds(contenders[name], size.micro_batches, windows))
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
            found.append(Bar(f"{label}: {name}, to Accelerate", ratios[name] / ratios[ACCELERATE], 1.0))
    short = replace(small_size(0.3e-3), micro_batches=FEW)
    texts.append(
        section("0.3 ms a micro-batch", short, measure(short, rounds=20 if options.quick else 200, windows=2))[0]
    )
    intro = (
        f"SGD, one thread, CPU time. Bars are judged on windows of {MICRO_BATCHES} micro-batches; the last table shows "
        f"how much more the fixed cost of a window (record, norm, random state, transaction) weighs in one of {FEW}."
    )
    text = "\n\n".join([intro, *texts])
    return tell("Overhead a micro-batch", "overhead", options, ["wholebatch", "torch", "accelerate"], text, found)


if __name__ == "__main__":
    sys.exit(main())
