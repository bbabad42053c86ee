"""How does what an accelerator has prepared train in windows? An accumulator over what is inside."""

from collections.abc import Sequence
from inspect import isroutine
from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch import nn

from wholebatch.core.errors import ConfigError
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import LossFn
from wholebatch.integrations.accelerate.habits import Alone, tell_of_clipping, tell_of_states
from wholebatch.integrations.accelerate.support import require_prepared, require_support, unwrapped


def accumulator(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loss_fn: LossFn | None = None,
    *,
    lr_scheduler: Any | Sequence[Any] | None = None,
    **options: Any,
) -> Accumulator:
    """Return an accumulator that trains what an accelerator has prepared.

    Its updates are exact as ever. It replaces ``accelerator.accumulate``, ``accelerator.backward``,
    ``accelerator.clip_grad_norm_``, ``optimizer.step``, ``optimizer.zero_grad`` and ``scheduler.step`` in the loop.

    Args:
        accelerator: Which has prepared the rest.
        model: As `prepare` returned it, also in DistributedDataParallel; or several in a `torch.nn.ModuleList` or
            `torch.nn.ModuleDict`.
        optimizer: One or several, as `prepare` returned them.
        loss_fn: ``loss_fn(model, micro_batch)``, as for `wb.Accumulator`.
        lr_scheduler: One or several, prepared or not. Each is stepped once an applied update, whatever the number of
            processes.
        options: Further options of `wb.Accumulator`, such as `targets`, `micro_batch` or `clip_norm`.

    Returns:
        An accumulator; `Accumulator.step`, `Accumulator.updates` and `Accumulator.window` are used as ever. The state
        that ``accelerator.save_state`` writes between updates is complete.

    Raises:
        ConfigError: The accelerator trains in a way that a window cannot follow.
        OptimizerError: Model or optimizer are not what this accelerator has prepared.

    Example:
        >>> import torch
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(3, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> exact = accumulator(
        ...     accelerator,
        ...     model,
        ...     optimizer,
        ...     lambda model, batch: torch.nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        ... )
        >>> loader = [{"x": torch.ones(rows, 3), "y": torch.ones(rows, 1)} for rows in (4, 4, 1)]
        >>> steps = accelerator.gradient_accumulation_steps
        >>> [(update.rows, update.micro_batches) for update in exact.updates(loader, micro_batches=steps)]
        [(8, 2), (1, 1)]
    """
    for name in ("precision", "loss_scaler"):
        if name in options:
            raise ConfigError(
                f"accumulator takes no {name}=..., which is the accelerator's.",
                hint="say it there: Accelerator(mixed_precision=...), with a GradScalerKwargs handler if need be.",
            )
    require_support(accelerator)
    require_prepared(accelerator, model)
    optimizers = [unwrapped(each) for each in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    schedulers = [
        each.scheduler if isinstance(each, AcceleratedScheduler) else each
        for each in (lr_scheduler if isinstance(lr_scheduler, Sequence) else [lr_scheduler])
        if each is not None
    ]
    alone = Alone(accelerator, options.pop("before_step", None))
    tell_of_clipping(accelerator, model)
    exact = Accumulator(
        model,
        optimizers,
        alone.around(loss_fn) if isroutine(loss_fn) else loss_fn,
        lr_scheduler=schedulers or None,
        loss_scaler=accelerator.scaler,
        before_step=alone,
        **options,
    )
    tell_of_states(accelerator, exact)
    return exact
