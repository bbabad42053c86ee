"""The command as people meet it: real processes, their two streams, their exit codes, their files."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wholebatch
from wholebatch.cli import commands, main
from wholebatch.cli.doctor import examine, extras, satisfies
from wholebatch.cli.edge import edge
from wholebatch.core import errors
from wholebatch.recipes.finding import BUILT_IN
from wholebatch.recipes.options import OPTIONS

COMMANDS = ["train", "plan", "tune", "verify", "report", "doctor"]
MY_FILE = '''
"""The least that a recipe has to say."""

import time

import torch


class Line:
    defaults = {"logical_batch": "16 rows", "micro_batch": "3 rows", "epochs": 2, "compare": False}
    seconds = 0.0

    def data(self, split):
        return [(x / 10, 2 * x / 10) for x in range(40 if split == "train" else 5)]

    def model(self):
        return torch.nn.Linear(1, 1)

    def collate(self, rows):
        return torch.tensor(rows)

    def loss(self, model, micro_batch):
        time.sleep(self.seconds)
        return torch.nn.functional.mse_loss(model(micro_batch[:, :1]), micro_batch[:, 1:])


class Slow(Line):
    seconds = 0.01


class Wrong(Line):
    def loss(self, model, micro_batch):
        return super().loss(model, micro_batch) * len(micro_batch)  # a sum, declared as a mean


class Broken(Line):
    def loss(self, model, micro_batch):
        raise LookupError("nobody knows the loss")


class Vector(Line):
    def loss(self, model, micro_batch):
        return model(micro_batch[:, :1])


class Stepping(Line):
    def step(self, model, optimizer, micro_batches):
        optimizer.zero_grad()
        rows = sum(len(micro_batch) for micro_batch in micro_batches)
        for micro_batch in micro_batches:
            (self.loss(model, micro_batch) * len(micro_batch) / rows).backward()
        optimizer.step()


class Averaging(Line):
    def step(self, model, optimizer, micro_batches):
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            loss = self.loss(model, micro_batch) / len(micro_batches)
            loss.backward()
        optimizer.step()


class Argless(Line):
    def step(self):
        pass


recipe = Line()
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_file.py").write_text(MY_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(*arguments, **options):
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(arguments, **options)
    return end.value.code or 0


def spawn(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "wholebatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finished(*arguments):
    """Run the command in a process of its own; return its exit code, stdout and stderr."""
    process = spawn(*arguments)
    out, talk = process.communicate(timeout=240)
    return process.returncode, out, talk


def events(run_folder):
    log = Path(run_folder, "log.jsonl")
    # The last line may be half written while the run goes on.
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def test_a_job_of_ones_own_runs_end_to_end(folder):
    (folder / "job.toml").write_text('micro_batch = "5 rows"\nepochs = 1\ncompare = true\nseed = 4\n')
    code, out, talk = finished("train", "my_file.py:recipe", "--config", "job.toml", "--epochs", "3", "--out", "first")
    assert code == 0, talk
    line, report = out.splitlines()
    assert line.startswith("9 updates of 16 rows, never more than 5 rows in memory at once; validation loss ")
    assert "; gradient equal to the undivided batch's to " in line
    assert report == "first/report.html"
    assert line == events("first")[-1]["summary"]
    assert "<html" in Path(report).read_text()
    assert "9 updates of 16 rows, 5 rows at once" in talk
    assert "compared cut and uncut" in talk
    start = events("first")[0]
    assert (start["recipe"], start["seed"], start["micro_batch"]) == ("my_file.py:recipe", 4, "5 rows")


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_ctrl_c_ends_a_run_cleanly(folder):
    process = spawn("train", "my_file.py:Slow", "--epochs", "1000", "--out", "run")
    wait_for(lambda: len(events("run")) > 4, process)
    process.send_signal(signal.SIGINT)
    out, talk = process.communicate(timeout=240)
    assert process.returncode == 130, talk
    finish = events("run")[-1]
    assert (finish["event"], finish["status"]) == ("finish", "interrupted")
    assert finish["updates"] == sum(event["event"] == "update" for event in events("run"))
    line, report = out.splitlines()
    assert line == finish["summary"]
    assert line.startswith("Interrupted after ")
    assert "interrupted" in Path(report).read_text()
    assert "Traceback" not in talk


def test_runs_are_shown_side_by_side(folder, capsys):
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "log.jsonl").write_text('{"event": "update", "number": 1, "loss": 2.5}\n')
    assert run("report", "one", "two") == 0
    out, err = capsys.readouterr()
    assert out == "comparison.html\n"
    assert [line.split() for line in err.splitlines()[1:]] == [["one", "1", "2.5"], ["two", "1", "2.5"]]
    assert run("report", "one", "two", "--out", "page.html") == 0
    assert capsys.readouterr().out == "page.html\n"
    assert Path("page.html").read_text() == Path("comparison.html").read_text()
    assert run("report", "one", "--out", "page.html") == 2
    assert "is for several runs" in capsys.readouterr().err


def test_a_report_is_written_anew(folder, capsys):
    """Data goes to stdout, talk to stderr; the log is that of a run that was killed."""
    log = [{"event": "start", "recipe": "text"}, {"event": "update", "number": 1, "loss": 2.5}]
    Path("run").mkdir()
    Path("run/log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    assert run("report", "run") == 0
    out, talk = capsys.readouterr()
    assert out == "run/report.html\n"
    assert "ends early" in talk
    assert "<html" in Path("run/report.html").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_a_sentence_and_a_failed_run(folder, capsys):
    Path("run").mkdir()
    Path("run/log.jsonl").symlink_to("/dev/full")
    assert run("train", "my_file.py:recipe", "--out", "run") == 1
    out, talk = capsys.readouterr()
    assert out == ""
    assert "error: An event could not be written to the log run/log.jsonl: No space left on device." in talk
    assert "hint: free some space" in talk
    assert "Traceback" not in talk


@pytest.mark.parametrize(
    ("arguments", "code", "found", "hint"),
    [
        (["train", "txt"], 2, "There is no recipe 'txt'.", "did you mean 'text'?"),
        (["train"], 2, "`recipe` is not given.", "`recipe` takes text, images"),
        (["train", "no_file.py:recipe"], 2, "There is no file no_file.py.", "did you mean my_file.py?"),
        (["train", "my_file.py:recip"], 2, "my_file.py has no `recip`.", "did you mean my_file.py:recipe?"),
        (["train", "text", "--config", "no.toml"], 2, "no.toml cannot be read: No such file", "current folder"),
        (["train", "text", "--config", "bad.toml"], 2, "no key `logical_bach` (in bad.toml)", "`logical_batch`"),
        (["train", "text", "--micro-batch", "5"], 2, "`--micro-batch` is '5'", "such as '16 rows'"),
        (["train", "text", "--lr", "-1"], 2, "`--lr` is -1.0", "a number above 0"),
        (["train", "text", "--precision", "fp8"], 2, "`--precision` is 'fp8'", "'bf16'"),
        (["train", "my_file.py:recipe", "--micro-batch", "8 tokens"], 2, "8 tokens was asked for", "length(row)"),
        (["train", "my_file.py:recipe", "--out", "my_file.py"], 2, "cannot be opened for writing", "--out"),
        (["train", "my_file.py:Vector", "--out", "run"], 2, "The loss is no scalar", "hint:"),
        (["train", "my_file.py:Wrong", "--out", "run"], 1, "gradient", "hint:"),
        (
            ["train", "my_file.py:Broken", "--out", "run"],
            1,
            "LookupError: nobody knows the loss (my_file.py, line ",
            "--debug",
        ),
        (["verify", "txt"], 2, "There is no recipe 'txt'.", "did you mean 'text'?"),
        (["verify", "my_file.py:recipe", "--micro-batch", "x"], 2, "`--micro-batch` is 'x'", "'16 rows'"),
        (["plan", "txt"], 2, "There is no recipe 'txt'.", "did you mean 'text'?"),
        (["plan", "my_file.py:recipe", "--memory", "8"], 2, "`--memory` is '8'", "'8GiB'"),
        (["plan", "my_file.py:recipe", "--ranks", "8", "--bandwidth", "25"], 2, "bandwidth='25'", '"25GB/s"'),
        (["plan", "my_file.py:recipe", "--bandwidth", "25GB/s"], 2, "there is one rank", "ranks=8"),
        (["plan", "my_file.py:recipe", "--ranks", "99"], 2, "16 rows: some would have none", "at most 16 ranks"),
        (["plan", "my_file.py:recipe", "--logical-batch", "9 tokens"], 2, "9 tokens was asked for", "length(row)"),
        (["train", "my_file.py:recipe", "--memory", "much"], 2, "`--memory` is 'much'", "'500MB'"),
        (["report", "nowhere"], 2, "There is no run folder nowhere", "wholebatch train"),
        (["report", "."], 2, "holds no log.jsonl", "wholebatch train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_a_sentence_a_hint_and_an_exit_code(arguments, code, found, hint, folder, capsys):
    (folder / "bad.toml").write_text('logical_bach = "8 rows"\n')
    assert run(*arguments) == code
    out, talk = capsys.readouterr()
    assert out == ""
    error = talk[talk.index("error: ") :]
    assert found in error
    assert hint in error
    assert "\nhint: " in error
    assert "Traceback" not in talk


def test_a_wrong_key_in_a_real_process(folder):
    (folder / "bad.toml").write_text('recipe = "text"\nlearning_rte = 1.0\nsed = 3\n')
    code, out, talk = finished("train", "--config", "bad.toml")
    assert (code, out) == (2, "")
    assert "`learning_rte`" in talk
    assert "did you mean `seed`?" in talk


def test_debug_shows_the_traceback_too(folder, capsys):
    assert run("train", "my_file.py:Broken", "--out", "run", "--debug") == 1
    talk = capsys.readouterr().err
    assert "Traceback (most recent call last)" in talk
    assert 'raise LookupError("nobody knows the loss")' in talk
    assert "What the run did until then is in run." in talk


@pytest.mark.parametrize(
    "arguments", [["train", "--nope"], ["nope"], ["train", "text", "--epochs", "many"], ["report"]]
)
def test_a_wrong_usage_ends_with_2(arguments, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().out == ""


def test_verify_says_equal_and_ends_with_0(folder, capsys):
    assert run("verify", "my_file.py:recipe", "--rows", "12") == 0
    assert capsys.readouterr().out.startswith("equal: the gradient of 12 rows as a whole and in 3 micro-batches")


def test_verify_names_the_cause_and_ends_with_1(folder, capsys):
    assert run("verify", "my_file.py:Wrong", "--rows", "12", "--micro-batch", "5 rows", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["micro_batches"] == 3
    assert found["cause"]


def test_verify_judges_a_step_of_the_recipe(folder, capsys):
    assert run("verify", "my_file.py:Stepping", "--rows", "11") == 0
    assert capsys.readouterr().out.startswith("equal: the update of the step of 11 rows as a whole and in 3")


def test_verify_names_the_line_of_a_step_and_writes_the_certificate(folder):
    command = [
        sys.executable,
        "-m",
        "wholebatch",
        "verify",
        "my_file.py:Averaging",
        "--rows",
        "11",
        "--out",
        "found.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cause: mean of means." in done.stdout
    assert "loss = self.loss(model, micro_batch) / len(micro_batches)" in done.stdout
    assert "The certificate is in found.json." in done.stderr
    found = json.loads((folder / "found.json").read_text())
    (cause,) = found["causes"]
    assert cause["name"] == "mean of means"
    assert cause["line"].startswith("my_file.py:")
    assert [cut["name"] for cut in found["cuts"]] == ["by rows", "permuted", "ragged"]


def test_verify_refuses_a_step_that_cannot_be_called(folder, capsys):
    assert run("verify", "my_file.py:Argless", "--rows", "11") == 2
    assert "cannot be called as step(model, optimizer, micro_batches)" in capsys.readouterr().err


def test_verify_refuses_a_file_that_cannot_be_written(folder, capsys):
    assert run("verify", "my_file.py:recipe", "--rows", "11", "--out", "nowhere/certificate.json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nowhere" in captured.err


def test_a_plan_says_what_fits_and_ends_with_0(folder, capsys):
    assert run("plan", "my_file.py:recipe", "--memory", "1GiB", "--no-time") == 0
    out = capsys.readouterr().out
    assert out.startswith("It fits: 16 rows, nothing is cut, fp32, ")
    assert "\n- " in out


def test_a_plan_is_drawn(folder, capsys):
    assert run("plan", "my_file.py:recipe", "--no-time", "--plot", "memory.svg") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("It fits")
    assert captured.err == "The picture is in memory.svg.\n"
    assert "rows in a micro-batch" in (folder / "memory.svg").read_text(encoding="utf-8")
    assert run("plan", "my_file.py:recipe", "--plot", "nowhere/memory.svg") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`--plot` is 'nowhere/memory.svg', where no file can be written." in captured.err


def test_a_plan_that_does_not_fit_ends_with_1_and_can_be_read_by_programs(folder, capsys):
    assert run("plan", "my_file.py:recipe", "--memory", "1kB", "--no-time", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["reasons"]


def test_a_plan_in_tokens_and_a_micro_batch_of_ones_own(capsys):
    assert run("plan", "text", "--logical-batch", "4000 tokens", "--memory", "60MB", "--no-time", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batch"].keys() == {"tokens"}
    assert found["peak_bytes"] <= 60_000_000
    assert run("plan", "images", "--memory", "1GiB", "--micro-batch", "16 rows", "--no-time", "--json") == 0
    assert json.loads(capsys.readouterr().out)["micro_batch"] == {"rows": 16}


def test_a_run_keeps_to_a_budget(folder, capsys):
    assert run("train", "my_file.py:recipe", "--memory", "1GiB", "--micro-batch", "auto", "--out", "run") == 0
    assert any("of the budget, so it is not cut" in reason for reason in events("run")[-1]["reasons"])
    assert run("train", "my_file.py:recipe", "--memory", "2kB", "--micro-batch", "auto", "--out", "run") == 1
    assert "does not hold one row" in capsys.readouterr().err


def test_the_recipes_are_listed(capsys):
    assert run("train", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BUILT_IN)
    assert all(len(line.split()) > 4 for line in lines)


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{wholebatch.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(command, capsys):
    assert run(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"wholebatch {command}" in said.partition("Example")[2]


def test_the_help_lists_the_commands(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in COMMANDS)


def test_what_can_be_stated_in_a_file_can_be_stated_by_flag():
    flags = set(inspect.signature(commands.train).parameters)
    assert set(OPTIONS) <= flags
    assert flags - set(OPTIONS) == {"config", "list_", "debug", "nproc"}


def test_waiting_threads_sleep_unless_the_user_says_otherwise(folder, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run("verify", "my_file.py:recipe", "--rows", "4")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run("verify", "my_file.py:recipe", "--rows", "4")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (errors.ConfigError("Found.", hint="do."), 2),
        (errors.SplitError("Found.", hint="do."), 2),
        (errors.LossError("Found.", hint="do."), 2),
        (errors.OptimizerError("Found.", hint="do."), 2),
        (errors.WeightError("Found.", hint="do."), 2),
        (errors.BatchNormError("Found.", hint="do."), 2),
        (errors.MissingExtraError("Found.", hint="do."), 2),
        (errors.NonFiniteError("Found.", hint="do."), 1),
        (errors.VerifyError("Found.", hint="do."), 1),
        (errors.WindowError("Found.", hint="do."), 1),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), 1),
        (OSError(28, "No space left on device"), 1),
        (ValueError(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_exception_has_its_exit_code(error, code, capsys):
    with pytest.raises(SystemExit) as end, edge(debug=False):
        raise error
    assert end.value.code == code
    talk = capsys.readouterr().err
    assert "Traceback" not in talk
    if isinstance(error, errors.WholeBatchError):
        assert talk == "error: Found.\nhint: do.\n"
    elif not isinstance(error, KeyboardInterrupt):
        assert talk.startswith(("error: ", "hint: "))
        assert "\nhint: " in talk


@pytest.mark.parametrize("passing", [SystemExit(3), BrokenPipeError()], ids=repr)
def test_what_is_no_error_passes_the_edge(passing):
    with pytest.raises(type(passing)), edge(debug=False):
        raise passing


def blocked(*modules):
    """Source that runs the command in an interpreter where some modules are not installed."""
    return f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from wholebatch.cli import main
main()
"""


