"""In how many bits are the gradients of 16-bit weights summed?

In 16 bits the sum stagnates: once it is 256 times as large as what is added, bfloat16 rounds the addend away.
"""

from collections.abc import Iterable
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from wholebatch.core.errors import WeightError

SumIn: TypeAlias = Literal["fp32", "compensated", "weights"]
"""How gradients of 16-bit weights are summed: in 32 bits, in 24 (a 16-bit sum and the next 8 bits), or in 16."""


def check_sum_in(accumulate_in: str | None) -> SumIn:
    """Return how 16-bit gradients are summed; None means in 32 bits.

    Raises:
        WeightError: There is no such sum.
    """
    if accumulate_in is None:
        return "fp32"
    if accumulate_in not in get_args(SumIn):
        raise WeightError(
            f"accumulate_in={accumulate_in!r} is no way to sum gradients.",
            hint='pass "fp32" (the default for 16-bit weights), "compensated" (three bytes a weight) or "weights".',
        )
    return cast(SumIn, accumulate_in)


def own_sums(parameters: Iterable[Tensor], sum_in: SumIn) -> "dict[Tensor, OwnSum]":
    """Return what sums the gradients of each 16-bit parameter; the others' ``.grad`` does."""
    if sum_in == "weights":
        return {}
    kind = Fp32Sum if sum_in == "fp32" else CompensatedSum
    return {each: kind() for each in parameters if each.is_floating_point() and each.element_size() < 4}


class Fp32Sum:
    """Sums 16-bit gradients in 32 bits: four bytes a weight."""

    bytes_each = 4

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    @property
    def holds(self) -> bool:
        return self._sum is not None

    @property
    def held(self) -> Tensor | None:
        return self._sum

    def add(self, grad: Tensor) -> None:
        if self._sum is None:
            self._sum = grad.to(torch.float32)
        else:
            self._sum.add_(grad)

    def total(self) -> Tensor:
        assert self._sum is not None
        return self._sum

    def clear(self) -> None:
        self._sum = None


class CompensatedSum:
    """Sums 16-bit gradients in 24 bits: a bfloat16 and the 8 bits that follow it, three bytes a weight.

    The error of one addition is 2**-17 of the sum, 256 times less than in bfloat16. A float32 is made of one
    parameter at a time, and the three bytes are its upper ones.
    """

    bytes_each = 3

    def __init__(self) -> None:
        self._high: Tensor | None = None
        self._low: Tensor | None = None

    @property
    def holds(self) -> bool:
        return self._high is not None

    @property
    def held(self) -> Tensor | None:
        return self._high

    def add(self, grad: Tensor) -> None:
        total = _dense(grad).to(torch.float32, copy=True)
        if self._high is not None:
            total.add_(self.total())
        bits = total.view(torch.int32)
        # Round to 24 bits, half to even, so that a sum of many does not drift; an infinity stays one.
        odd = bits.bitwise_right_shift(8).bitwise_and_(1)
        bits.add_(odd.add_(127).mul_(torch.isfinite(total)))
        high = bits.bitwise_right_shift(16).to(torch.int16)
        # Both or none, where memory runs out.
        self._high, self._low = high, bits.bitwise_right_shift_(8).to(torch.uint8)

    def total(self) -> Tensor:
        assert self._high is not None
        assert self._low is not None
        bits = self._high.to(torch.int32).bitwise_left_shift_(16)
        return bits.bitwise_or_(self._low.to(torch.int32).bitwise_left_shift_(8)).view(torch.float32)

    def clear(self) -> None:
        self._high = self._low = None


OwnSum: TypeAlias = Fp32Sum | CompensatedSum


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()
