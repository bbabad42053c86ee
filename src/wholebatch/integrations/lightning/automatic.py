"""How do calls of `training_step` become windows? In the place of Lightning's automatic optimization.

The trainer runs as ever, and counts micro-batches. Two of its methods are replaced while it trains: the one that runs a
micro-batch, and the one that ends it, where schedules are stepped.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from wholebatch.core.batch import Layout, paths
from wholebatch.core.errors import ConfigError, LossError, MeetingError
from wholebatch.core.record import Update
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.reasons import Reasons
from wholebatch.engine.rehearsal import is_rehearsal
from wholebatch.integrations.lightning.keeping import kept, take_over
from wholebatch.integrations.lightning.logs import Silence, current_hook, logging_of
from wholebatch.integrations.lightning.repeated import Repeated
from wholebatch.integrations.lightning.support import loaders_of, require_no_accumulation


class Automatic:
    """Trains with automatic optimization.

    Args:
        trainer: About to train.
        module: What it trains.
        cuts: Whether each batch of the loader is a logical batch, to be cut.
        told: Takes the record of each window.
        options: For the accumulator.

    Attributes:
        accumulator: Makes the windows.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        cuts: bool,
        told: Callable[[Update], object],
        options: Mapping[str, Any],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._cuts = cuts
        self._told = told
        self._epoch_loop = trainer.fit_loop.epoch_loop
        self._loop = self._epoch_loop.automatic_optimization
        (self._optimizer,) = trainer.optimizers
        self.accumulator = Accumulator(
            trainer.strategy.model,
            self._optimizer,
            self._loss,
            loss_scaler=getattr(trainer.precision_plugin, "scaler", None),
            before_step=self._before_step,
            **options,
        )
        self._ranks = trainer.world_size
        say = Reasons(self.accumulator.reasons)
        layout = Layout(options.get("collate"), paths(options.get("whole", ())), options.get("dims"))
        self._repeated = Repeated(list(loaders_of(trainer)) if self._ranks > 1 else [], layout, say)
        self._require_ranks_alike()
        self._arguments: tuple[Any, ...] = ()
        self._outputs: dict[str, Any] = {}
        self._silence = Silence(module)
        self._ran = False
        self._ended = False
        self._applied = False
        self._of_lightning = self._loop.run, self._epoch_loop.update_lr_schedulers

    def install(self) -> None:
        """Take the place of Lightning's own optimization."""
        self._loop.run = self._run
        self._epoch_loop.update_lr_schedulers = self._end_batch

    def remove(self) -> None:
        """Give it back."""
        for each, name in ((self._loop, "run"), (self._epoch_loop, "update_lr_schedulers")):
            vars(each).pop(name, None)

    def end_epoch(self) -> None:
        """Make an update of what is in a window that an early end has left open."""
        if self.accumulator.open_window is not None:
            self._close()
            for plateaus in (False, True):
                self._step_schedules(plateaus)
        self._ended = self._applied = False  # also where the last batch was given up in the middle

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint inside a window has to hold."""
        return kept(self.accumulator, self._ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the window that was open."""
        take_over(self.accumulator, state, self._trainer.global_rank, self._ranks)

    def _run(self, optimizer: Any, batch_idx: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a micro-batch, or a logical batch that is cut."""
        run, _ = self._of_lightning
        if self._loop._skip_backward:  # StochasticWeightAveraging looks at batch norm statistics without learning
            result: dict[str, Any] = run(optimizer, batch_idx, kwargs)
            return result
        batch, *self._arguments = kwargs.values()  # type: ignore[assignment]
        batch = self._repeated.left_out(batch, batch_idx)
        self._outputs, self._ran = {}, False
        if self.accumulator.open_window is None:
            self._loop._on_before_zero_grad(optimizer)
            self._loop.optim_progress.optimizer.zero_grad.increment_completed()
        # Around all of it, since micro-batches that meet take turns, and leave in another order than they enter.
        dtype = torch.get_default_dtype()
        try:
            with current_hook(self._module, "training_step"):
                self._run_batch(batch)
        finally:
            torch.set_default_dtype(dtype)
        return self._outputs

    def _run_batch(self, batch: Any) -> None:
        if self._cuts:
            require_no_accumulation(self._trainer)
            update = self.accumulator.step(batch)
            if self._outputs:
                self._outputs["loss"] = torch.tensor(update.loss)
            self._take(update)
            return
        closes = not self._epoch_loop._should_accumulate()
        if self.accumulator.open_window is None:
            self.accumulator.window(micro_batches=self._trainer.accumulate_grad_batches)
        try:
            self.accumulator.add(batch, last=closes)
        except MeetingError as error:
            raise MeetingError(
                error.found,
                hint="let each batch of the loader be a logical batch, and cut it: WholeBatch(micro_batch=wb.Rows(8)), "
                "without accumulate_grad_batches.",
            ) from error
        if self._ran:
            self._call("on_after_backward")
        if closes:
            self._close()

    def _loss(self, _model: Any, micro_batch: Any) -> Any:
        """Run `training_step` as its strategy does, which knows how the model is wrapped and the precision."""
        looks = is_rehearsal() or not torch.is_grad_enabled()
        with self._silence if looks else logging_of(self._trainer, micro_batch):
            output = self._trainer.strategy.training_step(micro_batch, *self._arguments)
        loss, extra = output, {}
        if isinstance(output, Mapping):
            if "loss" not in output:
                raise LossError(
                    f"training_step returned a dict with {', '.join(map(str, output)) or 'nothing'}, and no 'loss'.",
                    hint="return a loss, (loss_sum, targets), None, or a dict with one of them as 'loss'.",
                )
            loss = output["loss"]
            extra = {name: value for name, value in output.items() if name != "loss"}
        if looks or loss is None:
            return loss
        self._ran = True
        self._outputs = {"loss": _mean_of(loss), **extra}
        self._call("on_before_backward", self._outputs["loss"])
        return loss

    def _before_step(self) -> None:
        """Let hooks see the gradient of the whole window, and the trainer clip it."""
        self._trainer.precision_plugin._after_closure(self._module, self._optimizer)

    def _close(self) -> None:
        window = self.accumulator.open_window or self.accumulator.window()
        self._take(window.close())

    def _take(self, update: Update) -> None:
        """Count an update as the trainer does, if it was applied."""
        self._ended = True
        self._applied = update.skipped is None
        if self._applied:
            steps = self._loop.optim_progress.optimizer.step
            steps.increment_ready()
            steps.increment_completed()
        self._told(update)

    def _end_batch(self, interval: str, update_plateau_schedulers: bool) -> None:
        """End a micro-batch, also one that was None and has not run; step the schedules that are due."""
        _, update_lr_schedulers = self._of_lightning
        if interval != "step":
            update_lr_schedulers(interval, update_plateau_schedulers)
            return
        if not update_plateau_schedulers and not self._ended and not self._loop._skip_backward:
            self._end_without_a_run()
        self._step_schedules(update_plateau_schedulers)
        if update_plateau_schedulers:  # the last of what the trainer does in a batch
            self._ended = self._applied = False

    def _end_without_a_run(self) -> None:
        if self._cuts:
            if self._ranks > 1:
                self._take(self.accumulator.step(None))
        elif not self._epoch_loop._should_accumulate() and (
            self.accumulator.open_window is not None or self._ranks > 1
        ):
            self._close()

    def _step_schedules(self, plateaus: bool) -> None:
        """Step what counts updates, once an applied one."""
        if not self._applied:
            return
        strategy = self._trainer.strategy
        configs = strategy.lr_scheduler_configs
        due = [each for each in configs if each.interval == "step" and self._updates % each.frequency == 0]
        strategy.lr_scheduler_configs = [replace(each, frequency=1) for each in due]
        try:
            self._epoch_loop._update_learning_rates("step", plateaus)
        finally:
            strategy.lr_scheduler_configs = configs

    @property
    def _updates(self) -> int:
        steps: int = self._loop.optim_progress.optimizer_steps
        return steps

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of the callbacks and of the module, as the trainer does."""
        with current_hook(self._module, hook):
            for callback in self._trainer.callbacks:
                getattr(callback, hook)(self._trainer, self._module, *arguments)
            getattr(self._module, hook)(*arguments)

    def _require_ranks_alike(self) -> None:
        """Refuse ranks that would wait for each other."""
        if self._ranks == 1:
            return
        batches: list[Any] = [None] * self._ranks
        distributed.all_gather_object(batches, self._trainer.num_training_batches)
        if len(set(batches)) > 1:
            raise ConfigError(
                f"The ranks have {', '.join(map(str, batches))} batches in an epoch, and Lightning lets all of them "
                "speak in every batch, so that one would wait for ever.",
                hint="give all ranks equally many, as the trainer's sampler does (use_distributed_sampler=True), or "
                "let the loader yield None where a rank has no more.",
            )


def _mean_of(loss: Any) -> Any:
    """What the hooks of a batch get as its loss; a loss that is no tensor is refused elsewhere."""
    if isinstance(loss, tuple) and len(loss) in (2, 3):
        loss = loss[0] / loss[1]
    return loss.detach().clone() if isinstance(loss, torch.Tensor) else loss
