"""Accelerate: a `wb.Accumulator` for what `accelerator.prepare` returned.

    accumulator = accelerate.accumulator(accelerator, model, optimizer, loss_fn, lr_scheduler=scheduler)
    for update in accumulator.updates(loader, micro_batches=accelerator.gradient_accumulation_steps):
        ...

The accelerator keeps what it does well: devices, processes, mixed precision, loaders, and `save_state`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from inspect import isroutine
from typing import Any
from weakref import ref

from torch import Tensor, nn

from wholebatch.core.batch import Layout
from wholebatch.core.errors import ConfigError, MissingExtraError, OptimizerError, WindowError
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import LossFn
from wholebatch.engine.rehearsal import is_rehearsal

try:
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderDispatcher
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import DistributedType
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] not in ("accelerate", "torch"):
        raise
    raise MissingExtraError(
        f"wholebatch.integrations.accelerate needs Accelerate, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[accelerate]'",
    ) from None

__all__ = ["accumulator", "each_row_once"]

_PREPARE = "hand in what prepare returned: model, optimizer, loader = accelerator.prepare(model, optimizer, loader)"


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
    _require_support(accelerator)
    _require_prepared(accelerator, model)
    optimizers = [_unwrapped(each) for each in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    schedulers = [
        each.scheduler if isinstance(each, AcceleratedScheduler) else each
        for each in (lr_scheduler if isinstance(lr_scheduler, Sequence) else [lr_scheduler])
        if each is not None
    ]
    alone = _Alone(accelerator, options.pop("before_step", None))
    _tell_of_clipping(accelerator, model)
    return Accumulator(
        model,
        optimizers,
        alone.around(loss_fn) if isroutine(loss_fn) else loss_fn,
        lr_scheduler=schedulers or None,
        loss_scaler=accelerator.scaler,
        before_step=alone,
        **options,
    )


def each_row_once(accelerator: Accelerator, loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a prepared loader without the rows that come a second time.

    A prepared loader fills up its last batches from the front, so that all processes have equally many
    (``even_batches``). In a mean over targets those rows would count twice.

    Args:
        accelerator: Which has prepared the loader.
        loader: As `prepare` returned it.

    Yields:
        Its batches, on all processes equally many; the last is shorter by what was filled up, or None where nothing is
        left. `Accumulator.updates` and `Accumulator.step` take both.

    Example:
        >>> import torch
        >>> accelerator = Accelerator(cpu=True)
        >>> loader = accelerator.prepare(torch.utils.data.DataLoader(range(5), batch_size=2))
        >>> [len(batch) for batch in each_row_once(accelerator, loader)]
        [2, 2, 1]
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    layout = Layout()
    for batch in loader:
        state = accelerator.gradient_state
        if ranks == 1 or not state.end_of_dataloader or state.remainder == 0:
            yield batch
            continue
        if isinstance(loader, DataLoaderDispatcher):  # it cuts a batch of all processes by rows
            items = layout.count(batch) or 0
        else:
            items = loader.total_batch_size // ranks if hasattr(loader, "total_batch_size") else 0
        if not items or (state.remainder < 0 and not getattr(loader, "_drop_last", False)):
            raise _unknown("Nobody knows how many rows there are")
        own = min(items, max(0, state.remainder - rank * items)) if state.remainder > 0 else items
        if 0 < own < items and layout.count(batch) != items:
            raise _unknown(f"The last batch holds {own} rows of its own and {items - own} of the first")
        yield batch if own == items else layout.loaded(batch).take(range(own)) if own else None


def _unknown(found: str) -> ConfigError:
    return ConfigError(
        f"{found}, so that rows which come twice cannot be left out.",
        hint="prepare the loader with even_batches=False, and hand it to accumulator.updates, where processes need not "
        "have equally many: Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)).",
    )


class _Alone:
    """Called in each pass and before each step: refuses a second way to accumulate in the same loop.

    Args:
        accelerator: Which counts the calls of its `accumulate`.
        then: Called afterwards, or None.
    """

    def __init__(self, accelerator: Accelerator, then: Callable[[], object] | None) -> None:
        self._accelerator = accelerator
        self._then = then
        self._calls = accelerator.step

    def around(self, loss_fn: Any) -> LossFn:
        """Return a loss function that looks first, so that on several ranks the window is undone in time."""

        @wraps(loss_fn)
        def looking(model: Any, micro_batch: Any) -> Any:
            self._require()
            return loss_fn(model, micro_batch)

        return looking

    def __call__(self) -> None:
        self._require()
        if self._then is not None:
            self._then()

    def _require(self) -> None:
        if self._accelerator.step != self._calls:
            if not is_rehearsal():  # which may go on in another way, and would then not be told again
                self._calls = self._accelerator.step
            raise WindowError(
                "accelerator.accumulate() is used around an accumulator, and both would say when an update is due.",
                hint="leave out `with accelerator.accumulate(model):`, accelerator.backward and optimizer.step: "
                "accumulator.updates(loader, micro_batches=accelerator.gradient_accumulation_steps) does all of it.",
            )


def _tell_of_clipping(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the accelerator refuse to clip where there is nothing to clip, which looks as if it had been clipped."""
    clip = accelerator.clip_grad_norm_
    ours = ref(model)

    def clip_grad_norm_(parameters: Any, *arguments: Any, **options: Any) -> Any:
        several = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        trained = ours()
        known = set(map(id, trained.parameters())) if trained is not None else set()
        if several and all(id(each) in known and each.grad is None for each in several):
            raise WindowError(
                "There is no gradient to clip: an accumulator has used it up, in an update that was not clipped so.",
                hint="say it to the accumulator, which clips the gradient of the logical batch once: clip_norm=...",
            )
        return clip(several, *arguments, **options)

    accelerator.clip_grad_norm_ = clip_grad_norm_


def _require_support(accelerator: Accelerator) -> None:
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


def _require_prepared(accelerator: Accelerator, model: Any) -> None:
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


def _unwrapped(optimizer: Any) -> Any:
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise OptimizerError(
            f"The {type(optimizer).__name__} is not an optimizer that an accelerator has prepared.", hint=f"{_PREPARE}."
        )
    return optimizer.optimizer
