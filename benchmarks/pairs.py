"""Does retrieval rise with the logical batch, in the memory of one micro-batch?

The recipe `pairs` is trained at several logical batches, each cut into micro-batches of the same size, for the same
number of updates and at the same learning rate. Each is trained twice: with in-batch negatives from the whole logical
batch, and as ordinary accumulation has it, with those of a row's own micro-batch. Both see the same rows in the same
order, so that what is between them is due to the negatives alone.

Retrieval at 1 is the share of 500 held-out docstrings that are nearest to their own body, of 500; by chance 0.002. It
is the mean over a few seeds. Memory is the peak of tensors within one update, above weights, optimizer state and rows,
and beside it that of the same update with the batch as a whole.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from lockstep import MIB, peak_bytes
from page import Bar, arguments, table, tell
from wholebatch.recipes import pairs

MICRO_BATCH = 64
LOGICAL_BATCHES = (64, 256, 1024, 2048)
MEET, APART = "of the logical batch", "of the micro-batch"


def apart(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss as one writes it for a single batch."""
    queries, keys = model(*micro_batch)
    logits = queries @ keys.T / model.temperature
    own = torch.arange(len(queries))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {MEET: pairs.loss, APART: apart}


def accumulator(model: nn.Module, negatives: str, micro_batch: int, lr: float) -> wb.Accumulator:
    return wb.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=lr),
        LOSSES[negatives],
        micro_batch=wb.Rows(micro_batch),
        collate=pairs.collate,
        check=None,
    )


def batches(logical_batch: int, updates: int, seed: int) -> list[list[Any]]:
    """Return logical batches from rows in random order, gone through as often as it takes."""
    rows, draw = pairs.data("train"), torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < logical_batch * updates:
        order += torch.randperm(len(rows), generator=draw).tolist()
    return [
        [rows[place] for place in order[start : start + logical_batch]]
        for start in range(0, logical_batch * updates, logical_batch)
    ]


def retrieval(negatives: str, logical_batch: int, updates: int, lr: float, seed: int) -> float:
    """Train, and return retrieval at 1 on the validation rows."""
    torch.manual_seed(seed)
    model = pairs.model()
    trained = accumulator(model, negatives, MICRO_BATCH, lr)
    for batch in batches(logical_batch, updates, seed):
        trained.step(batch)
    model.eval()
    return pairs.measure(model, pairs.data("validation"))["retrieval_at_1"]


def peak(logical_batch: int, micro_batch: int, lr: float) -> int:
    """Return the peak of one update with negatives of the logical batch. Unit: bytes."""
    torch.manual_seed(0)
    measured = accumulator(pairs.model(), MEET, micro_batch, lr)
    (batch,) = batches(logical_batch, 1, seed=0)
    return peak_bytes(lambda: measured.step(batch))


def plot(path: Path, found: dict[str, list[float]], peaks: list[int], wholes: list[int], sizes: Sequence[int]) -> None:
    """Draw retrieval and memory over the logical batch, for a light and a dark page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.size": 11, "text.color": "#7a8090", "svg.hashsalt": "pairs"}):
        canvas = Figure(figsize=(8.2, 3.1), layout="constrained")
        left, right = canvas.subplots(1, 2)
        left.plot(sizes, found[MEET], "o-", color="#2f7fd1", label=f"negatives {MEET}")
        left.plot(sizes, found[APART], "s--", color="#d9692b", label=f"negatives {APART}")
        left.set_title("Retrieval at 1, of 500", loc="left", fontsize=11)
        right.plot(sizes, [each / MIB for each in peaks], "o-", color="#2f7fd1", label=f"{MICRO_BATCH} rows at once")
        right.plot(sizes, [each / MIB for each in wholes], "s--", color="#8d93a1", label="the whole batch at once")
        right.set_title("Peak of tensors in one update, MiB", loc="left", fontsize=11)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, map(str, sizes))
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("rows in the logical batch", color="#7a8090")
            axes.tick_params(colors="#7a8090", which="both")
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#7a8090")
            axes.legend(frameon=False, fontsize=10)
        canvas.savefig(path, transparent=True, metadata={"Date": None})


def main() -> int:
    parser = arguments(__doc__, "benchmarks/pairs.py")
    parser.add_argument("--updates", type=int, default=48, metavar="N", help="updates of each run (48)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs that are averaged (2)")
    parser.add_argument("--lr", type=float, default=5e-3, metavar="X", help="learning rate of AdamW (5e-3)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table, as SVG")
    options = parser.parse_args()
    sizes = LOGICAL_BATCHES[:2] if options.quick else LOGICAL_BATCHES
    updates = 4 if options.quick else options.updates
    seeds = range(1 if options.quick else options.seeds)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {MEET: [], APART: []}
    peaks, wholes, rows = [], [], []
    for size in sizes:
        ways = LOSSES if size > MICRO_BATCH else {MEET: pairs.loss}  # one micro-batch is the logical batch
        means = {
            way: statistics.fmean(retrieval(way, size, updates, options.lr, seed) for seed in seeds) for way in ways
        }
        for way in LOSSES:
            found[way].append(means.get(way, means[MEET]))
        peaks.append(peak(size, MICRO_BATCH, options.lr))
        wholes.append(peak(size, size, options.lr))
        print(f"{size} rows: {found[MEET][-1]:.3f} and {found[APART][-1]:.3f}", file=sys.stderr)
        rows.append(
            [
                str(size),
                *(f"{found[way][-1]:.3f}" for way in LOSSES),
                f"{peaks[-1] / MIB:.1f}",
                f"{wholes[-1] / MIB:.1f}",
            ]
        )
    headings = ["logical batch", *(f"negatives {way}" for way in LOSSES), "peak, MiB", "undivided, MiB"]
    text = f"{updates} updates, learning rate {options.lr:g}, {MICRO_BATCH} rows a micro-batch, seeds: {len(seeds)}."
    text += f"\n\n{table(headings, rows)}"
    learned = [
        Bar("retrieval at 1, largest logical batch to smallest", found[MEET][-1] / found[MEET][0], 1.0, most=False),
        Bar(
            "retrieval at 1 at the largest logical batch, negatives of all to those of the micro-batch",
            found[MEET][-1] / found[APART][-1],
            1.0,
            most=False,
        ),
    ]
    bars = [*([] if options.quick else learned), Bar("peak, largest to smallest", peaks[-1] / peaks[0], 1.5)]
    if options.plot is not None:
        plot(options.plot, found, peaks, wholes, sizes)
    return tell("In-batch negatives at one micro-batch", "pairs", options, ["wholebatch", "torch"], text, bars)


if __name__ == "__main__":
    sys.exit(main())
