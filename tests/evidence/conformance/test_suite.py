"""The suite as it is run: in processes, recorded, compared, shown, and on systems of others."""

import json
import subprocess
import sys

import pytest

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.conformance import suite, table
from wholebatch.evidence.conformance.adapters.textbook import textbook
from wholebatch.evidence.conformance.adapters.wholebatch import wholebatch
from wholebatch.evidence.conformance.choosing import choose_scenes, choose_systems
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.systems import SYSTEMS

ABSENT = System("absent", "Absent", wholebatch.train, frozenset(), ("no-such-distribution",), "pip install it")


@pytest.fixture(scope="module")
def results():
    told = []
    found = suite.run([wholebatch, textbook, ABSENT], ["T1-ragged-counts", "T2-mean", "T7-gan"], tell=told.append)
    assert sorted(told) == ["the textbook loop: 1 of 3 scenes pass", "wholebatch: 3 of 3 scenes pass"]
    return found


def test_systems_are_judged_in_processes_of_their_own_and_absent_ones_are_named(results):
    assert list(results["systems"]) == ["wholebatch", "textbook"]
    assert results["not_installed"] == {"absent": "pip install it"}
    outcomes = {name: each["outcome"] for name, each in results["systems"]["textbook"]["verdicts"].items()}
    assert outcomes == {"T1-ragged-counts": "fail", "T2-mean": "pass", "T7-gan": "fail"}
    assert results["systems"]["textbook"]["versions"]["torch"]
    assert json.loads(json.dumps(results)) == results


def test_a_table_says_the_worst_of_each_trap_and_the_details_say_why(results):
    assert [line.split("|")[1:5] for line in table.as_text(results).splitlines()] == [
        [" system     ", "   T1 ", "   T2 ", "   T7 "],
        [" :--------- ", " ---: ", " ---: ", " ---: "],
        [" wholebatch ", " pass ", " pass ", " pass "],
        [" textbook   ", " 0.67 ", " pass ", " 0.75 "],
    ]
    assert table.by_scene(results).splitlines()[2].split() == ["|", "T1-ragged-counts", "|", "pass", "|", "0.67", "|"]
    assert [line.split(";")[0] for line in table.details(results)] == [
        "textbook, T1-ragged-counts: fail",
        "textbook, T7-gan: fail",
    ]


def test_a_changed_verdict_is_named_with_both_versions(results):
    before = json.loads(json.dumps(results))
    assert suite.changes(results, before) == []
    before["systems"]["textbook"]["verdicts"]["T1-ragged-counts"]["outcome"] = "pass"
    before["systems"]["textbook"]["versions"]["torch"] = "1.0"
    (change,) = suite.changes(results, before)
    assert change.startswith("textbook, T1-ragged-counts: pass -> fail (torch 1.0 -> ")


def test_a_process_that_dies_fails_the_scenes_that_it_has_not_told(monkeypatch):
    monkeypatch.setattr(suite.sys, "executable", "/bin/false")
    verdict = suite.run([textbook], ["T2-mean"])["systems"]["textbook"]["verdicts"]["T2-mean"]
    assert (verdict["outcome"], verdict["why"]) == ("fail", "the process ended with 1: no message")


def test_the_recorded_verdicts_are_those_of_the_systems_and_scenes_that_there_are():
    recorded = suite.recorded()
    assert list(recorded["systems"]) == list(SYSTEMS)
    assert recorded["not_installed"] == {}
    for name, system in recorded["systems"].items():
        assert list(system["verdicts"]) == [scene.name for scene in SCENES], name
    assert {each["outcome"] for each in recorded["systems"]["wholebatch"]["verdicts"].values()} == {"pass"}


def test_systems_and_scenes_are_chosen_by_name_or_by_trap():
    assert choose_scenes(["T3"]) == ["T3-tail", "T3-tail-unsized", "T3-shorter-than-a-window"]
    assert len(choose_scenes(None)) == len(SCENES)
    assert choose_systems(["textbook"]) == [textbook]
    with pytest.raises(ConfigError, match="did you mean 'accelerate'"):
        choose_systems(["acelerate"])
    with pytest.raises(ConfigError, match="no scene 'T99'"):
        choose_scenes(["T99"])


ADAPTER = """
from wholebatch.evidence.conformance.adapters.{name} import {name} as system

def adapter(task):
    return system.train(task)

adapter.expresses = {expresses}
"""


@pytest.mark.parametrize(
    ("name", "expresses", "passed", "failed", "skipped"),
    [("wholebatch", {"clipping", "unsized"}, 10, 0, 12), ("textbook", set(), 3, 5, 14)],
)
def test_other_projects_run_the_suite_with_pytest(tmp_path, name, expresses, passed, failed, skipped):
    (tmp_path / "my_module.py").write_text(ADAPTER.format(name=name, expresses=expresses))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", "--wholebatch-adapter=my_module:adapter", "-rA"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {word: ended.stdout.count(f"\n{word} ") for word in ("PASSED", "FAILED")}
    assert counts == {"PASSED": passed, "FAILED": failed}, ended.stdout
    assert f"{skipped} skipped" in ended.stdout
    assert ended.returncode == (1 if failed else 0)
    assert ("a mean of means" in ended.stdout) == (name == "textbook")
