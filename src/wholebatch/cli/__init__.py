"""Which button do I press? The command ``wholebatch``."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and end the process with its exit code.

    Args:
        arguments: Without the name of the program; None: those of the process.

    Raises:
        SystemExit: Always. 0 done, 1 the run failed, 2 the user's input is wrong, 130 ended by Ctrl-C.
    """
    try:
        from wholebatch.cli.commands import app
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        print(
            "error: The command needs Typer, which is not installed.\nhint: pip install 'wholebatch[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(args=list(arguments) if arguments is not None else None, prog_name="wholebatch")
