"""What of a trainer and its module can be trained in windows? The rest is refused, before it would be wrong."""

from collections.abc import Iterator
from typing import Any

from wholebatch.core.errors import ConfigError, OptimizerError

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
"""Those under which a window owns the gradients."""

PRECISIONS = ("Precision", "MixedPrecision", "HalfPrecision", "DoublePrecision")
"""Those that change what a forward pass computes in, and at most scale the loss."""

_OWN_LOOP = "train in a loop of your own with wb.Accumulator, which takes a model sharded by fully_shard"

_INSTEAD = {
    "optimizer_step": "leave it out: the window steps once. A warm-up is a schedule with interval 'step'; what looks "
    "at gradients, or changes them, goes into on_before_optimizer_step",
    "optimizer_zero_grad": "leave it out: the window clears its gradients itself",
    "backward": "leave it out: the window runs the backward pass. What changes the loss goes into training_step",
}


def require_support(trainer: Any, module: Any, *, cuts: bool) -> None:
    """Refuse what a window could not keep exact.

    Args:
        trainer: About to train, with its optimizers.
        module: What it trains.
        cuts: Whether each batch of the loader is a logical batch, to be cut.

    Raises:
        ConfigError: Strategy, precision, a hook, or the trainer's accumulation.
        OptimizerError: There is no optimizer.
    """
    _require_known_loops(trainer)
    _require_strategy(trainer.strategy)
    plugin = type(trainer.precision_plugin).__name__
    if plugin not in PRECISIONS:
        raise ConfigError(
            f"The precision plugin is {plugin}, which does more to a backward pass than a window knows of.",
            hint="take precision='32-true', '64-true', 'bf16-true', 'bf16-mixed' or '16-mixed'.",
        )
    if any(type(each).__name__ == "_MockOptimizer" for each in trainer.optimizers):
        raise OptimizerError(
            "configure_optimizers returned None, so that nothing learns.", hint="return an optimizer from it."
        )
    for hook, instead in _INSTEAD.items():
        if overrides(module, hook):
            raise ConfigError(
                f"{type(module).__name__} has a {hook} of its own, which a window would not call.", hint=f"{instead}."
            )
    if "dataloader_iter" in _arguments(module.training_step):
        raise ConfigError(
            "training_step takes dataloader_iter, and reads its batches where no window sees them.",
            hint="let it take (batch, batch_idx).",
        )
    if cuts:
        _require_whole_batches(trainer, module)


def _require_known_loops(trainer: Any) -> None:
    epoch_loop = trainer.fit_loop.epoch_loop
    loop = epoch_loop.automatic_optimization
    used = [
        (epoch_loop, ("_should_accumulate", "_num_ready_batches_reached", "_update_learning_rates")),
        (epoch_loop, ("update_lr_schedulers", "manual_optimization")),
        (loop, ("run", "optim_progress", "_skip_backward", "_on_before_zero_grad")),
        (trainer.precision_plugin, ("_after_closure",)),
    ]
    missing = [name for owner, names in used for name in names if not hasattr(owner, name)]
    if missing:
        raise ConfigError(
            f"This version of Lightning trains in another way than those that are known: it has no {missing[0]}.",
            hint="pip install 'wholebatch[lightning]' 'lightning>=2.5,<2.7'.",
        )


def _require_strategy(strategy: Any) -> None:
    name = type(strategy).__name__
    if name not in STRATEGIES:
        raise ConfigError(
            f"The strategy is {name}, under which gradients live where no window can sum them.",
            hint=f"take strategy='auto' or 'ddp'; for weights that are sharded, {_OWN_LOOP}.",
        )
    if getattr(strategy, "_model_averager", None) is not None:
        raise ConfigError(
            "The strategy averages models now and then (post-local SGD), so that an update is not that of one batch.",
            hint="leave out ddp_comm_state and model_averaging_period.",
        )
    if getattr(strategy, "_ddp_comm_hook", None) is not None:
        raise ConfigError(
            "The strategy has a ddp_comm_hook, and a window adds gradients up itself, once.",
            hint="leave it out; WholeBatch(reduce_in='bf16') halves what travels.",
        )


def _require_whole_batches(trainer: Any, module: Any) -> None:
    require_no_accumulation(trainer)
    for each in (module, *trainer.callbacks):
        if overrides(each, "on_after_backward"):
            raise ConfigError(
                f"{type(each).__name__} has an on_after_backward, and a batch that is cut has several backward passes.",
                hint="look at the gradient of the whole batch, in on_before_optimizer_step.",
            )


def require_no_accumulation(trainer: Any) -> None:
    """Refuse two rules at once of what a logical batch is.

    Raises:
        ConfigError: The trainer accumulates, and batches are cut.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} makes a logical batch of several batches of "
            "the loader, and micro_batch=... says that each is one, to be cut.",
            hint="leave out one of them: with micro_batch, let the loader make batches that are as many times larger.",
        )


def overrides(one: Any, hook: str) -> bool:
    """Return whether a module or a callback has a hook of its own."""
    home = next((each for each in type(one).__mro__ if hook in vars(each)), None)
    ours = ("lightning.pytorch.", "pytorch_lightning.", "wholebatch.")
    return hook in vars(one) or (home is not None and not home.__module__.startswith(ours))


def loaders_of(trainer: Any) -> Iterator[Any]:
    """Yield the loaders from which the trainer reads what it trains on."""
    combined = trainer.fit_loop._combined_loader
    yield from combined.flattened if combined is not None else ()


def _arguments(function: Any) -> tuple[str, ...]:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code.co_varnames[: code.co_argcount] if code is not None else ()
