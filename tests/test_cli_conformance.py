"""``wholebatch conformance`` as it is typed."""

import json
from importlib.util import find_spec

import pytest

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
    [(["--system", "wholebach"], "did you mean 'wholebatch'"), (["--scene", "T0"], "There is no scene 'T0'")],
)
def test_a_name_that_does_not_exist_is_wrong_input(arguments, found, capsys):
    assert run(*arguments) == 2
    assert found in capsys.readouterr().err
