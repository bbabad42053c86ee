"""Is what a sink writes with installed?"""

import importlib
from typing import Any

from wholebatch.core.errors import MissingExtraError


def bring(module: str, *, what: str, extra: str) -> Any:
    """Return a module that an extra brings.

    Args:
        module: Its dotted name.
        what: Who needs it, to begin a sentence with.
        extra: Which extra brings it.

    Raises:
        MissingExtraError: It is not installed, or cannot be imported.

    Example:
        >>> bring("no_such_module", what="The sink", extra="none")
        Traceback (most recent call last):
        wholebatch.core.errors.MissingExtraError: The sink needs no_such_module, which cannot be imported:
        No module named 'no_such_module'.
        <BLANKLINE>
        hint: pip install 'wholebatch[none]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {module}, which cannot be imported: {error}.", hint=f"pip install 'wholebatch[{extra}]'"
        ) from error
