"""Which arguments of an accumulator are refused at once, whatever it is to train?"""

from collections.abc import Callable
from typing import Any, get_args

from wholebatch.core.errors import ConfigError
from wholebatch.core.split import Rows, Tokens
from wholebatch.engine.meetings.lockstep import Execution
from wholebatch.engine.ranks.balancing import check_balance
from wholebatch.engine.ranks.reduction import check_reduce_in
from wholebatch.engine.rules import BatchNorm, OnNonFinite


def check_arguments(
    *,
    micro_batch: object,
    collate: Callable[[list[Any]], Any] | None,
    clip_norm: object,
    before_step: object,
    reduce_in: str | None,
    balance: str | None,
    **choices: object,
) -> None:
    """Refuse what no accumulator can do; the arguments are those of `wb.Accumulator`.

    Raises:
        ConfigError: One of them says nothing that can be done.
    """
    for name, value in choices.items():
        if value not in _ALLOWED[name]:
            raise ConfigError(
                f"{name}={value!r} is not one of the choices.",
                hint="pass " + " or ".join(f"{name}={choice!r}" for choice in _ALLOWED[name]) + ".",
            )
    if micro_batch != "auto" and not isinstance(micro_batch, Rows | Tokens):
        raise ConfigError(
            f"micro_batch={micro_batch!r} says nothing about which rows go together.",
            hint='pass wb.Rows(8), wb.Tokens(4096, length=...) or "auto".',
        )
    if clip_norm is not None and not _is_positive(clip_norm):
        raise ConfigError(
            f"clip_norm={clip_norm!r} is no norm to clip a gradient to.", hint="pass a number above 0, or None."
        )
    if before_step is not None and not callable(before_step):
        raise ConfigError(
            f"before_step is a {type(before_step).__name__}, which cannot be called.",
            hint="pass a function without arguments, which looks at the gradients in .grad.",
        )
    check_reduce_in(reduce_in)
    check_balance(balance, collate)


def require_a_size(micro_batch: object) -> None:
    """Refuse to plan where ranks make every pass together.

    Raises:
        ConfigError: The micro-batch is to be planned.
    """
    if micro_batch == "auto":
        raise ConfigError(
            'micro_batch="auto" is planned by each rank for itself, and with communication="each" no rank can make a '
            "pass for itself.",
            hint='pass wb.Rows(8), wb.Tokens(4096, length=...), or communication="once".',
        )


def _is_positive(number: object) -> bool:
    try:
        return hasattr(number, "__float__") and not isinstance(number, bool) and float(number) > 0
    except (TypeError, ValueError):  # a tensor of several numbers
        return False


_ALLOWED: dict[str, tuple[object, ...]] = {
    "on_nonfinite": get_args(OnNonFinite),
    "batch_norm": get_args(BatchNorm),
    "lockstep": get_args(Execution),
    "check": ("first", None),
}
