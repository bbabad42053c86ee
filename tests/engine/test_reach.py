"""Micro-batches of several ranks meet as those of one process do: the update is that of the undivided batch."""

import pytest

import ranks
from coupled import FEEDING, MEETING, NORMED

EXACT = 1e-10


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found in all scenes; one start for all of them."""
    return ranks.launch("engine.reach_scenes", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return ranks.launch("engine.reach_scenes", 3, tmp_path_factory.mktemp("three"))


def assert_exact(off):
    assert max(off) <= EXACT, off


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("lockstep", ["auto", "joined"])
@pytest.mark.parametrize("name", [*MEETING, *FEEDING, *NORMED])
def test_the_update_is_that_of_one_process_with_the_undivided_batch(request, name, lockstep, num_ranks):
    """Weights and running statistics after three updates, in which ranks have different numbers of micro-batches."""
    launched = request.getfixturevalue("two" if num_ranks == 2 else "three")
    for found in ranks.result(launched, "every animal", num_ranks):
        assert_exact(found[f"{name}, {lockstep}"])


@pytest.mark.parametrize("scene", ["wrapped", "by length", "idle", "loaders", "nothing to learn", "masks"])
def test_however_uneven_the_ranks_are(two, scene):
    for found in ranks.result(two, scene, 2):
        for off in found.values():
            assert_exact(off)


def test_in_fp32_the_difference_is_rounding(two):
    for found in ranks.result(two, "in fp32", 2):
        assert all(eps <= 64 for eps in found.values()), found


def test_the_bound_sees_micro_batches_that_meet_on_their_own_rank_only(two):
    for found in ranks.result(two, "apart", 2):
        assert all(off[0] > 1e-3 for off in found.values()), found


def test_a_rank_that_fails_does_not_keep_the_others_waiting(two):
    """In either pass, before, between and after meetings; nobody moves, and the next update is right."""
    first, second = ranks.result(two, "failures", 2)
    for name, (error, said, changed, off) in first.items():
        assert error == "RankError", (name, said)
        assert "rank 1 could not: ValueError: of my own" in said
        assert second[name][:2] == ["ValueError", "of my own"]
        assert changed == second[name][2] == []
        assert_exact(off)
        assert_exact(second[name][3])


def test_a_shortage_on_one_rank_is_retried_on_all(two):
    for found in ranks.result(two, "shortage", 2):
        for name, (retries, off) in found.items():
            assert retries == 1, (name, found)
            assert_exact(off)


def test_ranks_that_run_out_of_memory_in_their_first_check_one_after_the_other_go_on(two):
    for found in ranks.result(two, "shortage in the first check", 2):
        assert found["retries"] == 2
        assert_exact(found["off"])


def test_ranks_that_do_not_meet_at_the_same_places_are_an_error_that_names_both(two):
    for found in ranks.result(two, "other places", 2):
        for name in ("other", "fewer", "nowhere", "unlike"):
            error, said = found[name]
            assert error in ("MeetingError", "RankError"), (name, said)
            assert "hint:" in said
            assert_exact(found[f"{name}, then"])
        assert "rank 0 meets at" in found["other"][1]
        assert "rank 1 meets at" in found["other"][1]
        assert "rank 1 ends" in found["fewer"][1]


def test_rows_stand_in_the_order_of_the_ranks(two):
    first, second = ranks.result(two, "numbers", 2)
    for found in (first, second):
        rows, masks, labels, _ = found["seen"]
        assert rows == 11
        assert labels == found["labels"]
        assert masks == [label == 1 for label in labels]
    assert first["seen"][3] == [4, 5, 6]
    assert second["seen"][3] == [7, 8, 9, 10]


def test_in_a_window_of_ones_own_ranks_cannot_meet(two):
    for found in ranks.result(two, "own window", 2):
        error, said = found["said"]
        assert error in ("MeetingError", "RankError")
        assert "2 ranks" in said or "MeetingError" in said


def test_a_gradient_inside_the_loss_through_what_other_ranks_brought_is_refused(two):
    for found in ranks.result(two, "penalty", 2):
        error, said = found["said"]
        assert error == "MeetingError"
        assert "2 ranks" in said
        assert found["moved"] == 0
        assert_exact(found["then"])
