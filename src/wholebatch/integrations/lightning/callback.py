"""What does the user of a `Trainer` add? One callback."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import TargetsFn
from wholebatch.engine.window import Window
from wholebatch.integrations.lightning.automatic import Automatic
from wholebatch.integrations.lightning.manual import Manual
from wholebatch.integrations.lightning.support import require_support

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback

_OF_THE_TRAINER = {
    "lr_scheduler": "return it from configure_optimizers, with interval 'step' if it counts updates",
    "precision": "say it to the trainer: Trainer(precision=...)",
    "loss_scaler": "say it to the trainer: Trainer(plugins=[MixedPrecision(..., scaler=...)])",
    "before_step": "write it as on_before_optimizer_step, which sees the gradient of the whole window",
}


class WholeBatch(Callback):
    """Makes every update of a `lightning.Trainer` that of the whole logical batch.

    The logical batch is either `accumulate_grad_batches` batches of the loader, each a micro-batch, or one batch of the
    loader that is cut by `micro_batch`. `training_step` returns a mean loss, ``(loss_sum, targets)``, a dict with one
    of them as ``"loss"``, or None where there is nothing to learn. Clipping, precision, schedules, validation, logging
    and checkpoints are the trainer's.

    Args:
        targets: ``targets(batch)`` counts what the loss averages over, such as unmasked tokens. Default: its rows.
        reduction: What `training_step` returns: ``"mean"`` over its targets, or their ``"sum"``.
        micro_batch: ``wb.Rows(8)``, ``wb.Tokens(4096, length=...)`` or ``"auto"``: each batch of the loader is a
            logical batch, and is cut. None: each is a micro-batch.
        windows: For manual optimization: how many batches make a logical batch of each optimizer, such as ``(1, 2)``;
            `training_step` then takes its windows from `windows`.
        clip_norm: For manual optimization, where Lightning leaves clipping to the module: the largest 2-norm of an
            update's gradient.
        step_schedules: For manual optimization: whether each schedule is stepped once an applied update of its
            optimizer. Else `training_step` or a hook does.
        on_update: Called with the record of each window.
        log: What is put before the names under which the loss and the norm of the gradient of each applied update are
            logged, such as ``"update/"``. None: they are not. What `training_step` logs is of single micro-batches.
        options: Further options of `wb.Accumulator`, such as `memory`, `collate` or `on_nonfinite`.

    Attributes:
        update: The record of the last window, or None before the first.

    Raises:
        ConfigError: An option belongs to the trainer, or two contradict each other.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> whole_batch = WholeBatch()
        >>> trainer = Trainer(
        ...     max_epochs=1,
        ...     accumulate_grad_batches=4,
        ...     callbacks=[whole_batch],
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> batches = [(torch.ones(rows, 3), torch.ones(rows, 1)) for rows in (4, 4, 1)]
        >>> trainer.fit(Regression(), torch.utils.data.DataLoader(batches, batch_size=None))
        >>> trainer.global_step, whole_batch.update.rows
        (1, 9)
    """

    def __init__(
        self,
        *,
        targets: TargetsFn | None = None,
        reduction: Reduction = "mean",
        micro_batch: Literal["auto"] | Rows | Tokens | None = None,
        windows: int | Sequence[int] | None = None,
        clip_norm: float | None = None,
        step_schedules: bool = False,
        on_update: Callable[[Update], object] | None = None,
        log: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, instead in _OF_THE_TRAINER.items():
            if name in options:
                raise ConfigError(f"WholeBatch takes no {name}=..., which is the trainer's.", hint=f"{instead}.")
        unknown = [name for name in options if name not in signature(Accumulator).parameters]
        if unknown:
            raise ConfigError(
                f"WholeBatch takes no {', '.join(unknown)}.",
                hint="its further options are those of wb.Accumulator, such as memory, collate or on_nonfinite.",
            )
        if on_update is not None and not callable(on_update):
            raise ConfigError(
                f"on_update is a {type(on_update).__name__}, which cannot be called.",
                hint="pass a function of the record of a window, such as print.",
            )
        if log is not None and not isinstance(log, str):
            raise ConfigError(
                f"log is a {type(log).__name__}, and not what is put before the names of what is logged.",
                hint='pass log="update/", or leave it out.',
            )
        if windows is None and (clip_norm is not None or step_schedules):
            raise ConfigError(
                "clip_norm and step_schedules are for manual optimization, and there are no windows=...",
                hint="clip with Trainer(gradient_clip_val=...); schedules are stepped as configure_optimizers says.",
            )
        if windows is not None and (micro_batch is not None or targets is not None):
            raise ConfigError(
                "With windows=..., training_step itself says of each loss over how many targets it is.",
                hint="leave out targets and micro_batch: window.backward(loss, targets=n).",
            )
        self._micro_batch = micro_batch
        self._windows = (windows,) if isinstance(windows, int) else windows
        self._options = {"reduction": reduction, **options}
        self._clip_norm, self._step_schedules = clip_norm, step_schedules
        self._targets = targets
        self._on_update = on_update
        self._log = log
        self._unlogged: Update | None = None
        self._training: Automatic | Manual | None = None
        self._loaded: dict[str, Any] = {}  # from a checkpoint
        self._left: dict[str, Any] = {}  # by a run that broke off, for a checkpoint that is written on its way out
        self._reasons: list[list[str]] = []
        self.update: Update | None = None

    @property
    def reasons(self) -> list[str]:
        """What was chosen automatically in the last training, and why; one sentence each."""
        return [reason for each in self._reasons for reason in each]

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        """What makes the updates of each optimizer, while the trainer trains."""
        if isinstance(self._training, Automatic):
            return (self._training.accumulator,)
        return () if self._training is None else self._training.accumulators

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of Lightning's own optimization."""
        cuts = self._micro_batch is not None
        require_support(trainer, pl_module, cuts=cuts)
        if pl_module.automatic_optimization:
            if self._windows is not None:
                raise ConfigError(
                    "windows=... is for manual optimization, and the module optimizes automatically.",
                    hint="leave it out: Trainer(accumulate_grad_batches=...) says what a logical batch is.",
                )
            self._training = Automatic(
                trainer,
                pl_module,
                cuts=cuts,
                told=self._take,
                options={**self._options, "targets": self._targets, "micro_batch": self._micro_batch or "auto"},
            )
        else:
            self._training = Manual(
                trainer,
                pl_module,
                self._windows,
                told=self._take,
                options={**self._options, "clip_norm": self._clip_norm},
                step_schedules=self._step_schedules,
            )
        self._reasons = [each.reasons for each in self.accumulators]
        self._left = {}
        loaded, self._loaded = self._loaded, {}
        if loaded:
            self._training.load_state_dict(loaded)
        self._training.install()

    def on_train_batch_end(self, _trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the last update."""
        update, self._unlogged = self._unlogged, None
        if update is None or self._log is None or update.skipped is not None:
            return
        values = {f"{self._log}loss": update.loss, f"{self._log}grad_norm": update.grad_norm}
        there = {name: value for name, value in values.items() if value is not None}
        pl_module.log_dict(there, on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Make an update of what an early end has left in a window."""
        if self._training is not None:
            self._training.end_epoch()

    def on_train_end(self, *_: Any) -> None:
        """Give Lightning's own optimization back."""
        self._leave()

    def on_exception(self, trainer: Any, *_: Any) -> None:
        """Roll back what is open, after it was kept for a checkpoint that is written on the way out."""
        if trainer.world_size == 1:  # other ranks do not come to this, and would have to take part
            self._left = self.state_dict()
            for each in self.accumulators:
                if each.open_window is not None:
                    each.open_window.rollback()
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint inside a window has to hold: its gradient, and where it began."""
        if self._training is None:
            return self._left
        return self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window that was open, once training starts."""
        self._loaded = state_dict

    def _leave(self) -> None:
        if self._training is not None:
            self._training.remove()
        self._training = None

    def _take(self, update: Update) -> None:
        self.update = self._unlogged = update
        if self._on_update is not None:
            self._on_update(update)

    def open_windows(self) -> tuple[Window, ...]:
        """Return the open window of each optimizer; see `windows`."""
        if not isinstance(self._training, Manual):
            raise ConfigError(
                "windows(self) is for manual optimization, inside training_step.",
                hint="set self.automatic_optimization = False, and say how long they are: WholeBatch(windows=(1, 2)).",
            )
        return self._training.windows()


def windows(module: Any) -> tuple[Window, ...]:
    """Return the open window of each optimizer, in `training_step` of a module with manual optimization.

    Args:
        module: The `LightningModule`; its trainer has a `WholeBatch` callback with ``windows=...``.

    Returns:
        In the order of `configure_optimizers`: call `Window.backward` with a loss and its targets, in the place of
        `manual_backward`. Nothing has to be zeroed, toggled or stepped: a window becomes an update after its last
        batch.

    Raises:
        ConfigError: There is no such callback, or the module optimizes automatically.
    """
    for each in module.trainer.callbacks:
        if isinstance(each, WholeBatch):
            return each.open_windows()
    raise ConfigError(
        "The trainer has no WholeBatch callback.", hint="add it: Trainer(callbacks=[WholeBatch(windows=(1, 2))])."
    )
