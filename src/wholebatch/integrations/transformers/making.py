"""How does one logical batch of a Trainer become an update? Through an accumulator made when training begins."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wholebatch.core.errors import VerifyError
from wholebatch.core.record import Update
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import LossFn
from wholebatch.integrations.transformers.beginning import Beginning
from wholebatch.integrations.transformers.events import BeforeStep
from wholebatch.integrations.transformers.objective import Rule, TrainerLoss
from wholebatch.integrations.transformers.rows import Collate, Taken, longest_first

_log = logging.getLogger("wholebatch")

_PADDED = "The loss of a row depends on how much it is padded, and so on which rows it is collated with"
_MASK = "pass attention_mask, or another mask, to the model; or pad every row to one length in the collator"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said of windows; see `WholeBatchTrainer`."""

    micro_batch: Literal["auto"] | Rows | Tokens | None
    memory: str | int | None
    targets: str | Callable[[Any], Any] | None
    reduction: Reduction
    loss_fn: LossFn | None
    passed_on: Mapping[str, Any]


class Updates:
    """Makes the updates of one call of `train`.

    Args:
        trainer: Prepared for training.
        model: As Accelerate has wrapped it.
        options: Of the user.

    Attributes:
        accumulator: Of rows, or, where the loader collates them itself, of its micro-batches.
        passed: What of the inputs of the last window is counted.
    """

    def __init__(self, trainer: Any, model: nn.Module, options: Options) -> None:
        self._trainer = trainer
        self._model = model
        self._options = options
        self._inputs = getattr(trainer.model, "main_input_name", "input_ids")
        self._keeps = trainer.args.include_num_input_tokens_seen != "no"
        self._collate = Collate(trainer.data_collator, self._inputs, keeps=self._keeps)
        self._loss = TrainerLoss(trainer, options.targets, options.reduction)
        self._optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self._before_step = BeforeStep(trainer, self._optimizer)
        self._made_for: tuple[bool, Rule | None, bool] | None = None
        self._together = False
        self._beginning = Beginning(
            trainer, self._loss, options.loss_fn, options.reduction, self._collate, options.passed_on["check"]
        )
        self.accumulator: Accumulator | None = None
        self.passed = {name: torch.empty(0) for name in (self._inputs, "attention_mask")} if self._keeps else {}

    def make(self, taken: Taken) -> Update:
        """Make the update of one logical batch."""
        trainer = self._trainer
        average, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
        self._before_step.due = True
        try:
            if self._beginning.due:
                self._beginning.begin(taken)
            accumulator = self._accumulator(taken.collated, self._loss.rule)
            if taken.collated:
                (update,) = accumulator.updates(taken.batches, micro_batches=taken.most)
                self._count([self._collate.seen(each) for each in taken.batches])
            else:
                rows = longest_first(taken.rows)
                update = self._step(accumulator, rows)
                self._count(self._collate.ended(len(rows)))
            return update
        finally:
            trainer.args.average_tokens_across_devices = average
            self._collate.begin()

    def save_loss_scale(self) -> None:
        """Hand the loss scale over to the scaler that the Trainer saves."""
        scaler = self._trainer.accelerator.scaler
        if scaler is not None and self.accumulator is not None:
            scaler.load_state_dict(self.accumulator.loss_scale)

    def end(self) -> None:
        """Give the events of the Trainer back to its loop."""
        self._before_step.remove()

    def _accumulator(self, collated: bool, rule: Rule | None) -> Accumulator:
        if self.accumulator is not None and self._made_for == (collated, rule, self._together):
            return self.accumulator
        self.save_loss_scale()
        options, trainer = self._options, self._trainer
        cut: Literal["auto"] | Rows | Tokens = "auto"
        if options.micro_batch is not None:
            cut = options.micro_batch
        elif options.memory is None:
            cut = Rows(trainer.args.train_batch_size)
        given = options.targets is not None
        self._made_for = collated, rule, self._together
        self.accumulator = Accumulator(
            self._model,
            self._optimizer,
            options.loss_fn or self._loss,
            targets=self._loss.count if given or options.loss_fn is None else None,
            reduction=self._beginning.reduction,
            micro_batch=cut,
            memory=options.memory,
            collate=None if collated or self._together else self._collate,
            clip_norm=trainer.args.max_grad_norm or None,
            precision="fp16" if trainer.accelerator.scaler is not None else "fp32",  # bf16 is in the forward pass
            **{**options.passed_on, "check": None if self._beginning.due else self._beginning.check},
        )
        self.accumulator.counts_first = True
        self.accumulator.reasons += self._beginning.reasons
        if trainer.accelerator.scaler is not None:  # as a checkpoint had it
            self.accumulator.loss_scale = trainer.accelerator.scaler.state_dict()
        return self.accumulator

    def _step(self, accumulator: Accumulator, rows: list[Any]) -> Update:
        """Make an update of rows, which are padded to the longest of a micro-batch wherever that changes nothing."""
        if not rows:
            return accumulator.step(None)
        if self._together:
            return accumulator.step(self._collate(rows))
        try:
            return accumulator.step(rows)
        except VerifyError as error:
            if not self._beginning.padding_counts(rows):
                raise
            if dist.is_available() and dist.is_initialized():
                raise VerifyError(f"{_PADDED}, and ranks pad differently.", hint=f"{_MASK}.") from error
        self._together = True
        self._beginning.reasons.append(
            f"{_PADDED}: all rows of a logical batch are collated together, and cut then (hint: {_MASK})."
        )
        _log.warning(self._beginning.reasons[-1])
        return self._accumulator(False, self._loss.rule).step(self._collate(rows))

    def _count(self, seen: list[dict[str, Tensor]]) -> None:
        """Keep what of the inputs of a window is counted, as one micro-batch."""
        if not seen:  # ranks count together, also those that have no rows
            self.passed = {name: tensor[:0] for name, tensor in self.passed.items()}
            return
        names = {name for each in seen for name in each}
        self.passed = {
            name: torch.cat([each[name].flatten() for each in seen if name in each]) for name in sorted(names)
        }
