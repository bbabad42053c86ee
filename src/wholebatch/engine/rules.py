"""What holds for every window of an accumulator?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wholebatch.core.weights import Reduction
from wholebatch.engine.noise import Noise
from wholebatch.engine.precision import Precision
from wholebatch.engine.setup import Setup
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.transaction import Transaction

OnNonFinite: TypeAlias = Literal["skip", "raise"]
"""What an infinite or undefined gradient does to its window."""

BatchNorm: TypeAlias = Literal["refuse", "per_micro_batch"]
"""What batch-dependent layers do to a window of more than one micro-batch."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What an accumulator was asked for, and what serves it.

    Attributes:
        setup: The model and what steps it.
        sums: Where its gradients are summed.
        transaction: Keeps what forward passes change.
        precision: In which forward passes run, with its loss scale.
        reduction: What a loss that stands alone is.
        clip_norm: Largest 2-norm of the logical batch's gradient, or None.
        on_nonfinite: What an infinite or undefined loss or gradient does.
        batch_norm: What layers do that compute over the rows of a micro-batch.
        before_step: Called when the gradient of the logical batch is in ``.grad``, before an optimizer steps.
        noise: Measures the gradient noise scale, or None.
    """

    setup: Setup
    sums: GradientSum
    transaction: Transaction
    precision: Precision
    reduction: Reduction
    clip_norm: float | None
    on_nonfinite: OnNonFinite
    batch_norm: BatchNorm
    before_step: Callable[[], object] | None
    noise: Noise | None
