"""Which button does what? The commands with their flags; what they do stands elsewhere.

Everything that takes long to import is imported inside a command, so that ``--help`` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wholebatch.cli.conformance import conformance
from wholebatch.cli.edge import DONE, FAILED, check_file, edge, say
from wholebatch.cli.flags import AsJson, Debug, RecipeName
from wholebatch.cli.launch import rest_while_waiting
from wholebatch.cli.plan import plan
from wholebatch.cli.train import train
from wholebatch.cli.tune import tune
from wholebatch.core.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


app.command()(train)
app.command()(plan)
app.command()(tune)


@app.command()
def verify(
    recipe: RecipeName,
    rows: Annotated[int, typer.Option(min=2, metavar="N", help="Rows of the batch that is cut.")] = 64,
    micro_batch: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="How to cut: rows or tokens; left out: three parts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the weights and of the choice of rows.")] = 0,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the certificate to a file, as JSON.")] = None,
    debug: Debug = False,
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

        rest_while_waiting()
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
    debug: Debug = False,
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
def doctor(debug: Debug = False) -> None:
    """Say what is installed, what is missing, and what the machine has.

    \b
    Example:
      wholebatch doctor
    """
    with edge(debug=debug):
        from wholebatch.cli.doctor import examine

        print(examine(), end="")
