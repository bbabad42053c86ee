"""Which optimizers fold gradients in as they come? Adam, accumulated in its moments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.core.errors import OptimizerError


class AdamA(Optimizer):
    """Adam that folds the gradient of each micro-batch into its moments as it arrives, and keeps no gradient.

    With g_k the part of micro-batch k of the gradient g = sum_k g_k of the logical batch,

        m = beta1 m + (1 - beta1) sum_k g_k,        v = beta2 v + (1 - beta2) sum_k g_k^2,

    and the update is that of AdamW from these moments. m is that of Adam; v is not: Adam has (sum_k g_k)^2 in the place
    of sum_k g_k^2. So **the update depends on the cut**, and is not the one of the undivided logical batch. Where the
    parts are alike, as early in training, steps are up to sqrt(number of micro-batches) times as large as Adam's; where
    they are noise, they are as large. With one micro-batch it is Adam, and so it is where the graphs of all are joined
    (exact batch norm), since the gradient then arrives as a whole. What it buys is the memory of a gradient.

    It is for `wb.Accumulator`, which divides each part by the window's targets before its backward pass, so these must
    be known by then: in ``step`` and ``updates`` from ``targets=...`` or the rows, for which the latter reads all
    micro-batches of a window before it begins; in a loop of one's own from ``window(targets=n)``.
    Called outside of a window, `step` takes ``.grad`` as the only part.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments, once an update.
        eps: Added to the root of v.
        weight_decay: Decoupled, as in AdamW: weights shrink by ``lr * weight_decay`` at each update.

    Raises:
        OptimizerError: An option is out of its range.

    Example:
        >>> import wholebatch as wb
        >>> model = nn.Linear(3, 1)
        >>> accumulator = wb.Accumulator(
        ...     model,
        ...     AdamA(model.parameters(), lr=1e-2),
        ...     lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        ...     micro_batch=wb.Rows(4),
        ... )
        >>> update = accumulator.step({"x": torch.ones(8, 3), "y": torch.zeros(8, 1)})
        >>> update.applied, update.micro_batches, update.grad_norm
        (True, 2, None)

    Source: Adam Accumulation to Reduce Memory Footprints of both Activations and Gradients for Large-scale DNN
    Training, arXiv 2305.19982.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, right in [
            ("lr", lr, _is_from_0(lr)),
            ("betas", betas, _are_two_shares(betas)),
            ("eps", eps, _is_from_0(eps)),
            ("weight_decay", weight_decay, _is_from_0(weight_decay)),
        ]:
            if not right:
                raise OptimizerError(
                    f"AdamA got {name}={value!r}.", hint="lr, eps and weight_decay are 0 or more, betas in [0, 1)."
                )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_groups", {})
        self.__dict__.setdefault("_folded", set())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in every optimizer of PyTorch."""
        super().add_param_group(param_group)
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._folded: set[Tensor] = set()

    def begin_window(self) -> None:
        """Get ready for the micro-batches of a window."""
        self._folded.clear()
        self._groups = {each: group for group in self.param_groups for each in group["params"]}

    @torch.no_grad()
    def consume(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Fold a micro-batch's part of the gradient into the moments of a parameter.

        Args:
            parameter: Which.
            gradient: As the window hands it over: divided by the targets, free of a loss scale.

        Raises:
            OptimizerError: The gradient is sparse.
        """
        if gradient.layout != torch.strided:
            raise OptimizerError(
                "AdamA takes no sparse gradients.", hint="make the embedding with sparse=False, or take SparseAdam."
            )
        state = self.state[parameter]
        if not state:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        first, second = _real(state["exp_avg"]), _real(state["exp_avg_sq"])
        part = _real(gradient).to(first.dtype)
        beta1, beta2 = self._groups[parameter]["betas"]
        if parameter in self._folded:
            first.add_(part, alpha=1 - beta1)
            second.addcmul_(part, part, value=1 - beta2)
        else:
            self._folded.add(parameter)
            state["step"] += 1
            first.lerp_(part, 1 - beta1)
            second.mul_(beta2).addcmul_(part, part, value=1 - beta2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights: at the end of a window from what was folded in; outside of one from ``.grad``.

        Args:
            closure: Computes the loss and its gradient anew, outside of a window.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._groups:
            self.begin_window()
            for parameter in self._groups:
                if parameter.grad is not None:
                    self.consume(parameter, parameter.grad)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._folded:
                    self._move(parameter, group)
        self._groups = {}
        self._folded.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and leave the moments of 16-bit weights in 32 bits, which PyTorch would cast."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [each for group in self.param_groups for each in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                saved = state_dict["state"].get(number, {}).get(name)
                if saved is not None and self.state[parameter][name].dtype != saved.dtype:
                    self.state[parameter][name] = saved.to(device=parameter.device, copy=True)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        lr, steps = float(group["lr"]), state["step"].item()
        first, second = _real(state["exp_avg"]), _real(state["exp_avg_sq"])
        weights = _real(parameter)
        wide = weights.to(first.dtype)
        if group["weight_decay"] != 0:
            wide.mul_(1 - lr * group["weight_decay"])
        root = (second.sqrt() / (1 - beta2**steps) ** 0.5).add_(group["eps"])
        wide.addcdiv_(first, root, value=-lr / (1 - beta1**steps))
        if wide is not weights:
            weights.copy_(wide)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _is_from_0(number: object) -> bool:
    return hasattr(number, "__float__") and float(number) >= 0


def _are_two_shares(numbers: object) -> bool:
    found = list(numbers) if isinstance(numbers, tuple | list) else []
    return len(found) == 2 and all(_is_from_0(each) and float(each) < 1 for each in found)
