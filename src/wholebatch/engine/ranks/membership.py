"""Who trains a model together, and in which way do they speak?"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

from torch import nn
from torch.optim import Optimizer

from wholebatch.core.errors import ConfigError, OptimizerError
from wholebatch.engine.ranks.alone import One
from wholebatch.engine.ranks.group import Group
from wholebatch.engine.ranks.instep import InStep
from wholebatch.engine.ranks.message import FIELDS
from wholebatch.engine.ranks.reduction import check_reduce_in
from wholebatch.engine.ranks.sharding import sharded_modules
from wholebatch.engine.ranks.sync import Many
from wholebatch.engine.ranks.wire import Wire, initialised
from wholebatch.engine.ranks.wrapping import make_equal, ranks_of
from wholebatch.engine.reasons import Say
from wholebatch.engine.steps.consuming import takers

Communication: TypeAlias = Literal["once", "each"]
"""How often ranks speak where weights are spread over them: once a window, or with each pass."""


def group_of(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    say: Say,
    *,
    reduce_in: str | None = None,
    communication: str = "once",
    measures: bool = False,
) -> Group:
    """Return the ranks that train a model together: one, unless `torch.distributed` is initialised with more.

    Args:
        model: As it is, wrapped in `DistributedDataParallel`, or sharded with `fully_shard`.
        optimizers: What steps it.
        say: Takes the reasons.
        reduce_in: In which dtype gradients travel.
        communication: How often ranks speak where weights are spread over them.
        measures: Whether the gradient noise scale is measured.

    Raises:
        ConfigError: An option is not one of the choices, or goes not together with another.
        OptimizerError: An optimizer or a wrapper cannot work on several ranks.
    """
    dtype = check_reduce_in(reduce_in)
    if communication not in get_args(Communication):
        raise ConfigError(
            f"communication={communication!r} is not one of the choices.",
            hint='pass communication="once" (a window) or "each" (pass).',
        )
    process_group = ranks_of(model)
    if process_group is None:
        return One(alone=initialised())
    taking = takers(optimizers)
    if taking:
        raise OptimizerError(
            f"{type(taking[0]).__name__} takes gradients in as they arrive, and over several ranks they have to be "
            "added up first.",
            hint="train in one process, or with an optimizer that steps from the whole gradient, such as AdamW.",
        )
    wire = Wire(process_group)
    introduce = partial(make_equal, model, optimizers, wire, say, measures=measures)
    sharded = sharded_modules(model)
    rank = f"This is rank {wire.rank} of {wire.ranks}"
    if not sharded:
        say(
            f"{rank}: gradients are added up once a window, and one message of {8 * FIELDS} bytes says over how many "
            "targets.",
            logging.INFO,
        )
        return Many(model, wire, introduce, dtype, measures=measures)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    costs = (
        f'communication="once" holds {numbers:,} weights and as many gradients on each rank inside a window, and moves '
        f'them once; "each" holds a share of 1 in {wire.ranks} and one layer, and moves them with every pass'
    )
    if communication == "once":
        say(f"{rank}, and the weights are sharded: {costs}. Once was taken.", logging.INFO)
        return Many(model, wire, introduce, dtype, measures=measures)
    if measures:
        raise ConfigError(
            'noise_scale needs the gradient of each micro-batch by itself, and with communication="each" fully_shard '
            "adds up those of all ranks with every pass.",
            hint='pass communication="once", or measure in one process: the noise scale is that of model and data.',
        )
    if reduce_in is not None:
        raise ConfigError(
            f'reduce_in={reduce_in!r} has no effect with communication="each", where fully_shard adds gradients up.',
            hint="say it there: fully_shard(module, mp_policy=MixedPrecisionPolicy(reduce_dtype=...)).",
        )
    say(f"{rank}, and the weights are sharded: {costs}. Each was asked for.", logging.INFO)
    return InStep(sharded, wire, introduce)
