"""Which flags do several commands have in common?"""

from typing import Annotated

import typer

from wholebatch.recipes.finding import BUILT_IN
from wholebatch.recipes.options import OPTIONS

RECIPE = f"{', '.join(BUILT_IN)}, my_file.py:recipe or package.module:recipe."
"""How a recipe is named."""

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE)]
LogicalBatch = Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["logical_batch"].help)]
MicroBatch = Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["micro_batch"].help)]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help=OPTIONS["memory"].help)]
LearningRate = Annotated[float | None, typer.Option(metavar="X", help=OPTIONS["lr"].help)]
BatchNorm = Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["batch_norm"].help)]
Precision = Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["precision"].help)]
AccumulateIn = Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["accumulate_in"].help)]
Seed = Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["seed"].help)]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
