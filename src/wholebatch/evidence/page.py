"""What is a page? One file of HTML that loads nothing, for phones, print and screen readers."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.figures import Figure

_STYLE = Path(__file__).with_name("report.css")
# Nothing is loaded and no script runs, whatever a log holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_page(title: str, opening: Iterable[str], main: Iterable[str], made_from: str) -> str:
    """Return a page, which holds its style itself.

    Args:
        title: As text.
        opening: HTML that follows the title.
        main: HTML.
        made_from: HTML at the foot.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)} - wholebatch</title>",
        f"<style>\n{_STYLE.read_text(encoding='ascii')}</style>",
        "</head>",
        "<body>",
        "<header>",
        '<p class="kind">wholebatch</p>',
        f"<h1>{escape(title)}</h1>",
        *opening,
        "</header>",
        "<main>",
        *main,
        "</main>",
        f"<footer>{made_from}</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def write_page(page: Path, html: str) -> Path:
    """Write a page, in place of an earlier one: a reader sees the earlier page or this one, never half of one.

    Raises:
        ConfigError: It cannot be written there.
    """
    draft = page.with_name(f".{page.name}.part")
    try:
        draft.write_text(html, encoding="utf-8", newline="\n")
        draft.replace(page)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(
            f"The report {page} cannot be written: {error.strerror}.",
            hint="free some space there or make the folder writable, then run `wholebatch report` on it.",
        ) from error
    return page


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, named: bool = False) -> list[str]:
    """Return a table of numbers that scrolls for itself on a narrow screen.

    Args:
        name: For screen readers.
        head: A cell for each column.
        rows: Cells by row.
        named: Whether the first column holds the names of the rows.
    """
    return [
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">',
        f'<table class="numbers{" named" * named}">',
        f"<thead>{_row('th scope=col', head)}</thead>",
        "<tbody>",
        *(_row("td", row) for row in rows),
        "</tbody></table>",
        "</div>",
    ]


def _row(tag: str, cells: Iterable[str]) -> str:
    end = tag.split()[0]
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{end}>' for cell in cells)}</tr>"


def plots(drawn: Sequence[Figure], heading: str = "Update by update") -> list[str]:
    """Return plots under a heading; nothing where there are none."""
    if not drawn:
        return []
    shown = [
        f"<figure>\n<h3>{escape(figure.title)}</h3>\n{figure.svg}\n"
        f"<figcaption>{as_html(figure.caption)}</figcaption>\n</figure>"
        for figure in drawn
    ]
    return [f"<h2>{escape(heading)}</h2>", '<div class="plots">', *shown, "</div>"]


def as_html(sentence: str) -> str:
    """Return a sentence as HTML, with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|[KMGT]?i?B|s|min|h)(?!\w))", "&nbsp;", escape(sentence))
