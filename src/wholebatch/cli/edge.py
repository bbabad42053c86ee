"""What does a person at the terminal see when something goes wrong? A sentence, a hint and an exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wholebatch.core.errors import (
    BatchNormError,
    ConfigError,
    LossError,
    MissingExtraError,
    OptimizerError,
    SplitError,
    WeightError,
    WholeBatchError,
)

DONE, FAILED, WRONG_INPUT, ENDED_BY_CTRL_C = 0, 1, 2, 130

# What the user can put right before the next run; anything else is a run that failed.
_MISTAKES = (BatchNormError, ConfigError, LossError, MissingExtraError, OptimizerError, SplitError, WeightError)
_EXTRAS = {"torch": "torch", "numpy": "torch", "rich": "cli", "pydantic": "cli", "matplotlib": "plots"}


def say(text: str) -> None:
    """Talk to the person at the terminal; what others may read goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def check_file(flag: str, file: Path | None) -> None:
    """Say that a file cannot be written where it was asked for, before anything takes time.

    Raises:
        ConfigError: It is a folder, or lies in none.
    """
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ConfigError(f"`{flag}` is {str(file)!r}, where no file can be written.", hint="name a file in a folder.")


@contextmanager
def edge(*, debug: bool) -> Iterator[None]:
    """Turn every exception of a command into words and an exit code.

    Args:
        debug: Show the traceback as well.

    Raises:
        SystemExit: In place of an exception.

    Example:
        >>> import contextlib, io
        >>> with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        ...     with edge(debug=False):
        ...         raise ConfigError("There is no recipe 'txt'.", hint="did you mean 'text'?")
        >>> print(said.getvalue(), end="")
        error: There is no recipe 'txt'.
        hint: did you mean 'text'?
    """
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted.")
        raise SystemExit(ENDED_BY_CTRL_C) from None
    except BrokenPipeError:
        raise  # whoever read the output has seen enough; Typer ends quietly
    except Exception as error:
        if debug:
            traceback.print_exc()
        found, hint = _words(error)
        if not (isinstance(error, _MISTAKES) and os.environ.get("LOCAL_RANK", "0") != "0"):  # once a machine
            rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
            say(f"{rank}error: {found}\nhint: {hint}" + "".join(f"\n{note}" for note in _notes(error)))
        raise SystemExit(WRONG_INPUT if isinstance(error, _MISTAKES) or _extra(error) else FAILED) from None


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", []) if os.environ.get("RANK", "0") == "0" else []


def _words(error: Exception) -> tuple[str, str]:
    """Return what was found, and what to do about it."""
    if isinstance(error, WholeBatchError):
        return error.found, error.hint
    extra = _extra(error)
    if extra is not None:
        return f"This command needs {error.name}, which is not installed.", f"pip install 'wholebatch[{extra}]'"  # type: ignore[attr-defined]
    what = f"{type(error).__name__}: {error}".strip().rstrip(":") + _place(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return what, "free some space on the disk, or name another folder with --out."
    return what, "run again with --debug for the traceback."


def _place(error: Exception) -> str:
    """Return the last line of the user's own that an exception came through, in brackets, if there is one."""
    theirs = (Path(__file__).parents[1], Path(os.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if (
            file.is_file()
            and not any(file.is_relative_to(home) for home in theirs)
            and "site-packages" not in file.parts
        ):
            return f" ({file.name}, line {frame.lineno})"
    return ""


def _extra(error: Exception) -> str | None:
    """Return the extra that brings a missing module."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return _EXTRAS.get(error.name.partition(".")[0])
    return None
