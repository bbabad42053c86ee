"""The command on several ranks, as people meet it: launched, killed, interrupted, and equal to one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wholebatch.cli import main
from wholebatch.cli.train import _as_flags
from wholebatch.recipes import ranks
from wholebatch.recipes.ranks import Place, joined

RECIPES = """
import os
import signal
import time

import torch

LAST = os.environ.get("RANK") == "1"


class Line:
    defaults = {"logical_batch": "16 rows", "micro_batch": "3 rows", "epochs": 2, "compare": False}
    seconds = 0.0
    passes = 0

    def data(self, split):
        return [(x / 10, 2 * x / 10) for x in range(33 if split == "train" else 5)]

    def model(self):
        return torch.nn.Linear(1, 1)

    def collate(self, rows):
        return torch.tensor(rows)

    def loss(self, model, micro_batch):
        self.passes += 1
        time.sleep(self.seconds)
        self.fault()
        return torch.nn.functional.mse_loss(model(micro_batch[:, :1]), micro_batch[:, 1:])

    def fault(self):
        pass


class Slow(Line):
    seconds = 0.02


class Broken(Line):
    def fault(self):
        if LAST:
            raise LookupError("nobody knows the loss")


class Killed(Slow):
    def fault(self):
        if LAST and self.passes == 8:
            os.kill(os.getpid(), signal.SIGKILL)


class Exact(Line):
    defaults = {**Line.defaults, "clip_norm": 0.5, "compare": True, "lr": 0.1}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()

    def collate(self, rows):
        return torch.tensor(rows, dtype=torch.float64)


