"""What does an optimizer keep, and what does its step take for a moment? Found out without stepping it."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.engine import memory
from wholebatch.engine.fit.fakes import stand_in, state_bytes
from wholebatch.engine.fit.timeline import Timeline
from wholebatch.engine.steps.consuming import TakesGradients

ELEMENTWISE = frozenset({"Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"})
"""Optimizers of PyTorch that look at each number by itself, so that a few numbers tell what all of them take."""

FEW, MORE = 64, 4096
"""So many numbers are stepped in place of all, as two weights: what a step takes for a moment is a part for each number
of the weight at hand, and one for each of the weight before, whose names are still in use. Unit: numbers."""


def step_need(
    optimizers: Sequence[Optimizer], device: torch.device, gradients: int, reasons: list[str]
) -> tuple[int, int]:
    """Return what optimizers keep on a device, and what a step takes for a moment. Unit: bytes.

    Args:
        optimizers: Stay as they are.
        device: Where the weights live.
        gradients: What all of them take. Unit: bytes.
        reasons: Takes what could not be looked at as it should, and why.
    """
    try:
        found = [_few_numbers(each, device) or _on_meta(each, device) for each in optimizers]
        return sum(state for state, _ in found), max((most for _, most in found), default=0)
    except Exception as error:
        said = memory.kind_in_a_line(error)
    try:
        single = _one_by_one(optimizers, device)
    except Exception as error:
        state, told = state_bytes(optimizers, device.type), "as it is"
        if not state:
            state, told = 2 * gradients, "as two numbers a weight, like Adam's"
        reasons.append(
            f"The optimizer's state was counted {told}, and its step as one gradient more, since a copy of it "
            f"could not be stepped ({memory.kind_in_a_line(error)})."
        )
        return state, gradients
    reasons.append(f"The optimizer's step was looked at weight by weight, on zeros, since it reads numbers ({said}).")
    return single


def _few_numbers(real: Optimizer, device: torch.device) -> tuple[int, int] | None:
    """The same from a few real numbers for each group and dtype; None where that would not tell.

    A step without memory takes as long as many real ones, since PyTorch computes its shapes in Python.
    """
    kind = type(real)
    if kind is not getattr(torch.optim, kind.__name__, None) or kind.__name__ not in ELEMENTWISE:
        return None
    if device.type != "cpu" or any(_together(group) for group in real.param_groups):
        return None
    parameters = [each for group in real.param_groups for each in group["params"]]
    if any(each.device.type != "cpu" or each.is_complex() for each in parameters):
        return None
    filled = sum(bool(real.state.get(each)) for each in parameters)
    if filled not in (0, len(parameters)):
        return None
    state, most = 0, 0
    for group in real.param_groups:
        learning = [each for each in group["params"] if each.requires_grad]
        told = {dtype: _Each.of(real, group, dtype) for dtype in {each.dtype for each in learning}}
        before = 0
        for parameter in learning:
            each, numbers = told[parameter.dtype], parameter.numel()
            state += each.state * numbers + each.counters
            most = max(most, each.at_hand * numbers + before + each.once)
            before = each.before * numbers
    return state_bytes([real], "cpu") if filled else state, most


def _together(group: dict[str, Any]) -> bool:
    """Whether a group is stepped as one, and not weight by weight."""
    return bool(group.get("foreach") or group.get("capturable") or group.get("differentiable"))


@dataclass(frozen=True, slots=True)
class _Each:
    """What an optimizer takes for weights of a dtype.

    Attributes:
        state: It keeps for a number. Unit: bytes.
        counters: It keeps for a weight. Unit: bytes.
        at_hand: A step takes for a moment, for a number of the weight at hand. Unit: bytes.
        before: The same for a number of the weight before. Unit: bytes.
        once: The same for a weight. Unit: bytes.
    """

    state: int
    counters: int
    at_hand: int
    before: int
    once: int

    @classmethod
    def of(cls, real: Optimizer, group: dict[str, Any], dtype: torch.dtype) -> "_Each":
        """Return what two weights of different size tell."""
        weights = [torch.zeros(numbers, dtype=dtype, requires_grad=True) for numbers in (FEW, MORE)]
        optimizer = _alone(real, group, weights)
        peak = _step_twice(optimizer, torch.device("cpu"))
        peak = 0 if group.get("fused") else peak  # all at once within an operation
        few, more = (_kept_bytes(optimizer.state[each]) for each in weights)
        state = (more - few) // (MORE - FEW)
        at_hand, rest = divmod(peak, MORE)
        return cls(state, few - state * FEW, at_hand, *divmod(rest, FEW))


def _alone(real: Optimizer, group: dict[str, Any], weights: list[Tensor]) -> Optimizer:
    """Return an optimizer of the same kind and settings for other weights, without a state."""
    other: Optimizer = object.__new__(type(real))
    other.__dict__.update(
        {name: OrderedDict() if isinstance(value, OrderedDict) else value for name, value in vars(real).items()}
    )  # hooks are the user's
    other.param_groups = [{**group, "params": weights, **({"fused": False} if group.get("fused") else {})}]
    other.state = defaultdict(dict)
    return other


def _kept_bytes(state: dict[str, Any]) -> int:
    return sum(each.numel() * each.element_size() for each in state.values() if isinstance(each, Tensor))


def _on_meta(real: Optimizer, device: torch.device) -> tuple[int, int]:
    """The same from a stand-in without memory."""
    optimizer = stand_in(real)
    peak = _step_twice(optimizer, torch.device("meta"))
    state = state_bytes([optimizer], "meta")
    state += state_bytes([optimizer], "cpu") if device.type == "cpu" else 0  # counters
    return state, 0 if all(group.get("fused") for group in real.param_groups) else peak


def _one_by_one(optimizers: Sequence[Optimizer], device: torch.device) -> tuple[int, int]:
    """The same from one weight after the other, on zeros."""
    state, most = 0, 0
    for real in optimizers:
        for group in real.param_groups:
            for parameter in group["params"]:
                optimizer = stand_in(real, only=parameter)
                most = max(most, _step_twice(optimizer, device))
                state += state_bytes([optimizer], device.type)
    return state, most


def _step_twice(optimizer: Optimizer, device: torch.device) -> int:
    """Step a stand-in and return what the second step takes for a moment; the first makes the state."""
    _step(optimizer, _gradients(optimizer))
    gradients = _gradients(optimizer)
    timeline = Timeline(device)
    with timeline:
        _step(optimizer, gradients)
    return timeline.peak_bytes


def _gradients(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """Zeros, in the dtypes in which a window hands gradients over."""
    learning = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    if isinstance(optimizer, TakesGradients):
        return {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in learning}
    return {parameter: torch.zeros_like(parameter) for parameter in learning}


def _step(optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
    if isinstance(optimizer, TakesGradients):
        optimizer.begin_window()
        for parameter, gradient in gradients.items():
            optimizer.consume(parameter, gradient)
    else:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    type(optimizer).step(optimizer)
