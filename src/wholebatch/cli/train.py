"""``wholebatch train``: how is a recipe trained from the command line?"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from wholebatch.cli.edge import DONE, ENDED_BY_CTRL_C, edge, say
from wholebatch.cli.flags import (
    RECIPE,
    AccumulateIn,
    BatchNorm,
    Debug,
    LearningRate,
    LogicalBatch,
    Memory,
    MicroBatch,
    Precision,
    Seed,
)
from wholebatch.cli.launch import launch, require_launcher, rest_while_waiting
from wholebatch.recipes.finding import BUILT_IN
from wholebatch.recipes.options import OPTIONS


def _show_recipes(wanted: bool) -> None:
    if wanted:
        for name, what in BUILT_IN.items():
            print(f"{name:<8}{what}")
        raise typer.Exit


def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help=RECIPE, show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A TOML file; its keys are these flags.")
    ] = None,
    logical_batch: LogicalBatch = None,
    grow_to: Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["grow_to"].help)] = None,
    grow: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["grow"].help)] = None,
    lr_rule: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["lr_rule"].help)] = None,
    noise_scale: Annotated[
        bool | None, typer.Option("--noise-scale/--no-noise-scale", help=OPTIONS["noise_scale"].help)
    ] = None,
    micro_batch: MicroBatch = None,
    memory: Memory = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["epochs"].help)] = None,
    updates: Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["updates"].help)] = None,
    lr: LearningRate = None,
    batch_norm: BatchNorm = None,
    clip_norm: Annotated[float | None, typer.Option(metavar="X", help=OPTIONS["clip_norm"].help)] = None,
    precision: Precision = None,
    accumulate_in: AccumulateIn = None,
    wrapper: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["wrapper"].help)] = None,
    communication: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["communication"].help)] = None,
    seed: Seed = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help=OPTIONS["out"].help)] = None,
    sink: Annotated[list[str] | None, typer.Option(metavar="NAME", help=OPTIONS["sink"].help)] = None,
    compare: Annotated[bool | None, typer.Option("--compare/--no-compare", help=OPTIONS["compare"].help)] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="On how many processes of this machine, as with torchrun.")
    ] = None,
    list_: Annotated[  # noqa: ARG001 - answered by its callback
        bool, typer.Option("--list", callback=_show_recipes, is_eager=True, help="Print the recipes and stop.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe, with a log and a report.

    What a flag leaves open, the file of --config says, and what that leaves open, the recipe. The last line says what
    was achieved; it and the path of the report go to stdout, all else to stderr. Ctrl-C ends a run cleanly, with its
    report.

    On several processes, with --nproc or started by torchrun, these share the rows of each logical batch, and the
    first writes and speaks for all.

    \b
    Examples:
      wholebatch train text
      wholebatch train images --logical-batch '512 rows' --micro-batch '16 rows' --epochs 3
      wholebatch train text --logical-batch '65536 tokens' --micro-batch '4096 tokens' --out runs/first
      wholebatch train my_file.py:recipe --config job.toml --lr 3e-4
      wholebatch train text --sink tensorboard --sink wandb
      wholebatch train text --nproc 2 --wrapper fsdp2
      torchrun --nnodes 4 --nproc-per-node 8 ... -m wholebatch train my_file.py:recipe
      wholebatch train images --batch-norm exact --micro-batch '4 rows'
      wholebatch train text --grow-to '1024 rows' --grow noise --lr-rule sqrt

    \b
    A file job.toml:
      logical_batch = "512 rows"
      micro_batch = "16 rows"
      epochs = 3

    A recipe of your own is anything with four functions: data(split), model(), collate(rows) and
    loss(model, micro_batch).
    """
    flags = {
        "recipe": recipe,
        "logical_batch": logical_batch,
        "grow_to": grow_to,
        "grow": grow,
        "lr_rule": lr_rule,
        "noise_scale": noise_scale,
        "micro_batch": micro_batch,
        "memory": memory,
        "epochs": epochs,
        "updates": updates,
        "lr": lr,
        "batch_norm": batch_norm,
        "clip_norm": clip_norm,
        "precision": precision,
        "accumulate_in": accumulate_in,
        "wrapper": wrapper,
        "communication": communication,
        "seed": seed,
        "out": out,
        "sink": sink or None,
        "compare": compare,
    }
    with edge(debug=debug):
        from wholebatch.recipes.config import Layer, configure, defaults_of, read_toml

        given = {key: value for key, value in flags.items() if value is not None}
        layers = [read_toml(config)] if config is not None else []
        layers.append(Layer("on the command line", given, "--{}"))
        stated = configure(layers)  # a wrong key is said before anything slow is loaded

        rest_while_waiting()
        from wholebatch.evidence.sinks import CallbackSink, ProgressBar
        from wholebatch.recipes.finding import find_recipe
        from wholebatch.recipes.job import train as run

        found = find_recipe(stated.recipe)
        stated = configure([defaults_of(found), *layers])
        if nproc is not None:
            require_launcher(nproc)
        if nproc is not None and nproc > 1:
            sys.exit(launch(nproc, ["train", *_as_flags(given, config), *["--debug"] * debug]))
        with _listening():
            summary = run(stated, [CallbackSink(_say_start), ProgressBar()], recipe=found)
        if summary.rank > 0:
            sys.exit(ENDED_BY_CTRL_C if summary.status == "interrupted" else DONE)
        print(summary.line)
        if summary.report is not None:
            print(summary.report)
        else:
            say(f"There is no report: {summary.why_no_report}")
        sys.exit(ENDED_BY_CTRL_C if summary.status == "interrupted" else DONE)


def _as_flags(given: Mapping[str, Any], config: Path | None) -> list[str]:
    """Return what was said on the command line, to say it again."""
    flags = ["--config", str(config)] if config is not None else []
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        if key == "recipe":
            flags.append(value)
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for each in value if isinstance(value, list) else [value]:
                flags += [flag, str(each)]
    return flags


def _say_start(event: Mapping[str, Any]) -> None:
    if event["event"] == "start":
        say(
            f"{event['recipe']}: {event['parameters']:,} parameters, {event['rows']:,} rows; "
            f"{event['updates_planned']:,} update{'s' * (event['updates_planned'] != 1)} of {event['logical_batch']}, "
            f"{event['micro_batch']} at once, {event['precision']} on {event['device']}"
        )


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":  # the first rank speaks for all
            say(record.getMessage())


@contextmanager
def _listening() -> Iterator[None]:
    """Print what the package says of itself, such as the reasons of automatic choices."""
    log, talk = logging.getLogger("wholebatch"), _Talk()
    before = log.level, log.propagate
    log.addHandler(talk)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(talk)
        log.level, log.propagate = before
