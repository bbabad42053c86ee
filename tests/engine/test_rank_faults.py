"""One of each fault on several real ranks: the right update on each, or a clear error. The many are in benchmarks/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

NUMBERS = [0, 1, 2, 3, 4, 5, 6, 14, 17, 21, 26]
"""Each kind once, and some that once ended wrong."""


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rank_faults as faults

    return faults


@pytest.mark.slow
def test_no_fault_ends_in_a_wrong_update_an_unclear_error_or_a_hang(faults):
    command = [sys.executable, BENCHMARKS / "rank_faults.py", "--numbers", json.dumps(NUMBERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    found = {number: wrong for number, _, _, wrong, _ in map(json.loads, done.stdout.splitlines())}
    without_link = [number for number in NUMBERS if faults.Scene.drawn(number).kind != faults.LINK]
    assert list(found) in (NUMBERS, without_link)
    assert not any(found.values()), done.stderr


def calm(faults, number, **changes):
    """What the ranks of a scene see if all goes well."""
    scene = faults.Scene.drawn(number)
    each = {"made": faults.UPDATES, "retries": 1, "off": 0.0, "errors": []}
    return scene, {rank: {**each, **changes} for rank in range(scene.ranks)}


@pytest.mark.parametrize(
    ("changes", "seconds", "found"),
    [
        ({"off": 1e-9}, 0.1, "is 1.0e-09 off"),
        ({"off": float("nan")}, 0.1, "off"),
        ({"made": 3}, 0.1, "made 3 updates and says"),
        ({"made": 3, "errors": [["RuntimeError", "gloo: a rank is gone"]]}, 0.1, "made 3 updates and says"),
        ({"made": 3, "errors": [["RankError", ""]]}, 0.1, "made 3 updates and says"),
        ({}, 30.0, "30.0 s until all had ended"),
        ({}, None, "the fault never came"),
    ],
)
def test_the_judge_sees_what_is_wrong(faults, changes, seconds, found):
    scene, seen = calm(faults, 5, **changes)
    assert any(found in each for each in faults.judge(scene, seen, seconds))
    scene, seen = calm(faults, 5)
    assert faults.judge(scene, seen, 0.1) == []


def test_the_judge_misses_whoever_says_nothing(faults):
    scene, seen = calm(faults, 5)
    del seen[0]
    assert faults.judge(scene, seen, 0.1) == ["rank 0 says nothing"]


def test_a_rank_that_was_only_stopped_or_out_of_memory_makes_all_updates(faults):
    told = [["RankError", "rank 1 is gone"]]
    for kind in (faults.PAUSED, faults.MEMORY):
        number = next(
            number
            for number in range(200)
            if faults.Scene.drawn(number).kind == kind and faults.Scene.drawn(number).use == "step"
        )
        scene, seen = calm(faults, number, made=2, errors=told)
        assert faults.judge(scene, seen, 0.1)
        assert not faults.judge(*calm(faults, number), 0.1)
