"""What has to be known before the first update? What the loss averages over, and that a cut changes nothing."""

import logging
from typing import Any

import torch.distributed as dist

from wholebatch.core.errors import WeightError, WholeBatchError
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.objective import LossFn, Objective
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.transaction import Transaction
from wholebatch.integrations.transformers.drawing import draws, look
from wholebatch.integrations.transformers.looking import ROWS, looking, measure
from wholebatch.integrations.transformers.objective import Rule, TrainerLoss
from wholebatch.integrations.transformers.parts import rows_of
from wholebatch.integrations.transformers.rows import Collate, Taken

_log = logging.getLogger("wholebatch")


class Beginning:
    """Looks at the first logical batch from which there is something to learn.

    Args:
        trainer: Prepared for training.
        loss: Of the trainer.
        own: A loss function of the user in place of it.
        declared: What that returns.
        collate: Makes micro-batches.
        check: Whether rows are compared, cut and uncut.

    Attributes:
        due: Whether it has still to look.
        check: What is left for an accumulator to compare.
        reasons: What was found, a sentence each.
    """

    def __init__(
        self,
        trainer: Any,
        loss: TrainerLoss,
        own: LossFn | None,
        declared: Reduction,
        collate: Collate,
        check: Any,
    ) -> None:
        self._trainer = trainer
        self._loss = loss
        self._own = own
        self._declared = declared
        self._collate = collate
        self.due = True
        self.check = check
        self.reasons: list[str] = []

    def begin(self, taken: Taken) -> None:
        """Look at the first logical batch from which there is something to learn."""
        if self._loss.rule is None and self._own is None:
            self._find_rule(taken)
            if self._loss.rule is None:
                return
        self.due = False
        if taken.collated or self.check is None:
            return
        trainer, usual = self._trainer, int(self._trainer.args.train_batch_size)
        if not any(heard(draws(trainer.data_collator, taken.rows[:usual], trainer.args.device))):
            return
        self.check = None  # that of the accumulator would collate the same rows again, to others
        refusal: WholeBatchError | None = None
        before = RandomState.now(trainer.args.device)
        try:
            if taken.rows:
                found = self._look(taken.rows[:usual])
                if found is not None:
                    said, level = found
                    self.reasons.append(said)
                    _log.log(level, said)
        except WholeBatchError as error:
            refusal = error
        finally:
            before.restore()
        for each in heard(refusal):
            if each is not None:
                raise each

    def _look(self, rows: list[Any]) -> tuple[str, int] | None:
        """Compare rows, cut and uncut, without collating them a second time; see `look`."""
        counts = self._loss.count if self._loss.rule is not None else None
        objective = Objective(self._own or self._loss, counts, self.reduction)
        return look(self._trainer.model, objective, self._collate(rows))

    def padding_counts(self, rows: list[Any]) -> bool:
        """Whether a cut changes nothing where rows are padded as they were before it."""
        some = rows[:: -(-len(rows) // ROWS)]
        try:
            found = self._look(some) if rows_of(self._collate(some)) == len(some) else None
        except WholeBatchError:
            return False
        return found is not None and found[1] < logging.WARNING  # else nobody could tell

    @property
    def reduction(self) -> Reduction:
        """What the loss is: a mean over its targets, or their sum."""
        return self._declared if self._own is not None else self._loss.reduction

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
        for name, refusal in heard((found.name if found is not None else None, wrong)):
            if refusal is not None:
                raise refusal
            if self._loss.rule is None and name is not None:
                self._loss.rule = self._loss.rule_named(name)
        if self._loss.rule is not None:
            self.reasons.append(f"The loss was seen, in a few forward passes, to divide by {self._loss.rule.says}.")
            _log.info(self.reasons[-1])

    def _measured(self, taken: Taken) -> Rule | None:
        if taken.collated:
            return measure(self._loss, None, taken.batches, 1)
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


def heard(what: Any) -> list[Any]:
    """Return what each rank says."""
    if not (dist.is_available() and dist.is_initialized()):
        return [what]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, what)
    return said
