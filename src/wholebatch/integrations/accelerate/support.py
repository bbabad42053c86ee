"""What can an accelerator train in windows, and was it prepared? The rest is refused, before it would be wrong."""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn

from wholebatch.core.errors import ConfigError, OptimizerError

_PREPARE = "hand in what prepare returned: model, optimizer, loader = accelerator.prepare(model, optimizer, loader)"


def require_support(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    allowed = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}
    if kind == DistributedType.FSDP and accelerator.is_fsdp2:
        return
    if kind not in allowed:
        raise ConfigError(
            f"The accelerator trains with {kind.value}, under which gradients live where no window can sum them.",
            hint="take DistributedDataParallel (accelerate launch --multi_gpu), or FSDP of version 2 "
            "(FullyShardedDataParallelPlugin(fsdp_version=2)).",
        )
    if accelerator.mixed_precision == "fp8":
        raise ConfigError(
            "The accelerator trains in fp8, whose scales move with every pass.", hint="take mixed_precision='bf16'."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            f"mixed_precision='fp16' has no effect on a {accelerator.device.type}: Accelerate trains there in the "
            "dtype of the weights.",
            hint="take mixed_precision='bf16', or 'no'.",
        )


def require_prepared(accelerator: Accelerator, model: Any) -> None:
    together = isinstance(model, nn.ModuleList | nn.ModuleDict)  # several, each prepared by itself
    parts = list(model.children()) if together else [model]
    if not all(_is_prepared(accelerator, each) for each in parts):
        raise OptimizerError(
            f"The {type(model).__name__} is not a model that this accelerator has prepared, so that it would be "
            "neither on its device nor in its checkpoints.",
            hint=f"{_PREPARE}.",
        )


def _is_prepared(accelerator: Accelerator, model: Any) -> bool:
    return getattr(model, "_is_accelerate_prepared", False) or any(model is each for each in accelerator._models)


def unwrapped(optimizer: Any) -> Any:
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise OptimizerError(
            f"The {type(optimizer).__name__} is not an optimizer that an accelerator has prepared.", hint=f"{_PREPARE}."
        )
    return optimizer.optimizer
