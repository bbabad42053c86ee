"""What does a logical batch of another size ask of the learning rate? Rules: printed, and applied when asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from wholebatch.core.errors import ConfigError
from wholebatch.core.schedules.schedule import check_size

Rule: TypeAlias = Literal["none", "linear", "sqrt"]
"""How settings of an optimizer follow the size of the logical batch."""


def rescaled(group: Mapping[str, Any], factor: float, rule: Rule) -> dict[str, Any]:
    """Return what changes in the settings of a parameter group when logical batches become `factor` times as large.

    ``"linear"``: the learning rate times k, for SGD, with a warm-up. ``"sqrt"``: the learning rate times the root of k
    and, for Adam and its kin, ``beta ** k``, so that each average keeps its length in rows, and ``eps / sqrt(k)``
    (On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, arXiv 2205.10287, where ``1 - beta`` grows by k;
    both agree to first order, and a power stays between 0 and 1). ``"none"``: nothing.

    Args:
        group: Of an optimizer: ``lr`` and, where it has them, ``betas`` and ``eps``.
        factor: k, above 0; below 1 for smaller logical batches.
        rule: Which.

    Returns:
        The new values of the settings that change, by name.

    Raises:
        ConfigError: There is no such rule, or no such factor.

    Example:
        >>> rescaled({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}, 4, "sqrt")
        {'lr': 0.002, 'betas': (0.6561, 0.996005996001), 'eps': 5e-09}
        >>> rescaled({"lr": 0.1, "momentum": 0.9}, 4, "linear")
        {'lr': 0.4}
    """
    if rule not in get_args(Rule):
        raise ConfigError(
            f"rule={rule!r} is no rule for the learning rate.", hint='pass "none", "linear" (SGD) or "sqrt" (Adam).'
        )
    if not hasattr(factor, "__float__") or not 0 < float(factor) < math.inf:
        raise ConfigError(
            f"A logical batch cannot become {factor!r} times as large.", hint="pass new size / old size, above 0."
        )
    k = float(factor)
    if rule == "none" or k == 1:
        return {}
    if rule == "linear":
        return {"lr": group["lr"] * k}
    new = {"lr": group["lr"] * math.sqrt(k)}
    if "betas" in group:
        new["betas"] = tuple(_plain(beta**k) for beta in group["betas"])
        if "eps" in group:
            new["eps"] = group["eps"] / math.sqrt(k)
    return new


def ema_decay(decay: float, factor: float) -> float:
    """Return the decay of an average of weights for logical batches that are `factor` times as large.

    ``decay ** k``, so that the average keeps its length in rows (arXiv 2307.13813).

    Args:
        decay: Of each update, in 0 to 1.
        factor: k, above 0.

    Example:
        >>> round(ema_decay(0.999, 4), 6)
        0.996006
    """
    return float(decay**factor)


@dataclass(frozen=True, slots=True)
class Change:
    """What a logical batch of another size asks of an optimizer, by a rule.

    Attributes:
        factor: How many times as large it becomes.
        rule: By which rule.
        before: The settings that change, of each parameter group.
        after: What they become.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = torch.optim.AdamW([weight], lr=1e-3)
        >>> change = Change.of(optimizer, 4, "sqrt")
        >>> print(change)
        logical batch x 4, rule sqrt
          lr     0.001         -> 0.002
          betas  (0.9, 0.999)  -> (0.6561, 0.996006)
          eps    1e-08         -> 5e-09
        >>> change.apply(optimizer)
        >>> optimizer.param_groups[0]["lr"]
        0.002
    """

    factor: float
    rule: Rule
    before: tuple[dict[str, Any], ...]
    after: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Any, factor: float, rule: Rule) -> "Change":
        """Compute what a change asks, and change nothing.

        Args:
            optimizer: Whose ``param_groups`` are looked at.
            factor: k = new size / old size.
            rule: Which.

        Raises:
            ConfigError: There is no such rule, or no such factor, or the optimizer has no parameter groups.
        """
        if not hasattr(optimizer, "param_groups"):
            raise ConfigError(
                f"The optimizer is a {type(optimizer).__name__} without parameter groups.",
                hint="pass an optimizer of torch.optim, or one that keeps its settings in param_groups as these do.",
            )
        after = tuple(rescaled(group, factor, rule) for group in optimizer.param_groups)
        before = tuple(
            {name: _plain(group[name]) for name in new}
            for group, new in zip(optimizer.param_groups, after, strict=True)
        )
        return cls(float(factor), rule, before, tuple({name: _plain(each[name]) for name in each} for each in after))

    @property
    def pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What changes in each parameter group: the settings before and after."""
        return list(zip(self.before, self.after, strict=True))

    def apply(self, optimizer: Any, lr_scheduler: Any = None) -> None:
        """Change the optimizer, and let schedules of the learning rate go on from there.

        Args:
            optimizer: As for `of`.
            lr_scheduler: One schedule or several that step it: the learning rates that they start from change too, or
                their next step would bring the old ones back.
        """
        scale = _scale(self.factor, self.rule)
        for group, new in zip(optimizer.param_groups, self.after, strict=True):
            for name, value in new.items():
                if hasattr(group[name], "fill_"):
                    group[name].fill_(value)
                else:
                    group[name] = value
            for name in ("initial_lr", "max_lr", "min_lr"):  # of OneCycleLR, CyclicLR and all that have a beginning
                if name in group:
                    group[name] = group[name] * scale
        schedules = lr_scheduler if isinstance(lr_scheduler, Sequence) else [lr_scheduler]
        for each in schedules:
            _rescale(each, scale)

    def __str__(self) -> str:
        lines = [f"logical batch x {self.factor:g}, rule {self.rule}"]
        if not any(self.after):
            lines.append("  nothing changes")
        many = len(self.after) > 1
        for number, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
            if many and new:
                lines.append(f"  parameter group {number}")
            wide = max((len(_say(each)) for each in old.values()), default=0)
            lines += [f"  {name:<6} {_say(old[name]):<{wide}}  -> {_say(value)}" for name, value in new.items()]
        return "\n".join(lines)


