"""How do weights that are spread over ranks get through a window? Gathered for it as a whole, and scattered at its end.

Inside the window every rank has all weights and sums all of their gradient, so ranks may have different numbers of
micro-batches, and one that fails keeps nobody waiting. Between windows each rank holds its share of weights and
optimizer state.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wholebatch.core.errors import OptimizerError
from wholebatch.engine.device import modules
from wholebatch.engine.ranks.shares import is_shard, share_of
from wholebatch.engine.sums import GradientSum


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose weights `torch.distributed.fsdp.fully_shard` has spread over ranks, the root first."""
    return [
        module for module in modules(model) if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__[1:])
    ]


def ranks_of_shards(model: nn.Module) -> Any:
    """Return the process group over which weights are spread.

    Raises:
        OptimizerError: They are spread over a part of the ranks.
    """
    mesh = next((cast(Any, each).device_mesh for each in model.parameters() if is_shard(each)), None)
    if mesh is None or mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise OptimizerError(
        f"The weights are spread over {mesh.size()} of {dist.get_world_size()} ranks, in {mesh.ndim} dimensions.",
        hint="let the mesh hold every rank, as in init_device_mesh(device, (replicas, shards)).",
    )


class Sharding:
    """The weights of a model, as they are spread between windows and gathered inside of one.

    Args:
        model: As it was given to the accumulator.
        sharded: Its modules that `fully_shard` has taken.
    """

    def __init__(self, model: nn.Module, sharded: Sequence[Any]) -> None:
        self._model = model
        self._sharded = list(sharded)
        self._gathered = False
        self._leaf_of: dict[Tensor, nn.Parameter] = {}
        self._delivered: list[nn.Parameter] = []

    def hush(self) -> None:
        """Gather all weights, and keep forward and backward passes from sending anything."""
        if self._gathered:
            return
        shards = dict(self._model.named_parameters())
        for each in self._sharded:
            each.set_requires_gradient_sync(False, recurse=False)
            each.set_reshard_after_forward(False, recurse=False)
            each.set_reshard_after_backward(False, recurse=False)
            each.unshard()
            for group in groups_of(each):
                group.reshard = _stay
        self._gathered = True
        leaves = dict(self._model.named_parameters())
        if not self._leaf_of:
            _require_to_keep_gradients(self._sharded)
        self._leaf_of = {shard: leaves[name] for name, shard in shards.items()}
        for name, leaf in leaves.items():
            if is_shard(leaf):
                raise OptimizerError(
                    f"{name} is spread over ranks in two ways, and stays so when it is gathered.",
                    hint="shard with fully_shard alone, on one device mesh.",
                )

    def release(self) -> None:
        """Let each rank keep its share of the weights, and let passes outside of windows gather what they need."""
        if not self._gathered:
            return
        for each in self._sharded:
            each.set_requires_gradient_sync(True, recurse=False)
            each.set_reshard_after_backward(True, recurse=False)
            # Also after a pass that was broken off: without this a module in the middle of one would stay as it is.
            each.set_reshard_after_forward(True, recurse=False)
            for group in groups_of(each):
                group.__dict__.pop("reshard", None)
            each.reshard()
        self._gathered = False
        for shard in self._delivered:
            shard.grad = None
        self._delivered = []

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients arrive in a backward pass, for those that an optimizer steps."""
        return [self._leaf_of.get(parameter, parameter) for parameter in parameters]

    def deliver(self, sums: GradientSum, factor: float) -> None:
        """Put each rank's share of the sum times `factor` where the optimizer looks for it."""
        shard_of = {leaf: shard for shard, leaf in self._leaf_of.items()}
        for leaf, gradient in sums.drain(factor):
            parameter: Any = shard_of[leaf]
            if not is_shard(parameter):
                parameter.grad = gradient.to(parameter.dtype)
                continue
            parameter.grad = _share(parameter, gradient)
            self._delivered.append(parameter)


def _require_to_keep_gradients(sharded: Sequence[Any]) -> None:
    """Refuse a policy under which gradients of gathered weights go where no window can sum them.

    Raises:
        OptimizerError: They are cast for a reduction of `fully_shard`'s own.
    """
    for each in sharded:
        policy = getattr(each._get_fsdp_state(), "_mp_policy", None)
        cast = getattr(policy, "reduce_dtype", None)
        for name, leaf in each.named_parameters():
            if cast is not None and leaf.element_size() >= 4 and cast != leaf.dtype:
                raise OptimizerError(
                    f"{name} is in {leaf.dtype}, and by MixedPrecisionPolicy(reduce_dtype={cast}) its gradient is cast "
                    "for a reduction that does not take place.",
                    hint='leave reduce_dtype out, and say in which dtype gradients travel with reduce_in="bf16".',
                )


def groups_of(module: Any) -> list[Any]:
    """What `fully_shard` keeps the weights of a module in."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [each for each in (state._fsdp_param_group,) if each is not None]


def _stay() -> None:
    """Where micro-batches meet inside a module, the first to leave it would scatter what the others still use."""


def _share(parameter: Any, gradient: Tensor) -> Tensor:
    """This rank's part of a gradient that every rank has as a whole."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    with torch.no_grad():
        whole = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        local = whole.to_local().to(device=parameter.to_local().device, dtype=parameter.dtype, copy=True)
    return share_of(parameter, local)


def require_shards(sums: GradientSum) -> None:
    """Refuse weights that no module has spread, where each pass adds up only what is.

    Raises:
        OptimizerError: There are some.
    """
    for parameter in sums.parameters:
        if not hasattr(parameter, "device_mesh"):
            raise OptimizerError(
                f'A parameter of shape {tuple(parameter.shape)} is on every rank, and communication="each" adds up '
                "only what fully_shard has spread.",
                hint='call fully_shard(model) on the root too, or pass communication="once".',
            )


def square_of(sums: GradientSum) -> Tensor | float:
    """Return this rank's part of the squared 2-norm of the gradient, so that those of all ranks add up to it."""
    total: Tensor | float = 0.0
    for parameter, local in sums.shares():
        spread: Any = parameter
        mesh = spread.device_mesh
        replicas = math.prod(
            mesh.size(dim) for dim, placement in enumerate(spread.placements) if placement.is_replicate()
        )
        wide = torch.float32 if local.element_size() < 4 else None
        total = total + torch.linalg.vector_norm(local, dtype=wide).double().square() / replicas
    return total
