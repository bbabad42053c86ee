"""Who trains what? Model, optimizers and schedules, and whether they belong together."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from wholebatch.core.errors import OptimizerError
from wholebatch.engine.device import input_device
from wholebatch.engine.ranks.group import Group
from wholebatch.engine.ranks.membership import group_of
from wholebatch.engine.reasons import Say, silent
from wholebatch.engine.steps.consuming import Consumption, takers
from wholebatch.engine.steps.inbackward import steps_in_backward
from wholebatch.engine.steps.scheduling import Schedules
from wholebatch.engine.steps.stepping import Stepping


@dataclass(slots=True)
class Setup:
    """A model with what steps it.

    Attributes:
        model: The module whose parameters learn.
        optimizers: What steps them, all at the end of a window.
        schedulers: Stepped once an applied update.
        device: Where the model takes its input.
        update: Steps the optimizers, once or not at all.
        group: The ranks that train the model together.
        schedules: Steps the schedulers.
        stepping: Whether a window is stepping the optimizers at this moment.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[Any, ...]
    device: torch.device
    update: Stepping
    group: Group
    schedules: Schedules
    stepping: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        lr_scheduler: Any | Sequence[Any] | None,
        *,
        reduce_in: str | None = None,
        communication: str = "once",
        measures: bool = False,
        say: Say = silent,
    ) -> "Setup":
        """Check that the three belong together.

        Args:
            model: The module whose parameters learn.
            optimizer: One optimizer, or several that each step a part of the model.
            lr_scheduler: One schedule or several, or None.
            reduce_in: In which dtype gradients travel between ranks.
            communication: How often ranks speak where weights are spread over them.
            measures: Whether the gradient noise scale is measured.
            say: Takes the reason of an automatic choice.

        Raises:
            OptimizerError: The three are not of the right kind, an optimizer holds parameters that are not the
                model's, needs a closure, or shares a parameter with another; a scheduler belongs to another optimizer;
                model or optimizer cannot be trained on several ranks.
        """
        optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
        if lr_scheduler is None:
            schedulers: tuple[Any, ...] = ()
        else:
            schedulers = tuple(lr_scheduler) if isinstance(lr_scheduler, Sequence) else (lr_scheduler,)
        check_belonging(model, optimizers)
        for scheduler in schedulers:
            _check_scheduler(scheduler, optimizers)
        device = input_device(model)
        group = group_of(model, optimizers, say, reduce_in=reduce_in, communication=communication, measures=measures)
        stepping = Stepping(optimizers, device)
        return cls(model, optimizers, schedulers, device, stepping, group, Schedules(schedulers))

    def consumption(self) -> Consumption | None:
        """Return what hands gradients over to the optimizers that take them in as they arrive; None if none does."""
        taking = takers(self.optimizers)
        return Consumption(taking) if taking else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizers step, each parameter once."""
        return [parameter for each in self.optimizers for group in each.param_groups for parameter in group["params"]]

    @property
    def bystanders(self) -> list[nn.Parameter]:
        """Parameters of the model that no optimizer steps."""
        stepped = set(map(id, [*self.parameters, *self.group.leaves(self.parameters)]))
        return [parameter for parameter in self.model.parameters() if id(parameter) not in stepped]

    @property
    def lr(self) -> float:
        """The learning rate of the first optimizer's first group; NaN where it finds its step by itself."""
        lr = self.optimizers[0].param_groups[0].get("lr")
        return math.nan if lr is None else float(lr)

    def step(self) -> BaseException | None:
        """Step every optimizer once, for a window; see `Stepping.step`."""
        self.stepping = True
        try:
            return self.update.step()
        finally:
            self.stepping = False


