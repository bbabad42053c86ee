"""What is known of an optimizer: does its step move each parameter on its own, and has it made one like this before?"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import optim
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

ONE_BY_ONE = frozenset(
    getattr(optim, name)
    for name in (
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
        *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
    )
    if hasattr(optim, name)
)
"""PyTorch's optimizers whose step moves each parameter on its own. Another class, or a subclass, may do anything."""


@dataclass(frozen=True, slots=True)
class Proof:
    """That an optimizer has completed a step with such groups, options and gradients."""

    groups: list[dict[str, Any]]
    kind: list[Any]

    def is_that_of(self, other: "Proof") -> bool:
        """Whether nothing has been loaded since, and no kind of option or gradient is new."""
        return self.groups is other.groups and self.kind == other.kind


def kind_of(optimizer: Optimizer) -> list[Any]:
    """What decides which lines of a step run, for each group: options, and the kinds of gradients."""
    return [
        (
            {name: _kind_of_option(value) for name, value in group.items() if name != "params"},
            {(each.grad.layout, each.grad.dtype, each.dtype) for each in group["params"] if each.grad is not None},
        )
        for group in optimizer.param_groups
    ]


def _kind_of_option(value: Any) -> Any:
    """What decides which lines run: also whether a number, such as a momentum, is 0."""
    if isinstance(value, bool | str | None):
        return value
    return (type(value), value == 0) if isinstance(value, int | float) else type(value)


def moves_one_by_one(optimizer: Optimizer) -> bool:
    """Whether a step on some of the parameters is their part of a step on all, and nobody listens."""
    kind = type(optimizer)
    if kind not in ONE_BY_ONE or not kind.step.__module__.startswith("torch."):
        return False
    own = optimizer.__dict__.get("step")  # a schedule puts one there that counts, and calls that of the class
    if own is not None and not (hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is kind.step):
        return False
    hooks = chain(
        optimizer._optimizer_step_pre_hooks.values(),
        optimizer._optimizer_step_post_hooks.values(),
        of_torch._global_optimizer_pre_hooks.values(),
        of_torch._global_optimizer_post_hooks.values(),
    )
    if not all((getattr(hook, "__module__", None) or "").startswith("wholebatch.") for hook in hooks):
        return False
    return not any(group.get("differentiable", False) for group in optimizer.param_groups)
