"""What does a window cost on two machines with a slow link between them?

Two ranks (gloo), each in a network namespace of its own, and between them a link of 1 Gbit/s or 100 Mbit/s with 1 ms or
20 ms from one to the other (link.py). A window has 1 to 32 micro-batches on each rank. Compared are `wb.Accumulator`
(without a wrapper, and with the model in `DistributedDataParallel`), DDP by hand with `no_sync`, Accelerate
(`accumulate`), Lightning (`accumulate_grad_batches`), and DDP that adds up after each micro-batch. All take turns, in a
new order each round, and a figure is the median over all windows of the slower rank's time. What a micro-batch takes
is waiting for the most part, as a host waits for its accelerator, so that two ranks and the link do not fight for two
cores; with ``--busy`` it is computing.

The yardstick is the same window taken apart: its passes and its optimizer's step without any communication, and one
all-reduce of its gradient as a single tensor after a barrier; the sum of the two medians. The bar is for the better of
the two ways of wholebatch.

From the measured parts `wholebatch.core.communication` predicts how the same logical batch would train on up to 64
ranks; the page shows the model beside what was measured with two.

Takes about twenty-five minutes, most of them waiting for the link.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import talkers
from link import ADDRESSES, DEVICE, Speed, link
from page import Bar, arguments, table, tell
from talkers import BARE, COMPUTE, CONTENDERS, EACH, REDUCTION, WRAPPED
from wholebatch.core.communication import Ranks
from wholebatch.core.link import Link

WIDTH, LAYERS = 512, 2
"""About 2 MB of gradients."""

TARGET_SECONDS = 0.03
"""What a micro-batch shall take."""

FEW_ROWS = 16
"""Of a micro-batch that waits."""

SPEEDS = tuple(Speed(bits, latency) for bits in (1e9, 1e8) for latency in (1e-3, 20e-3))
PARTS = (1, 2, 4, 8, 16, 32)
SCALED = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of ranks that are predicted, for a logical batch of as many micro-batches as the last."""

Found = dict[int, dict[str, float]]
"""Seconds by micro-batches a window, and by contender."""


def run(speed: Speed, job: dict[str, object]) -> Found:
    """Run two ranks over a link, and return the medians of the slower rank's times."""
    with link(speed) as sides, tempfile.TemporaryDirectory(prefix="wholebatch-link-") as folder:
        ranks = []
        for rank, side in enumerate(sides):
            environment = {
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29500",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "NODE_RANK": str(rank),
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
            }
            command = [*side, sys.executable, talkers.__file__, json.dumps({**job, "out": folder})]
            ranks.append(subprocess.Popen(command, env={**os.environ, **environment}))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    return {
        int(parts): {
            name: statistics.median(map(max, found[0][parts][name], found[1][parts][name])) for name in found[0][parts]
        }
        for parts in found[0]
    }


def rows_for(seconds: float) -> int:
    """Return how many rows take a time."""
    rows = 256
    for _ in range(3):
        rows = max(8, round(rows * seconds / talkers.micro_batch_seconds(WIDTH, LAYERS, rows)))
    return rows


def gradient_bytes() -> int:
    return sum(parameter.numel() * 4 for parameter in talkers.built(WIDTH, LAYERS).parameters())


def predicted(speed: Speed, ranks: int, parts: int, seconds: float) -> Ranks:
    """Return a window on so many ranks, from the seconds of a micro-batch."""
    return Ranks(
        ranks=ranks,
        link=Link(speed.bits / 8, speed.latency),
        rows=parts,
        micro_batches=parts,
        gradient_bytes=gradient_bytes(),
        compute_seconds=parts * seconds,
    )


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"


