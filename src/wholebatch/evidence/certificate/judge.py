"""Is this the gradient of the undivided batch, up to rounding?"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.checks.pieces import Probe, errors, is_rounding, scale_of_parts


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
        self._scale: Tensor | None = None
        self._size = whole.abs()
        self._found: dict[
            int, tuple[weakref.ref[Tensor], list[float]]
        ] = {}  # the same one is asked for some three times

    def errors(self, gradient: Tensor) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        of, found = self._found.get(id(gradient), (None, []))
        if of is None or of() is not gradient:
            found = errors(gradient, self.whole, self._size, self.probe.sizes)
            self._found[id(gradient)] = weakref.ref(gradient), found
        if is_rounding(found, self.probe.tolerance):
            return found
        if self._scale is None:  # measured again by what the parts hold before they cancel
            self._scale = torch.maximum(scale_of_parts(self.probe, self._parts), self._size)
        return errors(gradient, self.whole, self._scale, self.probe.sizes)

    def right(self, gradient: Tensor) -> bool:
        """Whether a gradient differs from the undivided one by rounding only."""
        return is_rounding(self.errors(gradient), self.probe.tolerance)

    def same(self, gradient: Tensor, other: Tensor) -> bool:
        """Whether two gradients differ by rounding only."""
        return is_rounding(errors(gradient, other, other.abs(), self.probe.sizes), self.probe.tolerance)

    def off(self, gradient: Tensor) -> float:
        """Return the 2-norm of the difference over that of the undivided gradient."""
        size = float(self.whole.norm())
        return float((gradient - self.whole).norm()) / size if size > 0 else 0.0
