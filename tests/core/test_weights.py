"""How much does each part count?"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wholebatch as wb
from wholebatch.core.weights import check_count, check_reduction, gradient_factor, loss_factor, mean_weights

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(counts=COUNTS)
def test_weighted_micro_batch_means_make_the_mean_of_the_whole(counts):
    targets = [[Fraction(place * 7 + target, 3) for target in range(n)] for place, n in enumerate(counts)]
    whole = [target for part in targets for target in part]
    means = [sum(part) / len(part) if part else 0 for part in targets]
    weighted = sum(Fraction(n, len(whole)) * mean for n, mean in zip(counts, means, strict=True))
    assert weighted == sum(whole) / len(whole)
    assert mean_weights(counts) == pytest.approx([n / len(whole) for n in counts], rel=1e-15)
    assert math.fsum(mean_weights(counts)) == pytest.approx(1, abs=1e-14)


def test_the_identity_sees_a_mean_of_means():
    means, counts = [1.0, 5.0], [6, 2]
    assert sum(w * m for w, m in zip(mean_weights(counts), means, strict=True)) == 2.0
    assert sum(means) / 2 == 3.0


def test_other_ranks_share_the_window():
    assert mean_weights([6, 2], total=16) == (0.375, 0.125)


@given(count=st.integers(1, 1000), reference=st.integers(1, 1000), total=st.integers(1, 1000))
def test_a_mean_and_its_sum_enter_alike_whatever_the_reference(count, reference, total):
    """(loss factor) times (gradient factor) is n / N for a mean and 1 / N for a sum."""
    late = gradient_factor(reference, total)
    assert loss_factor("mean", count, reference) * late == pytest.approx(count / total, rel=1e-15)
    assert loss_factor("sum", count, reference) * late == pytest.approx(1 / total, rel=1e-15)


@pytest.mark.parametrize(
    ("counts", "total", "found"),
    [
        ([3, -1], None, "-1 targets"),
        ([3, math.nan], None, "nan targets"),
        ([math.inf], None, "inf targets"),
        ([3, 4], 6, "said to hold 6 targets, its micro-batches hold 7"),
        ([0, 0], None, "2 micro-batches holds no target"),
        ([], None, "0 micro-batches holds no target"),
    ],
)
def test_counts_that_cannot_weigh_are_refused(counts, total, found):
    with pytest.raises(wb.WeightError, match=found) as error:
        mean_weights(counts, total=total)
    assert error.value.hint
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "count", [0, 3, 2.5, True, np.int64(3), torch.tensor(3), torch.tensor([2.5]), torch.empty((), device="meta")]
)
def test_a_number_of_targets_may_be_any_number_or_a_tensor_that_nobody_reads(count):
    check_count(count)


@pytest.mark.parametrize(
    ("count", "found"),
    [
        (-1, "-1 targets"),
        (math.nan, "nan targets"),
        (math.inf, "inf targets"),
        ("3", "type str"),
        (None, "type NoneType"),
        (torch.ones(2), r"type Tensor and shape \(2,\)"),
        ([3], "type list"),
    ],
)
def test_what_is_no_number_of_targets_is_refused(count, found):
    with pytest.raises(wb.WeightError, match=found) as error:
        check_count(count)
    assert "(labels != -100).sum()" in error.value.hint


def test_a_reduction_is_one_of_two():
    assert (check_reduction("mean"), check_reduction("sum")) == ("mean", "sum")
    with pytest.raises(wb.WeightError, match="reduction='none'") as error:
        check_reduction("none")
    assert 'reduction="mean"' in error.value.hint
    assert 'reduction="sum"' in error.value.hint
