"""What does a reader get? The log of a run as a page of HTML that needs nothing else, and as text for the terminal."""

import textwrap
from html import escape
from pathlib import Path

from wholebatch.evidence.figures import Figure, figures
from wholebatch.evidence.findings import Finding, findings, headline, trained
from wholebatch.evidence.page import as_html, html_page, plots, table, write_page
from wholebatch.evidence.runlog import Run, read_log
from wholebatch.evidence.wording import number, one_line, say_bytes, text

__all__ = ["Run", "read_log", "summarize", "write_report"]

REPORT_NAME = "report.html"
_STATED = {
    "logical_batch": "Logical batch",
    "micro_batch": "Micro-batch",
    "batch_norm": "Batch norm",
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
    return write_page(run.path.with_name(REPORT_NAME), _page(run, figures(run)))


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
    main = [*_findings(findings(run)), *plots(drawn), *_validations(run), *_reasons(run), *_stated(run)]
    return html_page(title, _opening(run), main, f"Made from {escape(run.path.name)} alone.")


def _opening(run: Run) -> list[str]:
    attention = "" if run.status == "done" else " warn"
    lines = [f'<p class="lede{attention}">{as_html(headline(run))}</p>']
    lines += [f"<p>{as_html(said)}</p>" for said in (trained(run), text(run.finish, "summary")) if said]
    return lines + [f'<p class="warn">{as_html(note)}</p>' for note in run.notes]


def _findings(found: list[Finding]) -> list[str]:
    if not found:
        return ["<p>No update was recorded, so there is nothing to show yet.</p>"]
    rows = [
        f'<div><dt>{escape(finding.topic)}</dt><dd class="figure">{as_html(finding.figure)}</dd>'
        f"<dd>{as_html(finding.sentence)}</dd></div>"
        for finding in found
    ]
    return ['<dl class="findings">', *rows, "</dl>"]


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
    return ["<h2>Validation</h2>", *table("Validation", head, rows)]


def _cell(measures: dict[str, object], name: str) -> str:
    value = measures.get(name)
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else text(measures, name)


def _reasons(run: Run) -> list[str]:
    reasons = run.finish.get("reasons") or run.start.get("reasons")  # some choices are made on the way
    if not isinstance(reasons, list) or not reasons:
        return []
    return [
        "<h2>Choices made automatically</h2>",
        "<ul>",
        *(f"<li>{as_html(one_line(str(reason)))}</li>" for reason in reasons),
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
