"""Is this the gradient of the undivided batch, up to rounding?"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from wholebatch.core.split import Indices
from wholebatch.engine.checks.pieces import Probe, errors, floors, is_rounding, norm, relative, scale_of_parts


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
        self._floors = floors(whole, probe.sizes)
        self._floors_of_parts: list[float] | None = None
        self._found: dict[int, tuple[weakref.ref[Tensor], list[float]]] = {}  # one gradient is asked for several times

    def errors(self, gradient: Tensor) -> list[float]:
        """Return the relative error of each parameter's gradient."""
        found = self._from_whole(gradient)
        if is_rounding(found, self.probe.tolerance):
            return found
        if self._floors_of_parts is None:  # measured again by what the parts hold before they cancel
            scale = torch.maximum(scale_of_parts(self.probe, self._parts), self.whole.abs())
            self._floors_of_parts = floors(scale, self.probe.sizes)
        return relative(gradient - self.whole, self._floors_of_parts, self.probe.sizes)

    def right(self, gradient: Tensor) -> bool:
        """Whether a gradient differs from the undivided one by rounding only."""
        return is_rounding(self.errors(gradient), self.probe.tolerance)

    def is_whole(self, gradient: Tensor) -> bool:
        """The same, without a look at what cancels."""
        return is_rounding(self._from_whole(gradient), self.probe.tolerance)

    def same(self, gradient: Tensor, other: Tensor) -> bool:
        """Whether two gradients differ by rounding only."""
        return is_rounding(errors(gradient, other, other, self.probe.sizes), self.probe.tolerance)

    def off(self, gradient: Tensor) -> float:
        """Return the 2-norm of the difference over that of the undivided gradient."""
        size = norm(self.whole)
        return norm(gradient - self.whole) / size if size > 0 else 0.0

    def _from_whole(self, gradient: Tensor) -> list[float]:
        of, found = self._found.get(id(gradient), (None, []))
        if of is None or of() is not gradient:
            found = relative(gradient - self.whole, self._floors, self.probe.sizes)
            self._found[id(gradient)] = weakref.ref(gradient), found
        return found
