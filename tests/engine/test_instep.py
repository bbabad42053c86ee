"""Ranks that gather weights with every pass go in step, and still make the update of one process or none."""

import pytest
import torch

import ranks
from engine.sync_scenes import LEAVES_PASSES

EXACT = 1e-12


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.launch("engine.instep_scenes", 2, tmp_path_factory.mktemp("two"))


def test_a_failure_before_the_first_pass_is_told(two):
    other, failed = ranks.result(two, "a failure before the first pass", 2)
    assert failed["said"][0] == "SplitError"
    assert other["said"][0] == "RankError"
    assert "rank 1 could not: SplitError" in other["said"][1]
    for found in (other, failed):
        assert found["moved"] == 0
        assert found["off"] <= EXACT


@pytest.mark.skipif(not LEAVES_PASSES, reason="a PyTorch whose FSDPModule has no reset_iter_state")
def test_memory_that_runs_out_in_a_loader_s_micro_batch_is_an_error_on_all(two):
    other, short = ranks.result(two, "a shortage in a loader", 2)
    assert short["said"][0] == "OutOfMemoryError"
    assert "smaller ones, or hand accumulator.step" in short["said"][1]
    assert other["said"][0] == "RankError"
    assert "rank 1 could not: OutOfMemoryError" in other["said"][1]
    for found in (other, short):
        assert found["moved"] == 0
        assert found["off"] <= EXACT


def test_a_rank_without_targets_stands_in_with_what_has_some(two):
    """The loss of no target is 0 / 0, and 0 times that is not 0."""
    for found in ranks.result(two, "a mean over nothing", 2):
        assert found["skipped"] == [None, None]
        assert found["off"] <= EXACT


def test_targets_may_turn_out_to_be_none_after_the_forward_pass(two):
    for found in ranks.result(two, "targets that the loss counts", 2):
        assert found["off, known=True"] <= EXACT
        assert found["off, known=False"] <= EXACT
        stands_in, after_forward = found["said"]
        assert "returned None for a micro-batch that stands in" in stands_in
        assert "returned None after the forward pass" in after_forward
        assert found["moved"] == [0.0, 0.0]


def test_a_penalty_of_the_weights_is_refused(two):
    for found in ranks.result(two, "weights outside of their layer", 2):
        error, said = found["said"]
        assert error == "LossError"
        assert "The loss uses 0.weight outside of the layer that holds it" in said
        assert found["moved"] == 0.0


def test_without_a_way_out_of_a_pass_memory_that_runs_out_ends_the_run(two):
    for found in ranks.result(two, "no way back", 2):
        assert found["said"][0][0] == "OutOfMemoryError"
        assert "cannot go back together" in found["said"][0][1]
        assert found["said"][1][0] == "SampleError"
        assert found["next"][0] == found["next"][1] == "RankError"
        assert found["moved"] == 0


def test_passes_that_do_not_send_the_same_are_not_left(two):
    for found in ranks.result(two, "passes that differ", 2):
        assert found == {"steady": True, "unsteady": False}


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("auto", "ConfigError", "no rank can make a pass for itself"),
        ("reduce_in", "ConfigError", "has no effect"),
        ("a choice", "ConfigError", "'twice' is not one of the choices"),
        ("half", "OptimizerError", "is on every rank"),
        ("older", "OptimizerError", "FullyShardedDataParallel"),
    ],
)
def test_what_is_not_possible_is_refused(two, kind, error, said):
    for found in ranks.result(two, "refused", 2):
        assert found[kind][0] == error
        assert said in found[kind][1]


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated"])
def test_the_shares_of_16_bit_gradients_are_summed_apart(two, accumulate_in):
    for found in ranks.result(two, "sums in 16 bits", 2):
        assert found[accumulate_in]["off"] <= 4 * torch.finfo(torch.bfloat16).eps
        assert found[accumulate_in]["norm off"] <= 4 * torch.finfo(torch.bfloat16).eps


def test_the_bound_sees_a_sum_of_shares_that_stands_still(two):
    for found in ranks.result(two, "sums in 16 bits", 2):
        assert found["weights"]["off"] > 8 * torch.finfo(torch.bfloat16).eps


def test_a_loop_of_one_s_own_makes_equally_many_passes(two):
    for found in ranks.result(two, "a loop of one's own", 2):
        assert found["off"] <= EXACT
        assert "not" not in (found["skipped"][1] or "")
        assert found["skipped"][0] is not None
        assert found["skipped"][1] is None
        assert found["rows"] == 16
