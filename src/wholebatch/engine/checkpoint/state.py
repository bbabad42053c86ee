"""What of an accumulator does the next process need, and does it belong to the one that is there?"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.errors import ConfigError, WindowError
from wholebatch.engine.opening import Windows
from wholebatch.engine.precision import Precision
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.ranks.agreement import agreed
from wholebatch.engine.ranks.shares import is_shard, local_of, share_of
from wholebatch.engine.setup import Setup


def state_of(windows: Windows, precision: Precision) -> dict[str, Any]:
    """Return it, with tensors as they are: whoever keeps it while training goes on copies them.

    Args:
        windows: Of the accumulator, with its model, optimizers and schedules.
        precision: Whose loss scale is kept.

    Raises:
        ConfigError: A schedule does not say where it is.
        WindowError: A window of `step` or `updates`, or a backward pass, is under way.
    """
    setup = windows.rules.setup
    with agreed(setup.group.wire):
        _require_schedules_that_say_where_they_are(setup)
        window = windows.state_dict()
    with setup.group.at_rest():
        weights = setup.model.state_dict()
        buffers = _other_buffers(setup.model, weights)
    optimizers = [each.state_dict() for each in setup.optimizers]
    noise = windows.rules.noise
    return {
        "rank": _rank(setup),
        "group": setup.group.state_dict(),
        "window": window,
        "weights": {name: _local(each) for name, each in weights.items()},
        "versions": {name: dict(each) for name, each in getattr(weights, "_metadata", {}).items()},
        "buffers": buffers,
        "kinds": _kinds(setup),
        "optimizers": [_local_state(each) for each in optimizers],
        "shards": [_shards(each) for each in optimizers],
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
        ConfigError: It is none, or model, optimizers, schedules, precision or ranks are not those of the state.
        WindowError: A window is open.
    """
    setup = windows.rules.setup
    with agreed(setup.group.wire):
        require(windows, precision, state)
    weights = _Versioned(_as_spread(state["weights"], setup.model.state_dict()))
    weights._metadata = state["versions"]
    setup.model.load_state_dict(weights)
    _put_back_buffers(setup.model, state["buffers"])
    for optimizer, saved, shards in zip(setup.optimizers, state["optimizers"], state["shards"], strict=True):
        _load_optimizer(optimizer, saved, shards)
    for schedule, saved in zip(setup.schedulers, state["schedules"], strict=True):
        schedule.load_state_dict(saved)
    precision.load_state_dict(state["loss scale"])
    setup.group.load_state_dict(state["group"])
    windows.load_state_dict(state["window"])
    noise = windows.rules.noise
    if noise is not None and state["noise"] is not None:
        noise.average.load_state_dict(state["noise"])
    RandomState.of(state["random"], setup.device).restore()


def require(windows: Windows, precision: Precision, state: Any) -> None:
    """Refuse a state that does not belong here; see `take_over`."""
    setup = windows.rules.setup
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
    if list(state["rank"]) != _rank(setup):
        raise _other("what rank {} of {} has saved".format(*state["rank"]), "rank {} of {}".format(*_rank(setup)))
    _require_the_same_model(setup.model, state["weights"])
    _require_the_same_steppers(setup, state)
    precision.require(state["loss scale"])
    windows.require(state["window"])


_PARTS = {
    *("rank", "group", "window", "weights", "versions", "buffers", "kinds", "optimizers", "shards", "schedules"),
    *("loss scale", "random", "noise"),
}


class _Versioned(dict[str, Any]):
    """Weights with the versions of the modules that they belong to, as `torch.nn.Module.state_dict` returns them."""

    _metadata: Any


def _rank(setup: Setup) -> list[int]:
    """Which rank this is, and of how many."""
    wire = setup.group.wire
    return [wire.rank, wire.ranks] if wire is not None else [0, 1]


def _local(value: Any) -> Any:
    return local_of(value) if isinstance(value, Tensor) else value


def _local_state(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, of which this rank holds all or a share."""
    each = {
        number: {name: _local(value) for name, value in kept.items()} for number, kept in optimizer["state"].items()
    }
    return {**optimizer, "state": each}


def _shards(optimizer: dict[str, Any]) -> list[tuple[int, str]]:
    """Which tensors of an optimizer's state are spread over ranks: the numbers of their parameters, and their names."""
    return [
        (number, name)
        for number, kept in optimizer["state"].items()
        for name, value in kept.items()
        if isinstance(value, Tensor) and is_shard(value)
    ]


def _as_spread(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Saved weights, spread over ranks as those of the same names are."""
    return {
        name: share_of(here[name], value.to(here[name].device)) if isinstance(value, Tensor) else value
        for name, value in saved.items()
    }


def _require_schedules_that_say_where_they_are(setup: Setup) -> None:
    for schedule in setup.schedulers:
        if not hasattr(schedule, "state_dict") or not hasattr(schedule, "load_state_dict"):
            raise ConfigError(
                f"A {type(schedule).__name__} does not say where it is: it has no state_dict.",
                hint="give it state_dict and load_state_dict, or one of torch.optim.lr_scheduler in its place.",
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
        saved, own = weights[name], _local(here[name])
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


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any], shards: Sequence[tuple[int, str]]) -> None:
    """Let an optimizer take over a state in the dtypes that it has; PyTorch casts it to that of the weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    saved = copy.deepcopy(saved)
    parameter_of = dict(zip(numbers, parameters, strict=True))
    for number, name in shards:
        kept, parameter = saved["state"][number], parameter_of[number]
        kept[name] = share_of(parameter, kept[name].to(parameter.device))
    optimizer.load_state_dict(saved)
    for number, parameter in parameter_of.items():
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