class Vector(Line):
    def loss(self, model, micro_batch):
        return model(micro_batch[:, :1])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(RECIPES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spawn(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(*command):
    process = spawn(*command)
    out, talk = process.communicate(timeout=240)
    return process.returncode, out, talk


def train(*arguments):
    return finished("-m", "wholebatch", "train", *arguments)


def events(folder, kind=None):
    log = Path(folder, "log.jsonl")
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def test_two_processes_make_the_updates_of_one(folder):
    """The built-in text job, whose rows differ in length. AdamW's first steps are signs, which magnify rounding."""
    job = ["text", "--logical-batch", "24 rows", "--micro-batch", "1024 tokens", "--updates", "3"]
    code, out, talk = train(*job, "--nproc", "2", "--out", "two")
    assert code == 0, talk
    assert main_ends_with_0(*job, "--no-compare", "--out", "one")
    one, two = events("one", "update"), events("two", "update")
    assert len(one) == len(two) == 3
    for number, (alone, together) in enumerate(zip(one, two, strict=True)):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5 if number else 1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3 if number else 1e-5)
        assert (together["rows"], together["targets"]) == (alone["rows"], alone["targets"])
        assert together["micro_batches"] < alone["micro_batches"]
    measured, right = (events(run, "validation")[-1]["measures"] for run in ("two", "one"))
    assert measured == pytest.approx(right, rel=1e-4)
    line, report = out.splitlines()
    assert line.startswith("3 updates of 24 rows on 2 ranks, never more than ")
    assert "; gradient equal to the undivided batch's to " in line
    assert report == "two/report.html"
    assert "<html" in Path(report).read_text()
    assert events("two")[0]["ranks"] == 2
    assert talk.count("compared cut and uncut") == 1
    assert "Traceback" not in talk


def main_ends_with_0(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["train", *arguments])
    return (end.value.code or 0) == 0


def test_the_comparison_sees_another_share_of_rows(folder):
    """If each rank trained on all rows of another order, losses would differ by far more than rounding."""
    assert main_ends_with_0("mine.py:Line", "--out", "one")
    assert main_ends_with_0("mine.py:Line", "--seed", "1", "--out", "other")
    one, other = (events(run, "update")[0]["loss"] for run in ("one", "other"))
    assert one != pytest.approx(other, rel=1e-4)


def test_torchrun_starts_the_same_job(folder):
    """Also with a last logical batch of one row, of which the other rank has none."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, out, talk = finished(*launcher, "-m", "wholebatch", "train", "mine.py:Line", "--out", "two")
    assert code == 0, talk
    assert main_ends_with_0("mine.py:Line", "--out", "one")
    rows = [update["rows"] for update in events("two", "update")]
    assert rows == [16, 16, 1, 16, 16, 1]
    for alone, together in zip(events("one", "update"), events("two", "update"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert out.splitlines()[0].startswith("6 updates of 16 rows on 2 ranks")


@pytest.mark.parametrize(("wrapper", "communication"), [("ddp", "once"), ("fsdp2", "once"), ("fsdp2", "each")])
def test_a_wrapped_model_is_trained_as_by_one_process(folder, wrapper, communication):
    """Said in the file; what is validated and compared is the plain model with all of its weights."""
    Path("job.toml").write_text(f'wrapper = "{wrapper}"\ncommunication = "{communication}"\n')
    code, out, talk = train("mine.py:Exact", "--config", "job.toml", "--nproc", "2", "--out", "two")
    assert code == 0, talk
    assert main_ends_with_0("mine.py:Exact", "--out", "one")
    one, two = events("one", "update"), events("two", "update")
    assert len(one) == len(two) == 6
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-12)
    measured, right = (events(run, "validation")[-1]["measures"]["loss"] for run in ("two", "one"))
    assert measured == pytest.approx(right, rel=1e-12)
    assert "gradient equal to the undivided batch's to " in out
    assert events("two")[0]["config"]["wrapper"] == wrapper
    assert ("weights are sharded" in " ".join(events("two")[-1]["reasons"])) is (wrapper == "fsdp2")
    assert "Warning" not in talk, talk


@pytest.mark.parametrize(
    ("recipe", "code", "said"),
    [
        ("Broken", 1, ["[rank 1] error: LookupError: nobody knows the loss", "rank 1 could not: LookupError"]),
        ("Killed", 1, ["[rank 0] error: Rank 0 "]),
        ("Vector", 2, ["error: The loss is no scalar"]),
        ("Nothing", 2, ["error: mine.py has no `Nothing`"]),
    ],
)
def test_what_goes_wrong_on_a_rank_is_said_without_a_traceback(folder, recipe, code, said):
    found, out, talk = train(f"mine.py:{recipe}", "--nproc", "2", "--out", "run")
    assert found == code, talk
    assert out == ""
    for each in said:
        assert talk.count(each) == 1, talk
    assert "Traceback" not in talk
    if recipe in ("Broken", "Killed"):
        assert events("run")[-1]["status"] == "failed"
        assert Path("run/report.html").exists()


def test_ctrl_c_ends_all_ranks_cleanly(folder):
    process = spawn("-m", "wholebatch", "train", "mine.py:Slow", "--epochs", "1000", "--nproc", "2", "--out", "run")
    end = time.monotonic() + 120
    while len(events("run")) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, talk = process.communicate(timeout=240)
    assert process.returncode == 130, talk
    finish = events("run")[-1]
    assert (finish["event"], finish["status"]) == ("finish", "interrupted")
    assert out.splitlines() == [finish["summary"], "run/report.html"]
    assert "Traceback" not in talk
    assert "error" not in talk


def test_one_process_needs_no_launcher_and_wraps_nothing(folder, capsys):
    assert main_ends_with_0("mine.py:Line", "--nproc", "1", "--wrapper", "ddp", "--out", "run")
    assert "here it is left out" in capsys.readouterr().err
    assert events("run")[0]["ranks"] == 1


def test_ranks_are_not_started_from_a_rank(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["train", "mine.py:Line", "--nproc", "2"])
    assert end.value.code == 2
    assert "this is rank 1 of 2" in capsys.readouterr().err


def test_an_environment_that_says_half_of_it_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ranks.ConfigError, match="RANK is not set"), joined():
        pass


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(ranks.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(ranks.torch.accelerator, "current_accelerator", lambda: ranks.torch.device("cuda"))
    monkeypatch.setattr(ranks.torch.accelerator, "device_count", lambda: 1)
    taken = []
    monkeypatch.setattr(ranks.torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ranks.ConfigError, match="1 of cuda"):
        ranks._choose_device()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ranks._choose_device() == "cpu:gloo,cuda:nccl"
    assert taken == [0]


@pytest.mark.parametrize("length", [None, len])
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_every_row_goes_to_one_rank(size, length):
    rows = ["x" * (place % 5 + place) for place in range(size)]
    shares = [Place(rank, 4).share(rows, length) for rank in range(4)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    if size >= 4:
        work = [sum(map(len, share)) for share in shares]
        assert min(map(len, shares)) > 0
        assert length is None or max(work) - min(work) <= 64
    assert Place().share(rows, length) == rows


def test_a_signal_breaks_off_work_once_and_nothing_else():
    place = Place()
    place.stop(signal.SIGTERM, None)
    assert place.stopped is None
    with pytest.raises(KeyboardInterrupt), place.at_work():
        place.stop(signal.SIGTERM, None)
    with place.at_work():
        place.stop(signal.SIGINT, None)
    assert place.stopped == signal.SIGTERM
    assert "Rank 0 was told to stop (SIGTERM)" in place.why_stopped().found


def test_flags_are_said_again_as_they_were():
    given = {"recipe": "text", "lr": 1e-3, "compare": False, "sink": ["wandb", "mlflow"], "logical_batch": "8 rows"}
    said = "--config job.toml text --lr 0.001 --no-compare --sink wandb --sink mlflow --logical-batch"
    assert _as_flags(given, Path("job.toml")) == [*said.split(), "8 rows"]
    assert _as_flags({"compare": True}, None) == ["--compare"]
