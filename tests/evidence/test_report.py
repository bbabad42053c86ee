"""The report: what a log holds, what it shows, and a page that loads nothing and obeys no string of the log.

WHOLEBATCH_REWRITE_GOLDEN=1 rewrites the golden files instead of comparing with them.
"""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wholebatch.core.errors import ConfigError, MissingExtraError
from wholebatch.evidence.figures import figures
from wholebatch.evidence.findings import findings, headline
from wholebatch.evidence.report import Run, read_log, summarize, write_report
from wholebatch.evidence.sinks import JsonLines

GOLDEN = Path(__file__).parent / "golden"
MIB = 2**20
GIB = 2**30
HOSTILE = "</p><script src=//x.test/a.js>alert(1)</script><img src=x onerror=\"alert('2')\"> & \x1b[2J\x9b31m\u202e end"
VOID = {"meta", "link", "img", "br"}

START = {
    "event": "start",
    "time": "2025-03-01T10:00:00+00:00",
    "recipe": "text: paragraphs of a novel",
    "logical_batch": "512 rows",
    "micro_batch": "4096 tokens",
    "precision": "fp32",
    "seed": 0,
    "device": "cpu",
    "parameters": 1_234_567,
    "rows": 2000,
    "updates_planned": 60,
    "budget_bytes": 768 * MIB,
    "reasons": ["losses are scaled before backward: all targets are known"],
    "versions": {"wholebatch": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
}
EVIDENCE = {
    "event": "evidence",
    "gradient_error": 1.9e-7,
    "gradient_ok": True,
    "undivided_peak_bytes": 2 * GIB,
    "cut_peak_bytes": 512 * MIB,
    "targets_per_second": 47_200.0,
    "plain_targets_per_second": 20_000.0,
    "speedup": 2.36,
}
FINISH = {
    "event": "finish",
    "status": "done",
    "updates": 58,
    "skipped": 2,
    "seconds": 192.3,
    "summary": "All went well.",
}


def update(number: int, **changed: object) -> dict[str, Any]:
    return {
        "event": "update",
        "epoch": 1 + (number - 1) // 20,
        "number": number,
        "loss": 2 + 3 / number,
        "targets": 150_000,
        "rows": 512,
        "micro_batches": 38 + number % 5,
        "lr": 3e-3 / number,
        "padding": 0.02 + 0.001 * (number % 7),
        "grad_norm": 1 + 1 / number,
        "skipped": None,
        "retries": 0,
        "peak_bytes": 600 * MIB + number * MIB // 8,
        "seconds": 3.2,
        "noise_scale": None,
        **changed,
    }


def validation(number: int) -> dict[str, Any]:
    measures = {"loss": 2.1 + 3 / number, "bits_per_byte": 3.5 + 4 / number}
    return {"event": "validation", "epoch": number // 20, "update": number, "measures": measures}


def bare(number: int, **measured: object) -> dict[str, Any]:
    """Return an update of which little is known, so that only the plots in question are drawn."""
    return {"event": "update", "number": number, **measured}


def whole_run(updates: int = 60) -> list[dict[str, Any]]:
    events = [START]
    for number in range(1, updates + 1):
        lost = {"skipped": "The gradient is not finite.", "loss": math.nan, "grad_norm": None}
        events.append(update(number, **(lost if number in (23, 41) else {})))
        events += [validation(number)] if number % 20 == 0 else []
    return [*events, EVIDENCE, FINISH]


def folder_of(tmp_path: Path, events: list[dict[str, Any]], *, tail: str = "") -> Path:
    log = JsonLines(tmp_path / "log.jsonl")
    for event in events:
        log.write(event)
    log.close()
    with log.path.open("a") as file:
        file.write(tail)
    return tmp_path


def run_of(*events: dict[str, Any]) -> Run:
    """Return the run of some events without the way through a file."""

    def of(kind: str) -> tuple[dict[str, Any], ...]:
        return tuple(event for event in events if event["event"] == kind)

    start, evidence, finish = ((of(kind) or ({},))[-1] for kind in ("start", "evidence", "finish"))
    return Run(
        path=Path("log.jsonl"),
        start=start,
        updates=of("update"),
        validations=of("validation"),
        evidence=evidence,
        finish=finish,
    )


def finding(topic: str, *events: dict[str, Any]) -> str:
    """Return figure and sentence about a topic."""
    (found,) = [found for found in findings(run_of(*events)) if found.topic == topic]
    return f"{found.figure} | {found.sentence}"


class Page(HTMLParser):
    """The elements and the text of a page; refuses tags that do not pair up."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def outward(html: str) -> list[str]:
    """Return whatever in a page could make a browser ask for something else than the page."""
    page = Page(html)
    found = [f"<{tag}>" for tag, _ in page.elements if tag in {"script", "img", "iframe", "object", "base", "image"}]
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                found += [f"{tag} {name}={value}"] if not value.startswith(("#", "data:,")) else []
            elif "//" in value and not name.startswith("xmlns"):
                found.append(f"{tag} {name}={value}")
            found += [f"{tag} {name}"] if name.startswith("on") else []
    return found + re.findall(r"@import|url\((?!#)[^)]*", html)


# Reading a log


def test_every_kind_of_event_is_read(tmp_path):
    run = read_log(folder_of(tmp_path, [*whole_run(), {"event": "of tomorrow"}]))
    assert run.path == tmp_path / "log.jsonl"
    assert run == read_log(tmp_path / "log.jsonl") == read_log(str(tmp_path))
    assert (len(run.updates), len(run.validations), run.notes) == (60, 3, ())
    assert (run.start, run.evidence, run.finish, run.status) == (START, EVIDENCE, FINISH, "done")
    assert run.series("micro_batches")[:3] == [39, 40, 41]
    assert math.isnan(run.series("loss")[22])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("nothing", "There is no run folder"),
        ("folder", r"holds no log\.jsonl, so it is not a run"),
    ],
)
def test_what_is_no_run_is_said_with_a_hint(tmp_path, made, said):
    path = tmp_path / "run"
    if made == "folder":
        path.mkdir()
    for read in (read_log, write_report):
        with pytest.raises(ConfigError, match=said) as caught:
            read(path)
        assert str(path) in caught.value.found
        assert "--out FOLDER" in caught.value.hint


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1, 2]",
        b"7",
        b"{}",
        b'{"event": 3}',
        b"\xff\xfe",
        b"[" * 20_000,
        b'{"event": "update"} {}',
        b"\x00" * 80,
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    path = folder_of(tmp_path, [START, update(1)]) / "log.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(FINISH).encode() + b"\n")
    with pytest.raises(ConfigError, match=rf"Line 3 of {re.escape(str(path))} is not an event: ") as caught:
        read_log(tmp_path)
    assert len(caught.value.found) < len(str(path)) + 100
    assert caught.value.found.isprintable()


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path):
    run = read_log(folder_of(tmp_path, [START, update(1)], tail='{"event": "update", "numb'))
    assert len(run.updates) == 1
    assert run.notes == ("The last line of the log (line 3) is unfinished and was left out.",)
    assert run.notes[0] in summarize(run)
    assert run.notes[0] in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_last_line_that_only_lacks_its_line_break_counts(tmp_path):
    run = read_log(folder_of(tmp_path, [START, update(1)], tail=json.dumps(update(2))))
    assert (len(run.updates), run.notes) == (2, ())


def test_of_several_runs_in_a_log_the_last_is_read(tmp_path):
    run = read_log(folder_of(tmp_path, [*whole_run(), {**START, "seed": 1}, update(1)]))
    assert (run.start["seed"], len(run.updates), run.finish) == (1, 1, {})
    assert run.notes == ("The log holds 2 runs; this is the last one.",)


def test_an_empty_log_is_a_report_that_says_so(tmp_path):
    page = Page(write_report(folder_of(tmp_path, [])).read_text(encoding="utf-8"))
    assert "The log is empty." in page.text
    assert "No update was recorded" in page.text
    assert [tag for tag, _ in page.elements if tag in {"svg", "dl"}] == []
    assert summarize(read_log(tmp_path)) == "The log holds no run.\nThe log is empty."


# What is said


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (FINISH, "The run is done: 2 updates in 3 min 12 s."),
        ({**FINISH, "status": "interrupted"}, "The run was interrupted after 2 of 60 planned updates in 3 min 12 s;"),
        ({**FINISH, "status": "failed", "seconds": None}, "The run failed after 2 of 60 planned updates."),
        ({**FINISH, "status": "paused"}, "The run ended as paused, after 2 of 60 planned updates in 3 min 12 s."),
        ({"event": "other"}, "The log ends early, after 2 of 60 planned updates: the run was killed,"),
    ],
    ids=lambda value: value.get("status", "none") if isinstance(value, dict) else "",
)
def test_how_the_run_ended_comes_first(tmp_path, finish, said):
    events = [START, update(1), update(2), update(3, skipped="Why not."), finish]
    assert headline(run_of(*events)).startswith(said)
    page = Page(write_report(folder_of(tmp_path, events)).read_text(encoding="utf-8"))
    (opening,) = [attributes for _, attributes in page.elements if "lede" in attributes.get("class", "")]
    assert said in page.text.replace("\xa0", " ")
    assert ("warn" in opening["class"]) == (finish.get("status") != "done")


@pytest.mark.parametrize(
    ("stated", "cuts", "figure", "cut", "held"),
    [
        ("8 rows", (64, 64), "8 of 512 rows", "64 micro-batches of 8 rows", "at most 8 rows were"),
        ("1 row", (512, 512), "1 of 512 rows", "512 micro-batches of 1 row", "at most 1 row was"),
        ("4096 tokens", (38, 42), "13 of 512 rows", "38 to 42 micro-batches of 4096 tokens", "on average 13 rows were"),
        ("auto: it depends", (4, 4), "128 of 512 rows", "4 micro-batches", "on average 128 rows were"),
    ],
)
def test_the_logical_batch_is_told_from_what_was_in_memory(stated, cuts, figure, cut, held):
    updates = [update(number, micro_batches=micro_batches) for number, micro_batches in enumerate(cuts, 1)]
    assert finding("Logical batch", {**START, "micro_batch": stated}, *updates) == (
        f"{figure} | Each update is that of a logical batch of 512 rows, cut into {cut}: {held} in memory at once."
    )


def test_where_graphs_were_joined_nothing_is_claimed_about_memory():
    joined = {**FINISH, "reasons": ['lockstep="auto" joins the graphs of all micro-batches: batch norm is exact in 1.']}
    said = finding("Logical batch", {**START, "micro_batch": "8 rows"}, update(1, micro_batches=64), joined)
    assert said.endswith(
        "At most 8 rows were run at once, but their graphs were joined, so that the activations of the whole batch "
        "were held."
    )
    assert "in memory at once" not in said


def test_a_short_last_batch_does_not_change_what_the_batch_was():
    updates = [update(1, rows=512, micro_batches=64), update(2, rows=16, micro_batches=2)]
    said = finding("Logical batch", {**START, "micro_batch": "8 rows"}, *updates)
    assert said.startswith("8 of 512 rows | Each update is that of a logical batch of 512 rows, cut into 2 to 64 ")


def test_a_log_that_does_not_tell_the_cut_claims_nothing_about_it():
    topics = {found.topic for found in findings(run_of(START, update(1, micro_batches=None)))}
    assert "Logical batch" not in topics
    assert "Updates" in topics


def test_a_batch_that_was_not_cut_is_said_to_be_whole():
    said = finding("Logical batch", START, update(1, micro_batches=1))
    assert said == "not cut | Each update is that of a logical batch of 512 rows, which was in memory whole."


def test_a_streaming_window_may_not_know_its_rows():
    said = finding("Logical batch", update(1, rows=None, micro_batches=4))
    assert said == "cut in 4 | Each update is that of a logical batch of unknown rows, cut into 4 micro-batches."


@pytest.mark.parametrize("rounding", [True, False])
def test_a_gradient_error_is_called_rounding_only_where_it_was_judged_so(rounding):
    said = finding("Gradient", START, update(1), {**EVIDENCE, "gradient_ok": rounding})
    assert ("is that of the undivided one, up to rounding:" in said) == rounding
    assert ("is not that of the undivided one" in said) != rounding


@pytest.mark.parametrize(
    ("peak", "cut", "figure", "said"),
    [
        (600 * MIB, 512 * MIB, "75 % less", "took more than 600 MiB, which keeps the budget of 768 MiB."),
        (900 * MIB, 3 * GIB, "50 % more", "took more than 900 MiB, which is more than the budget of 768 MiB."),
    ],
)
def test_memory_is_told_also_where_nothing_was_saved(peak, cut, figure, said):
    evidence = {**EVIDENCE, "cut_peak_bytes": cut}
    found = finding("Memory", START, update(1, peak_bytes=peak), update(2, peak_bytes=1), evidence)
    assert found.startswith(f"{figure} | The undivided batch takes 2 GiB at its peak, the cut one ")
    assert said in found


@pytest.mark.parametrize(
    ("ours", "figure", "slower"), [(47_200.0, "2.36 times", False), (18_000.0, "0.90 times", True)]
)
def test_speed_is_told_also_where_nothing_was_won(ours, figure, slower):
    found = finding("Speed", update(1), {**EVIDENCE, "targets_per_second": ours})
    assert found.startswith(f"{figure} | ")
    assert "against 20,000 of the plain loop" in found
    assert found.endswith(": slower.") == slower


def test_the_plain_loop_stands_in_the_plot_by_its_ratio():
    """Seconds of a comparison are not those of the updates: 1,000 a second at twice the speed of the plain loop."""
    evidence = {**EVIDENCE, "targets_per_second": 70.0, "plain_targets_per_second": 35.0}
    updates = [bare(number, targets=seconds * 1000, seconds=seconds) for number, seconds in [(1, 2), (2, 3)]]
    (speed,) = figures(run_of(*updates, evidence))
    assert speed.caption == "Speed of each update. Dashed: plain loop, 500 by the ratio measured side by side."


def test_what_was_not_measured_is_said_with_its_reason():
    missing = {**dict.fromkeys(EVIDENCE), "event": "evidence", "why": "the undivided batch ran out of memory."}
    why = "not measured: the undivided batch ran out of memory."
    for topic in ("Gradient", "Memory", "Speed"):
        assert why in finding(topic, START, update(1), missing)
        assert "not measured." in finding(topic, START, update(1))
    assert finding("Speed", update(1)).startswith("46,900 a second | 46,900 targets per second on average.")


def test_skipped_updates_are_told_by_reason():
    lost = [update(number, skipped="The loss is nan.") for number in range(3, 10)]
    found = finding("Updates", update(1), update(2, skipped="No targets.", retries=2), *lost)
    assert found == (
        "1 of 9 | Skipped 1 (2): No targets. Skipped 7 (3, 4, 5, 6, 7, ...): The loss is nan. "
        "A logical batch was cut anew 2 times after running out of memory."
    )
    many = finding("Updates", *(update(number, skipped=f"The loss is 1e{number}.") for number in range(1, 9)))
    assert many.endswith("Skipped 1 (5): The loss is 1e5. The log has 3 further reasons.")
    assert finding("Updates", update(1)) == "1 | Every window became an update; none was skipped."


def test_a_loss_that_was_never_finite_is_said():
    assert finding("Loss", update(1, loss=None)) == "never finite | No update had a finite loss."


def test_lengths_that_are_not_known_have_no_padding():
    run = run_of(update(1, padding=None), update(2, padding=None))
    assert "Padding" not in {found.topic for found in findings(run)}
    assert [figure.title for figure in figures(run) if "Padding" in figure.title] == []


def test_the_summary_fits_its_width(tmp_path):
    run = read_log(folder_of(tmp_path, whole_run()))
    for width in (60, 100):
        lines = summarize(run, width=width).splitlines()
        assert max(map(len, lines)) <= width
    assert "All went well." in summarize(run)
    assert summarize(run).isascii()


def test_choices_that_were_made_on_the_way_are_shown(tmp_path):
    finish = {**FINISH, "reasons": ["made at the start", "made on the way"]}
    for events, said in (([START, update(1)], START["reasons"]), ([START, update(1), finish], finish["reasons"])):
        page = Page(write_report(folder_of(tmp_path, events)).read_text(encoding="utf-8"))
        assert all(reason in page.text for reason in said)


# The plots


def test_each_measure_has_a_plot_that_names_itself():
    drawn = {figure.title: figure for figure in figures(run_of(*whole_run()))}
    assert list(drawn) == [
        "Loss",
        "Peak memory, GiB",
        "Targets per second",
        "Padding, % of all positions",
        "Gradient norm",
        "Learning rate",
    ]
    for title, figure in drawn.items():
        ((_, attributes),) = [element for element in Page(figure.svg).elements if element[0] == "svg"]
        assert attributes["role"] == "img"
        assert attributes["aria-label"].startswith(f"{title}: ")
        assert attributes["viewbox"] == "0 0 372 228"
        assert "width" not in attributes
    assert "Dashed: undivided batch, 2 GiB. Dotted: budget, 768 MiB." in drawn["Peak memory, GiB"].caption
    assert "Dashed: plain loop, 19,900 by the ratio" in drawn["Targets per second"].caption
    assert "58 updates, from 5 to 2.05, lowest 2.05, highest 5." in drawn["Loss"].svg
    assert "3 validation points, the last 2.15." in drawn["Loss"].svg
    assert ">skipped</text>" in drawn["Loss"].svg


def horizontal_lines(svg: str) -> int:
    """Return how many dashed or dotted lines cross a plot; one more of each stands in its legend."""
    return len(re.findall(r"clip-path[^>]*stroke-dasharray", svg))


@pytest.mark.parametrize(("budget", "whole", "lines"), [(None, None, 0), (GIB, None, 1), (None, GIB, 1), (GIB, GIB, 2)])
def test_memory_stands_against_what_is_known(budget, whole, lines):
    evidence = {**EVIDENCE, "undivided_peak_bytes": whole}
    run = run_of({**START, "budget_bytes": budget}, *(bare(number, peak_bytes=MIB) for number in (1, 2)), evidence)
    (memory,) = figures(run)
    assert horizontal_lines(memory.svg) == lines
    assert ("budget, 1 GiB" in memory.caption) == bool(budget)
    assert ("undivided batch, 1 GiB" in memory.caption) == bool(whole)


def test_a_gradient_norm_over_decades_is_drawn_on_a_scale_of_decades():
    def ticks(*norms: float) -> list[str]:
        run = run_of(*(bare(number, grad_norm=norm) for number, norm in enumerate(norms, 1)))
        (drawn,) = figures(run)
        return re.findall(r"text-anchor: end[^>]*>([^<]+)<", drawn.svg)

    assert {"0.1", "1", "10", "100"} <= set(ticks(0.05, 200, 3))
    assert "0" in ticks(0.5, 2, 3)


def test_many_updates_make_a_small_plot():
    updates = [bare(number, loss=2 + 3 / number) for number in range(1, 6001)]
    few, many = (figures(run_of(*updates[:count]))[0].svg for count in (60, 6000))
    assert "<use" in few.partition("clip-path")[2]
    assert len(many) < 10 * len(few)


def test_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib as mpl

    folder = folder_of(tmp_path, whole_run())
    plain = write_report(folder).read_bytes()
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "xtick.labelsize": 30, "figure.dpi": 300}):
        before = dict(mpl.rcParams)
        styled = write_report(folder).read_bytes()
        assert dict(mpl.rcParams) == before
    assert styled == plain


def test_a_missing_matplotlib_says_which_install_brings_it(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, whole_run())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape("hint: pip install 'wholebatch[plots]'")):
        write_report(folder)
    assert "The run is done" in summarize(read_log(folder))  # the text needs no plots


# The page


def test_the_page_loads_nothing(tmp_path):
    html = write_report(folder_of(tmp_path, whole_run())).read_text(encoding="utf-8")
    assert outward(html) == []
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", html))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of XML, never loaded
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    "planted",
    [
        '<script src="//x.test/a.js"></script>',
        "<img src=a.png>",
        "<p onclick='go()'></p>",
        '<p style="background: url(https://x.test/a.png)"></p>',
        "<style>@import 'a.css';</style>",
        '<link rel="stylesheet" href="a.css">',
    ],
)
def test_the_look_for_requests_sees_a_planted_one(planted):
    assert outward(f"<main>{planted}</main>") != []


def test_names_in_the_page_are_unique_and_lead_somewhere(tmp_path):
    html = write_report(folder_of(tmp_path, whole_run())).read_text(encoding="utf-8")
    page = Page(html)
    names = page.values("id")
    assert len(names) == len(set(names))
    used = {link.removeprefix("#") for link in page.values("xlink:href")} | set(re.findall(r"url\(#(\w+)\)", html))
    assert used
    assert used <= set(names)


def test_the_page_is_for_phones_print_and_screen_readers(tmp_path):
    html = write_report(folder_of(tmp_path, whole_run())).read_text(encoding="utf-8")
    page = Page(html)
    assert page.elements[0] == ("html", {"lang": "en"})
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.elements]
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == tags.count("title") == tags.count("main") == tags.count("style") == 1
    assert tags.count("figure") == tags.count("svg") == tags.count("figcaption") == 6
    for rule in ("@media print", "@media (max-width", "prefers-color-scheme: dark"):
        assert rule in html


def hostile(value: object) -> object:
    """Return an event whose every text is hostile, and whose every name of a measure or version is."""
    match value:
        case str():
            return HOSTILE
        case dict():
            return {HOSTILE if key in {"bits_per_byte", "torch"} else key: hostile(item) for key, item in value.items()}
        case list():
            return [hostile(item) for item in value]
    return value


def test_no_string_of_the_log_is_obeyed(tmp_path):
    missing = {**dict.fromkeys(EVIDENCE), "event": "evidence", "why": "a reason"}
    lost = {**update(61, skipped="a reason"), "number": "a number", "micro_batches": "a count"}
    evil = [{**hostile(event), "event": event["event"]} for event in [*whole_run(), lost, missing]]
    html = write_report(folder_of(tmp_path, evil)).read_text(encoding="utf-8")
    page = Page(html)
    assert outward(html) == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", html)
    tame = HOSTILE.replace("\x1b", "?").replace("\x9b", "?").replace("\u202e", "?")
    # title, heading, how it ended, trained (2), summary, batch, gradient, memory, speed, validation (2), skipped (3)
    assert page.text.count(tame) >= 15
    said = summarize(read_log(tmp_path))
    assert "<script" in said
    assert said.replace("\n", "").isprintable()


RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    '"a <b>"',
    "true",
    "[1]",
    "{}",
    "1" + "0" * 400,
    "1e308",
    "-5",
    "0",
    '""',
]


def spoiled(event: dict[str, Any], raw: str) -> str:
    """Return the line of an event with the same text for every value."""
    return "{" + ", ".join(f'"{key}": {json.dumps(event[key]) if key == "event" else raw}' for key in event) + "}\n"


@pytest.mark.parametrize("raw", [*RAW, RAW], ids=lambda raw: raw[:9] if isinstance(raw, str) else "each in turn")
def test_no_value_of_the_log_breaks_the_report(tmp_path, raw):
    """Whatever stands where a number or a text should be is shown or left out."""
    events = [START, update(1), validation(20), EVIDENCE, FINISH]
    lines = [spoiled(event, each) for event in events for each in ([raw] if isinstance(raw, str) else raw)]
    if not isinstance(raw, str):
        lines = [*(json.dumps(event) + "\n" for event in [START, update(1), update(2)]), *lines[len(raw) :]]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert outward(html) == []
    assert "<b>" not in html
    assert summarize(read_log(tmp_path)).startswith(("The", "Training run: "))
    assert ("<svg" in html) == (raw in ["-5", "0", RAW])


def test_the_same_log_gives_the_same_bytes(tmp_path):
    folder = folder_of(tmp_path, whole_run())
    first = write_report(folder).read_bytes()
    source = f"from wholebatch.evidence.report import write_report; write_report({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", source], check=True, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    )
    assert (folder / "report.html").read_bytes() == first


def test_the_report_replaces_the_earlier_one_and_leaves_nothing_else(tmp_path):
    folder = folder_of(tmp_path, whole_run())
    (folder / "report.html").write_text("earlier")
    assert write_report(folder / "log.jsonl") == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "report.html"}
    assert "earlier" not in (folder / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    folder = folder_of(tmp_path, whole_run(2))
    (folder / "report.html" / "in the way").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"report\.html cannot be written: Is a directory\.") as caught:
        write_report(folder)
    assert "wholebatch report" in caught.value.hint
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "report.html"}


def without_drawings(html: str) -> str:
    """Return the page with each plot as its opening tag: the curves are for matplotlib to test."""
    return re.sub(r"(<svg [^>]*>).*?</svg>", r"\1</svg>", html, flags=re.DOTALL)


@pytest.mark.parametrize("name", ["report.html", "summary.txt"])
def test_the_golden_files_hold(tmp_path, name):
    folder = folder_of(tmp_path, whole_run())
    if name == "report.html":
        said = without_drawings(write_report(folder).read_text(encoding="utf-8"))
    else:
        said = summarize(read_log(folder)) + "\n"
    if os.environ.get("WHOLEBATCH_REWRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(said, encoding="utf-8", newline="\n")
    assert said == (GOLDEN / name).read_text(encoding="utf-8")
