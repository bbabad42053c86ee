"""Where events go: a log that is whole or says why, a bar for the terminal, and a seam for the rest."""

import errno
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from wholebatch.core.errors import ConfigError, MissingExtraError, WholeBatchError
from wholebatch.core.record import Update
from wholebatch.evidence.sinks import CallbackSink, JsonLines, ProgressBar, SinkError, Sinks

FULL = Path("/dev/full")
UPDATE = Update(number=1, loss=2.5, targets=900, rows=64, micro_batches=4, lr=0.1, peak_bytes=2**30, seconds=0.5)
EVENT = {"event": "update", "epoch": 1, **UPDATE.to_dict()}


def lines_of(path: Path) -> list[dict[str, object]]:
    """Return the events of a log as a strict reader of JSON sees them: NaN is no JSON."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="ascii").splitlines()]


# The log


def test_each_event_is_on_disk_before_the_next_one_begins(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    for number in range(1, 4):
        log.write({**EVENT, "number": number})
        assert [event["number"] for event in lines_of(log.path)] == list(range(1, number + 1))
    log.close()


def test_an_update_comes_back_as_it_was(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.write(EVENT)
    log.close()
    (event,) = lines_of(log.path)
    assert (event.pop("event"), event.pop("epoch")) == ("update", 1)
    assert Update(**event) == UPDATE


def test_what_json_cannot_say_becomes_null_or_text(tmp_path):
    log = JsonLines(str(tmp_path / "log.jsonl"))
    values = {"nan": float("nan"), "up": float("inf"), "deep": {"down": [1.5, float("-inf"), ("a", None)]}}
    tensors = {"count": torch.tensor(3), "mean": torch.tensor(0.5), "odd": torch.tensor(float("nan"))}
    log.write({"event": "odd", **values, **tensors, "many": torch.ones(2), "where": Path("a/b"), 7: "\ud800\n"})
    (event,) = lines_of(log.path)
    assert event == {
        "event": "odd",
        "nan": None,
        "up": None,
        "deep": {"down": [1.5, None, ["a", None]]},
        "count": 3,
        "mean": 0.5,
        "odd": None,
        "many": "tensor([1., 1.])",
        "where": "a/b",
        "7": "\ud800\n",
    }
    log.close()


def test_missing_folders_are_made_and_an_earlier_log_is_replaced(tmp_path):
    path = tmp_path / "runs" / "first" / "log.jsonl"
    for loss in (1.0, 2.0):
        log = JsonLines(path)
        log.write({"event": "update", "loss": loss})
        log.close()
    assert lines_of(path) == [{"event": "update", "loss": 2.0}]


def test_closing_twice_is_closing_once_and_a_closed_log_takes_nothing(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.close()
    log.close()
    with pytest.raises(SinkError, match=r"is closed and takes no update event.*\n\nhint: "):
        log.write(EVENT)


@pytest.mark.parametrize("inside", ["a folder", "a file/log.jsonl"])
def test_a_path_that_cannot_be_written_is_the_users_mistake(tmp_path, inside):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").touch()
    path = tmp_path / inside
    with pytest.raises(ConfigError) as caught:
        JsonLines(path)
    assert str(path) in caught.value.found
    assert isinstance(caught.value.__cause__, OSError)
    assert "--out" in caught.value.hint


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file():
    log = JsonLines(FULL)
    with pytest.raises(SinkError) as caught:
        log.write(EVENT)
    assert isinstance(caught.value, WholeBatchError)
    assert isinstance(caught.value, OSError)
    assert not isinstance(caught.value, ConfigError)  # the run failed: the user's input was not wrong
    assert str(caught.value.__cause__.errno) == str(errno.ENOSPC)
    assert "/dev/full: No space left on device." in caught.value.found
    assert "free some space" in caught.value.hint
    log.close()


def test_a_line_that_did_not_fit_leaves_no_trace(tmp_path):
    """The disk fills up in the middle of a line; what is written later follows the last whole line."""
    resource = pytest.importorskip("resource")
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"event": "first"})
    whole = log.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 10, limits[1]))
    try:
        with pytest.raises(SinkError, match="File too large"):
            log.write(EVENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.stat().st_size == whole
    log.write({"event": "later"})
    log.close()
    assert [event["event"] for event in lines_of(log.path)] == ["first", "later"]


# A function


def test_every_sink_takes_an_update_as_it_is(tmp_path):
    """A log held it as a text, and the others ended in an AttributeError."""
    update = Update(number=1, loss=2.5, targets=900, rows=64, micro_batches=4, lr=0.1)
    seen = []
    screen = io.StringIO()
    sinks = (
        CallbackSink(seen.append),
        JsonLines(tmp_path / "log.jsonl"),
        ProgressBar(console=Console(file=screen)),
    )
    for sink in sinks:
        sink.write(update)
        sink.close()
    right = {"event": "update", **update.to_dict()}
    assert seen == [right]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == right
    assert "loss 2.5" in screen.getvalue()


def test_any_function_is_a_sink():
    seen = []
    sink = CallbackSink(seen.append)
    sink.write(EVENT)
    sink.close()
    assert seen == [EVENT]


# The bar


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A progress bar on a terminal, or on a file, that is not there."""

    def __init__(self, *, terminal: bool, width: int = 120) -> None:
        self.file = io.StringIO()
        self.clock = Clock()
        console = Console(file=self.file, force_terminal=terminal, force_interactive=terminal, width=width)
        self.bar = ProgressBar(console=console, every_seconds=10, clock=self.clock)

    def show(self, events: list[dict[str, object]], *, seconds_each: float) -> str:
        for event in events:
            self.clock.now += seconds_each if event["event"] == "update" else 0
            self.bar.write(event)
        return self.text

    @property
    def text(self) -> str:
        """What was written, without the codes that move the cursor and set colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.file.getvalue())


def updates(count: int, **more: object) -> list[dict[str, object]]:
    return [{**EVENT, "number": number, "loss": 10.0 / number, **more} for number in range(1, count + 1)]


@pytest.fixture(autouse=True)
def _no_dumb_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


START = {"event": "start", "updates_planned": 40}
FINISH = {"event": "finish", "status": "done"}


def test_the_bar_shows_what_a_person_waits_for():
    screen = Screen(terminal=True)
    text = screen.show([START, *updates(10)], seconds_each=3.0)
    for said in ("epoch 1", "update 10/40", "loss 1", "1,800 targets/s", "1 GiB", "1 min 30 s left"):
        assert said in text.splitlines()[-1]
    screen.bar.close()


def test_the_speed_is_that_of_the_last_windows():
    screen = Screen(terminal=True)
    text = screen.show([START, *updates(10), *updates(10, targets=450)], seconds_each=1.0)
    assert "900 targets/s" in text.splitlines()[-1]
    screen.bar.close()


def test_the_terminal_is_given_back():
    screen = Screen(terminal=True)
    screen.show([START, *updates(2)], seconds_each=1.0)
    assert screen.file.getvalue().count("\x1b[?25l") == 1  # the cursor is hidden
    screen.bar.write(FINISH)
    screen.bar.close()
    assert screen.file.getvalue().count("\x1b[?25h") == 1
    assert screen.file.getvalue().rindex("\x1b[?25h") > screen.file.getvalue().rindex("update 2/40")


def test_stdout_is_not_drawn_on(capsys):
    """Data goes to stdout: the bar on stderr leaves it alone."""
    screen = Screen(terminal=True)
    screen.show([START, *updates(1)], seconds_each=1.0)
    print("data")
    screen.bar.close()
    assert capsys.readouterr().out == "data\n"
    assert "data" not in screen.text


def test_fast_updates_are_not_all_drawn():
    screen = Screen(terminal=True)
    text = screen.show([{**START, "updates_planned": 1000}, *updates(1000)], seconds_each=0.001)
    assert 5 <= text.count("targets/s") <= 20
    assert "update 1000/1000" in text
    screen.bar.close()


def test_a_narrow_terminal_keeps_the_words():
    narrow, wide = Screen(terminal=True, width=80), Screen(terminal=True, width=120)
    for screen in (narrow, wide):
        screen.show([START, *updates(10)], seconds_each=1.0)
        screen.bar.close()
    assert "1 GiB  30 s left" in narrow.text
    bar = "\u2501" * 3
    assert bar in wide.text
    assert bar not in narrow.text


@pytest.mark.parametrize("terminal", [True, False])
def test_validation_and_skipped_updates_are_said(terminal):
    screen = Screen(terminal=terminal)
    skipped = updates(6, skipped="The gradient is [bold]not[/bold] finite.", loss=float("nan"), epoch="[b]1[/b]")
    validation = {"event": "validation", "epoch": 1, "update": 6, "measures": {"loss": 2.25, "odd": float("nan")}}
    text = screen.show([START, *skipped, validation], seconds_each=1.0)
    screen.bar.close()
    assert text.count("skipped: The gradient is [bold]not[/bold] finite.") == 2
    assert text.count("skipped (the log has the reasons of further ones): The gradient") == 1
    assert "epoch 1, validation: loss 2.25, odd nan" in text
    assert "epoch [b]1[/b]" in screen.text
    assert "loss nan" in screen.text
    assert "6 skipped" in screen.text


def test_a_file_gets_a_short_line_now_and_then():
    screen = Screen(terminal=False)
    text = screen.show([START, *updates(25)], seconds_each=1.0)
    assert text.splitlines() == [
        "epoch 1, update 1/40, loss 10, 1,800 targets/s, 1 GiB, 39 s left",
        "epoch 1, update 11/40, loss 0.9091, 1,800 targets/s, 1 GiB, 29 s left",
        "epoch 1, update 21/40, loss 0.4762, 1,800 targets/s, 1 GiB, 19 s left",
    ]
    screen.bar.write(FINISH)
    assert screen.text.splitlines()[3:] == ["epoch 1, update 25/40, loss 0.4, 1,800 targets/s, 1 GiB, 15 s left"]
    screen.bar.close()
    assert len(screen.text.splitlines()) == 4
    assert "\x1b" not in screen.file.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(terminal=True)
    screen.show([START, *updates(25)], seconds_each=1.0)
    assert len(screen.text.splitlines()) == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_little_is_enough(terminal):
    """A loop of one's own may write updates alone, and an update may lack what was not measured."""
    screen = Screen(terminal=terminal)
    bare = Update(number=1, loss=2.5, targets=8, rows=None, micro_batches=1, lr=0.1)
    screen.bar.write({"event": "update", **bare.to_dict()})
    screen.bar.write({"event": "of another kind"})
    screen.bar.close()
    assert "update 1" in screen.text
    assert "loss 2.5" in screen.text
    assert not re.search(r"epoch|targets/s|left|None|/", screen.text)


def test_a_missing_rich_says_which_install_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=re.escape("hint: pip install 'wholebatch[cli]'")):
        ProgressBar()


@pytest.mark.parametrize("module", ["sinks", "report"])
def test_the_import_needs_the_standard_library_alone(module):
    source = f"import sys, wholebatch.evidence.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"wholebatch.evidence.{module}" in loaded
    assert loaded & {"rich", "matplotlib", "numpy", "torch", "pydantic"} == set()


@pytest.mark.parametrize("other", [3, [CallbackSink(print)], print])
def test_what_is_no_sink_is_refused(other):
    with pytest.raises(ConfigError, match="is no sink") as error:
        Sinks(CallbackSink(print), other)
    assert "CallbackSink(function)" in error.value.hint


def test_a_callback_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="A callback is a int"):
        CallbackSink(3)
