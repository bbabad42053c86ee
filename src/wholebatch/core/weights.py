"""How much does each part count? Every division of a window has its owner here.

The objective of a window is declared as a mean over the targets of the logical batch,

    L = (sum over micro-batches k, sum over the targets of k, of the target's loss) / N,     N = sum_k n_k,

so a mean over the n_k targets of micro-batch k enters with n_k / N, and a sum with 1 / N. N is known before the first
backward pass when a logical batch is in hand, and only at the close when micro-batches stream in. Both are one rule
here: every loss is divided by a *reference* c before its backward pass, and the gradient is multiplied by c / N at
the close. With c = N, known early, the second factor is 1.

The functions take plain numbers or zero-dimensional tensors and never ask a tensor for its value, so that nothing waits
for the device.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias

from wholebatch.core.errors import WeightError

Reduction: TypeAlias = Literal["mean", "sum"]
"""What a loss function returns: the mean over its targets, or their sum."""

Count: TypeAlias = Any
"""A number of targets: an int, a float, or a zero-dimensional tensor that stays on its device."""


def mean_weights(counts: Sequence[float], *, total: float | None = None) -> tuple[float, ...]:
    """Return the factors that turn micro-batch means into one logical-batch mean.

    A mean over N targets is not the mean of K smaller means unless every micro-batch holds equally many targets. With
    n_k targets in micro-batch k,

        mean over the logical batch = sum_k (n_k / N) * mean over micro-batch k,

    and, the gradient being linear in the loss, the same factors hold for gradients.

    Args:
        counts: Targets that enter the loss in each micro-batch, in order; shape ``[K]``. Unit: targets, whatever the
            loss averages over.
        total: N, the targets of the whole window. Unit: targets. Defaults to ``sum(counts)``.

    Returns:
        K dimensionless factors, in the order of `counts`. Over the whole window they add up to 1.

    Raises:
        WeightError: A count is negative or not a number, `total` is less than ``sum(counts)``, or the window holds no
            target at all, so that its mean does not exist.

    Example:
        >>> mean_weights([6, 2])
        (0.75, 0.25)
    """
    for count in counts:
        check_count(count)
    whole = math.fsum(counts) if total is None else total
    if whole < math.fsum(counts):
        raise WeightError(
            f"The window is said to hold {whole} targets, its micro-batches hold {math.fsum(counts)}.",
            hint="count the same targets in both places.",
        )
    if not whole > 0:
        raise WeightError(
            f"A window of {len(counts)} micro-batches holds no target, so that its mean does not exist.",
            hint="leave such a window out: there is nothing to learn from it.",
        )
    return tuple(count / whole for count in counts)


def check_count(count: Count) -> None:
    """Raise a `WeightError` unless `count` can be a number of targets; tensors pass unseen, to be judged at the close.

    Args:
        count: Targets of one micro-batch. Unit: targets; summed sample weights need not be whole.

    Raises:
        WeightError: It is no number, negative, infinite, or not a number.

    Example:
        >>> check_count(-1)
        Traceback (most recent call last):
            ...
        wholebatch.core.errors.WeightError: A micro-batch is said to hold -1 targets.
        <BLANKLINE>
        hint: targets are what the loss averages over: 0 or more, such as (labels != -100).sum().
    """
    if type(count) is int and count >= 0:
        return
    if isinstance(count, Real):
        if 0 <= float(count) < math.inf:
            return
        found = f"{count} targets"
    elif hasattr(count, "shape") and math.prod(count.shape) == 1:
        return
    else:
        found = f"targets of type {type(count).__name__}" + (
            f" and shape {tuple(count.shape)}" if hasattr(count, "shape") else ""
        )
    raise WeightError(
        f"A micro-batch is said to hold {found}.",
        hint="targets are what the loss averages over: 0 or more, such as (labels != -100).sum().",
    )


def check_reduction(reduction: str) -> Reduction:
    """Return `reduction` if it is one of the two that exist.

    Args:
        reduction: What the loss function is said to return.

    Raises:
        WeightError: It is neither ``"mean"`` nor ``"sum"``.

    Example:
        >>> check_reduction("sum")
        'sum'
    """
    if reduction == "mean":
        return "mean"
    if reduction == "sum":
        return "sum"
    raise WeightError(
        f"reduction={reduction!r} says nothing about what the loss function returns.",
        hint='pass reduction="mean" if it averages over its targets, reduction="sum" if it adds them up.',
    )


def loss_factor(reduction: Reduction, count: Count, reference: Count) -> Count:
    """Return what a micro-batch's loss is multiplied by before its backward pass.

    Args:
        reduction: Whether the loss is the mean over its targets or their sum.
        count: Targets in this micro-batch. Unit: targets.
        reference: What every loss of the window is divided by; the window's targets, where they are known. Unit:
            targets.

    Returns:
        ``count / reference`` for a mean, ``1 / reference`` for a sum. Dimensionless, or per target.

    Example:
        >>> loss_factor("mean", 3, 12), loss_factor("sum", 3, 12)
        (0.25, 0.08333333333333333)
    """
    return count / reference if reduction == "mean" else 1 / reference


def gradient_factor(reference: Count, total: Count) -> Count:
    """Return what the summed gradient is multiplied by at the close of a window.

    Args:
        reference: What every loss of the window was divided by. Unit: targets.
        total: Targets of the window, now that all are counted. Unit: targets.

    Returns:
        ``reference / total``, dimensionless; 1 when the window's targets were known early.

    Example:
        >>> gradient_factor(8, 32)
        0.25
    """
    return reference / total


def common_factor(reference: Count, common: Count) -> Count:
    """Return what a rank's summed gradient is multiplied by before it is added to those of other ranks.

    Each rank divides its losses by a reference of its own, as it knows only its own targets. Multiplied by reference
    over common, the gradients of all ranks are divided by one reference, and `gradient_factor(common, total)` makes
    their sum that of the logical batch. There is no mean over ranks: a target counts once, on whatever rank it is.

    Args:
        reference: What every loss of this rank was divided by. Unit: targets.
        common: Any number on which all ranks agree; a power of two, so that it adds no rounding. Unit: targets.

    Example:
        >>> common_factor(8, 32)
        0.25
    """
    return reference / common
