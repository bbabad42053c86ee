"""In which dtype do forward passes run, and how is a loss kept in the range of 16 bits? Autocast and loss scale."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from wholebatch.core.errors import ConfigError, WeightError

Format: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""How forward passes run: as the weights are, or under autocast in bfloat16 or float16."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


_AS_IS = nullcontext()


class Precision:
    """Autocast for the forward passes and, in float16, a dynamic loss scale.

    The smallest float16 is 6e-8, and gradients of a mean over many targets lie below it. So the loss is multiplied by a
    scale S before its backward pass and the summed gradient divided by S, in the same multiplication that divides by
    the targets. If the sum of a window is not finite, the whole window is skipped and S is lowered, once; after many
    good windows it is raised. `torch.amp.GradScaler` decides both.

    Args:
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: Where the weights live.
        scaler: Scales losses, in whichever precision; None: one of its own in float16, and else none.

    Attributes:
        as_is: Whether forward passes run as the weights are, without autocast.

    Raises:
        WeightError: There is no such precision.
    """

    def __init__(self, precision: Format, device: torch.device, scaler: torch.amp.GradScaler | None = None) -> None:
        if precision not in get_args(Format):
            raise WeightError(
                f"precision={precision!r} is not one that forward passes can run in.",
                hint='pass "fp32" (as the weights are), "bf16" or "fp16" (autocast).',
            )
        self._device = device
        self._dtype = _AUTOCAST.get(precision)
        self.as_is = self._dtype is None
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise ConfigError(
                f"loss_scaler is a {type(scaler).__name__}, which scales no loss.",
                hint="pass a torch.amp.GradScaler, or leave it out.",
            )
        if scaler is None and precision == "fp16":
            scaler = torch.amp.GradScaler(device.type)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        # The scaler looks for infinities in the gradients of an optimizer. One with a single number, the norm of the
        # window's gradient, tells it about all optimizers at once.
        if self._scaler is not None:
            self._norm = torch.zeros(1, device=device, requires_grad=True)
            self._probe = torch.optim.SGD([self._norm], lr=0.0)

    @property
    def eps(self) -> float:
        """The rounding unit of autocast; 0 where forward passes run as the weights are."""
        return torch.finfo(self._dtype).eps if self._dtype is not None else 0.0

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass."""
        if self._dtype is None:
            return _AS_IS
        return torch.autocast(self._device.type, self._dtype)

    def scale(self) -> Tensor | None:
        """Return the loss scale S, still on the device, or None where there is none."""
        if self._scaler is None:
            return None
        scaled = self._scaler.scale(torch.ones((), device=self._device))
        assert isinstance(scaled, Tensor)
        return scaled

    def settle(self, norm: float) -> None:
        """Let the end of a window lower or raise the loss scale.

        Args:
            norm: 2-norm of the scaled gradient of the whole window, infinite or NaN if any part of it is.
        """
        if self._scaler is None:
            return
        self._norm.grad = torch.full_like(self._norm, norm)
        self._scaler.unscale_(self._probe)
        self._scaler.update()
        self._norm.grad = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the loss scale and how long it has been good; None where there is none."""
        return None if self._scaler is None else self._scaler.state_dict()

    def require(self, state: Mapping[str, Any] | None) -> None:
        """Refuse the state of another precision.

        Raises:
            ConfigError: It has a loss scale where there is none here, or none where there is one.
        """
        if (state is None) != (self._scaler is None):
            with_one, without = 'precision="fp16"', "another precision"
            raise ConfigError(
                f"The state is of a run with {without if state is None else with_one}, and here is "
                f"{without if self._scaler is None else with_one}.",
                hint="make the accumulator with the precision of the run that was saved.",
            )

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over a loss scale, after `require`."""
        if self._scaler is not None:
            self._scaler.load_state_dict(dict(state or {}))

    def settling(self, norm: float) -> AbstractContextManager[object]:
        """Return a context for the step: the loss scale is settled, and what it was if the step fails.

        Args:
            norm: As for `settle`.
        """
        return _AS_IS if self._scaler is None else self._settling(norm)

    @contextmanager
    def _settling(self, norm: float) -> Iterator[None]:
        assert self._scaler is not None
        before = self._scaler.state_dict()
        try:
            self.settle(norm)
            yield
        except BaseException:
            if before["scale"] > 0:  # one that was stopped half-way refuses to go on, unless a scale is set
                self._scaler.update(before["scale"])
            self._scaler.load_state_dict(before)
            self._norm.grad = None
            raise


def widened(x: Tensor) -> Tensor:
    """Return a tensor in 32 bits at least: sums over many rows are too coarse in 16."""
    return x.float() if x.element_size() < 4 else x
