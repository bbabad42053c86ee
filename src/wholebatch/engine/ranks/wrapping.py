"""How is the model wrapped, who trains it together, and how is its wrapper kept quiet inside a window?"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from wholebatch.core.errors import OptimizerError, RankError
from wholebatch.engine.device import modules
from wholebatch.engine.ranks.sharding import ranks_of_shards, sharded_modules
from wholebatch.engine.ranks.wire import Wire, initialised
from wholebatch.engine.reasons import Say
from wholebatch.engine.sums import GradientSum

P = ParamSpec("P")
T = TypeVar("T")


def ranks_of(model: Any) -> Any:
    """Return the process group that trains a model, or None where this process trains it alone.

    Raises:
        OptimizerError: The model is wrapped in what a window cannot keep quiet.
    """
    if _alone.get() or not initialised() or not isinstance(model, nn.Module):
        return None
    process_group: Any = dist.group.WORLD
    for module in modules(model):
        if isinstance(module, DistributedDataParallel):
            _require_quiet(module)
            process_group = module.process_group
        elif type(module).__name__ == "FullyShardedDataParallel":
            raise OptimizerError(
                "The model is wrapped in FullyShardedDataParallel, whose gradients live where no window can sum them.",
                hint="shard it with torch.distributed.fsdp.fully_shard(model), which has replaced that wrapper.",
            )
    if sharded_modules(model):
        process_group = ranks_of_shards(model)
    return process_group if dist.get_world_size(process_group) > 1 else None


class Wrapping:
    """The wrappers of a model that would reduce gradients by themselves, and that a window keeps quiet.

    Args:
        model: As it was given to the accumulator.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers: list[Any] = [each for each in modules(model) if isinstance(each, DistributedDataParallel)]
        self._before: list[tuple[bool, bool]] = []

    def hush(self) -> None:
        """Keep forward passes from sending buffers, and backward passes from reducing gradients."""
        if not self._before:
            self._before = [
                (each.require_backward_grad_sync, each.require_forward_param_sync) for each in self._wrappers
            ]
        for each in self._wrappers:
            each.require_backward_grad_sync = each.require_forward_param_sync = False

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients arrive in a backward pass: these themselves."""
        return list(parameters)

    def deliver(self, sums: GradientSum, factor: float) -> None:
        """Put the sum times `factor` where the optimizer looks for it."""
        sums.deliver(factor)

    def release(self) -> None:
        """Let the wrappers do as they did before."""
        for each, (backward, forward) in zip(self._wrappers, self._before, strict=False):
            each.require_backward_grad_sync, each.require_forward_param_sync = backward, forward
        self._before = []


def by_itself(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of a model run on this rank alone: nothing in it reaches over ranks, nor does the wrapper."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        wrapping = Wrapping(model) if isinstance(model, nn.Module) else None
        before = _alone.set(True)
        if wrapping is not None:
            wrapping.hush()
        try:
            return function(*args, **kwargs)
        finally:
            if wrapping is not None:
                wrapping.release()
            _alone.reset(before)

    return alone


_alone = ContextVar("alone", default=False)


def sparse_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose gradients are sparse tensors."""
    return [
        cast(nn.Parameter, each.weight)
        for each in modules(model)
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse
    ]


def make_equal(
    model: nn.Module, optimizers: Sequence[Optimizer], wire: Wire, say: Say, *, measures: bool = False
) -> None:
    """Give every rank the weights and buffers of the first, once, and require that all else is equal already.

    Raises:
        RankError: The ranks train different models, or with different optimizers.
    """
    mine = [*_description(model, optimizers), "noise_scale" if measures else "no noise_scale"]
    digests = wire.gather(hashlib.sha256(repr(mine).encode()).hexdigest())
    if len(set(digests)) > 1:
        everyone = wire.gather(mine)
        rank = next(rank for rank, each in enumerate(everyone) if each != everyone[0])
        one, other = _first_difference(everyone[0], everyone[rank])
        raise RankError(
            f"The ranks do not train the same: rank 0 has {one}, rank {rank} has {other}.",
            hint="build model, optimizer and schedule alike on every rank, and load a checkpoint on every rank.",
        )
    whole = [each for each in [*model.parameters(), *model.buffers()] if not hasattr(each, "device_mesh")]
    tensors = {id(each): each for each in whole}
    differed = 0
    with torch.no_grad():
        for each in tensors.values():
            first = each.detach().clone(memory_format=torch.contiguous_format)
            wire.take_first(first)
            if not torch.equal(first, each):
                differed += 1
                each.copy_(first)
    if differed:
        say(
            f"{differed} of {len(tensors)} weights and buffers of rank {wire.rank} differed from those of rank 0, and "
            "have been made equal to them.",
            logging.INFO,
        )


def _require_quiet(module: DistributedDataParallel) -> None:
    for option in ("static_graph", "mixed_precision"):
        if getattr(module, option, None):
            raise OptimizerError(
                f"The model is wrapped in DistributedDataParallel with {option}, which reduces gradients in a "
                "way of its own.",
                hint=f"leave {option} out; the window reduces once, while the last backward pass runs, and "
                'precision="bf16" or "fp16" is autocast.',
            )


def _description(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[str]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} of shape {tuple(tensor.shape)} in {tensor.dtype}"
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        yield kind
        for group in optimizer.param_groups:
            options = {
                key: float(value) if isinstance(value, Tensor) else value
                for key, value in group.items()
                if isinstance(value, bool | int | float | str | tuple)
                or (isinstance(value, Tensor) and value.ndim == 0)
            }
            yield f"{kind} of {len(group['params'])} parameters with {options}"
        yield f"{kind} with a state for {len(optimizer.state)} parameters"


def _first_difference(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    for mine, yours in zip(one, other, strict=False):
        if mine != yours:
            return mine, yours
    return f"{len(one)} parts", f"{len(other)} parts"
