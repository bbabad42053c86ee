"""What did a step make of each cut, and which direction explains that?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wholebatch.engine.checks.distance import errors, is_rounding
from wholebatch.engine.checks.pieces import Probe
from wholebatch.evidence.certificate.cuts import Cut
from wholebatch.evidence.certificate.lines import Kind
from wholebatch.evidence.certificate.rehearsal import Rehearsal
from wholebatch.evidence.certificate.source import Place, division_before

CLOSE = 1e-3
"""How near a factor must come to the one of a habit, relative; with 16-bit weights, half of what counts as rounding."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a step made of one cut, next to what its micro-batches hold.

    Attributes:
        cut: The cut.
        found: What the step did, line by line.
        means: The mean gradient of each micro-batch, zero where it has no target. Shape ``[micro-batches, entries]``.
        shares: The share of each micro-batch in the targets of the window. Shape ``[micro-batches]``.
    """

    cut: Cut
    found: Rehearsal
    means: Tensor
    shares: Tensor

    @property
    def number(self) -> int:
        """Micro-batches in the window."""
        return len(self.means)

    def between(self, *kinds: Kind) -> Place | None:
        """Return the line that did this to the gradients after one backward pass and before another, if one did."""
        *_, last = self.found.steps or [self.found.passes]
        return next((each.place for each in self.found.effects if each.kind in kinds and 0 < each.passes < last), None)

    def line(self, *kinds: Kind) -> Place | None:
        """Return the first line that did this."""
        return next((each.place for each in self.found.effects if each.kind in kinds), None)


def window(probe: Probe, cut: Cut, found: Rehearsal) -> Window:
    """Return what a step did, next to the gradients of the micro-batches as the declared objective has them."""
    entries = sum(probe.sizes)
    pieces = [probe.run(part) for part in cut.parts]
    targets = torch.tensor([0.0 if piece is None else piece.targets for piece in pieces], dtype=torch.float64)
    zero = torch.zeros(entries, dtype=torch.float64)
    means = [
        zero if piece is None else piece.gradient / piece.targets if piece.is_sum else piece.gradient
        for piece in pieces
    ]
    return Window(cut, found, torch.stack(means), targets / targets.sum())


class Measured:
    """Three windows, measured against directions that a habit would go.

    Args:
        probe: Has the model and the tolerance.
        whole: The gradient of the undivided batch. Shape ``[entries]``.
        windows: By rows, permuted and ragged.
        here: Where the step is defined; the line where no better one is known.

    Attributes:
        probe, whole, windows: As given.
        added: The first line that added to the gradients, if one was seen.
        near: How near a factor must come to the one of a habit, relative.
    """

    def __init__(self, probe: Probe, whole: Tensor, windows: Sequence[Window], here: Place | None) -> None:
        self.probe = probe
        self.whole = whole
        self.windows = windows
        self._here = here
        self.added = self.line_of("added")
        self.near = max(CLOSE, probe.tolerance / 2)

    def factors(self, directions: Sequence[Tensor]) -> list[float] | None:
        """Return by which factors the gradients go along some directions; None where they do not."""
        factors = [
            float(torch.dot(each.found.gradient, way) / torch.dot(way, way).clamp(min=1e-300))
            for each, way in zip(self.windows, directions, strict=True)
        ]
        ways = [factor * way for factor, way in zip(factors, directions, strict=True)]
        return factors if min(map(abs, factors)) > 0 and self.fits(ways) else None

    def fits(self, right: Sequence[Tensor]) -> bool:
        """Return whether the gradients are these, one for each window."""
        return all(
            self.agrees(each.found.gradient, gradient) for each, gradient in zip(self.windows, right, strict=True)
        )

    def agrees(self, gradient: Tensor, right: Tensor) -> bool:
        """Return whether a gradient is another but for rounding."""
        scale = torch.maximum(right.abs(), self.windows[0].means.abs().mean(0) * 0.03)
        return is_rounding(errors(gradient, right, scale, self.probe.sizes), self.probe.tolerance)

    def solve(self, each: Window) -> Tensor | None:
        """Return the weights of the micro-batches in the gradient; None where none fit or they cannot be told apart."""
        held = each.shares > 0
        means = each.means[held]
        if int(torch.linalg.matrix_rank(means, rtol=1e-6)) < len(means):
            return None
        solution = torch.linalg.lstsq(means.T, each.found.gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        if not self.agrees(each.found.gradient, solution @ means):
            return None
        weights = torch.zeros_like(each.shares)
        weights[held] = solution
        return weights

    def reached_by_more(self, right: Sequence[Tensor]) -> list[int]:
        """Return the parameters, by place, that are off in some window, if others are right in all of them."""
        off: set[int] = set()
        sizes = [part.norm() / max(1, len(part)) ** 0.5 for part in self.whole.split_with_sizes(self.probe.sizes)]
        average = float(self.whole.norm()) / max(1, len(self.whole)) ** 0.5
        for each, gradient in zip(self.windows, right, strict=True):
            found = errors(each.found.gradient, gradient, gradient.abs(), self.probe.sizes)
            off |= {place for place, error in enumerate(found) if not error <= self.probe.tolerance}
        untouched = [place for place, size in enumerate(sizes) if float(size) > 0.03 * average and place not in off]
        return sorted(off) if untouched else []

    def ratio(self, gradient: Tensor, right: Tensor, places: Sequence[int]) -> float | None:
        """Return by which factor the gradients of some parameters are too large; None where it is no factor."""
        found, wanted = gradient.split_with_sizes(self.probe.sizes), right.split_with_sizes(self.probe.sizes)
        one, other = torch.cat([found[place] for place in places]), torch.cat([wanted[place] for place in places])
        factor = float(torch.dot(one, other) / torch.dot(other, other).clamp(min=1e-300))
        return factor if float((one - factor * other).norm()) <= self.near * float(one.norm()) else None

    def are_close(self, found: Sequence[float], wanted: Sequence[float]) -> bool:
        """Return whether factors are those of a habit."""
        return all(abs(one - other) <= self.near * abs(other) for one, other in zip(found, wanted, strict=True))

    def line_between(self, *kinds: Kind) -> Place | None:
        """Return the line that did this inside a window, if one did."""
        return next((place for each in self.windows if (place := each.between(*kinds)) is not None), None)

    def line_of(self, *kinds: Kind) -> Place | None:
        """Return the first line that did this, if one did."""
        return next((place for each in self.windows if (place := each.line(*kinds)) is not None), None)

    def dividing_line(self) -> str | None:
        """Return the line that divides: one that was seen to scale the whole sum, or one written as a division."""
        for effect in self.windows[0].found.effects:
            written = any(mark in effect.place.text for mark in ("/", "div", "*", "mul"))
            if written and effect.kind == "scaled" and effect.passes == self.windows[0].found.steps[-1]:
                return str(effect.place)
        return self.say(division_before(self.added, self._here))

    def say(self, place: Place | None) -> str | None:
        """Return a place as text; where the step is defined if there is none."""
        place = place or self._here
        return str(place) if place is not None else None
