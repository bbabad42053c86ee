"""How does a run become the record, and the table of a page?

``python -m wholebatch.evidence.conformance.record conformance.json docs/how-we-know.md``: the results of ``wholebatch
conformance --out conformance.json`` become those that come with the package, and the page shows them.
"""

import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from wholebatch.evidence.conformance.suite import Results
from wholebatch.evidence.conformance.table import as_page

BEGIN, END = "<!-- conformance table -->", "<!-- end of conformance table -->"


def shown(page: str, results: Results) -> str:
    """Return a page with these results between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"The page has no place for the table.\nhint: write {BEGIN} and {END} where it shall stand.")
    return f"{before}{BEGIN}\n\n{as_page(results)}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Record results, and show them on a page."""
    file, page = map(Path, arguments)
    results = json.loads(file.read_text("utf-8"))
    record = Path(str(files("wholebatch.evidence.conformance") / "recorded.json"))
    record.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write_text(shown(page.read_text("utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
