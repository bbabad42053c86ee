"""How does the reference show the examples of docstrings?"""

import re
from typing import Any

import griffe

HEADING = re.compile("^Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    # Griffe knows "Examples"; below other headings, ">>>" would be a quotation.

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = HEADING.sub("Examples:", obj.docstring.value)