class Rates:
    """Lets an optimizer follow the size of the logical batch, by a rule, from one update to the next.

    Args:
        optimizer: Whose settings follow.
        at: The size for which they are right as they stand.
        rule: ``"linear"``, ``"sqrt"`` or ``"none"``.
        lr_scheduler: One schedule or several that step it.

    Attributes:
        at: The size for which settings are right now.

    Raises:
        ConfigError: There is no such rule, `at` is no size, or the optimizer has no parameter groups.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
        >>> rates = Rates(optimizer, at=64, rule="linear")
        >>> rates.follow(64), print(rates.follow(256)), optimizer.param_groups[0]["lr"]
        logical batch x 4, rule linear
          lr     0.1  -> 0.4
        (None, None, 0.4)
    """

    def __init__(self, optimizer: Any, *, at: int, rule: Rule, lr_scheduler: Any = None) -> None:
        self._optimizer = optimizer
        self._rule: Rule = rule
        self._lr_scheduler = lr_scheduler
        self.at = check_size("at", at)
        Change.of(optimizer, 1, rule)

    def follow(self, size: int) -> Change | None:
        """Change the optimizer for a logical batch of another size. To be called between updates.

        Args:
            size: Of the next logical batch, in the unit of `at`.

        Returns:
            What has changed; None where the size has not.
        """
        if check_size("size", size) == self.at:
            return None
        change = Change.of(self._optimizer, size / self.at, self._rule)
        change.apply(self._optimizer, self._lr_scheduler)
        self.at = size
        return change

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group as it stands."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, int]:
        """Return for which size the settings are right; the optimizer's own state holds them."""
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there."""
        self.at = int(state["at"])


def _scale(factor: float, rule: Rule) -> float:
    return {"none": 1.0, "linear": factor, "sqrt": math.sqrt(factor)}[rule]


def _rescale(schedule: Any, scale: float) -> None:
    """Multiply the learning rates that a schedule, or those inside of it, starts from."""
    for inner in getattr(schedule, "_schedulers", []):
        _rescale(inner, scale)
    for name in ("base_lrs", "max_lrs", "min_lrs"):
        if hasattr(schedule, name):
            setattr(schedule, name, [each * scale for each in getattr(schedule, name)])
    if hasattr(schedule, "eta_min"):  # of CosineAnnealingLR
        schedule.eta_min = schedule.eta_min * scale


def _plain(value: Any) -> Any:
    """A number, also where the optimizer keeps it in a tensor."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _say(value: Any) -> str:
    return f"({', '.join(map(_say, value))})" if isinstance(value, tuple) else f"{value:.6g}"
