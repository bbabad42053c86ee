"""Does AdamA learn as Adam does, and what memory does it save? The recipes `text` and `images`, side by side.

Both train the same model on the same logical batches, cut in the same way, with `wb.AdamA` and with `torch.optim.AdamW`
from the same options. AdamA's second moment is that of the parts, so its steps are larger the finer the cut; the figure
is the measure of the recipe on the validation rows after some updates. What tensors of one update take at most, above
weights and optimizer state, is counted by PyTorch's profiler, and CPU time by the process's clock, on one thread.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of each start and stop

import torch
from torch import Tensor, nn

import wholebatch as wb
from page import Bar, arguments, table, tell
from wholebatch.engine import memory
from wholebatch.recipes import images, text

MIB = 1 << 20
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "AdamA": wb.AdamA}


@dataclass(frozen=True)
class Job:
    """A recipe with what it is trained with."""

    recipe: Any
    loss: Callable[[nn.Module, Any], Tensor]
    targets: Callable[[Any], Any]
    reduction: Any
    rows: int
    micro_batch: int
    updates: int
    lr: float
    measure: str
    larger_is_better: bool

    def batches(self) -> Iterator[list[Any]]:
        """Yield logical batches in an order that is the same for all."""
        rows, draw = self.recipe.data("train"), random.Random(0)
        for _ in range(self.updates):
            yield [rows[place] for place in draw.sample(range(len(rows)), self.rows)]


def sum_of_text(model: nn.Module, micro_batch: Tensor) -> Tensor:
    """The recipe's loss without its count: AdamA must know the targets before."""
    return text.loss(model, micro_batch)[0]


def count_of_text(micro_batch: Tensor) -> Tensor:
    return (micro_batch != text.PADDING).sum()


def jobs(quick: bool) -> dict[str, Job]:
    share = 10 if quick else 1
    return {
        "text": Job(
            text, sum_of_text, count_of_text, "sum", 64, 8, 80 // share, 2e-3, "bits_per_byte", larger_is_better=False
        ),
        "images": Job(
            images,
            images.loss,
            lambda micro_batch: len(micro_batch[1]),
            "mean",
            128,
            16,
            120 // share,
            3e-3,
            "accuracy",
            larger_is_better=True,
        ),
    }


def train(job: Job, kind: Any, micro_batch: int) -> tuple[float, float, int]:
    """Return the measure on the validation rows, CPU seconds an update, and the peak of one update in bytes."""
    torch.manual_seed(0)
    model = job.recipe.model()
    accumulator = wb.Accumulator(
        model,
        kind(model.parameters(), lr=job.lr, weight_decay=0.01),
        job.loss,
        targets=job.targets,
        reduction=job.reduction,
        collate=job.recipe.collate,
        micro_batch=wb.Rows(micro_batch),
        check=None,
    )
    seconds = []
    batches = list(job.batches())
    for batch in batches:
        start = time.process_time()
        accumulator.step(batch)
        seconds.append(time.process_time() - start)
    validation = job.recipe.data("validation")
    found = job.recipe.measure(model, validation[: 200 if job.recipe is text else len(validation)])[job.measure]
    with memory.tensor_peak() as peak:
        accumulator.step(batches[0])
    return found, statistics.median(seconds), peak.peak_bytes


def wide_model_saves() -> float:
    """Return the share of the gradient's size that is saved where activations are small."""
    peaks = {}
    for name, kind in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
        accumulator = wb.Accumulator(
            model,
            kind(model.parameters()),
            lambda model, x: model(x).square().mean(),
            micro_batch=wb.Rows(4),
            check=None,
        )
        rows = torch.randn(16, 256)
        for _ in range(2):
            accumulator.step(rows)
        with memory.tensor_peak() as peak:
            accumulator.step(rows)
        peaks[name] = peak.peak_bytes
    return (peaks["AdamW"] - peaks["AdamA"]) / sum(each.nbytes for each in model.parameters())


def main() -> int:
    parser = arguments(__doc__, "benchmarks/adama.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    found = [Bar("peak memory below AdamW's, in sizes of the gradient", wide_model_saves(), 0.9, most=False)]
    for name, job in jobs(options.quick).items():
        for micro_batch in (job.rows, job.micro_batch):
            figures = {}
            for kind, optimizer in OPTIMIZERS.items():
                figures[kind], seconds, peak = train(job, optimizer, micro_batch)
                rows.append(
                    [
                        f"{name}, {kind}",
                        str(-(-job.rows // micro_batch)),
                        f"{job.measure} {figures[kind]:.3f}",
                        f"{seconds * 1e3:.0f}",
                        f"{peak / MIB:.1f}",
                    ]
                )
            ratio = figures["AdamA"] / figures["AdamW"]
            worse = 1 / ratio if job.larger_is_better else ratio
            cut = "cut" if micro_batch < job.rows else "whole"
            if not options.quick:
                found.append(Bar(f"{name}, {cut}: {job.measure} against AdamW's (above 1: worse)", worse, 1.1))
    headings = ["recipe, optimizer", "micro-batches", "validation", "CPU ms an update", "peak, MiB"]
    return tell("AdamA beside AdamW", "adama", options, ["wholebatch", "torch"], table(headings, rows), found)


if __name__ == "__main__":
    sys.exit(main())
