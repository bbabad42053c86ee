"""The suite as it is run: in processes, recorded, compared, shown, and on systems of others."""

import json
from pathlib import Path

import pytest

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.conformance import mistakes, record, suite, table
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


def test_of_several_ranks_the_worst_verdict_counts_and_one_that_dies_ends_the_others(monkeypatch):
    monkeypatch.setattr(suite.sys, "executable", "/bin/false")
    found = suite.run([wholebatch], ["T2x2-mean", "T1x2-ragged-counts"])["systems"]["wholebatch"]["verdicts"]
    assert list(found) == ["T2x2-mean", "T1x2-ragged-counts"]
    assert {verdict["outcome"] for verdict in found.values()} == {"fail"}
    assert "rank 0 ended with" in found["T2x2-mean"]["why"]


@pytest.fixture(scope="module")
def over_ranks():
    """What two real processes say, once for all tests."""
    scenes = [scene.name for scene in SCENES if "ranks" in scene.task.asks]
    return suite.run([each for each in SYSTEMS.values() if each.name.partition("-")[0] == "wholebatch"], scenes)


def test_wholebatch_passes_the_scenes_over_ranks(over_ranks):
    assert "wholebatch-ddp" in over_ranks["systems"]
    for name, system in over_ranks["systems"].items():
        assert len(system["verdicts"]) == 8
        for scene, verdict in system["verdicts"].items():
            confirmed = None if scene.startswith("T8") else True  # where rows meet there is no second reading by rows
            assert (verdict["outcome"], verdict["confirmed"]) == ("pass", confirmed), (name, scene, verdict)
            assert verdict["error"] <= 1e-12


def test_what_a_way_for_several_ranks_is_not_for_is_not_held_against_it(over_ranks):
    alone = suite.run([SYSTEMS["wholebatch-ddp"]], ["T2-mean"])
    assert "| wholebatch-ddp |   - |" in table.as_text(alone)
    assert table.details(alone) == []
    assert "not expressible" not in table.as_page(alone)
    assert "passes 8 of the 8 scenes" in table.as_page(over_ranks)


def test_the_recorded_verdicts_are_those_of_the_systems_and_scenes_that_there_are():
    recorded = suite.recorded()
    assert {*recorded["systems"], *recorded["not_installed"]} == set(SYSTEMS)
    assert set(recorded["not_installed"]) == {"composer", "composer-tokens"}  # not beside this torch
    for name, system in recorded["systems"].items():
        assert list(system["verdicts"]) == [scene.name for scene in SCENES], name
    assert suite.stands(recorded)


def test_each_recorded_verdict_on_counts_divisors_tails_and_masks_is_confirmed_by_a_second_reading():
    for name, system in suite.recorded()["systems"].items():
        for scene, verdict in system["verdicts"].items():
            if scene.partition("-")[0] in ("T1", "T2", "T3", "T4") and verdict["error"] is not None:
                assert verdict["confirmed"] is True, (name, scene)


def test_each_recorded_failure_has_a_known_mistake():
    for name, system in suite.recorded()["systems"].items():
        for scene, verdict in system["verdicts"].items():
            if verdict["outcome"] == "fail":
                assert any(mistake in verdict["why"] for mistake in mistakes.NAMES), (name, scene, verdict["why"])


def test_what_is_not_expressible_because_of_two_optimizers_has_a_reason_of_its_own():
    for name, system in suite.recorded()["systems"].items():
        if not name.startswith("wholebatch"):
            why = system["verdicts"]["T10-two-optimizers"]["why"]
            assert "no way to say" not in why, name


def test_the_page_shows_what_is_recorded():
    """If not: ``python -m wholebatch.evidence.conformance.record conformance.json docs/how-we-know.md``."""
    page = (Path(__file__).parents[3] / "docs" / "how-we-know.md").read_text("utf-8")
    assert record.shown(page, suite.recorded()) == page
    with pytest.raises(ValueError, match="no place"):
        record.shown("no markers", suite.recorded())


def test_a_run_is_recorded_and_shown(tmp_path, monkeypatch, results):
    monkeypatch.setattr(record, "files", lambda _: tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{record.BEGIN}\n\na stale line\n\n{record.END}\nafter\n")
    record.main([str(tmp_path / "run.json"), str(page)])
    assert json.loads((tmp_path / "recorded.json").read_text()) == results
    said = page.read_text()
    assert said.startswith(f"before\n{record.BEGIN}\n")
    assert said.endswith(f"{record.END}\nafter\n")
    assert "| textbook   | 0.67 |" in said
    assert "Not installed beside the others: absent (`pip install it`)." in said
    assert "a stale line" not in said


def test_wholebatch_stands_if_it_passes_or_refuses_where_that_is_honest():
    def results(**outcomes):
        verdicts = {name.replace("_", "-"): {"outcome": outcome} for name, outcome in outcomes.items()}
        return {"systems": {"wholebatch": {"verdicts": verdicts}}}

    assert suite.stands(results(T2_mean="pass", T7_zero_first="refuses"))
    assert not suite.stands(results(T2_mean="refuses", T7_zero_first="pass"))
    assert not suite.stands(results(T7_zero_first="fail"))
    assert suite.stands({"systems": {}})
    of_ranks = {"T2-mean": {"outcome": "not expressible"}, "T2x2-mean": {"outcome": "pass"}}
    assert suite.stands({"systems": {"wholebatch-ddp": {"verdicts": of_ranks}}})
    assert not suite.stands({"systems": {"wholebatch": {"verdicts": of_ranks}}})
    of_ranks["T2x2-mean"]["outcome"] = "fail"
    assert not suite.stands({"systems": {"wholebatch-ddp": {"verdicts": of_ranks}}})


def test_systems_and_scenes_are_chosen_by_name_or_by_trap():
    assert choose_scenes(["T3"]) == ["T3-tail", "T3-tail-unsized", "T3-shorter-than-a-window"]
    assert len(choose_scenes(None)) == len(SCENES)
    assert choose_systems(["textbook"]) == [textbook]
    with pytest.raises(ConfigError, match="did you mean 'accelerate'"):
        choose_systems(["acelerate"])
    with pytest.raises(ConfigError, match="no scene 'T99'"):
        choose_scenes(["T99"])
