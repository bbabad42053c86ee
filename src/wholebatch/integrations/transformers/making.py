"""How does one logical batch of a Trainer become an update? Through an accumulator made when training begins."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wholebatch.core.errors import WeightError, WholeBatchError
from wholebatch.core.record import Update
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import LossFn, Objective
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.transaction import Transaction
from wholebatch.integrations.transformers.drawing import draws, look
from wholebatch.integrations.transformers.looking import ROWS, looking, measure
from wholebatch.integrations.transformers.objective import Rule, TrainerLoss
from wholebatch.integrations.transformers.rows import Collate, Taken, longest_first

_log = logging.getLogger("wholebatch")


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
        self._before_step = _BeforeStep(trainer, self._optimizer)
        self._made_for: tuple[bool, Rule | None] | None = None
        self._reasons: list[str] = []
        self._due = True
        self._check = options.passed_on["check"]
        self.accumulator: Accumulator | None = None
        self.passed = {name: torch.empty(0) for name in (self._inputs, "attention_mask")} if self._keeps else {}

    def make(self, taken: Taken) -> Update:
        """Make the update of one logical batch."""
        trainer = self._trainer
        average, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
        self._before_step.due = True
        try:
            if self._due:
                self._begin(taken)
            accumulator = self._accumulator(taken.collated, self._loss.rule)
            if taken.collated:
                (update,) = accumulator.updates(taken.items, micro_batches=taken.most)
                self._count([self._collate.seen(each) for each in taken.items])
            else:
                rows = longest_first(taken.rows)
                update = accumulator.step(rows if rows else None)
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
        if self.accumulator is not None and self._made_for == (collated, rule):
            return self.accumulator
        options, trainer = self._options, self._trainer
        cut: Literal["auto"] | Rows | Tokens = "auto"
        if options.micro_batch is not None:
            cut = options.micro_batch
        elif options.memory is None:
            cut = Rows(trainer.args.train_batch_size)
        given = options.targets is not None
        self._made_for = collated, rule
        self.accumulator = Accumulator(
            self._model,
            self._optimizer,
            options.loss_fn or self._loss,
            targets=self._loss.count if given or options.loss_fn is None else None,
            reduction=self._reduction,
            micro_batch=cut,
            memory=options.memory,
            collate=None if collated else self._collate,
            clip_norm=trainer.args.max_grad_norm or None,
            precision="fp16" if trainer.accelerator.scaler is not None else "fp32",  # bf16 is in the forward pass
            **{**options.passed_on, "check": None if self._due else self._check},
        )
        self.accumulator.counts_first = True
        self.accumulator.reasons += self._reasons
        if trainer.accelerator.scaler is not None:  # as a checkpoint had it
            self.accumulator.loss_scale = trainer.accelerator.scaler.state_dict()
        return self.accumulator

    def _begin(self, taken: Taken) -> None:
        """Look at the first logical batch from which there is something to learn."""
        own = self._options.loss_fn
        if self._loss.rule is None and own is None:
            self._find_rule(taken)
        if self._loss.rule is None and own is None:
            return
        self._due = False
        if taken.collated or self._check is None:
            return
        trainer, usual = self._trainer, int(self._trainer.args.train_batch_size)
        if not any(_heard(draws(trainer.data_collator, taken.rows[:usual], trainer.args.device))):
            return
        self._check = None  # that of the accumulator would collate the same rows again, to others
        counts = self._loss.count if self._loss.rule is not None else None
        objective = Objective(own or self._loss, counts, self._reduction)
        refusal: WholeBatchError | None = None
        before = RandomState.now(trainer.args.device)
        try:
            if taken.rows:
                found = look(trainer.model, objective, self._collate(taken.rows[:usual]))
                self._reasons += [found] if found else []
        except WholeBatchError as error:
            refusal = error
        finally:
            before.restore()
        for each in _heard(refusal):
            if each is not None:
                raise each

    @property
    def _reduction(self) -> Reduction:
        return self._options.reduction if self._options.loss_fn is not None else self._loss.reduction

    def _find_rule(self, taken: Taken) -> None:
        """Find out what the loss averages over, on all ranks the same."""
        trainer = self._trainer
        before = Transaction(trainer.model, trainer.args.device)
        before.begin()
        found: Rule | None = None
        wrong: WeightError | None = None
        try:
            with looking(trainer):
                found = self._measured(taken)
        except WeightError as error:
            wrong = error
        finally:
            before.roll_back()
        for name, refusal in _heard((found.name if found is not None else None, wrong)):
            if refusal is not None:
                raise refusal
            if self._loss.rule is None and name is not None:
                self._loss.rule = self._loss.rule_named(name)
        if self._loss.rule is not None:
            self._reasons.append(f"The loss was seen, in a few forward passes, to divide by {self._loss.rule.says}.")
            _log.info(self._reasons[-1])

    def _measured(self, taken: Taken) -> Rule | None:
        if taken.collated:
            return measure(self._loss, None, taken.items, 1)
        rows = ROWS
        try:
            self._collate(taken.rows[:ROWS])
        except Exception:  # a collator may be written for batches of the usual size; any other error is raised there
            rows = int(self._trainer.args.train_batch_size)
        while True:
            try:
                return measure(self._loss, self._collate, taken.rows, rows)
            except Exception as error:
                if rows == 1 or not memory.is_out_of_memory(error):
                    raise
            rows = -(-rows // 2)
            memory.free_cached(self._trainer.args.device)

    def _count(self, seen: list[dict[str, Tensor]]) -> None:
        """Keep what of the inputs of a window is counted, as one micro-batch."""
        if not seen:  # ranks count together, also those that have no rows
            self.passed = {name: tensor[:0] for name, tensor in self.passed.items()}
            return
        names = {name for each in seen for name in each}
        self.passed = {
            name: torch.cat([each[name].flatten() for each in seen if name in each]) for name in sorted(names)
        }


def _heard(what: Any) -> list[Any]:
    """Return what each rank says."""
    if not (dist.is_available() and dist.is_initialized()):
        return [what]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, what)
    return said


class _BeforeStep:
    """Lets `on_pre_optimizer_step` see the gradient of the logical batch: when the optimizer is about to step.

    Args:
        trainer: Whose loop would send the event when the step is over.
        optimizer: What steps.
    """

    def __init__(self, trainer: Any, optimizer: Any) -> None:
        self._trainer = trainer
        self._handler = trainer.callback_handler
        self.due = False
        self._hook: Any = None
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # a wrapper may leave out super().__init__()
            self._hook = optimizer.register_step_pre_hook(self._send)
            self._handler.on_pre_optimizer_step = lambda _args, _state, control: control

    def _send(self, *_: Any) -> None:
        if self.due:  # once a window: large models step in pieces
            self.due = False
            trainer = self._trainer
            event = type(self._handler).on_pre_optimizer_step
            trainer.control = event(self._handler, trainer.args, trainer.state, trainer.control)

    def remove(self) -> None:
        """Let the loop send it again."""
        if self._hook is not None:
            self._hook.remove()
        self._handler.__dict__.pop("on_pre_optimizer_step", None)
