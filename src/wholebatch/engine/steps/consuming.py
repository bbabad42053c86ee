"""How does a window work with an optimizer that takes gradients in as they arrive?

Such an optimizer has two methods more than others. Then no gradient lives longer than it takes to hand it over.
"""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.errors import OptimizerError, WindowError
from wholebatch.engine.gradients import norm_of
from wholebatch.engine.steps.undo import Away, Beside, Undo


@runtime_checkable
class TakesGradients(Protocol):
    """An optimizer that takes gradients in during the backward passes of a window.

    Besides these methods it is a `torch.optim.Optimizer`, whose ``step()`` is called once at the end of the window,
    with no gradient in ``.grad``. Weights may move there and nowhere else, because the forward passes of a window all
    see the same weights. A window that comes to nothing puts back what the optimizer keeps in tensors, in its groups
    and in its state, so nothing has to be undone.
    """

    def begin_window(self) -> None:
        """Get ready: what is taken in from now on makes one update."""

    def consume(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take in what one micro-batch adds to the gradient of a parameter.

        Args:
            parameter: Which.
            gradient: The micro-batch's part of the gradient of the logical batch: divided by the window's targets, free
                of a loss scale, in 32 bits where the weights have fewer. The parts of a window add up to the gradient.
                It is the optimizer's to change, and gone unless kept.
        """


def takers(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return the optimizers that take gradients in as they arrive."""
    # As isinstance(each, TakesGradients), which takes thirty times as long.
    return [each for each in optimizers if hasattr(each, "begin_window") and hasattr(each, "consume")]


def consumed_by(optimizers: Sequence[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters whose gradients are taken in as they arrive."""
    return {parameter for each in takers(optimizers) for group in each.param_groups for parameter in group["params"]}


def check_clip_norm(optimizers: Sequence[Optimizer], clip_norm: float | None) -> None:
    """Refuse to clip what never exists as a whole.

    Raises:
        OptimizerError: `clip_norm` is given, and an optimizer takes gradients in as they arrive.
    """
    taking = takers(optimizers)
    if taking and clip_norm is not None:
        raise OptimizerError(
            f"clip_norm={clip_norm!r} needs the gradient of the whole logical batch, and {type(taking[0]).__name__} "
            "takes it in and forgets it part by part.",
            hint="leave out clip_norm, or train with an optimizer that steps from the whole gradient, such as AdamW.",
        )


class Consumption:
    """Hands the gradients of a window over as they arrive, and makes the optimizers forget them if it comes to nothing.

    Args:
        optimizers: Those that take gradients in.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._room, self._other = Away(), Beside()
        self._undo: Undo | None = None
        self._norms: dict[torch.device, Tensor] = {}
        self._scale: Tensor | None = None
        self._of: dict[Tensor, TakesGradients] = {}
        self.parameters = [each for one in optimizers for group in one.param_groups for each in group["params"]]

    def begin(self, scale: Tensor | None) -> None:
        """Begin a window, if it has not begun.

        Args:
            scale: The loss scale, on the device, or None.
        """
        if self._undo is not None:
            return
        undo = Undo(self._optimizers, self._room, other=self._other)
        self._undo, self._scale, self._norms = undo, scale, {}
        for each in self._optimizers:
            assert isinstance(each, TakesGradients)
            each.begin_window()
            for group in each.param_groups:
                self._of.update(dict.fromkeys(group["params"], each))

    def take(self, parameter: nn.Parameter) -> None:
        """Hand over what has arrived at a parameter.

        Raises:
            WindowError: The optimizer moved the weights.
        """
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        with torch.no_grad():
            if gradient.element_size() < 4:
                gradient = gradient.to(torch.float32)
            if self._scale is not None:
                gradient = gradient.div_(self._scale.to(gradient.device))
            self._note(gradient)
            version = parameter._version
            self._of[parameter].consume(parameter, gradient)
        if parameter._version != version:
            raise WindowError(
                f"{type(self._of[parameter]).__name__}.consume() moved the weights inside an open window.",
                hint="keep what was consumed in the optimizer's state, and move the weights in step(), which is called "
                "once at the end of the window.",
            )

    @property
    def empty(self) -> bool:
        """Whether nothing has been handed over."""
        return not self._norms

    @property
    def norms(self) -> list[Tensor]:
        """Infinite or not a number if anything was that was handed over; no norm of the whole gradient.

        Each is the 2-norm of all parts on a device, as if they stood side by side. Shape ``[]``.
        """
        return list(self._norms.values())

    def commit(self) -> None:
        """Keep what was taken in."""
        self._undo = None

    def roll_back(self) -> None:
        """Make the optimizers what they were when the window began."""
        if self._undo is not None:
            self._undo.put_back()
            self._undo = None

    def _note(self, gradient: Tensor) -> None:
        norm = norm_of(gradient)
        before = self._norms.get(norm.device)
        self._norms[norm.device] = norm if before is None else torch.hypot(before, norm.to(before.dtype))


class _Nobody:
    """Takes gradients in and keeps nothing."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]

    def begin_window(self) -> None:
        pass

    def consume(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        pass


def forgetting(parameters: Sequence[nn.Parameter]) -> Consumption:
    """Return what lets gradients go as they arrive: for a look at a window whose optimizer takes these in."""
    return Consumption(cast(list[Optimizer], [_Nobody(parameters)]))