@pytest.mark.parametrize(
    ("missing", "arguments", "code", "said"),
    [
        (("typer",), ["--help"], 2, "pip install 'wholebatch[cli]'"),
        (("torch",), ["train", "text"], 2, "pip install 'wholebatch[torch]'"),
        (("torch", "numpy", "pydantic", "rich", "matplotlib"), ["--help"], 0, "Commands:"),
        (("torch", "numpy", "rich", "matplotlib"), ["doctor"], 0, "unknown without PyTorch"),
    ],
    ids=["typer", "torch", "help", "doctor"],
)
def test_a_missing_extra_is_named(missing, arguments, code, said):
    done = subprocess.run(
        [sys.executable, "-c", blocked(*missing), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr


def test_the_doctor_tells_what_is_here():
    said = examine()
    for word in ("torch", "typer", "pydantic", "device", "threads", "memory", "disk", wholebatch.__version__):
        assert word in said


def test_the_doctor_is_well_without_a_place_to_speak(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("doctor") == 0


def test_the_doctor_tells_what_is_missing_and_what_brings_it(monkeypatch):
    monkeypatch.setattr(
        "wholebatch.cli.doctor._installed", {"torch": "2.1.0", "numpy": "2.0", "safetensors": "0.8"}.get
    )
    said = examine()
    assert "2.1.0, but it has to be" in said
    assert "pip install 'wholebatch[torch]'" in said
    assert "pip install 'wholebatch[plots]'" in said
    monkeypatch.setattr("wholebatch.cli.doctor.satisfies", lambda _version, _bounds: True)
    assert "pip install 'wholebatch[torch]'" not in examine()


def test_extras_are_those_of_the_project():
    found = extras()
    assert list(found)[:3] == ["torch", "cli", "plots"]
    assert set(found["cli"]) == {"typer", "rich", "pydantic"}
    assert satisfies("2.13.0", found["torch"]["torch"])
    assert not satisfies("1.13.0", found["torch"]["torch"])
    assert "dev" not in found


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", "<2.14,>=2.9", True),
        ("2.14.0", "<2.14,>=2.9", False),
        ("2.9", ">=2.9.0", True),
        ("2.10", ">=2.9", True),
        ("2.8.9", ">=2.9", False),
        ("1.0", "", True),
        ("1.0", "==1.0.0", True),
        ("1.1rc1", "==1.0", False),
    ],
)
def test_versions_are_compared_as_numbers(version, bounds, fits):
    assert satisfies(version, bounds) is fits
