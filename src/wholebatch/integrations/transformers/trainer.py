"""How does a Trainer make updates of whole logical batches? Its loop stays; a window takes the place of a step."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from wholebatch.core.budget import parse_bytes
from wholebatch.core.errors import ConfigError
from wholebatch.core.record import Update
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.narrow import SumIn
from wholebatch.engine.objective import LossFn
from wholebatch.engine.ranks.balancing import Balance
from wholebatch.engine.ranks.reduction import ReduceIn
from wholebatch.engine.rules import BatchNorm, OnNonFinite
from wholebatch.integrations.transformers.balancing import balanced
from wholebatch.integrations.transformers.logged import Losses
from wholebatch.integrations.transformers.making import Options, Updates
from wholebatch.integrations.transformers.objective import TrainerLoss
from wholebatch.integrations.transformers.refusals import require_supported
from wholebatch.integrations.transformers.rows import WAITING, Taken, share_out, take, uncollated

logger = logging.get_logger(__name__)


class WholeBatchTrainer(Trainer):
    """A `transformers.Trainer` that trains exactly as if every logical batch fit into memory as a whole.

    A logical batch is ``per_device_train_batch_size * gradient_accumulation_steps`` rows of each rank, as it is for the
    Trainer: the same rows, updates, schedule, logs, evaluations and checkpoints. Every target counts once, whatever
    the model does with ``num_items_in_batch``, however ragged the rows and wherever the epoch ends; the gradient is
    clipped once, and the loss that is logged is that of the logical batch.

    Args:
        *args: As for `transformers.Trainer`.
        micro_batch: ``wb.Rows(8)``, ``wb.Tokens(4096, length=...)``, or ``"auto"``: the whole batch if it fits, else
            the fastest that does. None: rows of ``per_device_train_batch_size``; ``"auto"`` where `memory` is given.
        memory: What training may take in all, such as ``"2GiB"``, for ``micro_batch="auto"``.
        targets: What the loss averages over, if it is not what the first rows show: ``targets(inputs)`` counts it, or
            ``"labels"`` (that are not -100), ``"shifted_labels"`` (the same, but for the first of each row),
            ``"rows"``.
        reduction: What `compute_loss` returns: ``"mean"`` over its targets, or their ``"sum"``.
        loss_fn: ``loss_fn(model, inputs)`` in place of `compute_loss`, as `wb.Accumulator` takes it; its targets are
            the rows unless `targets` counts them.
        accumulate_in: As for `wb.Accumulator`.
        on_nonfinite: As for `wb.Accumulator`.
        batch_norm: As for `wb.Accumulator`.
        lockstep: As for `wb.Accumulator`.
        check: As for `wb.Accumulator`.
        reduce_in: As for `wb.Accumulator`.
        balance: As for `wb.Accumulator`.
        noise_scale: As for `wb.Accumulator`.
        **kwargs: As for `transformers.Trainer`.

    Attributes:
        last_update: The record of the last window, a `wb.Update`; None before the first.
        accumulator: What makes the updates, a `wb.Accumulator`; None before training. Its ``reasons`` say what was
            chosen automatically.

    Raises:
        ConfigError: The arguments ask for what cannot be made exact, or `memory` is no number of bytes.
        WeightError: `targets` is no way to count; or, at the first window, the loss is none of those that can be told.

    Example:
        >>> import tempfile, torch, wholebatch as wb
        >>> from transformers import TrainingArguments
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(2, 1)
        ...     def forward(self, x, labels=None):
        ...         outputs = self.head(x).squeeze(-1)
        ...         return {"loss": (outputs - labels).square().mean(), "logits": outputs}
        >>> rows = [{"x": torch.randn(2), "labels": torch.randn(())} for _ in range(10)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(
        ...         folder, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1,
        ...         report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        ...     )
        ...     trainer = WholeBatchTrainer(Model(), args, train_dataset=rows)
        ...     done = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> done.global_step, trainer.last_update.rows
        (2, 4)
    """

    def __init__(
        self,
        *args: Any,
        micro_batch: Literal["auto"] | Rows | Tokens | None = None,
        memory: str | int | None = None,
        targets: Callable[[Any], Any] | Literal["labels", "shifted_labels", "rows"] | None = None,
        reduction: Reduction = "mean",
        loss_fn: LossFn | None = None,
        accumulate_in: SumIn | None = None,
        on_nonfinite: OnNonFinite = "skip",
        batch_norm: BatchNorm = "refuse",
        lockstep: Literal["auto", "replay", "joined"] = "auto",
        check: Literal["first"] | None = "first",
        reduce_in: ReduceIn | None = None,
        balance: Balance | None = None,
        noise_scale: bool | int = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_supported(self)
        TrainerLoss(self, targets, reduction)  # which refuses what is no way to count
        if memory is not None:
            parse_bytes(memory)
        self._options = Options(
            micro_batch=micro_batch,
            memory=memory,
            targets=targets,
            reduction=reduction,
            loss_fn=loss_fn,
            passed_on={
                "accumulate_in": accumulate_in,
                "on_nonfinite": on_nonfinite,
                "batch_norm": batch_norm,
                "lockstep": lockstep,
                "check": check,
                "reduce_in": reduce_in,
                "balance": balance,
                "noise_scale": noise_scale,
            },
        )
        self._takes_rows = False
        self._updates: Updates | None = None
        self._losses = Losses()
        self.last_update: Update | None = None

    @property
    def accumulator(self) -> Accumulator | None:
        """What makes the updates; None before training."""
        return None if self._updates is None else self._updates.accumulator

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        try:
            self._takes_rows = True
            with balanced(self.model):
                return super().train(*args, **kwargs)
        finally:
            self._takes_rows = False
            self.accelerator.gradient_state._set_sync_gradients(True)
            if self._updates is not None:
                self._updates.end()

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader; in training it gives rows, not collated yet, and each row once."""
        if not self._takes_rows:
            return super().get_train_dataloader()
        with uncollated(self):
            return share_out(super().get_train_dataloader())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Take one logical batch from the loader, in the last of the places that the Trainer counts."""
        return take(epoch_iterator, num_batches, device), None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        """Make one update from a logical batch, forward, backward, clipped and stepped, and return its loss."""
        if inputs is WAITING:
            return torch.zeros((), device=self.args.device)
        if not isinstance(inputs, Taken):
            raise ConfigError(
                f"training_step was called with a {type(inputs).__name__}, not with a logical batch of its loader.",
                hint="leave get_batch_samples as it is; get_train_dataloader and compute_loss can be overridden.",
            )
        assert self._updates is not None
        model.train()
        self.optimizer.train()
        update = self.last_update = self._updates.make(inputs)
        if not update.applied:
            logger.warning(f"Step {self.state.global_step + 1} made no update: {update.skipped}.")
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            memory.free_cached(self.args.device)
        # The optimizer has stepped; while Accelerate counts gradients as not complete, it does not step once more.
        self.accelerator.gradient_state._set_sync_gradients(False)
        self.optimizer._is_overflow = not update.applied  # then the Trainer does not step its schedule either
        return torch.tensor(self._losses.add(update), device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the loss of a training step is that of its logical batches."""
        if "loss" in logs and "learning_rate" in logs and self.is_in_train:
            logs = self._losses.shown(logs, keep_infinite=not self.args.logging_nan_inf_filter)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Count the operations of what was padded and passed."""
        if inputs is WAITING or isinstance(inputs, Taken):
            inputs = {} if inputs is WAITING or self._updates is None else self._updates.passed
            if not inputs:
                return 0
        operations: int = super().floating_point_ops(inputs)
        return operations

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._updates, self._losses = Updates(self, model, self._options), Losses()
        return model, loader

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if inputs is not WAITING and self._updates is not None:
            super()._track_num_input_tokens(self._updates.passed)

    def _clip_grad_norm(self, model: nn.Module) -> float | None:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:  # noqa: ARG002 - the Trainer's
        """Return the norm of the logical batch's gradient, before it was clipped."""
        return None if self.last_update is None else self.last_update.grad_norm

    def _save_scaler(self, output_dir: str) -> None:
        if self._updates is not None:
            self._updates.save_loss_scale()
        super()._save_scaler(output_dir)
