"""Is this the gradient of the undivided batch, up to rounding?"""

import math
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.checks.distance import errors, is_rounding, norm, relative
from wholebatch.engine.checks.pieces import Probe, scale_of_parts

Gradient: TypeAlias = Tensor | Sequence[Tensor]
"""On the CPU: all parameters one after the other, or, without a copy, one by one. Shape (of each) ``[entries]``."""


class Judge:
    """Says how far a gradient is from that of the undivided batch.

    Args:
        probe: Runs rows, should their gradients cancel, and knows the tolerance.
        whole: The gradient of the undivided batch.
        parts: Some cut of the rows.
    """

    def __init__(self, probe: Probe, whole: Gradient, parts: Sequence[Indices]) -> None:
        self.probe = probe
        self._whole = self._by_parameter(whole)
        self._parts = parts
        self._norms = list(map(norm, self._whole))
        self._norms_of_parts: list[float] | None = None
        self._known: dict[int, tuple[weakref.ref[Tensor], list[float]]] = {}  # one gradient is asked for several times

    @cached_property
    def whole(self) -> Tensor:
        """The gradient of the undivided batch, in 32 bits or more. Shape ``[entries]``."""
        return torch.cat(list(map(_wide, self._whole)))

    def errors(self, gradient: Gradient) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        found = self._relative(gradient, self._norms)
        if is_rounding(found, self.probe.tolerance):
            return found
        if self._norms_of_parts is None:  # measured again by what the parts hold before they cancel
            scale = torch.maximum(scale_of_parts(self.probe, self._parts), self.whole.abs())
            self._norms_of_parts = list(map(norm, self._by_parameter(scale)))
        return self._relative(gradient, self._norms_of_parts)

    def right(self, gradient: Gradient) -> bool:
        """Whether a gradient differs from the undivided one by rounding only."""
        return is_rounding(self.errors(gradient), self.probe.tolerance)

    def is_whole(self, gradient: Gradient) -> bool:
        """The same, without a look at what cancels."""
        return is_rounding(self._relative(gradient, self._norms), self.probe.tolerance)

    def same(self, gradient: Tensor, other: Tensor) -> bool:
        """Whether two gradients differ by rounding only. Shape of both: ``[entries]``."""
        return is_rounding(errors(gradient, other, other, self.probe.sizes), self.probe.tolerance)

    def off(self, gradient: Gradient) -> float:
        """Return the 2-norm of the difference over that of the undivided gradient."""
        size = math.hypot(*self._norms)
        return math.hypot(*self._differences(gradient)) / size if size > 0 else 0.0

    def _relative(self, gradient: Gradient, scales: list[float]) -> list[float]:
        return relative(self._differences(gradient), scales, self.probe.sizes)

    def _differences(self, gradient: Gradient) -> list[float]:
        known_by = gradient if isinstance(gradient, Tensor) else gradient[0]
        of, known = self._known.get(id(known_by), (None, []))
        if of is None or of() is not known_by:
            pairs = zip(self._by_parameter(gradient), self._whole, strict=True)
            known = [norm(_wide(one) - _wide(other)) for one, other in pairs]
            self._known[id(known_by)] = weakref.ref(known_by), known
        return known

    def _by_parameter(self, gradient: Gradient) -> Sequence[Tensor]:
        return gradient.split_with_sizes(self.probe.sizes) if isinstance(gradient, Tensor) else gradient


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() > 2 else tensor.float()