def check_belonging(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that optimizers can step a model.

    Raises:
        OptimizerError: They are not of the right kind, a parameter has no shape yet, an optimizer holds parameters that
            are not the model's, needs a closure, or shares a parameter with another.
    """
    if not isinstance(model, nn.Module):
        raise OptimizerError(
            f"The model is a {type(model).__name__}, not a torch.nn.Module.",
            hint="pass the module itself; several modules go together in a torch.nn.ModuleList or ModuleDict.",
        )
    lazy = [name for name, each in model.named_parameters() if isinstance(each, UninitializedParameter)]
    if lazy:
        raise OptimizerError(
            f"Lazy parameters have no shape yet: {', '.join(lazy[:5])}.",
            hint="run the model on one batch first, under torch.no_grad().",
        )
    if not optimizers:
        raise OptimizerError("There is no optimizer.", hint="pass one, such as torch.optim.AdamW(model.parameters()).")
    for each in optimizers:
        _check_optimizer(each)
    _check_parameters(model, optimizers)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"The optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer.",
            hint="pass the optimizer itself, or a list of optimizers.",
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptimizerError(
            f"{type(optimizer).__name__} needs a closure: it evaluates the loss several times in one step.",
            hint="a window has one gradient to give; use an optimizer that steps from it, such as AdamW or SGD.",
        )


def _check_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in held if id(parameter) not in names]
    if foreign:
        raise OptimizerError(
            f"The optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's; the first has "
            f"shape {tuple(foreign[0].shape)}.",
            hint="make the optimizer from this model's parameters, after it has its final layers; parameters of the "
            "loss go into one module with the model: torch.nn.ModuleDict({'model': model, 'loss': loss}).",
        )
    for parameter in held:
        if id(parameter) in seen:
            raise OptimizerError(
                f"Two optimizers hold the same parameter: {names[id(parameter)]}.",
                hint="give each parameter to one of them.",
            )
        seen.add(id(parameter))
    for name, parameter in model.named_parameters():
        stepping = steps_in_backward(parameter)
        if stepping is not None:
            raise OptimizerError(
                f"A hook on {name} holds an optimizer ({stepping}), to step it inside of the backward pass, which is "
                "once for each micro-batch.",
                hint="take the hooks off, and pass the optimizer to the accumulator; one that keeps no gradients is "
                "wb.AdamA, or your own with begin_window() and consume(parameter, gradient).",
            )
    if not any(parameter.requires_grad for parameter in held):
        raise OptimizerError(
            "None of the optimizer's parameters requires a gradient, so that nothing can learn.",
            hint="unfreeze what is to learn: parameter.requires_grad_(True).",
        )


def _check_scheduler(scheduler: Any, optimizers: Sequence[Optimizer]) -> None:
    if isinstance(scheduler, type):
        raise OptimizerError(
            f"The scheduler is the class {scheduler.__name__} itself.",
            hint=f"make one of the optimizer: {scheduler.__name__}(optimizer, ...).",
        )
    if not callable(getattr(scheduler, "step", None)):
        raise OptimizerError(
            f"The scheduler is a {type(scheduler).__name__}, which has no step().",
            hint="pass one of torch.optim.lr_scheduler, or leave lr_scheduler out.",
        )
    asks = _asked_for(scheduler)
    if asks is not None:
        raise OptimizerError(
            f"{type(scheduler).__name__}.step() asks for `{asks}`, and once an update it is called with nothing.",
            hint="step it in your own loop, after each applied update (update.applied), and leave lr_scheduler "
            "out; or pass an object whose step() calls it with what it needs.",
        )
    steps = getattr(scheduler, "optimizer", None)
    if steps is not None and not any(steps is each for each in optimizers):
        raise OptimizerError(
            f"The {type(scheduler).__name__} belongs to another optimizer, so it would change no learning rate here.",
            hint="make it from the optimizer that is passed along with it.",
        )


def _asked_for(scheduler: Any) -> str | None:
    """What the step of a schedule has to be given, where it does not come by it here."""
    if isinstance(scheduler, ReduceLROnPlateau):  # is given the loss
        return None
    try:
        asked = inspect.signature(scheduler.step).parameters.values()
    except (TypeError, ValueError):  # something built in may not say what it takes
        return None
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return next((each.name for each in asked if each.default is each.empty and each.kind not in free), None)
