"""``wholebatch conformance`` as it is typed."""

import json

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


def test_a_scene_that_wholebatch_does_not_pass_is_a_failure(capsys, monkeypatch):
    from wholebatch.evidence.conformance import suite

    def broken(system, scenes):
        return {scene: {"outcome": "fail", "error": 0.5, "why": "planted"} for scene in scenes}

    monkeypatch.setattr(suite, "_in_a_process", broken)
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
