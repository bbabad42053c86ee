"""Several runs side by side: one page and one table, from their logs alone."""

import json
import re
from pathlib import Path

import pytest

from wholebatch.core.errors import ConfigError, MissingExtraError
from wholebatch.evidence.beside import summarize_runs, write_comparison
from wholebatch.evidence.curves import Curve, curves

MIB = 2**20


def run(folder, *, losses=(3.0, 2.0, 1.0), batch_norm="exact", accuracy=0.5, status="done", out=None, error=1e-7):
    """Write the log of a run into a folder."""
    folder.mkdir(parents=True)
    config = {"recipe": "images", "batch_norm": batch_norm, "seed": 0, "out": out, "compare": True}
    events = [{"event": "start", "recipe": "images", "config": config}]
    for number, loss in enumerate(losses, 1):
        events.append({"event": "update", "number": number, "loss": loss, "peak_bytes": number * MIB, "skipped": None})
    measures = {"loss": 0.25, "accuracy": accuracy}
    events.append({"event": "validation", "epoch": 1, "update": len(losses), "measures": measures})
    events.append({"event": "evidence", "gradient_error": error})
    events.append({"event": "finish", "status": status, "seconds": 12.0})
    folder.joinpath("log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture
def two(tmp_path):
    exact = run(tmp_path / "runs" / "exact", out="runs/exact")
    return [exact, run(tmp_path / "runs" / "group", losses=(4.0, 3.0), batch_norm="group", accuracy=0.75, out="x")]


def test_a_table_holds_what_differs_and_what_came_of_it(two):
    assert [re.split(r"  +", line) for line in summarize_runs(two).splitlines()] == [
        [
            "Run",
            "Batch norm",
            "Updates",
            "Training loss",
            "Validation loss",
            "Validation accuracy",
            "Peak memory",
            "Gradient off by",
            "Time",
        ],
        ["exact", "exact", "3", "1", "0.25", "0.5", "3 MiB", "1.0e-07", "12 s"],
        ["group", "group", "2", "3", "0.25", "0.75", "2 MiB", "1.0e-07", "12 s"],
    ]


def test_the_page_stands_in_the_folder_of_the_runs_and_shows_a_curve_for_each(two):
    page = write_comparison(two)
    assert page == two[0].parent / "comparison.html"
    html = page.read_text()
    assert "<h1>2 training runs: images</h1>" in html
    assert "They differ in batch norm." in html
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["Training loss", "Validation loss", "Validation accuracy"]
    assert "At the end: exact 0.5, group 0.75." in html
    for role in ("series", "accent"):  # the colours of the first and the second run
        assert f"var(--{role}, " in html.replace("&quot;", '"')


def test_the_page_loads_nothing_and_is_the_same_each_time(two, tmp_path):
    first = write_comparison(two).read_text()
    assert set(re.findall(r"https?://[^\s\"'<>]+", first)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in first
    assert write_comparison(two, tmp_path / "other.html").read_text() == first
    names = re.findall(r' id="([^"]+)"', first)
    assert len(names) == len(set(names))


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(tmp_path):
    both = [run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", batch_norm="frozen")]
    names = [line.split("  ")[0] for line in summarize_runs(both).splitlines()[1:]]
    assert names == [str(each) for each in both]
    assert write_comparison(both).parent == tmp_path


def test_runs_that_were_asked_for_in_the_same_words_are_said_to_be(tmp_path):
    both = [run(tmp_path / "one", out="one"), run(tmp_path / "two", out="two")]
    assert "They were asked for in the same words." in write_comparison(both).read_text()


def test_a_run_that_is_not_done_is_named(tmp_path):
    both = [run(tmp_path / "one"), run(tmp_path / "two", status="interrupted")]
    assert "Not every run is done: two (interrupted)." in write_comparison(both).read_text()


def test_what_nobody_measured_is_left_out(tmp_path):
    both = [run(tmp_path / name, error=None) for name in ("one", "two")]
    assert "Gradient off by" not in summarize_runs(both)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "log.jsonl").write_text('{"event": "update", "number": 1}\n')
    assert summarize_runs([both[0], bare]).splitlines()[2].split() == ["bare", *"---", "1", *"-----"]
    assert "bare" in write_comparison([both[0], bare]).read_text()


def test_a_loss_is_smoothed_over_some_updates_and_the_caption_says_so(tmp_path):
    losses = [float(number % 2) for number in range(48)]
    both = [run(tmp_path / name, losses=losses) for name in ("one", "two")]
    html = write_comparison(both).read_text()
    assert "a mean over 2 updates" in html.replace("&nbsp;", " ")
    assert "At the end: one 0.5, two 0.5." in html


def test_what_a_log_or_a_folder_is_called_is_not_obeyed(tmp_path):
    evil = "<script>alert(1)</script>"
    both = [run(tmp_path / "$a_b$ & c", batch_norm=evil), run(tmp_path / "__init__")]
    html = write_comparison(both).read_text()
    assert "<script" not in html
    assert "&lt;script" in html


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: [path], "cannot be compared"),
        (lambda path: [path, path / "log.jsonl"], "given twice"),
        (lambda path: [path, path / "nowhere"], "no run folder"),
    ],
)
def test_what_cannot_be_compared_is_said_with_a_hint(tmp_path, made, said):
    with pytest.raises(ConfigError, match=said) as raised:
        write_comparison(made(run(tmp_path / "one")))
    assert raised.value.hint


def test_a_page_goes_where_a_file_can_be(two, tmp_path):
    for out in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(ConfigError, match="no file can be written"):
            write_comparison(two, out)


def test_a_missing_matplotlib_says_which_install_brings_it(two, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError):
        write_comparison(two)
    assert "exact" in summarize_runs(two)  # the table needs no plots


def test_a_plot_without_a_value_is_none():
    assert curves("Loss", "", [Curve("one", [])]) is None


def test_more_runs_than_colours_are_drawn():
    shown = curves("Loss", "Falls.", [Curve(f"run {place}", [(1, 2.0), (2, 1.0)]) for place in range(9)])
    assert shown.svg.count("run 8") == 2  # in the legend and for screen readers
    assert shown.title == "Loss"


def test_paths_may_be_relative(two, monkeypatch):
    monkeypatch.chdir(two[0].parent)
    assert write_comparison(["exact", Path("group")]) == Path("comparison.html")
