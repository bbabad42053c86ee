"""How do plans look beside what was measured? Draws memory against the micro-batch for some models of the zoo.

Each picture is `Plan.to_svg`; its crosses are what the tensors of a real window took, by the count of PyTorch's
profiler.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

import wholebatch as wb
from plan import real_peak
from zoo import ZOO, Creature

ROWS = 96
DRAWN = {
    "MLP": ("2500kB", (8, 24, 48)),
    "U-Net": ("40MB", (4, 12, 24)),
    "large vocabulary": ("64MB", (2, 4, 8)),
    "large vocabulary, chunked head": ("64MB", (8, 24, 48)),
}
"""The budget of each model, and the micro-batches that are measured. Unit: rows."""


def draw(creature: Creature, memory: str, sizes: tuple[int, ...]) -> tuple[str, float]:
    """Return a picture, and how far a cross lies from its plan at most, as a share."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    plan = wb.plan(model, optimizer, creature.loss_fn, creature.batch(4), ROWS, memory, timed=False)
    measured = {size: real_peak(creature, "fp32", wb.Rows(size), ROWS) for size in sizes}
    off = max(abs(plan.peak_at(size) / peak - 1) for size, peak in measured.items())
    return plan.to_svg(measured), off


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/pictures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--only", default="", help="the model of this name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for creature in ZOO:
        if creature.name not in DRAWN or options.only not in ("", creature.name):
            continue
        svg, off = draw(creature, *DRAWN[creature.name])
        file = options.folder / f"memory-{creature.name.lower().replace(',', '').replace(' ', '-')}.svg"
        file.write_text(svg, encoding="utf-8")
        print(f"{file}: measured within {100 * off:.2f} % of the plan")
    return 0


if __name__ == "__main__":
    sys.exit(main())
