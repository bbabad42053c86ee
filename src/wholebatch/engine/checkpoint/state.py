"""What of an accumulator does the next process need, and does it belong to the one that is there?"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.errors import ConfigError, WindowError
from wholebatch.engine.opening import Windows
from wholebatch.engine.precision import Precision
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.setup import Setup


def state_of(windows: Windows, precision: Precision) -> dict[str, Any]:
    """Return it, with tensors as they are: whoever keeps it while training goes on copies them.

    Args:
        windows: Of the accumulator, with its model, optimizers and schedules.
        precision: Whose loss scale is kept.

    Raises:
        ConfigError: There are several ranks, or a schedule that does not say where it is.
        WindowError: A window of `step` or `updates`, or a backward pass, is under way.
    """
    setup = windows.rules.setup
    _require_one(setup)
    for schedule in setup.schedulers:
        if not hasattr(schedule, "state_dict") or not hasattr(schedule, "load_state_dict"):
            raise ConfigError(
                f"A {type(schedule).__name__} does not say where it is: it has no state_dict.",
                hint="give it state_dict and load_state_dict, or one of torch.optim.lr_scheduler in its place.",
            )
    weights = setup.model.state_dict()
    noise = windows.rules.noise
    return {
        "window": windows.state_dict(),
        "weights": dict(weights),
        "versions": {name: dict(each) for name, each in getattr(weights, "_metadata", {}).items()},
        "buffers": _other_buffers(setup.model, weights),
        "kinds": _kinds(setup),
        "optimizers": [each.state_dict() for each in setup.optimizers],
        "schedules": [each.state_dict() for each in setup.schedulers],
        "loss scale": precision.state_dict(),
        "random": RandomState.now(setup.device).state_dict(),
        "noise": None if noise is None else noise.average.state_dict(),
    }


def take_over(windows: Windows, precision: Precision, state: Any) -> None:
    """Go on from a state. If it does not belong here, nothing changes.

    Args:
        windows: Of the accumulator.
        precision: Of the accumulator.
        state: As `state_of` returned it.

    Raises:
        ConfigError: It is none, or model, optimizers, schedules or precision are not those of the state.
        WindowError: A window is open.
    """
    setup = windows.rules.setup
    _require_one(setup)
    if not isinstance(state, Mapping) or not state.keys() >= _PARTS:
        raise ConfigError(
            f"This {type(state).__name__} is no state of an accumulator.",
            hint="pass what accumulator.state_dict() returned; what wb.save wrote is for wb.load(path, accumulator).",
        )
    if windows.current is not None:
        raise WindowError(
            "A window is open, and its gradient would be that of other weights.",
            hint="load before the first window, or close or roll back this one: accumulator.open_window.rollback().",
        )
    _require_the_same_model(setup.model, state["weights"])
    _require_the_same_steppers(setup, state)
    precision.require(state["loss scale"])
    windows.require(state["window"])
    weights = _Versioned(state["weights"])
    weights._metadata = state["versions"]
    setup.model.load_state_dict(weights)
    _put_back_buffers(setup.model, state["buffers"])
    for optimizer, saved in zip(setup.optimizers, state["optimizers"], strict=True):
        _load_optimizer(optimizer, saved)
    for schedule, saved in zip(setup.schedulers, state["schedules"], strict=True):
        schedule.load_state_dict(saved)
    precision.load_state_dict(state["loss scale"])
    windows.load_state_dict(state["window"])
    noise = windows.rules.noise
    if noise is not None and state.get("noise") is not None:
        noise.average.load_state_dict(state["noise"])
    RandomState.of(state["random"], setup.device).restore()


_PARTS = {"window", "weights", "versions", "buffers", "kinds", "optimizers", "schedules", "loss scale", "random"}


class _Versioned(dict[str, Any]):
    """Weights with the versions of the modules that they belong to, as `torch.nn.Module.state_dict` returns them."""

    _metadata: Any


def _require_one(setup: Setup) -> None:
    if setup.group.ranks > 1:
        raise ConfigError(
            f"There are {setup.group.ranks} ranks, and wb.save knows the state of one process.",
            hint="between windows, keep model and optimizer with torch.distributed.checkpoint.",
        )


def _other(found: str, here: str) -> ConfigError:
    return ConfigError(
        f"The state holds {found}, and there is {here} here.",
        hint="make model, optimizers, schedules and accumulator as in the run that was saved.",
    )


def _require_the_same_model(model: nn.Module, weights: Mapping[str, Any]) -> None:
    here = model.state_dict()
    for name in [*weights, *here]:
        if name not in here or name not in weights:
            raise _other(name if name in weights else f"no {name}", "none" if name in weights else "one")
        saved, own = weights[name], here[name]
        if isinstance(saved, Tensor) and (saved.shape != own.shape or saved.dtype != own.dtype):
            raise _other(f"{name} of shape {tuple(saved.shape)} in {saved.dtype}", f"{tuple(own.shape)} in {own.dtype}")


def _kinds(setup: Setup) -> list[str]:
    """What steps the model, by name."""
    return [type(each).__name__ for each in (*setup.optimizers, *setup.schedulers)]


def _require_the_same_steppers(setup: Setup, state: Mapping[str, Any]) -> None:
    if state["kinds"] != _kinds(setup):
        raise _other(f"{', '.join(state['kinds'])}", f"{', '.join(_kinds(setup))}")
    here = [[len(group["params"]) for group in each.param_groups] for each in setup.optimizers]
    there = [[len(group["params"]) for group in each["param_groups"]] for each in state["optimizers"]]
    if here != there:
        raise _other(f"optimizers with parameter groups of {there} tensors", f"{here}")


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Let an optimizer take over a state in the dtypes that it has; PyTorch casts it to that of the weights."""
    optimizer.load_state_dict(copy.deepcopy(saved))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        here = optimizer.state.get(parameter, {})
        for name, value in saved["state"].get(number, {}).items():
            own = here.get(name)
            if isinstance(value, Tensor) and isinstance(own, Tensor) and own.dtype != value.dtype:
                here[name] = value.to(own.device, copy=True)


def _other_buffers(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers that are not in the model's own state."""
    return {name: buffer for name, buffer in model.named_buffers() if name not in weights}


@torch.no_grad()
def _put_back_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in saved and saved[name].shape == buffer.shape and not buffer.is_inference():
            buffer.copy_(saved[name])
