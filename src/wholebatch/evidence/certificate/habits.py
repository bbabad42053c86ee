"""Which mistake is it? A step that ends where a loop with a known wrong habit ends has that habit too.

With m_k the mean gradient of micro-batch k, n_k its targets and N those of the window, the right update goes along

    g = sum_k (n_k / N) m_k.

Every habit predicts another direction; a prediction has to hold for all cuts at once.
"""

import torch

from wholebatch.engine.checks.causes import Cause
from wholebatch.evidence.certificate.measured import Measured, Window


class Naming:
    """Looks for the habit that explains three windows.

    Args:
        measured: The windows.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def gradients(self) -> list[Cause]:
        """Return what is wrong with the gradient that the optimizer is given, if it is a habit of the step."""
        if any(len(each.found.steps) != 1 for each in self._measured.windows):
            return []
        for look in (self._divisor, self._dropped, self._weights, self._term):
            cause = look()
            if cause is not None:
                return [cause]
        return []

    def follows_the_loss(self) -> bool:
        """Whether the step makes what the losses of its micro-batches say, each weighted by its targets."""
        return self._measured.fits([each.shares @ each.means for each in self._measured.windows])

    def _divisor(self) -> Cause | None:
        """A factor for each window, before the plain sum of the means or before the right sum."""
        sums = [each.means.sum(0) for each in self._measured.windows]
        numbers = [each.number for each in self._measured.windows]
        factors = self._measured.factors(sums)
        if factors is not None:
            if self._measured.are_close(factors, [factors[0]] * len(factors)) and self._measured.are_close(
                [factors[0]], [1.0]
            ):
                return Cause(
                    "not divided",
                    "The means of the micro-batches are added up and divided by nothing, so that the update grows with "
                    "their number.",
                    "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
                    self._measured.say(self._measured.added),
                )
            if self._measured.are_close(factors, [factors[0]] * len(factors)):
                return self._fixed(f"{1 / factors[0]:.6g} micro-batches")
            return Cause(
                "mean of means",
                "Every micro-batch weighs the same, whatever it holds: the loss is divided by the number of "
                "micro-batches, not by the targets of the window.",
                "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
                self._measured.dividing_line(),
            )
        factors = self._measured.factors([self._measured.whole for _ in self._measured.windows])
        if factors is None:
            return None
        if self._measured.are_close(factors, [factors[0]] * len(factors)):
            return Cause(
                "wrong divisor",
                f"The update is {factors[0]:.6g} times the right one, however the batch is cut.",
                "divide by the targets that the window holds, once; if the batch is smaller than the one the step is "
                "written for, verify with one of that size.",
                self._measured.dividing_line(),
            )
        each_holds = [factor / number for factor, number in zip(factors, numbers, strict=True)]
        if self._measured.are_close(each_holds, [each_holds[0]] * len(factors)):
            return self._fixed(f"{1 / each_holds[0]:.6g} micro-batches")
        if self._measured.are_close(factors, [1 / number for number in numbers]):
            return Cause(
                "wrong divisor",
                "The window is divided twice: by its targets, and by the number of micro-batches.",
                "divide once, by the targets of the window.",
                self._measured.dividing_line(),
            )
        return None

    def _fixed(self, divisor: str) -> Cause:
        numbers = " and ".join(str(each) for each in dict.fromkeys(each.number for each in self._measured.windows))
        return Cause(
            "ragged last window",
            f"Every window is divided as if it had {divisor}, also those of {numbers}: a shorter window at the end of "
            "an epoch gets too small an update.",
            "divide by what the window holds: weigh each mean loss by targets / targets_of_the_window.",
            self._measured.dividing_line(),
        )

    def _dropped(self) -> Cause | None:
        for each in self._measured.windows:
            missing = self._missing(each)
            if missing:
                where = (
                    each.between("zeroed")
                    or self._measured.line_between("zeroed")
                    or each.between("changed")
                    or self._measured.added
                )
                names = ", ".join(str(place + 1) for place in missing)
                return Cause(
                    "dropped micro-batches",
                    f"Of {each.number} micro-batches ({each.cut.name}), the update holds nothing of number {names}.",
                    "clear gradients before the window, never inside it, and let every micro-batch add to it.",
                    self._measured.say(where),
                )
        return None

    def _missing(self, each: Window) -> list[int]:
        """Which micro-batches have no part in the gradient, counted from 0."""
        held = [place for place in range(each.number) if float(each.shares[place]) > 0]
        weights = self._measured.solve(each)
        if weights is not None:
            largest = float(weights.abs().max())
            return [place for place in held if abs(float(weights[place])) <= self._measured.near * largest]
        for kept in ([held[-1]], [held[0]], held[:-1], held[1:]):  # too few entries to solve for all weights
            for shares in (each.shares, torch.ones_like(each.shares)):
                right = shares[kept] @ each.means[kept]
                factor = float(torch.dot(each.found.gradient, right) / torch.dot(right, right).clamp(min=1e-300))
                if len(kept) < len(held) and self._measured.agrees(each.found.gradient, factor * right):
                    return [place for place in held if place not in kept]
        return []

    def _weights(self) -> Cause | None:
        each = self._measured.windows[-1]
        weights = self._measured.solve(each)
        if weights is None:
            return None
        said = ", ".join(f"{float(weight):.3g}" for weight in weights)
        right = ", ".join(f"{float(share):.3g}" for share in each.shares)
        return Cause(
            "weights",
            f"The micro-batches ({each.cut.name}) weigh {said} in the update, and {right} would be right.",
            "weigh each mean loss by its share of the targets: loss * targets / targets_of_the_window.",
            self._measured.dividing_line(),
        )

    def _term(self) -> Cause | None:
        """What is counted once for each micro-batch: some parameters, or a term of the loss."""
        numbers = [each.number for each in self._measured.windows]
        sums = {
            "whole": [self._measured.whole for _ in self._measured.windows],
            "means": [each.means.mean(0) for each in self._measured.windows],
            "shares": [each.shares @ each.means for each in self._measured.windows],
        }
        for right in sums.values():
            reached = self._measured.reached_by_more(right)
            if not reached:
                continue
            ratios = [
                self._measured.ratio(each.found.gradient, g, reached)
                for each, g in zip(self._measured.windows, right, strict=True)
            ]
            known = [ratio for ratio in ratios if ratio is not None]
            names = ", ".join(self._measured.probe.names[place] for place in reached)
            if len(known) == len(ratios):
                extra = [ratio - number for ratio, number in zip(known, numbers, strict=True)]
                if max(extra) - min(extra) <= self._measured.near * max(numbers):
                    return Cause(
                        "temperature counted k times",
                        f"The gradient of {names} is counted once for each micro-batch: {known[0]:.3g} times in a "
                        f"window of {numbers[0]}, {known[-1]:.3g} times in one of {numbers[-1]}.",
                        "take its gradient from one of the two passes only: detach it in the other.",
                        self._measured.say(self._measured.added),
                    )
                continue
            return self._balancing(f"It reaches {names}; all other parameters have the right gradient.")
        extras = [
            (each.found.gradient - self._measured.whole) / (each.number - 1)
            for each in self._measured.windows
            if each.number > 1
        ]
        if len(set(numbers)) > 1 and all(self._measured.agrees(extra, extras[0]) for extra in extras):
            return self._balancing("Its gradient is there as often as there are micro-batches.")
        return None

    def _balancing(self, found: str) -> Cause:
        return Cause(
            "balancing loss",
            "A term beside the mean, such as a balancing loss or a regulariser, is counted for each micro-batch, where "
            f"it should count once a window. {found}",
            "divide it with the rest, or add it once a window; a balancing loss needs statistics of the whole window.",
            self._measured.say(self._measured.added),
        )


def clip_before_the_sum(where: str | None) -> Cause:
    """Return the cause that clipping too early is."""
    return Cause(
        "clipping before the sum",
        "Gradients are clipped before those of all micro-batches are added up, which turns the update.",
        "clip once, after the last backward pass and before optimizer.step().",
        where,
    )
