"""``wholebatch conformance``: what goes wrong in the tools that people use, in one table."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wholebatch.cli.edge import DONE, FAILED, check_file, edge, say
from wholebatch.cli.flags import Debug


def conformance(
    system: Annotated[
        list[str] | None, typer.Option("--system", metavar="NAME", help="Only this one; may be given several times.")
    ] = None,
    scene: Annotated[
        list[str] | None,
        typer.Option(
            "--scene", metavar="NAME", help="Only this one, or a whole trap (T1); may be given several times."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print versions and verdicts as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same to a file, as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Run the traps of gradient accumulation on wholebatch and on other systems.

    Each scene is a short training run whose right end is known: plain SGD on the undivided batches. A cell says "pass",
    how far the change of the weights is off (relative), "refuses" where the system raises an error, or "-" where it has
    no documented way to say what the scene asks for. Ends with 1 when wholebatch fails a scene.

    \b
    Examples:
      wholebatch conformance
      wholebatch conformance --system accelerate --scene T1
      wholebatch conformance --out conformance.json
      wholebatch conformance --json | jq .systems.lightning
    """
    with edge(debug=debug):
        from wholebatch.evidence.conformance import suite, table
        from wholebatch.evidence.conformance.choosing import choose_scenes, choose_systems

        systems, scenes = choose_systems(system), choose_scenes(scene)
        check_file("--out", out)  # the run takes minutes, so it is said before
        results = suite.run(systems, scenes, tell=say)
        for name, install in results["not_installed"].items():
            say(f"{name} is not installed: {install}")
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            say(f"Versions and verdicts are in {out}.")
        if as_json:
            print(json.dumps(results, indent=1))
        elif results["systems"]:
            print(table.as_text(results))
            print("\n".join(["", *table.details(results)]))
        for change in suite.changes(results, suite.recorded()):
            say(f"warning: changed since it was recorded: {change}")
        for dispute in suite.disputed(results):
            say(f"error: {dispute}")
        sys.exit(DONE if suite.stands(results) and not suite.disputed(results) else FAILED)
