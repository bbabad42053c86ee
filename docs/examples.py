"""How does the reference show the examples of docstrings?"""

import re
from typing import Any

import griffe

HEADING = re.compile("^Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Griffe knows the heading "Examples"; others are text, with ``>>>`` quoting."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = HEADING.sub("Examples:", obj.docstring.value)
