"""Which mistake is it? A step that ends where a loop with a known wrong habit ends has that habit too.

With m_k the mean gradient of micro-batch k, n_k its targets and N those of the window, the right update goes along

    g = sum_k (n_k / N) m_k.

Every habit predicts another direction, or another number of steps; a prediction has to hold for all cuts at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wholebatch.engine.causes import Cause
from wholebatch.engine.pieces import Probe, errors, is_rounding
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


class Naming:
    """Looks for the habit that explains three windows.

    Args:
        probe: Has the model and the tolerance.
        whole: The gradient of the undivided batch. Shape ``[entries]``.
        windows: By rows, permuted and ragged.
        here: Where the step is defined; the line where no better one is known.
    """

    def __init__(self, probe: Probe, whole: Tensor, windows: Sequence[Window], here: Place | None) -> None:
        self._probe = probe
        self._whole = whole
        self._windows = windows
        self._here = here
        self._added = self._line("added")
        self._near = max(CLOSE, probe.tolerance / 2)

    def counts(self) -> list[Cause]:
        """Return what is wrong with the number of steps."""
        first = self._windows[0]
        causes = []
        stepping = next((each for each in self._windows if len(each.found.steps) > 1), None)
        if stepping is not None:
            causes.append(
                Cause(
                    "optimizer stepped per micro-batch",
                    f"The optimizer stepped {len(stepping.found.steps)} times in a window of {stepping.number} "
                    "micro-batches.",
                    "step once, after the last micro-batch: move the line out of the loop.",
                    self._say(stepping.line("stepped")),
                )
            )
        late = next((each for each in self._windows if not each.found.steps), None)
        if late is first:
            causes.append(
                Cause(
                    "no update",
                    f"The optimizer never stepped in a window of {first.number} micro-batches"
                    + (", although the weights moved." if first.found.moved else "."),
                    "call optimizer.step() once, after the last micro-batch, on the optimizer that the step is given.",
                    self._say(self._added),
                )
            )
        elif late is not None:
            causes.append(
                Cause(
                    "ragged last window",
                    f"A window of {late.number} micro-batches ended without an update, where one of {first.number} had "
                    "one: what it has gathered is lost, or leaks into the next.",
                    "step at the end of every window, also of one that is shorter.",
                    self._say(first.line("stepped")),
                )
            )
        often = max(self._windows, key=lambda each: each.found.schedule_steps)
        if often.found.schedule_steps > 1:
            causes.append(
                Cause(
                    "scheduler per micro-batch",
                    f"The schedule was stepped {often.found.schedule_steps} times in a window of {often.number} "
                    "micro-batches, which is one update.",
                    "step it once an update, next to optimizer.step().",
                    self._say(often.line("scheduled")),
                )
            )
        return causes

    def gradients(self) -> list[Cause]:
        """Return what is wrong with the gradient that the optimizer is given, if it is a habit of the step."""
        if any(len(each.found.steps) != 1 for each in self._windows):
            return []
        for look in (self._divisor, self._dropped, self._weights, self._term):
            cause = look()
            if cause is not None:
                return [cause]
        return []

    def follows_the_loss(self) -> bool:
        """Whether the step makes what the losses of its micro-batches say, each weighted by its targets."""
        return self._fit([each.shares @ each.means for each in self._windows])

    def _divisor(self) -> Cause | None:
        """A factor for each window, before the plain sum of the means or before the right sum."""
        sums = [each.means.sum(0) for each in self._windows]
        numbers = [each.number for each in self._windows]
        factors = self._factors(sums)
        if factors is not None:
            if self._close(factors, [factors[0]] * len(factors)) and self._close([factors[0]], [1.0]):
                return Cause(
                    "not divided",
                    "The means of the micro-batches are added up and divided by nothing, so that the update grows with "
                    "their number.",
                    "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
                    self._say(self._added),
                )
            if self._close(factors, [factors[0]] * len(factors)):
                return self._fixed(f"{1 / factors[0]:.6g} micro-batches")
            return Cause(
                "mean of means",
                "Every micro-batch weighs the same, whatever it holds: the loss is divided by the number of "
                "micro-batches, not by the targets of the window.",
                "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
                self._divides(),
            )
        factors = self._factors([self._whole for _ in self._windows])
        if factors is None:
            return None
        if self._close(factors, [factors[0]] * len(factors)):
            return Cause(
                "wrong divisor",
                f"The update is {factors[0]:.6g} times the right one, however the batch is cut.",
                "divide by the targets that the window holds, once; if the batch is smaller than the one the step is "
                "written for, verify with one of that size.",
                self._divides(),
            )
        each_holds = [factor / number for factor, number in zip(factors, numbers, strict=True)]
        if self._close(each_holds, [each_holds[0]] * len(factors)):
            return self._fixed(f"{1 / each_holds[0]:.6g} micro-batches")
        if self._close(factors, [1 / number for number in numbers]):
            return Cause(
                "wrong divisor",
                "The window is divided twice: by its targets, and by the number of micro-batches.",
                "divide once, by the targets of the window.",
                self._divides(),
            )
        return None

    def _fixed(self, divisor: str) -> Cause:
        numbers = " and ".join(str(each) for each in dict.fromkeys(each.number for each in self._windows))
        return Cause(
            "ragged last window",
            f"Every window is divided as if it had {divisor}, also those of {numbers}: a shorter window at the end of "
            "an epoch gets too small an update.",
            "divide by what the window holds: weigh each mean loss by targets / targets_of_the_window.",
            self._divides(),
        )

    def _dropped(self) -> Cause | None:
        for each in self._windows:
            missing = self._missing(each)
            if missing:
                where = each.between("zeroed") or self._between("zeroed") or each.between("changed") or self._added
                names = ", ".join(str(place + 1) for place in missing)
                return Cause(
                    "dropped micro-batches",
                    f"Of {each.number} micro-batches ({each.cut.name}), the update holds nothing of number {names}.",
                    "clear gradients before the window, never inside it, and let every micro-batch add to it.",
                    self._say(where),
                )
        return None

    def _missing(self, each: Window) -> list[int]:
        """Which micro-batches have no part in the gradient, counted from 0."""
        held = [place for place in range(each.number) if float(each.shares[place]) > 0]
        weights = self._solve(each)
        if weights is not None:
            largest = float(weights.abs().max())
            return [place for place in held if abs(float(weights[place])) <= self._near * largest]
        for kept in ([held[-1]], [held[0]], held[:-1], held[1:]):  # too few entries to solve for all weights
            for shares in (each.shares, torch.ones_like(each.shares)):
                right = shares[kept] @ each.means[kept]
                factor = float(torch.dot(each.found.gradient, right) / torch.dot(right, right).clamp(min=1e-300))
                if len(kept) < len(held) and self._right(each.found.gradient, factor * right):
                    return [place for place in held if place not in kept]
        return []

    def _weights(self) -> Cause | None:
        each = self._windows[-1]
        weights = self._solve(each)
        if weights is None:
            return None
        said = ", ".join(f"{float(weight):.3g}" for weight in weights)
        right = ", ".join(f"{float(share):.3g}" for share in each.shares)
        return Cause(
            "weights",
            f"The micro-batches ({each.cut.name}) weigh {said} in the update, and {right} would be right.",
            "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
            self._divides(),
        )

    def _term(self) -> Cause | None:
        """What is counted once for each micro-batch: some parameters, or a term of the loss."""
        numbers = [each.number for each in self._windows]
        sums = {
            "whole": [self._whole for _ in self._windows],
            "means": [each.means.mean(0) for each in self._windows],
            "shares": [each.shares @ each.means for each in self._windows],
        }
        for right in sums.values():
            reached = self._reached(right)
            if not reached:
                continue
            ratios = [
                self._ratio(each.found.gradient, g, reached) for each, g in zip(self._windows, right, strict=True)
            ]
            known = [ratio for ratio in ratios if ratio is not None]
            names = ", ".join(self._probe.names[place] for place in reached)
            if len(known) == len(ratios):
                extra = [ratio - number for ratio, number in zip(known, numbers, strict=True)]
                if max(extra) - min(extra) <= self._near * max(numbers):
                    return Cause(
                        "temperature counted k times",
                        f"The gradient of {names} is counted once for each micro-batch: {known[0]:.3g} times in a "
                        f"window of {numbers[0]}, {known[-1]:.3g} times in one of {numbers[-1]}.",
                        "take its gradient from one of the two passes only: detach it in the other.",
                        self._say(self._added),
                    )
                continue
            return self._balancing(f"It reaches {names}; all other parameters have the right gradient.")
        extras = [(each.found.gradient - self._whole) / (each.number - 1) for each in self._windows if each.number > 1]
        if len(set(numbers)) > 1 and all(self._right(extra, extras[0]) for extra in extras):
            return self._balancing("Its gradient is there as often as there are micro-batches.")
        return None

    def _balancing(self, found: str) -> Cause:
        return Cause(
            "balancing loss",
            "A term beside the mean, such as a balancing loss or a regulariser, is counted for each micro-batch, where "
            f"it should count once a window. {found}",
            "divide it with the rest, or add it once a window; a balancing loss needs statistics of the whole window.",
            self._say(self._added),
        )

    def _reached(self, right: Sequence[Tensor]) -> list[int]:
        """The parameters, by place, that are off in some window, if there are others that are right in all of them."""
        off: set[int] = set()
        sizes = [part.norm() / max(1, len(part)) ** 0.5 for part in self._whole.split_with_sizes(self._probe.sizes)]
        average = float(self._whole.norm()) / max(1, len(self._whole)) ** 0.5
        for each, gradient in zip(self._windows, right, strict=True):
            found = errors(each.found.gradient, gradient, gradient.abs(), self._probe.sizes)
            off |= {place for place, error in enumerate(found) if not error <= self._probe.tolerance}
        untouched = [place for place, size in enumerate(sizes) if float(size) > 0.03 * average and place not in off]
        return sorted(off) if untouched else []

    def _ratio(self, gradient: Tensor, right: Tensor, places: Sequence[int]) -> float | None:
        """By which factor the gradients of some parameters are too large; None where it is no factor."""
        found, wanted = gradient.split_with_sizes(self._probe.sizes), right.split_with_sizes(self._probe.sizes)
        one, other = torch.cat([found[place] for place in places]), torch.cat([wanted[place] for place in places])
        factor = float(torch.dot(one, other) / torch.dot(other, other).clamp(min=1e-300))
        return factor if float((one - factor * other).norm()) <= self._near * float(one.norm()) else None

    def _factors(self, directions: Sequence[Tensor]) -> list[float] | None:
        """By which factors the gradients go along some directions; None where they do not."""
        factors = [
            float(torch.dot(each.found.gradient, way) / torch.dot(way, way).clamp(min=1e-300))
            for each, way in zip(self._windows, directions, strict=True)
        ]
        ways = [factor * way for factor, way in zip(factors, directions, strict=True)]
        return factors if min(map(abs, factors)) > 0 and self._fit(ways) else None

    def _fit(self, right: Sequence[Tensor]) -> bool:
        return all(
            self._right(each.found.gradient, gradient) for each, gradient in zip(self._windows, right, strict=True)
        )

    def _right(self, gradient: Tensor, right: Tensor) -> bool:
        scale = torch.maximum(right.abs(), self._windows[0].means.abs().mean(0) * 0.03)
        return is_rounding(errors(gradient, right, scale, self._probe.sizes), self._probe.tolerance)

    def _solve(self, each: Window) -> Tensor | None:
        """The weights of the micro-batches in the gradient; None where none fit or they cannot be told apart."""
        held = each.shares > 0
        means = each.means[held]
        if int(torch.linalg.matrix_rank(means, rtol=1e-6)) < len(means):
            return None
        solution = torch.linalg.lstsq(means.T, each.found.gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        if not self._right(each.found.gradient, solution @ means):
            return None
        weights = torch.zeros_like(each.shares)
        weights[held] = solution
        return weights

    def _between(self, *kinds: Kind) -> Place | None:
        return next((place for each in self._windows if (place := each.between(*kinds)) is not None), None)

    def _line(self, *kinds: Kind) -> Place | None:
        return next((place for each in self._windows if (place := each.line(*kinds)) is not None), None)

    def _close(self, found: Sequence[float], wanted: Sequence[float]) -> bool:
        return all(abs(one - other) <= self._near * abs(other) for one, other in zip(found, wanted, strict=True))

    def _divides(self) -> str | None:
        """The line that divides: one that was seen to scale the whole sum, or one that is written as a division."""
        for effect in self._windows[0].found.effects:
            written = any(mark in effect.place.text for mark in ("/", "div", "*", "mul"))
            if written and effect.kind == "scaled" and effect.passes == self._windows[0].found.steps[-1]:
                return str(effect.place)
        return self._say(division_before(self._added, self._here))

    def _say(self, place: Place | None) -> str | None:
        place = place or self._here
        return str(place) if place is not None else None


def clip_before_the_sum(where: str | None) -> Cause:
    """Return the cause that clipping too early is."""
    return Cause(
        "clipping before the sum",
        "Gradients are clipped before those of all micro-batches are added up, which turns the update.",
        "clip once, after the last backward pass and before optimizer.step().",
        where,
    )
