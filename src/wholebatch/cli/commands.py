"""Which button does what? The commands with their flags; what they do stands elsewhere.

Everything that takes long to import is imported inside a command, so that ``--help`` answers at once.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from wholebatch.cli import plan as _plan
from wholebatch.cli import tune as _tune
from wholebatch.cli.conformance import conformance
from wholebatch.cli.edge import DONE, ENDED_BY_CTRL_C, FAILED, check_file, edge, say
from wholebatch.cli.launch import launch, require_launcher
from wholebatch.core.errors import ConfigError
from wholebatch.recipes.finding import BUILT_IN
from wholebatch.recipes.options import OPTIONS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_RECIPE = f"{', '.join(BUILT_IN)}, my_file.py:recipe or package.module:recipe."


def _show_version(wanted: bool) -> None:
    if wanted:
        import wholebatch

        print(wholebatch.__version__)
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train exactly as if the whole batch fit.

    \b
    Examples:
      wholebatch train text
      wholebatch plan text --memory 500MB
      wholebatch tune text
      wholebatch verify my_file.py:recipe
      wholebatch report runs/text
      wholebatch conformance
      wholebatch doctor
    """


def _show_recipes(wanted: bool) -> None:
    if wanted:
        for name, what in BUILT_IN.items():
            print(f"{name:<8}{what}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help=_RECIPE, show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A TOML file; its keys are these flags.")
    ] = None,
    logical_batch: Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["logical_batch"].help)] = None,
    grow_to: Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["grow_to"].help)] = None,
    grow: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["grow"].help)] = None,
    lr_rule: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["lr_rule"].help)] = None,
    noise_scale: Annotated[
        bool | None, typer.Option("--noise-scale/--no-noise-scale", help=OPTIONS["noise_scale"].help)
    ] = None,
    micro_batch: Annotated[str | None, typer.Option(metavar="AMOUNT", help=OPTIONS["micro_batch"].help)] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help=OPTIONS["memory"].help)] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["epochs"].help)] = None,
    updates: Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["updates"].help)] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help=OPTIONS["lr"].help)] = None,
    batch_norm: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["batch_norm"].help)] = None,
    clip_norm: Annotated[float | None, typer.Option(metavar="X", help=OPTIONS["clip_norm"].help)] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["precision"].help)] = None,
    accumulate_in: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["accumulate_in"].help)] = None,
    wrapper: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["wrapper"].help)] = None,
    communication: Annotated[str | None, typer.Option(metavar="NAME", help=OPTIONS["communication"].help)] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help=OPTIONS["seed"].help)] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help=OPTIONS["out"].help)] = None,
    sink: Annotated[list[str] | None, typer.Option(metavar="NAME", help=OPTIONS["sink"].help)] = None,
    compare: Annotated[bool | None, typer.Option("--compare/--no-compare", help=OPTIONS["compare"].help)] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="On how many processes of this machine, as with torchrun.")
    ] = None,
    list_: Annotated[  # noqa: ARG001 - answered by its callback
        bool, typer.Option("--list", callback=_show_recipes, is_eager=True, help="Print the recipes and stop.")
    ] = False,
    debug: _Debug = False,
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

        _rest_while_waiting()
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


def _rest_while_waiting() -> None:
    """Let threads of PyTorch sleep while they wait, unless the user has said otherwise. Needed before it is loaded.

    Spinning, the default of OpenMP, costs most of a core as soon as anything else runs on the machine: on two busy
    cores the text recipe trained 5 times as slow.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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


app.command()(_plan.plan)
app.command()(_tune.tune)


@app.command()
def verify(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE)],
    rows: Annotated[int, typer.Option(min=2, metavar="N", help="Rows of the batch that is cut.")] = 64,
    micro_batch: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="How to cut: rows or tokens; left out: three parts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the weights and of the choice of rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the certificate to a file, as JSON.")] = None,
    debug: _Debug = False,
) -> None:
    """Print a certificate: is the update of a batch that is cut that of the whole batch?

    The batch is cut by rows, permuted, and ragged. If the recipe has a function step(model, optimizer, micro_batches),
    that loop is judged. Names the mistake and the line to change where the updates differ. Ends with 0 when they agree
    up to rounding, and with 1 when they do not.

    \b
    Examples:
      wholebatch verify text
      wholebatch verify my_file.py:recipe --rows 32 --micro-batch '5 rows'
      wholebatch verify my_file.py:recipe --out certificate.json
      wholebatch verify my_file.py:recipe --json | jq .causes
    """
    with edge(debug=debug):
        from wholebatch.recipes.config import Layer, configure

        given = {"recipe": recipe, "micro_batch": micro_batch or "auto", "seed": seed}
        stated = configure([Layer("on the command line", given, "--{}")])
        check_file("--out", out)

        _rest_while_waiting()
        from wholebatch.recipes.checking import check_recipe
        from wholebatch.recipes.finding import find_recipe

        verification = check_recipe(
            find_recipe(stated.recipe), rows=rows, micro_batch=stated.micro_batch, seed=stated.seed
        )
        plain = json.dumps(verification.to_dict(), indent=2, allow_nan=False)
        if out is not None:
            out.write_text(f"{plain}\n", encoding="utf-8")
            say(f"The certificate is in {out}.")
        print(plain if as_json else verification)
        sys.exit(DONE if verification.ok else FAILED)


app.command()(conformance)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folder of a run, or the log in it; or several.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of several runs: the page; left out, comparison.html in their folder."),
    ] = None,
    debug: _Debug = False,
) -> None:
    """Write report.html anew from the log of a run, or one page that shows several runs side by side.

    Also of one that was killed. The path of the page goes to stdout, a summary in words to stderr.

    \b
    Examples:
      wholebatch report runs/text
      open "$(wholebatch report runs/text)"
      wholebatch report runs/exact runs/group runs/frozen
      wholebatch report runs/* --out side-by-side.html
    """
    with edge(debug=debug):
        if len(runs) > 1:
            from wholebatch.evidence.beside import summarize_runs, write_comparison

            say(summarize_runs(runs))
            print(write_comparison(runs, out))
            return
        (run,) = runs
        if out is not None:
            raise ConfigError(
                "`--out` is for several runs; the report of one is written beside its log.", hint="leave it out."
            )
        from wholebatch.evidence.report import read_log, summarize, write_report

        say(summarize(read_log(run)))
        print(write_report(run))


@app.command()
def doctor(debug: _Debug = False) -> None:
    """Say what is installed, what is missing, and what the machine has.

    \b
    Example:
      wholebatch doctor
    """
    with edge(debug=debug):
        from wholebatch.cli.doctor import examine

        sys.stdout.write(examine())
