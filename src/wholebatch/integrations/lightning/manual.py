"""How do several optimizers make windows of their own? In manual optimization, one accumulator each."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.ranks.wrapping import Wrapping
from wholebatch.engine.window import Window
from wholebatch.integrations.lightning.keeping import kept, take_over


class Manual:
    """Trains with manual optimization.

    Args:
        trainer: About to train.
        module: What it trains.
        lengths: How many batches make a logical batch of each optimizer.
        told: Takes the record of each window.
        options: For the accumulators.
        step_schedules: Whether schedules are stepped once an applied update of their optimizer.

    Attributes:
        accumulators: One for each optimizer.

    Raises:
        ConfigError: Lengths are missing or no numbers of batches, or there is a loss scale.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        lengths: Sequence[int] | None,
        *,
        told: Callable[[Update], object],
        options: Mapping[str, Any],
        step_schedules: bool = False,
    ) -> None:
        optimizers = trainer.optimizers
        if lengths is None or len(lengths) != len(optimizers) or any(type(n) is not int or n < 1 for n in lengths):
            raise ConfigError(
                f"The module optimizes by hand with {len(optimizers)} optimizers, and windows={lengths!r}.",
                hint="say how many batches make a logical batch of each, as in WholeBatch(windows="
                f"{(1,) * len(optimizers)}), and take them in training_step: windows(self).",
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                "Manual optimization with a loss scale: one scale would be lowered and raised by several windows.",
                hint="take precision='bf16-mixed'.",
            )
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs] if step_schedules else []
        self.accumulators = tuple(
            Accumulator(
                _home(module, optimizer),
                optimizer,
                lr_scheduler=[each for each in schedules if each.optimizer is optimizer] or None,
                **options,
            )
            for optimizer in optimizers
        )
        self._ranks, self._rank = trainer.world_size, trainer.global_rank
        self._wrapping = Wrapping(trainer.strategy.model)
        self._lengths = tuple(lengths)
        self._batches = [0] * len(optimizers)
        self._told = told
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._update_lr_schedulers = self._epoch_loop.update_lr_schedulers

    def install(self) -> None:
        """Be told where a batch ends."""
        self._epoch_loop.update_lr_schedulers = self._end_batch
        self._wrapping.hush()  # it is around all players, and would send the gradients of each backward pass

    def remove(self) -> None:
        """Be told no longer."""
        vars(self._epoch_loop).pop("update_lr_schedulers", None)
        self._wrapping.release()

    def windows(self) -> tuple[Window, ...]:
        """Return the open window of each optimizer."""
        return tuple(each.open_window or each.window() for each in self.accumulators)

    def end_epoch(self) -> None:
        """Make updates of what an early end has left in windows."""
        self._close([n > 0 for n in self._batches])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint inside windows has to hold."""
        return {"accumulators": [kept(each, self._ranks) for each in self.accumulators], "batches": list(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the windows that were open."""
        for accumulator, of_it in zip(self.accumulators, state["accumulators"], strict=True):
            take_over(accumulator, of_it, self._rank, self._ranks)
        self._batches = list(state["batches"])

    def _end_batch(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Close the windows that are complete; Lightning itself steps no schedules in manual optimization."""
        if interval == "step" and not update_plateau_schedulers:
            if self._ranks > 1:
                self.windows()  # also where the batch was None: ranks open, and close, each window together
            self._batches = [each + 1 for each in self._batches]
            last = self._epoch_loop._num_ready_batches_reached()
            self._close([last or n >= length for n, length in zip(self._batches, self._lengths, strict=True)])
        self._update_lr_schedulers(interval, update_plateau_schedulers)

    def _close(self, due: Sequence[bool]) -> None:
        steps = self._epoch_loop.manual_optimization.optim_step_progress
        for place, accumulator in enumerate(self.accumulators):
            if not due[place]:
                continue
            self._batches[place] = 0
            if accumulator.open_window is None:
                continue
            update = accumulator.open_window.close()
            if update.skipped is None:
                steps.increment_ready()
                steps.increment_completed()
            self._told(update)


def _home(module: nn.Module, optimizer: Optimizer) -> nn.Module:
    """Return the smallest part of a module that holds all that an optimizer steps."""
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    paths = [name.split(".")[:-1] for name, each in module.named_parameters() if id(each) in stepped]
    if not paths:
        return module
    together = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return module.get_submodule(".".join(names[0] for names in together))
