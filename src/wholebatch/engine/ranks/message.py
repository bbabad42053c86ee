"""What do ranks say at the end of a window? One message of 64 bytes, which is added up over all of them."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wholebatch.core.errors import LossError, RankError
from wholebatch.core.window import WindowState
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.weighing import Weighing, read_numbers

FIELDS = 8
"""Numbers in a message, of eight bytes each."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Whether a rank comes to the end of its micro-batches.

    Attributes:
        ended: It has none after this window.
        idle: It has none in this window either.
    """

    ended: bool = False
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """What all ranks have said, added up.

    Attributes:
        targets, loss_sum: Of the window. Unit of the first: targets.
        rows: Of the window, or None where a rank was not told.
        failed: Whether a rank could not do its part.
        extra: The sum of what a group asks besides.
        all_ended, all_idle: Whether every rank has said so.
        differ: Whether ranks have gradients for different parameters.
        scale: The loss scale; 1 without one.
        beside: Numbers of this rank alone, read along.
        spread, parts: As in `Reading`, where they are measured.
    """

    targets: float
    loss_sum: float
    rows: int | None
    failed: bool
    extra: float
    all_ended: bool
    all_idle: bool
    differ: bool
    scale: float
    beside: list[float]
    spread: float = math.nan
    parts: float = 0.0

    @classmethod
    def of(
        cls,
        wire: Wire,
        weighing: Weighing,
        state: WindowState,
        presence: Sequence[bool],
        ending: Ending,
        *,
        extra: Tensor | float,
        device: torch.device,
        beside: Callable[[], Sequence[Tensor]] = tuple,
        noise: Sequence[Tensor | float] = (),
    ) -> Self:
        """Say what a rank has to say, and hear the sum over all, with one wait for the device.

        Args:
            wire: Speaks to the other ranks.
            weighing, state: Of the window on this rank.
            presence: For each parameter, whether this rank has a gradient.
            ending: Whether this rank has more.
            extra: What the group asks besides.
            device: Where the message is written.
            beside: Returns what is read along, when the message is on its way. Each of shape ``[]``.
            noise: Two numbers more, where the gradient noise scale is measured.
        """
        rows = math.nan if state.rows is None else state.rows
        ends = ending.ended + ending.idle * (wire.ranks + 1)
        mask = mask_of(presence, wire.ranks)
        scale = [] if weighing.scale is None else [weighing.scale]
        fields = [state.targets, weighing.loss_sum, rows, spoilt(weighing, state), extra, ends, mask, mask**2, *noise]
        message = torch.tensor(
            [0.0 if isinstance(field, Tensor) else float(field) for field in fields], dtype=torch.float64, device=device
        )
        for place, field in enumerate(fields):
            if isinstance(field, Tensor):
                message[place] = field
        sent = wire.add_up(message)
        others = list(beside())
        wire.wait(sent)
        read = read_numbers([*others, *scale, *message.unbind()])
        targets, loss_sum, rows, failed, extras, endings, masks, squares = read[-len(fields) :][:FIELDS]
        return cls(
            targets=targets,
            loss_sum=loss_sum,
            rows=None if math.isnan(rows) else int(rows),
            failed=failed != 0,
            extra=extras,
            all_ended=endings % (wire.ranks + 1) == wire.ranks,
            all_idle=endings // (wire.ranks + 1) == wire.ranks,
            differ=wire.ranks * squares != masks**2,  # exactly equal only where all masks are the same
            scale=read[len(others)] if scale else 1.0,
            beside=read[: len(others)],
            **(dict(zip(("spread", "parts"), read[-len(noise) :], strict=True)) if noise else {}),
        )


def say_failed(wire: Wire, device: torch.device, *, measures: bool = False) -> None:
    """Say instead that this rank could not do its part."""
    message = torch.zeros(FIELDS + 2 * measures, dtype=torch.float64, device=device)
    message[3] = 1
    wire.wait(wire.add_up(message))


def anywhere(wire: Wire, presence: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each parameter whether any rank has a gradient for it. Asked only where ranks differ."""
    flags = torch.tensor(presence, dtype=torch.uint8, device=device)
    wire.wait(wire.add_up(flags, largest=True))
    return [bool(flag) for flag in flags.tolist()]


def common_of(targets: float, before: float) -> float:
    """Return the reference of the next window, the same on all ranks: a power of two near the targets of the last."""
    return 2.0 ** math.floor(math.log2(targets)) if 0 < targets < math.inf else before


def mask_of(presence: Sequence[bool], ranks: int) -> int:
    """Return a number for a set of parameters, so small that sums of squares over all ranks are exact in float64."""
    bits = (53 - 2 * math.ceil(math.log2(ranks))) // 2
    return zlib.crc32(bytes(presence)) % (1 << bits)


def spoilt(weighing: Weighing, state: WindowState) -> Tensor | float:
    """1 if a device counted targets that cannot weigh a loss, else 0; still on the device."""
    spoilt: Tensor | float = 0.0
    for count in (state.targets, weighing.least):
        if isinstance(count, Tensor):
            spoilt = spoilt + (~((count >= 0) & torch.isfinite(count))).to(torch.float64)
    return spoilt


def told(failures: Sequence[tuple[int, str]]) -> RankError:
    """Return the error that some ranks failed, by rank and what each said."""
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    return RankError(
        "No rank made this update, because "
        + "; ".join(f"rank {rank} could not: {said}" for rank, said in failures[:3])
        + f"{more}.",
        hint="the log of that rank says more; weights, gradients, buffers and random state of every rank are as "
        "before.",
    )


def words(error: BaseException) -> str:
    said = (str(error).strip() or "it says nothing").splitlines()[0]
    return f"{type(error).__name__}: {said[:300].rstrip('.')}"


def no_gradient() -> LossError:
    return LossError(
        "No parameter that the optimizer steps received a gradient.",
        hint="the loss must depend on the weights of the model that was given to wb.Accumulator.",
    )
