"""Does memory grow with the logical batch? Peak memory of one update with 8, 64, 256 and 1,024 micro-batches.

Every micro-batch is 8 rows of 32 bytes for a small byte-level transformer. What tensors take at most is counted by
PyTorch's profiler, from the first forward pass to the end of the update, above what was there before (weights,
optimizer state). Beside it the resident size of a fresh process at its highest, as the kernel tells it, and how much
that is above what it was just before the update; the rows themselves (bytes, 0.4 MB at most) are in it. The undivided
batch is measured up to 256 micro-batches. The profiler itself takes up to 6 GB at 1,024 (--quick stops at 64).
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of each start and stop

import torch
from torch import nn

import wholebatch as wb
from page import Bar, arguments, table, tell
from wholebatch.engine import memory
from wholebatch.evidence import reference
from wholebatch.recipes import text as recipe

ROWS, LENGTH = 8, 32
COUNTS = (8, 64, 256, 1024)
UNDIVIDED = 256
"""The undivided batch is measured up to so many micro-batches."""

CPU = torch.device("cpu")
MIB = 1 << 20
Update = Callable[[list[bytes]], object]


def rows_of(micro_batches: int) -> list[bytes]:
    draw = random.Random(0)
    return [bytes(draw.choices(range(97, 123), k=LENGTH)) for _ in range(ROWS * micro_batches)]


def ways() -> dict[str, Update]:
    """Return the three ways to make an update from a list of rows, and the undivided one, ready to go."""

    def parts(rows: list[bytes]) -> list[list[bytes]]:
        return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = recipe.ByteTransformer(width=32, heads=2, blocks=1)
        return model, torch.optim.AdamW(model.parameters())

    options = {"collate": recipe.collate, "check": None}
    by_step = wb.Accumulator(*fresh(), recipe.loss, micro_batch=wb.Rows(ROWS), **options)
    by_updates = wb.Accumulator(*fresh(), recipe.loss, check=None)
    window_model, window_optimizer = fresh()
    by_window = wb.Accumulator(window_model, window_optimizer, check=None)
    whole_model, whole_optimizer = fresh()

    def updates(rows: list[bytes]) -> None:
        micro_batches = len(rows) // ROWS
        list(by_updates.updates(map(recipe.collate, parts(rows)), micro_batches=micro_batches))

    def window(rows: list[bytes]) -> None:
        with by_window.window() as window:
            for part in parts(rows):
                window.backward(recipe.loss(window_model, recipe.collate(part)))

    def undivided(rows: list[bytes]) -> None:
        reference.update(whole_model, whole_optimizer, recipe.loss, recipe.collate(rows))

    return {
        "wb step(batch)": by_step.step,
        "wb updates(loader)": updates,
        "wb window()": window,
        "undivided": undivided,
    }


def tensor_bytes(update: Update, micro_batches: int) -> int:
    """Return what the tensors of one update take at most. The optimizer has its state already."""
    update(rows_of(2))
    rows = rows_of(micro_batches)
    with memory.tensor_peak() as peak:
        update(rows)
    return peak.peak_bytes


def in_this_process(way: str, micro_batches: int) -> tuple[int, int]:
    """Return the resident size of this process at its highest, and how much of it one update brought."""
    update = ways()[way]
    update(rows_of(2))
    rows = rows_of(micro_batches)
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    update(rows)
    after = memory.peak_bytes(CPU)
    if before is None or after is None:
        return 0, 0
    return after, after - before


def in_a_child(way: str, micro_batches: int) -> tuple[int, int]:
    """Return the same, of a fresh process."""
    command = [sys.executable, __file__, "--child", way, str(micro_batches)]
    peak, more = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak, more


def main() -> int:
    parser = arguments(__doc__, "benchmarks/memory.py")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MICRO_BATCHES"), help="measure one update in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(in_this_process(options.child[0], int(options.child[1]))))
        return 0
    counts = COUNTS[:2] if options.quick else COUNTS
    rows, found = [], []
    for way, update in ways().items():
        tensors: dict[int, int] = {}
        processes: dict[int, int] = {}
        for count in counts:
            if way == "undivided" and count > UNDIVIDED:
                rows.append([way, f"{count:,}", "not tried", "", ""])
                continue
            tensors[count] = tensor_bytes(update, count)
            processes[count], more = in_a_child(way, count)
            figures = [f"{each / MIB:,.2f}" for each in (tensors[count], processes[count], more)]
            rows.append([way, f"{count:,}", *figures])
        if way != "undivided":
            for what, peaks in (("tensors", tensors), ("process", processes)):
                growth = max(peaks.values()) / peaks[counts[0]] - 1 if peaks[counts[0]] else float("nan")
                found.append(
                    Bar(f"{way}: growth of {what}, {counts[0]} to {counts[-1]:,} micro-batches", growth, 0.01, digits=4)
                )
    headings = ["way", "micro-batches", "tensors, MiB", "process, MiB", "of it the update, MiB"]
    text = f"{ROWS} rows of {LENGTH} bytes a micro-batch.\n\n{table(headings, rows)}"
    return tell("Peak memory as the logical batch grows", "memory", options, ["wholebatch", "torch"], text, found)


if __name__ == "__main__":
    sys.exit(main())
