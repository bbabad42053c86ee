"""What does the loss of a Trainer average over? The rules that there are, and the loss as an accumulator takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import SplitError, WeightError
from wholebatch.core.weights import Count, Reduction, check_reduction

IGNORED = -100
"""The label from which nothing is to be learned, in all of transformers."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a loss averages over.

    Attributes:
        name: By which ranks agree on it.
        count: ``count(micro_batch)``. Unit: targets.
        says: What that is, as the end of a sentence.
        told: Whether the loss is to be told its count, as ``num_items_in_batch``.
        adds_up: Whether it is the sum over its targets when it is told that there is one.
    """

    name: str
    count: Callable[[Any], Count]
    says: str
    told: bool = False
    adds_up: bool = False


def count_labels(micro_batch: Any) -> Tensor:
    """Return how many labels are not -100."""
    found: Tensor = (micro_batch["labels"] != IGNORED).sum()
    return found


def count_shifted_labels(micro_batch: Any) -> Tensor:
    """Return how many labels are not -100 where the first of each row has nothing before it to be told from."""
    if "shift_labels" in micro_batch:
        return count_labels({"labels": micro_batch["shift_labels"]})
    return count_labels({"labels": micro_batch["labels"][..., 1:]})


def count_rows(micro_batch: Any) -> int:
    """Return the rows of a collated micro-batch: the first dimension of its labels, or of its first tensor."""
    parts = [micro_batch["labels"]] if "labels" in micro_batch else list(micro_batch.values())
    rows = next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if rows is not None:
        return rows
    try:
        return LogicalBatch(micro_batch).rows  # of tensors that lie deeper
    except SplitError:
        raise WeightError(
            "A micro-batch holds no tensor with rows, so its targets cannot be counted.",
            hint="pass targets=..., a function that counts what the loss averages over.",
        ) from None


LABELS = Rule("labels", count_labels, "the labels that are not -100")
SHIFTED = Rule("shifted_labels", count_shifted_labels, "the labels that are not -100, but for the first of each row")
ALL_ROWS = Rule("rows", count_rows, "the rows")
NAMED = {rule.name: rule for rule in (LABELS, SHIFTED, ALL_ROWS)}


class TrainerLoss:
    """The loss of a trainer as `wb.Accumulator` takes it: ``loss_fn(model, micro_batch)``, a mean over its targets.

    Args:
        trainer: Whose `compute_loss` it is.
        targets: The rule, if the user has declared it: a name, or a function of the micro-batch.
        reduction: What `compute_loss` returns.

    Attributes:
        trainer: As given.
        rule: What it averages over; None until it is known.
    """

    def __init__(self, trainer: Any, targets: str | Callable[[Any], Any] | None, reduction: Reduction) -> None:
        self.trainer = trainer
        self._declared = check_reduction(reduction)
        self.rule: Rule | None = None
        if callable(targets):
            self.rule = Rule("given", targets, "what targets=... counts", told=True)
        elif targets in NAMED:
            named = NAMED[targets]
            self.rule = Rule(named.name, named.count, named.says, told=True)
        elif targets is not None:
            raise WeightError(
                f"targets={targets!r} is no way to count.",
                hint=f"pass a function of the micro-batch, or one of {', '.join(map(repr, NAMED))}.",
            )

    @property
    def reduction(self) -> Reduction:
        """What the loss is: a mean over its targets, or their sum."""
        return "sum" if self.rule is not None and self.rule.adds_up else self._declared

    def count(self, micro_batch: Any) -> Count:
        """Count what a micro-batch's loss averages over; until that is known, what the Trainer counts."""
        if self.rule is None and (items := self.items(micro_batch)) is not None:
            return items
        return (self.rule or LABELS).count(micro_batch)

    def __call__(self, model: Any, micro_batch: Any) -> Tensor:
        """Return the loss of a micro-batch."""
        rule = self.rule or LABELS
        if not rule.told:
            return self.loss(model, micro_batch, None)
        return self.loss(model, micro_batch, 1 if self.reduction == "sum" else rule.count(micro_batch))

    def loss(self, model: Any, micro_batch: Any, items: Count | None) -> Tensor:
        """Return what `compute_loss` makes of a micro-batch."""
        trainer = self.trainer
        inputs = trainer._prepare_inputs(micro_batch)  # a copy: compute_loss may take the labels out
        with trainer.compute_loss_context_manager():
            if items is not None and not isinstance(items, Tensor):
                items = torch.full((), items, device=trainer.args.device)  # written there: no copy is waited for
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=items)
            return loss

    def outputs(self, model: Any, micro_batch: Any) -> Any:
        """Return the outputs of the model beside which `compute_loss` makes the loss, or None if it does not say."""
        with self.trainer.compute_loss_context_manager():
            try:
                made = self.trainer.compute_loss(
                    model, self.trainer._prepare_inputs(micro_batch), return_outputs=True, num_items_in_batch=None
                )
            except TypeError:  # one of the user's, that needs the number or does not know of outputs
                return None
        return made[1] if isinstance(made, tuple) and len(made) == 2 else None

    def items(self, micro_batch: Any) -> Any:
        """Return what the Trainer counts as the items of a micro-batch, or None where it counts none."""
        return self.trainer._get_num_items_in_batch([micro_batch], self.trainer.args.device)

    def rule_named(self, name: str) -> Rule:
        """Return the rule of a name, as another rank may have found it."""
        if name in NAMED:
            return NAMED[name]
        says = "num_items_in_batch" + ("" if name == "items" else ", and to add what does not divide by it")
        return Rule(name, self._count_items, says, told=True, adds_up=name == "items")

    def _count_items(self, micro_batch: Any) -> Count:
        items: Count | None = self.items(micro_batch)
        return 0 if items is None else items
