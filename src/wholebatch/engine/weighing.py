"""With which factor does a loss's gradient enter a window, and what do the losses add up to?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import LossError, WeightError
from wholebatch.core.weights import Count, gradient_factor, loss_factor
from wholebatch.engine.objective import Part


@dataclass(frozen=True, slots=True)
class Reading:
    """What a window came to, as plain numbers.

    Attributes:
        loss: The objective: the sum of losses over the targets.
        norm: 2-norm of the gradient of the objective.
        factor: What the summed gradient is multiplied by to be that of the objective. Dimensionless.
        scaled_norm: 2-norm of the summed gradient as it stands, loss scale included.
        targets: Targets of the window.
        least: The fewest that a device counted in one micro-batch; 0 where none did.
        spread: The sum over micro-batches of the squared norm of what each added, over its targets, where that is
            measured; NaN where it is not known.
        parts: How many these are.
    """

    loss: float
    norm: float
    factor: float
    scaled_norm: float
    targets: float
    least: float
    spread: float = math.nan
    parts: float = 0.0


class Weighing:
    """Divides the losses of one window before their backward passes, and its gradient at the close.

    The rule is that of `wholebatch.core.weights`: every loss is divided by a reference, which is the window's targets
    where they are known and a guess elsewhere, and the gradient is multiplied by reference over targets. Nothing here
    waits for the device before `read`.

    Args:
        targets: The targets of the whole window, if they are known beforehand. Unit: targets.
        micro_batches: About how many micro-batches will come; the guess is this times the targets of the first.
        scale: The loss scale, on the device, or None.
        early: Whether gradients are used up as they arrive, so that nothing can be divided at the close.
        reference: What losses are divided by, where that is prescribed. Unit: targets.

    Attributes:
        spread: The sum over micro-batches of the squared norm of what each added, over its targets; NaN if it is not
            known of one of them.
        parts: How many these are.
    """

    def __init__(
        self,
        *,
        targets: Count | None,
        micro_batches: int,
        scale: Tensor | None,
        early: bool = False,
        reference: float | None = None,
    ) -> None:
        self._early = early
        self._weighed = False
        self._known = widen(targets)
        self._expected = micro_batches
        self._reference: Count | None = reference
        self._scale = scale
        self._loss_sum: Tensor | None = None
        self._least: Tensor | None = None
        self._root: tuple[float, Tensor] | None = None
        self._noted: list[tuple[Tensor, Count, Count]] = []
        self._has_once: bool | None = None
        self.spread: Tensor | float = 0.0
        self.parts: Count = 0

    @property
    def scaled(self) -> bool:
        """Whether there is a loss scale."""
        return self._scale is not None

    @property
    def reference(self) -> Count:
        """What every loss was divided by; 1 where there was none. Unit: targets."""
        return 1 if self._reference is None else self._reference

    def divide_like(self, other: "Weighing") -> None:
        """Divide losses by what another one divides them by."""
        self._reference = other._reference

    @property
    def scale(self) -> Tensor | None:
        """The loss scale, on the device, or None."""
        return self._scale

    @property
    def loss_sum(self) -> Tensor | float:
        """What the losses add up to, on their device. Shape ``[]``."""
        return 0.0 if self._loss_sum is None else self._loss_sum

    @property
    def least(self) -> Tensor | float:
        """The fewest targets that a device counted in one micro-batch; 0 where none did. Unit: targets."""
        return 0.0 if self._least is None else self._least

    def weigh(self, part: Part) -> tuple[list[Tensor], list[Tensor]]:
        """Return the losses of a micro-batch and the gradients that enter at them.

        Args:
            part: Loss and targets, more than 0 of them unless a device counted. What it adds to the record is noted by
                `settle`.

        Returns:
            The two arguments of `run_backward`.

        Raises:
            LossError: A term that acts once a window came with some of its micro-batches and not with others.
        """
        self._require_alike(part)
        count = part.targets
        if isinstance(count, Tensor):
            count = widen(count)
        if self._reference is None:
            guess = self._known is None or (part.counted and not self._early)
            self._reference = _positive(count) * self._expected if guess else self._known
        if self._early and self._known is None:
            self._require_the_only_one()
        self._noted = [(part.loss.detach(), count if part.reduction == "mean" else 1, count)]
        losses = [part.loss]
        roots = [self._enter(loss_factor(part.reduction, count, self._reference), count, part.loss)]
        if part.once is not None:
            self._noted.append((part.once.detach(), count, count))
            if part.once.requires_grad:
                losses.append(part.once)
                roots.append(self._enter(loss_factor("mean", count, self._reference), count, part.once))
        return losses, roots

    def note_own(self, square: Tensor | None) -> None:
        """Note how large the gradient is that the losses weighed last have brought; before `settle`.

        Args:
            square: Its squared norm, on the device; None: it is not known. Shape ``[]``.
        """
        count = self._noted[0][2]
        if square is None:
            self.spread = math.nan
        elif isinstance(count, Tensor):
            count = count.to(square.device, non_blocking=square.device.type != "cpu")
            self.spread = self.spread + torch.where(count > 0, square / count, 0.0)
            self.parts = self.parts + (count > 0)
        else:
            self.spread = self.spread + square / count
            self.parts = self.parts + 1

    def settle(self) -> None:
        """Note the losses that were weighed last for the record: they count."""
        count = self._noted[0][2]
        if isinstance(count, Tensor):
            self._least = count if self._least is None else torch.minimum(self._least, count)
        for loss, times, count in self._noted:
            self._note(loss, times, count)
        self._noted = []

    def read(self, norms: Sequence[Tensor], targets: Count) -> Reading:
        """Return what the window came to, with one wait for the device.

        Args:
            norms: 2-norms of the parts of the summed gradient. Each of shape ``[]``.
            targets: Targets of the window. Unit: targets.
        """
        asked = [self._loss_sum, targets, self._reference, self._scale, self._least, self.spread, self.parts]
        numbers = read_numbers([*norms, *(each for each in asked if isinstance(each, Tensor))])
        rest = iter(numbers[len(norms) :])
        plain: list[Any] = [next(rest) if isinstance(each, Tensor) else each for each in asked]
        loss_sum, total, reference, scale, least, spread, parts = plain
        if self._early and total and abs(reference / total - 1) > 1e-6:
            raise WeightError(
                f"The losses of a window were divided by {reference} targets before their backward passes, and hold "
                f"{total}; an optimizer that takes gradients in as they arrive allows no division later.",
                hint=_TOLD_EARLY,
            )
        scaled_norm = math.hypot(*numbers[: len(norms)])
        factor = gradient_factor(reference, total) / (scale or 1.0) if total else 0.0
        return Reading(
            loss=loss_sum / total if total else math.nan,
            norm=scaled_norm * factor,
            factor=factor,
            scaled_norm=scaled_norm,
            targets=total,
            least=least if least is not None else 0.0,
            spread=spread,
            parts=parts,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was weighed so far; the loss scale is that of the accumulator."""
        return {name: getattr(self, f"_{name}") for name in _KEPT} | {"spread": self.spread, "parts": self.parts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what another process has weighed, with tensors on a device."""
        for name in _KEPT:
            value = state[name]
            setattr(self, f"_{name}", value.to(device, copy=True) if isinstance(value, Tensor) else value)
        spread, parts = state["spread"], state["parts"]
        self.spread = spread.to(device, copy=True) if isinstance(spread, Tensor) else spread
        self.parts = parts.to(device, copy=True) if isinstance(parts, Tensor) else parts

    def _require_alike(self, part: Part) -> None:
        has_once = part.once is not None
        if self._has_once is None:
            self._has_once = has_once
        elif self._has_once != has_once:
            raise LossError(
                "A term that acts once a window (loss_sum, targets, once) came with some of its micro-batches and not "
                "with others. It enters by their shares of the targets, so that it would act less than once.",
                hint="return it with every micro-batch, as in (loss_sum, targets, penalty(model)); if there is none, "
                "a tensor of 0.",
            )

    def _require_the_only_one(self) -> None:
        if self._expected > 1 or self._weighed:
            raise WeightError(
                "The targets of this window are not known before its backward passes, and an optimizer that takes "
                "gradients in as they arrive needs each of them divided by then.",
                hint=_TOLD_EARLY,
            )
        self._weighed = True

    def _enter(self, weight: Count, count: Count, loss: Tensor) -> Tensor:
        """The gradient that enters at a loss: its weight times the loss scale; 0 where a device counted no target."""
        if isinstance(count, Tensor):
            weight = torch.where(count > 0, weight, 0.0)
        if self._scale is not None:
            weight = weight * self._scale
        if isinstance(weight, Tensor):
            return weight.detach().to(device=loss.device, dtype=loss.dtype).reshape(loss.shape)
        last = self._root
        if last is None or last[0] != weight or last[1].dtype != loss.dtype or last[1].shape != loss.shape:
            last = self._root = (weight, torch.full_like(loss, weight))
        return last[1]

    def _note(self, loss: Tensor, times: Count, count: Count) -> None:
        """Add a loss, times what it counts for, to the window's; the sum stays on its device until it is read.

        One tensor for all: a small one for each loss would pin places in the heap between large blocks.
        """
        noted = loss.reshape(()) if loss.ndim else loss
        if self._loss_sum is None:
            wide = noted.dtype if noted.element_size() >= 4 else torch.float32
            self._loss_sum = torch.zeros((), dtype=wide, device=noted.device)
        if isinstance(count, Tensor):
            noted, times = torch.where(count > 0, noted * times, 0.0), 1
        if noted.device != self._loss_sum.device:
            noted = noted.to(self._loss_sum.device)
        self._loss_sum.add_(noted, alpha=times)


_KEPT = ("known", "expected", "reference", "loss_sum", "least")

_TOLD_EARLY = (
    "tell how many there are in the whole window: accumulator.window(targets=n), or step and updates with targets=... "
    "and a loss function that returns the loss alone."
)


def widen(count: Count) -> Count:
    """Return a count as wide as its device has numbers, so that sums and quotients round no more than losses do."""
    return count.detach().reshape(()).to(widest(count)) if isinstance(count, Tensor) else count


def widest(tensor: Tensor) -> torch.dtype:
    """Return the widest numbers that a tensor's device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _positive(count: Count) -> Count:
    return torch.where(count > 0, count, 1) if isinstance(count, Tensor) else count


def read_numbers(tensors: list[Tensor]) -> list[float]:
    """Return the numbers of some tensors of shape ``[]``, with one wait for the device."""
    if len({each.device for each in tensors}) > 1:
        tensors = [each.to(tensors[0].device) for each in tensors]
    numbers: list[float] = torch.stack(tensors).tolist()
    return numbers
