"""Several ranks save together, and others go on as if nothing had happened."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import ranks
from engine.checkpoint import rank_killed
from engine.checkpoint.rank_scenes import SCENES


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.launch("engine.checkpoint.rank_scenes", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks.launch("engine.checkpoint.rank_scenes", 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("wrap", ["bare", "ddp", "fsdp", "each", "bf16 fsdp", "bf16 each"])
def test_two_ranks_go_on_bit_by_bit(two, wrap):
    check(ranks.result(two, wrap, 2), 2)


@pytest.mark.parametrize("wrap", ["bare", "hsdp", "hsdp each"])
def test_so_do_four(four, wrap):
    check(ranks.result(four, wrap, 4), 4)


def check(by_rank, number):
    for each in by_rank:
        assert each["same"]
        assert not each["forgetful"]
        assert each["files"] == [f"run.rank-{rank}-of-{number}.safetensors" for rank in range(number)]


def test_what_one_rank_cannot_do_none_does(two):
    first, second = ranks.result(two, "what one rank cannot do none does", 2)
    assert first["left"]
    assert second["left"]
    assert first["not saved"][0] == "RankError"
    assert "rank 1 could not: ConfigError: extra is a object" in first["not saved"][1]
    assert second["not saved"][0] == "ConfigError"
    assert first["not loaded"][0] == "RankError"
    assert "holds no position of a loader" in second["not loaded"][1]
    assert "There is no file" in first["nowhere"][1]


def test_a_rank_that_was_killed_before_it_moved_its_file_takes_it_over(two):
    for each in ranks.result(two, "a rank was killed before it moved its file", 2):
        assert each["loaded"] == ["new", "new"]
        assert "was not written together with those of the other ranks" in each["apart"][1]


def run(folder, *, killed=False):
    """Run two processes; return the weights at the end of each, or nothing if they were killed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, rank_killed.__file__]
    path = os.pathsep.join([str(ranks.TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    both = [
        subprocess.Popen(
            [*command, str(rank), folder / f"store-{killed}", folder / "kept" / "run", out, *["killed"] * killed],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank, out in enumerate(outs)
    ]
    assert [each.wait(120) for each in both] == [-signal.SIGKILL if killed else 0] * 2
    return None if killed else [torch.load(out) for out in outs]


def test_two_processes_that_were_killed_inside_a_window_are_followed_by_two_that_go_on(tmp_path):
    straight = run(tmp_path / "straight")
    (tmp_path / "stopped" / "kept").mkdir(parents=True)
    run(tmp_path / "stopped", killed=True)
    assert all(map(torch.equal, straight, run(tmp_path / "stopped")))


def test_the_launches_end_well(two, four):
    assert [each["code"] for each in (*two["exit"], *four["exit"])] == [0] * 6
    assert set(SCENES.by_name) <= {*two, *four}
