"""``wholebatch tune``: how large should the logical batch be?"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wholebatch.cli.edge import DONE, FAILED, check_file, edge, say
from wholebatch.cli.flags import (
    AccumulateIn,
    AsJson,
    BatchNorm,
    Debug,
    LearningRate,
    LogicalBatch,
    Memory,
    MicroBatch,
    Precision,
    RecipeName,
    Seed,
)


def tune(
    recipe: RecipeName,
    logical_batch: LogicalBatch = None,
    micro_batch: MicroBatch = None,
    memory: Memory = None,
    lr: LearningRate = None,
    batch_norm: BatchNorm = None,
    precision: Precision = None,
    accumulate_in: AccumulateIn = None,
    seed: Seed = None,
    updates: Annotated[
        int, typer.Option(min=2, metavar="N", help="How long is trained to measure the noise scale.")
    ] = 40,
    lr_rule: Annotated[
        str, typer.Option(metavar="NAME", help="By which rule --out changes the learning rate: none, linear or sqrt.")
    ] = "none",
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the settings to a TOML file that train --config reads.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say how large the logical batch of a recipe should be, and what its learning rate becomes.

    Trains for a while, measures the gradient noise scale and the speed at several sizes, and names the logical batch
    that makes the most progress for the time. What a flag leaves open, the recipe says. Nothing is kept unless --out
    asks for it. Ends with 1 where the noise scale cannot be told.

    \b
    Examples:
      wholebatch tune text
      wholebatch tune images --memory 2GiB --micro-batch auto
      wholebatch tune my_file.py:recipe --logical-batch '256 rows' --updates 200
      wholebatch tune text --out settings.toml --lr-rule sqrt
      wholebatch train text --config settings.toml
      wholebatch tune text --json | jq .noise_scale
    """
    flags = {
        "recipe": recipe,
        "logical_batch": logical_batch,
        "micro_batch": micro_batch,
        "memory": memory,
        "lr": lr,
        "batch_norm": batch_norm,
        "precision": precision,
        "accumulate_in": accumulate_in,
        "seed": seed,
    }
    with edge(debug=debug):
        from wholebatch.recipes.config import Layer, configure, defaults_of

        layer = Layer("on the command line", {key: value for key, value in flags.items() if value is not None}, "--{}")
        check_file("--out", out)
        configure([layer])  # a wrong value is said before anything slow is loaded

        from wholebatch.recipes.finding import find_recipe
        from wholebatch.recipes.settings import check_rule, settings_of
        from wholebatch.recipes.tuning import tune_recipe

        rule = check_rule(lr_rule)
        found = find_recipe(recipe)
        config = configure([defaults_of(found), layer])
        tuning = tune_recipe(found, config, updates=updates, say=say)
        print(json.dumps(tuning.to_dict(), indent=2) if as_json else tuning)
        if out is not None and tuning.chosen is not None:
            out.write_text(settings_of(found, config, tuning, rule), encoding="utf-8")
            say(f"The settings are in {out}: wholebatch train {recipe} --config {out}")
        sys.exit(DONE if tuning.chosen is not None else FAILED)
