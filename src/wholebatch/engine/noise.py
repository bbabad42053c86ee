"""How large is a micro-batch's own gradient? Its norm, taken as it arrives and before it is added to the window's.

A hook on a weight sees the gradient that one backward pass brings, all uses of the weight summed, before autograd adds
it to ``.grad``: nothing is copied, and one number a weight is kept.
"""

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.errors import OptimizerError
from wholebatch.core.noise import NoiseSample, NoiseScale
from wholebatch.core.split import Tokens
from wholebatch.engine.arrivals import before_added, remove
from wholebatch.engine.gradients import norm_of
from wholebatch.engine.reasons import Say
from wholebatch.engine.steps.consuming import takers
from wholebatch.engine.weighing import Reading, widest


def noise_of(noise_scale: bool | int, optimizers: Sequence[Optimizer], micro_batch: object, say: Say) -> "Noise | None":
    """Return what measures the noise scale of an accumulator; None if that was not asked for.

    Args:
        noise_scale: As for `wb.Accumulator`.
        optimizers: What steps the model.
        micro_batch: How it is cut.
        say: Takes what is to be known of the measure.

    Raises:
        ConfigError: `noise_scale` is neither yes or no nor a number of windows.
        OptimizerError: An optimizer takes gradients in as they arrive.
    """
    if noise_scale is False:
        return None
    noise = Noise(NoiseScale().windows if noise_scale is True else noise_scale, say)
    taking = takers(optimizers)
    if taking:
        raise OptimizerError(
            f"noise_scale={noise_scale!r} needs the gradient of the whole logical batch, and "
            f"{type(taking[0]).__name__} takes it in and forgets it part by part.",
            hint="measure with an optimizer that steps from the whole gradient, such as AdamW.",
        )
    if isinstance(micro_batch, Tokens):
        say(
            "noise_scale: micro-batches by tokens hold rows of like length, and differ from one another by more than "
            "chance, so that the noise scale comes out somewhat too large; wb.Rows does not sort.",
            logging.INFO,
        )
    return noise


class Noise:
    """Measures the gradient noise scale of an accumulator's windows.

    Args:
        windows: Over how many windows averages are taken.
        say: Takes the reason why nothing is measured.

    Attributes:
        average: Of all windows so far.
    """

    def __init__(self, windows: int, say: Say) -> None:
        self.average = NoiseScale(windows)
        self._say = say
        self._ear = _Ear()
        self._parameters: list[nn.Parameter] = []
        self._release: Callable[[], object] = lambda: None

    def hear(self, parameters: Sequence[nn.Parameter], backward: Callable[[], None]) -> Tensor | None:
        """Run a backward pass, and return the squared norm of what it has brought, on its device.

        Args:
            parameters: To whom.
            backward: Runs the pass.

        Returns:
            Shape ``[]``. None where the gradient of a weight came in parts, as nested backward passes bring it, so
            that its norm is not known; a pass that brought nothing has norm 0.
        """
        if parameters is not self._parameters:
            self._attend(parameters)
        ear = self._ear
        ear.norms, ear.twice, ear.listening = {}, False, True
        try:
            backward()
        finally:
            ear.listening = False
        norms, ear.norms = list(ear.norms.values()), {}
        if ear.twice:
            return None
        if not norms:
            return torch.zeros((), device=parameters[0].device)
        device = norms[0].device
        if len({(norm.device, norm.dtype) for norm in norms}) > 1:
            norms = [norm.to(device, widest(norm)) for norm in norms]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), dtype=widest(norms[0]))
        return norm.square()

    def take_in(self, read: Reading) -> float | None:
        """Take a window into the average, once it has become an update.

        Args:
            read: What it came to.

        Returns:
            The noise scale as it stands; None where it is not known, or the window said nothing. Unit: targets.
        """
        # What arrived is the gradient of the sum divided by factor * targets.
        spread = read.spread * (read.factor * read.targets) ** 2
        sample = NoiseSample.of(spread=spread, norm=read.norm, targets=read.targets, parts=read.parts)
        self.average.add(sample)
        if sample is None and self.average.variance is None:
            self._say(_MET if math.isnan(read.spread) else _ONE, logging.INFO)
        return None if sample is None else self.average.scale

    def _attend(self, parameters: Sequence[nn.Parameter]) -> None:
        self._release()
        self._parameters = parameters  # type: ignore[assignment]  # the very list: another one has other parameters
        hooks = [before_added(each, partial(self._ear.note, id(each))) for each in parameters]
        self._release = weakref.finalize(self, remove, hooks)


_ONE = (
    "noise_scale: a window of one micro-batch does not show by how much micro-batches differ: nothing is "
    "measured; cut it, as in micro_batch=wb.Rows(n) with n at most half of the logical batch."
)
_MET = (
    "noise_scale: the gradient of a single micro-batch is not known here, since micro-batches meet, or since a nested "
    "backward pass (checkpoint with use_reentrant=True) brings it in parts; nothing is measured."
)


class _Ear:
    """What the hooks know. Not the weights, so that a weight does not keep itself alive."""

    __slots__ = ("listening", "norms", "twice")

    def __init__(self) -> None:
        self.listening = False
        self.twice = False
        self.norms: dict[int, Tensor] = {}

    def note(self, place: int, gradient: Tensor) -> None:
        if self.listening:
            self.twice = self.twice or place in self.norms
            self.norms[place] = norm_of(gradient.detach())