def section(speed: Speed, found: Found) -> tuple[str, list[Bar]]:
    """Return the tables of one link, and its bars."""
    rows, bars = [], []
    for parts, seconds in found.items():
        yardstick = seconds[COMPUTE] + seconds[REDUCTION]
        rows.append(
            [
                str(parts),
                milliseconds(seconds[COMPUTE]),
                milliseconds(seconds[REDUCTION]),
                *(f"{seconds[name] / yardstick:.3f}" for name in CONTENDERS),
            ]
        )
        best = min(seconds[BARE], seconds[WRAPPED]) / yardstick
        bars.append(Bar(f"{speed}, {parts} a window: compute plus one reduction", best, 1.05))
    headings = ["micro-batches", "compute, ms", "reduction, ms", *CONTENDERS]
    most = max(found)
    each = found[most][COMPUTE] / most
    model = []
    for parts, seconds in found.items():
        told = predicted(speed, 2, parts, each)
        model.append(
            [
                str(parts),
                milliseconds(told.reduction_seconds),
                milliseconds(seconds[REDUCTION]),
                milliseconds(told.window_seconds),
                milliseconds(seconds[BARE]),
                milliseconds(told.each_seconds),
                milliseconds(seconds[EACH]),
            ]
        )
    told_headings = [
        "micro-batches",
        "reduction, predicted",
        "measured",
        "window, predicted",
        "measured",
        "adding up each, predicted",
        "measured",
    ]
    text = (
        f"## {speed}\n\nTimes of a window against compute plus one reduction.\n\n{table(headings, rows)}\n\n"
        f"The model beside it, in ms.\n\n{table(told_headings, model)}"
    )
    return text, bars


def scaling(seconds: float) -> str:
    """Return the predicted curve: one logical batch, on more and more ranks."""
    rows = []
    for ranks in SCALED:
        cells = [str(ranks), str(SCALED[-1] // ranks)]
        for speed in SPEEDS:
            told = predicted(speed, ranks, SCALED[-1] // ranks, seconds)
            window, each = told.window_seconds, told.each_seconds
            assert window is not None
            assert each is not None
            alone = SCALED[-1] * seconds
            cells += [f"{alone / window:.1f}", f"{alone / each:.1f}"]
        rows.append(cells)
    headings = ["ranks", "micro-batches a rank"]
    for speed in SPEEDS:
        headings += [f"{speed}", "adding up each"]
    return table(headings, rows)


MODEL = """\
A window takes `k c + max(0, f - b)`, where k micro-batches take c each on a rank. The gradient of G bytes leaves in
pieces of 25 MiB as the last backward pass (b, two thirds of c) makes them; each takes `2 (n - 1) (piece / n / bandwidth
+ latency)`, a ring over n ranks, and f is when the last one is there. The message of 64 bytes travels beside it. Adding
up after each micro-batch takes `k (c + max(0, f - b))`. Not in the model: waiting for a slower rank, links that several
ranks share, the optimizer's step, and TCP's slow start."""


def main() -> int:
    parser = arguments(__doc__, "benchmarks/distributed.py")
    parser.add_argument("--busy", action="store_true", help="micro-batches compute for their time, instead of waiting")
    options: Namespace = parser.parse_args()
    parts = (1, 8) if options.quick else PARTS
    speeds = SPEEDS[::3] if options.quick else SPEEDS
    rows, waits = (rows_for(TARGET_SECONDS), 0.0) if options.busy else (FEW_ROWS, TARGET_SECONDS)
    rounds = 2 if options.quick else 5
    job = {"width": WIDTH, "layers": LAYERS, "rows": rows, "waits": waits, "parts": parts, "rounds": rounds}
    texts, bars, compute = [], [], []
    for speed in speeds:
        print(f"{speed} ...", file=sys.stderr)
        found = run(speed, job)
        text, some = section(speed, found)
        texts.append(text)
        bars += some
        compute.append(found[max(parts)][COMPUTE] / max(parts))
    sent = predicted(speeds[0], 2, 1, statistics.median(compute)).sent_bytes
    intro = (
        f"{LAYERS} linear layers of width {WIDTH}: {gradient_bytes() / 1e6:.2f} MB of gradients, of which each of two "
        f"ranks sends {sent / 1e6:.2f} MB a reduction; {rows} rows a micro-batch, which takes "
        f"{1e3 * statistics.median(compute):.1f} ms{'' if options.busy else ', nearly all of it waiting'}."
    )
    curve = (
        f"## Predicted for more ranks\n\n{MODEL}\n\nTimes as fast as one rank, for a logical batch of {SCALED[-1]} "
        f"micro-batches.\n\n{scaling(statistics.median(compute))}"
    )
    text = "\n\n".join([intro, *texts, curve])
    packages = ["wholebatch", "torch", "accelerate", "lightning"]
    return tell("Two ranks and a slow link", "distributed", options, packages, text, bars)


if __name__ == "__main__":
    sys.exit(main())
