"""``wholebatch conformance`` as it is typed."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import wholebatch
from wholebatch.cli import main


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["conformance", *arguments])
    return ended.value.code


def test_the_table_goes_to_stdout_and_talk_to_stderr(capsys):
    assert run("--system", "wholebatch", "--system", "textbook", "--scene", "T1", "--scene", "T2-mean") == 0
    said = capsys.readouterr()
    assert "| textbook   | 0.67 | pass |" in said.out
    assert "textbook, T1-ragged-counts: fail; the change of the weights is 0.67 off; a mean of means" in said.out
    assert "wholebatch: 2 of 2 scenes pass" in said.err


def test_json_holds_versions_and_verdicts(capsys):
    assert run("--system", "textbook", "--scene", "T1-ragged-counts", "--json") == 0  # what a peer does is no failure
    results = json.loads(capsys.readouterr().out)
    assert results["systems"]["textbook"]["verdicts"]["T1-ragged-counts"]["outcome"] == "fail"
    assert set(results) == {"date", "python", "systems", "not_installed"}


def test_results_go_to_a_file_too(capsys, tmp_path):
    file = tmp_path / "conformance.json"
    assert run("--system", "textbook", "--scene", "T2-mean", "--out", str(file)) == 0
    said = capsys.readouterr()
    assert "| textbook | pass |" in said.out
    assert f"Versions and verdicts are in {file}." in said.err
    assert json.loads(file.read_text())["systems"]["textbook"]["verdicts"]["T2-mean"]["outcome"] == "pass"


def test_verdicts_that_are_disputed_are_a_failure(capsys, monkeypatch):
    from wholebatch.evidence.conformance import suite

    def disputed(system, scenes):
        return {scene: {"outcome": "pass", "error": 0.0, "confirmed": False, "why": ""} for scene in scenes}

    monkeypatch.setattr(suite, "_judge", disputed)
    assert run("--system", "wholebatch", "--scene", "T1") == 1
    assert "error: wholebatch, T1-ragged-counts: two ways to compute what is right disagree" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("composer") is not None, reason="composer is installed")
def test_a_system_that_is_not_installed_is_named_with_its_install_line(capsys):
    assert run("--system", "composer") == 2
    said = capsys.readouterr().err
    assert "Composer is not installed." in said
    assert "pip install mosaicml" in said


def test_a_scene_that_wholebatch_does_not_pass_is_a_failure(capsys, monkeypatch):
    from wholebatch.evidence.conformance import suite

    def broken(system, scenes):
        return {scene: {"outcome": "fail", "error": 0.5, "confirmed": True, "why": "planted"} for scene in scenes}

    monkeypatch.setattr(suite, "_judge", broken)
    assert run("--system", "wholebatch", "--scene", "T1") == 1
    said = capsys.readouterr()
    assert "wholebatch, T1-ragged-counts: fail; planted" in said.out
    assert "changed since it was recorded: wholebatch, T1-ragged-counts: pass -> fail (same versions)" in said.err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--system", "wholebach"], "did you mean 'wholebatch'"),
        (["--system", "keras"], "did you mean 'keras-torch' or 'keras-jax'?"),
        (["--scene", "qq"], "There is no scene 'qq'.\nhint: There are T1-ragged-counts"),
        (["--scene", "t3"], "did you mean 'T3'?"),
        (["--scene", "T3-tial"], "did you mean 'T3-tail'?"),
        (["--out", "no/such/folder/f.json", "--scene", "T1"], "where no file can be written"),
        (["--out", ".", "--scene", "T1"], "where no file can be written"),
    ],
)
def test_a_name_that_does_not_exist_is_wrong_input(arguments, found, capsys):
    assert run(*arguments) == 2
    assert found in capsys.readouterr().err


@pytest.fixture
def planted(tmp_path):
    """A copy of the package in which something is planted, and its command."""
    package = tmp_path / "wholebatch"
    shutil.copytree(Path(wholebatch.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def plant(file, edit):
        where = package / "evidence" / "conformance" / file
        before = where.read_text("utf-8")
        after = edit(before)
        assert after != before
        where.write_text(after, encoding="utf-8")

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "wholebatch", "conformance", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return plant, command


def test_a_changed_verdict_of_a_peer_is_a_warning_and_no_failure(planted):
    """The record says that the textbook loop fails a scene which it passes."""
    plant, command = planted

    def fails_there(record):
        results = json.loads(record)
        results["systems"]["textbook"]["verdicts"]["T2-mean"]["outcome"] = "fail"
        return json.dumps(results)

    plant("recorded.json", fails_there)
    ended = command("--system", "textbook", "--scene", "T2-mean", "--json")
    assert ended.returncode == 0, ended.stderr
    assert "warning: changed since it was recorded: textbook, T2-mean: fail -> pass (same versions)" in ended.stderr
    assert json.loads(ended.stdout)["systems"]["textbook"]["verdicts"]["T2-mean"]["outcome"] == "pass"


def test_a_scene_that_wholebatch_really_fails_ends_with_1(planted):
    """Its optimizers have twice the learning rate that the scene asks for."""
    plant, command = planted
    plant("adapters/wholebatch.py", lambda page: page.replace("SGD(weights, lr=lr)", "SGD(weights, lr=2 * lr)"))
    ended = command("--system", "wholebatch", "--scene", "T2-mean")
    assert ended.returncode == 1, ended.stderr
    assert "wholebatch, T2-mean: fail; the change of the weights is 1 off" in ended.stdout
    assert "warning: changed since it was recorded: wholebatch, T2-mean: pass -> fail" in ended.stderr
