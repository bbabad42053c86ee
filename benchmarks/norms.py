"""What becomes of batch norm when a batch is cut: five runs of the recipe `images`, side by side.

Batch norm over the whole logical batch (exact), over each micro-batch, frozen, and converted to group norm; and the
undivided batch, which the exact one should be like. Same pictures, same order, same first weights, same learning rate.
Writes ``comparison.html`` beside the runs. A run that is there already is not made again.
"""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

from page import Bar, arguments, table, tell
from wholebatch.evidence.beside import write_comparison
from wholebatch.evidence.curves import Curve, curves
from wholebatch.evidence.runlog import Run, read_log
from wholebatch.recipes.config import Layer, configure, defaults_of
from wholebatch.recipes.finding import find_recipe
from wholebatch.recipes.job import train

ON_ANY_PAGE = {
    "sans": "sans-serif",
    "ink": "#7a8090",
    "calm": "#7a8090",
    "rule": "#7a809055",
    "series": "#2f7fd1",
    "accent": "#d9692b",
    "third": "#2f9e68",
    "fourth": "#a65cc0",
    "fifth": "#b08c1a",
    "sixth": "#2b95a5",
}
"""What the roles of a report's plot look like on light and dark alike."""

WAYS = ("whole", "exact", "per_micro_batch", "group", "frozen")


def make(folder: Path, way: str, rows: int, epochs: int, seed: int) -> Run:
    """Return a run, made now if it is not there."""
    out = folder / (way if seed == 0 else f"{way}-{seed}")
    if not (out / "log.jsonl").is_file() or read_log(out).status != "done":
        recipe = find_recipe("images")
        values = {
            "recipe": "images",
            "batch_norm": "exact" if way == "whole" else way,
            "micro_batch": recipe.defaults["logical_batch"] if way == "whole" else f"{rows} rows",
            "epochs": epochs,
            "seed": seed,
            "compare": seed == 0,
            "out": str(out),
        }
        train(configure([defaults_of(recipe), Layer("in the benchmark", values)]), recipe=recipe)
    print(f"{out}: {json.dumps(read_log(out).validations[-1]['measures'])}", file=sys.stderr)
    return read_log(out)


def last(run: Run, measure: str) -> float:
    """Return a measure of the last validation."""
    return float(run.validations[-1]["measures"][measure])


def plot(path: Path, runs: dict[str, Run]) -> None:
    """Draw the accuracy of each run after each epoch, as an SVG that stands alone on a light or a dark page."""
    shown = [
        Curve(way, [(event["update"], event["measures"]["accuracy"]) for event in run.validations], marks=True)
        for way, run in runs.items()
    ]
    figure = curves("Validation accuracy", "", shown)
    assert figure is not None
    svg = re.sub(r"var\(--(\w+)(?:, #\w+)?\)", lambda found: ON_ANY_PAGE[found[1]], figure.svg)
    path.write_text(svg, encoding="utf-8")


def main() -> int:
    parser = arguments(__doc__, "benchmarks/norms.py")
    parser.add_argument("--folder", type=Path, default=Path("runs/norms"), help="where the runs are (runs/norms)")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows of a micro-batch (2)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of each run (8)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each kind (2)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracy of the runs, as SVG")
    options = parser.parse_args()
    epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds)
    by_way = {way: [make(options.folder, way, options.rows, epochs, seed) for seed in range(seeds)] for way in WAYS}
    first = {way: runs[0] for way, runs in by_way.items()}
    rows = []
    for way, runs in by_way.items():
        error = runs[0].evidence.get("gradient_error")
        rows.append(
            [
                way,
                f"{fmean(last(run, 'accuracy') for run in runs):.3f}",
                ", ".join(f"{last(run, 'accuracy'):.3f}" for run in runs),
                f"{fmean(last(run, 'loss') for run in runs):.3f}",
                f"{error:.1e}" if error is not None else "-",
            ]
        )
    headings = ["batch norm", "accuracy", "by seed", "validation loss", "gradient off by"]
    text = f"{epochs} epochs, 128 rows a logical batch, {options.rows} a micro-batch.\n\n{table(headings, rows)}"
    exact, parts = (float(first[way].evidence["gradient_error"]) for way in ("exact", "per_micro_batch"))
    found = [
        Bar("gradient of the trained network, exact: distance from the undivided batch", exact, 1e-3, digits=None),
        Bar("the same per micro-batch, which the bound above has to see", parts, 1e-2, most=False, digits=None),
    ]
    if options.plot is not None:
        plot(options.plot, first)
    print(write_comparison([run.path for run in first.values()]), file=sys.stderr)
    return tell("Batch norm in a cut batch", "norms", options, ["wholebatch", "torch"], text, found)


if __name__ == "__main__":
    sys.exit(main())
