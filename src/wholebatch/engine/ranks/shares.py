"""What does a rank hold of a tensor that is spread over several?"""

from typing import Any

from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    return hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: all of it, unless it is spread over ranks."""
    spread: Any = tensor
    local: Tensor = spread.to_local() if is_shard(tensor) else tensor
    return local


def share_of(parameter: Tensor, local: Tensor) -> Tensor:
    """Return a tensor that is spread as a parameter is, of which this rank holds `local`; that itself if it is not."""
    if not is_shard(parameter):
        return local
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    return DTensor.from_local(
        local,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
