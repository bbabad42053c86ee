"""``wholebatch plan``: will it fit, and how is the logical batch best cut?"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wholebatch.cli.edge import DONE, FAILED, check_file, edge, say
from wholebatch.cli.flags import (
    AccumulateIn,
    AsJson,
    Debug,
    LogicalBatch,
    Memory,
    MicroBatch,
    Precision,
    RecipeName,
    Seed,
)
from wholebatch.core.spread import Spread


def plan(
    recipe: RecipeName,
    logical_batch: LogicalBatch = None,
    memory: Memory = None,
    micro_batch: MicroBatch = None,
    precision: Precision = None,
    accumulate_in: AccumulateIn = None,
    seed: Seed = None,
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="On how many ranks like this one.")] = 1,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="What a rank sends in a second: '25GB/s' (bytes), '100Gbit/s' (bits)."),
    ] = None,
    latency: Annotated[
        str, typer.Option(metavar="TIME", help="How long an empty message takes: '20us', '1ms'.")
    ] = "0s",
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time a few passes, to choose the fastest.")] = True,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw memory against the micro-batch into this SVG file."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say whether a recipe fits into memory, where that goes, and how its logical batch is best cut.

    Nothing is trained. What a flag leaves open, the recipe says; without a micro-batch the plan chooses it. On several
    ranks it is the plan of each, and with a bandwidth it predicts the time of a window. Ends with 0 when it fits, and
    with 1 when it does not.

    \b
    Examples:
      wholebatch plan text --logical-batch '512 rows' --memory 500MB
      wholebatch plan images --memory 64MiB --no-time
      wholebatch plan my_file.py:recipe --memory 8GiB --precision bf16
      wholebatch plan my_file.py:recipe --memory 8GiB --json | jq .reasons
      wholebatch plan images --memory 64MiB --plot memory.svg
      wholebatch plan text --ranks 8 --bandwidth 25GB/s --latency 20us
    """
    flags = {
        "recipe": recipe,
        "logical_batch": logical_batch,
        "memory": memory,
        "precision": precision,
        "accumulate_in": accumulate_in,
        "seed": seed,
        "micro_batch": micro_batch or "auto",
    }
    with edge(debug=debug):
        from wholebatch.recipes.config import Layer, configure, defaults_of

        layer = Layer("on the command line", {key: value for key, value in flags.items() if value is not None}, "--{}")
        check_file("--plot", plot)
        configure([layer])  # a wrong value is said before anything slow is loaded

        Spread.of(ranks, ranks, bandwidth, latency)

        from wholebatch.recipes.finding import find_recipe
        from wholebatch.recipes.planning import plan_recipe

        found = find_recipe(recipe)
        made = plan_recipe(
            found,
            configure([defaults_of(found), layer]),
            timed=timed,
            ranks=ranks,
            bandwidth=bandwidth,
            latency=latency,
        )
        print(json.dumps(made.to_dict(), indent=2) if as_json else made)
        if plot is not None:
            plot.write_text(made.to_svg(), encoding="utf-8")
            say(f"The picture is in {plot}.")
        sys.exit(DONE if made.fits else FAILED)
