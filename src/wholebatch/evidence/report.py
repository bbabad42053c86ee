"""What does a reader get? The log of a run as a page of HTML that needs nothing else, and as text for the terminal."""

import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from pathlib import Path

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.figures import Figure, figures
from wholebatch.evidence.findings import Finding, findings, headline, trained
from wholebatch.evidence.runlog import Run, read_log
from wholebatch.evidence.wording import number, one_line, say_bytes, text

__all__ = ["Run", "read_log", "summarize", "write_report"]

REPORT_NAME = "report.html"
_STYLE = Path(__file__).with_name("report.css")
# Nothing is loaded and no script runs, whatever a log holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STATED = {
    "logical_batch": "Logical batch",
    "micro_batch": "Micro-batch",
    "precision": "Precision",
    "seed": "Seed",
    "device": "Device",
    "updates_planned": "Updates planned",
    "time": "Started",
}


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` beside the log of a run, and from that log alone.

    The page loads nothing: style and plots are in it. The same log gives the same bytes.

    Args:
        run_folder: A run folder, or the log in it.

    Returns:
        The page.

    Raises:
        ConfigError: There is no log, a line of it is not an event, or the page cannot be written there.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> _ = Path("log.jsonl").write_text('{"event": "update", "number": 1, "loss": 2.5}\\n')
        >>> print(write_report("."))
        report.html
    """
    run = read_log(run_folder)
    page = run.path.with_name(REPORT_NAME)
    draft = page.with_name(f".{REPORT_NAME}.part")
    html = _page(run, figures(run))
    try:
        draft.write_text(html, encoding="utf-8", newline="\n")
        draft.replace(page)  # a reader sees the earlier page or this one, never half of one
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(
            f"The report {page} cannot be written: {error.strerror}.",
            hint="free some space there or make the folder writable, then run `wholebatch report` on it.",
        ) from error
    return page


def summarize(run: Run, *, width: int = 100) -> str:
    """Return what a run achieved, as a short text for the terminal.

    Args:
        run: A log that was read.
        width: Where lines break. Unit: characters.

    Returns:
        Lines without a final line break.

    Example:
        >>> _ = Path("log.jsonl").write_text('{"event": "update", "number": 1, "loss": 2.5, "micro_batches": 1}\\n')
        >>> print(summarize(read_log("."), width=72).splitlines()[0])
        The log ends early, after 1 update: the run was killed, or it is still
    """
    recipe = text(run.start, "recipe")
    lines = [
        f"Training run: {recipe}" if recipe else "",
        headline(run),
        trained(run),
        text(run.finish, "summary"),
        *run.notes,
    ]
    found = findings(run)
    margin = max((len(finding.topic) for finding in found), default=0) + 2
    paragraphs = [textwrap.wrap(line, width) for line in lines if line]
    paragraphs += [[""]] if found else []
    paragraphs += [
        textwrap.wrap(
            f"{finding.figure}. {finding.sentence}",
            width,
            initial_indent=finding.topic.ljust(margin),
            subsequent_indent=" " * margin,
        )
        for finding in found
    ]
    return "\n".join(line for paragraph in paragraphs for line in paragraph)


def _page(run: Run, drawn: list[Figure]) -> str:
    recipe = text(run.start, "recipe")
    title = f"Training run: {recipe}" if recipe else "Training run"
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
        *_opening(run),
        "</header>",
        "<main>",
        *_findings(findings(run)),
        *_plots(drawn),
        *_validations(run),
        *_reasons(run),
        *_stated(run),
        "</main>",
        f"<footer>Made from {escape(run.path.name)} alone.</footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _said(sentence: str) -> str:
    """Return a sentence as HTML, with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|[KMGT]?i?B|s|min|h)(?!\w))", "&nbsp;", escape(sentence))


def _opening(run: Run) -> list[str]:
    attention = "" if run.status == "done" else " warn"
    lines = [f'<p class="lede{attention}">{_said(headline(run))}</p>']
    lines += [f"<p>{_said(said)}</p>" for said in (trained(run), text(run.finish, "summary")) if said]
    return lines + [f'<p class="warn">{_said(note)}</p>' for note in run.notes]


def _findings(found: list[Finding]) -> list[str]:
    if not found:
        return ["<p>No update was recorded, so there is nothing to show yet.</p>"]
    rows = [
        f'<div><dt>{escape(finding.topic)}</dt><dd class="figure">{_said(finding.figure)}</dd>'
        f"<dd>{_said(finding.sentence)}</dd></div>"
        for finding in found
    ]
    return ['<dl class="findings">', *rows, "</dl>"]


def _plots(drawn: list[Figure]) -> list[str]:
    if not drawn:
        return []
    plots = [
        f"<figure>\n<h3>{escape(figure.title)}</h3>\n{figure.svg}\n"
        f"<figcaption>{_said(figure.caption)}</figcaption>\n</figure>"
        for figure in drawn
    ]
    return ["<h2>Update by update</h2>", '<div class="plots">', *plots, "</div>"]


def _validations(run: Run) -> list[str]:
    told = [(event, event["measures"]) for event in run.validations if isinstance(event.get("measures"), dict)]
    names = list(dict.fromkeys(name for _, measures in told for name in measures))
    if not names:
        return []
    head = ["Epoch", "Update", *(one_line(name) for name in names)]
    rows = [
        [text(event, "epoch"), text(event, "update"), *(_cell(measures, name) for name in names)]
        for event, measures in told
    ]
    cells = [_row("td", row) for row in rows]
    table = [
        '<table class="numbers">',
        f"<thead>{_row('th scope=col', head)}</thead>",
        "<tbody>",
        *cells,
        "</tbody></table>",
    ]
    return [
        "<h2>Validation</h2>",
        '<div class="scroll" tabindex="0" role="region" aria-label="Validation">',
        *table,
        "</div>",
    ]


def _cell(measures: dict[str, object], name: str) -> str:
    value = measures.get(name)
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else text(measures, name)


def _row(tag: str, cells: Iterable[str]) -> str:
    end = tag.split()[0]
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{end}>' for cell in cells)}</tr>"


def _reasons(run: Run) -> list[str]:
    reasons = run.finish.get("reasons") or run.start.get("reasons")  # some choices are made on the way
    if not isinstance(reasons, list) or not reasons:
        return []
    return [
        "<h2>Choices made automatically</h2>",
        "<ul>",
        *(f"<li>{_said(one_line(str(reason)))}</li>" for reason in reasons),
        "</ul>",
    ]


def _stated(run: Run) -> list[str]:
    stated = [(said, text(run.start, name)) for name, said in _STATED.items()]
    budget = number(run.start, "budget_bytes")
    stated += [("Memory budget", say_bytes(budget))] if budget else []
    versions = run.start.get("versions")
    stated += [(one_line(str(name)), text(versions, name)) for name in versions] if isinstance(versions, dict) else []
    rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in stated if value]
    return ["<h2>Settings</h2>", '<dl class="settings">', *rows, "</dl>"] if rows else []
