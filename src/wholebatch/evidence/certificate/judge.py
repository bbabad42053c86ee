"""Is this the gradient of the undivided batch, up to rounding?"""

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.checks.pieces import Probe, errors, is_rounding, norms, relative, scale_of_parts


class Judge:
    """Says how far a gradient is from that of the undivided batch.

    Args:
        probe: Runs rows, should their gradients cancel, and knows the tolerance.
        whole: The gradient of the undivided batch. Shape ``[entries]``.
        parts: Some cut of the rows.
    """

    def __init__(self, probe: Probe, whole: Tensor, parts: Sequence[Indices]) -> None:
        self.probe = probe
        self.whole = whole
        self._parts = parts
        self._norms = norms(whole, probe.sizes)
        self._norms_of_parts: list[float] | None = None
        self._known: dict[int, tuple[weakref.ref[Tensor], list[float]]] = {}  # one gradient is asked for several times

    def errors(self, gradient: Tensor) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        found = self._relative(gradient, self._norms)
        if is_rounding(found, self.probe.tolerance):
            return found
        if self._norms_of_parts is None:  # measured again by what the parts hold before they cancel
            scale = torch.maximum(scale_of_parts(self.probe, self._parts), self.whole.abs())
            self._norms_of_parts = norms(scale, self.probe.sizes)
        return self._relative(gradient, self._norms_of_parts)

    def right(self, gradient: Tensor) -> bool:
        """Whether a gradient differs from the undivided one by rounding only."""
        return is_rounding(self.errors(gradient), self.probe.tolerance)

    def is_whole(self, gradient: Tensor) -> bool:
        """The same, without a look at what cancels."""
        return is_rounding(self._relative(gradient, self._norms), self.probe.tolerance)

    def same(self, gradient: Tensor, other: Tensor) -> bool:
        """Whether two gradients differ by rounding only."""
        return is_rounding(errors(gradient, other, other, self.probe.sizes), self.probe.tolerance)

    def off(self, gradient: Tensor) -> float:
        """Return the 2-norm of the difference over that of the undivided gradient."""
        size = math.hypot(*self._norms)
        return math.hypot(*self._differences(gradient)) / size if size > 0 else 0.0

    def _relative(self, gradient: Tensor, scales: list[float]) -> list[float]:
        return relative(self._differences(gradient), scales, self.probe.sizes)

    def _differences(self, gradient: Tensor) -> list[float]:
        of, known = self._known.get(id(gradient), (None, []))
        if of is None or of() is not gradient:
            known = norms(gradient - self.whole, self.probe.sizes)
            self._known[id(gradient)] = weakref.ref(gradient), known
        return known
