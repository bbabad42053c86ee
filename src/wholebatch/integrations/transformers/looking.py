"""How is it found out what a loss averages over? By looking: a mean is one only over the right count.

A Trainer does not say. Its loss comes from the model, from ``compute_loss_func``, from label smoothing, or from a
`compute_loss` of the user; some divide by the ``num_items_in_batch`` that they are given, some ignore it, and whether a
model shifts its labels shows in its code alone. So a few forward passes tell, without gradients and before training:

- A loss that halves as ``num_items_in_batch`` doubles divides by it. A micro-batch is given its own count.
- A mean over labels that are not -100 is that of two parts of the labels, each weighted with its count.
- A mean over rows is that of two parts of the rows.

A loss that is none of these is refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import WeightError, WholeBatchError
from wholebatch.core.weights import Count
from wholebatch.engine import memory
from wholebatch.engine.randomness import RandomState
from wholebatch.integrations.transformers.objective import ALL_ROWS, IGNORED, LABELS, SHIFTED, Rule, TrainerLoss
from wholebatch.integrations.transformers.parts import (
    first_row_and_rest,
    halves,
    labels_of,
    masked,
    of_classes,
    pieces,
    rows_of,
)

ROWS = 8
"""How many rows are looked at together: without gradients, they take less than fewer do in training."""


def measure(
    loss: TrainerLoss, collate: Callable[[list[Any]], Any] | None, rows: Sequence[Any], most: int
) -> Rule | None:
    """Find out what the loss averages over.

    Args:
        loss: Of the trainer.
        collate: Makes a micro-batch of rows; None: each of `rows` is one.
        rows: Of the first logical batch.
        most: How many go together.

    Returns:
        The rule; None where there is nothing to learn in any of the rows.

    Raises:
        WeightError: It is none of those that can be told.
    """
    look = Look(loss)
    together = pieces(rows, most) if collate is not None else list(rows)
    micro_batch: Any = None
    for piece in together:
        micro_batch = collate(piece) if collate is not None else piece
        if look.is_empty(micro_batch):
            continue
        found = look.at_items(micro_batch) or look.at_labels(micro_batch)
        if found is not None:
            return found
        if look.labels > 1:
            break
    else:
        # A single label is a mean over whatever there is.
        return LABELS if look.labels == 1 and (collate is None or len(rows) == 1) else None
    found = look.at_rows(micro_batch)
    if found is not None:
        return found
    raise WeightError(
        f"The loss of {type(loss.trainer.model).__name__} is a mean neither over labels that are not -100 nor over "
        "rows, and does not divide by num_items_in_batch, so nobody knows what to divide by when a batch is cut.",
        hint="declare it: WholeBatchTrainer(..., targets=lambda inputs: ...), which counts what the loss of these "
        'inputs averages over, such as its summed class weights; a loss that is a sum also takes reduction="sum". '
        'A loss that compares the rows of a batch with each other needs wb.gather, and targets="rows".',
    ) from look.failed


class Look:
    """A few forward passes that tell how a loss behaves. They leave no trace of their own.

    Args:
        loss: Of the trainer.

    Attributes:
        labels: How many of the labels that were seen last are not -100; infinitely many where there are none to see.
        failed: What the loss raised where it was given a part of the rows.
    """

    def __init__(self, loss: TrainerLoss) -> None:
        self._loss = loss
        self._trainer = loss.trainer
        self._model = loss.trainer.model  # not its wrapper: other ranks may not look at the same time
        self._random = RandomState.now(loss.trainer.args.device)
        self._eps = 0.0
        self.labels: float = math.inf
        self.failed: Exception | None = None

    def of(self, micro_batch: Any, items: Count | None = None) -> float:
        """Return the loss of a micro-batch, with the random numbers of all others."""
        self._random.restore()
        loss: Any = self._loss.loss(self._model, micro_batch, items)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise WeightError(
                f"compute_loss returned a {found}, not a tensor with one number.",
                hint="return a mean over its targets, such as loss.mean() of one loss for each row.",
            )
        self._eps = max(torch.finfo(loss.dtype).eps, torch.finfo(torch.float32).eps / 4)
        return float(loss.detach())

    def same(self, one: float, other: float, rounding: float = 16) -> bool:
        """Whether two numbers are equal up to the rounding of losses."""
        return abs(one - other) <= rounding * self._eps * max(abs(one), abs(other))

    def is_empty(self, micro_batch: Any) -> bool:
        """Return whether there is nothing to learn where the Trainer counts, as from rows of a single token."""
        items = self._loss.items(micro_batch)
        if items is None or float(items):
            return False
        self.labels = 0
        return True

    def at_items(self, micro_batch: Any) -> Rule | None:
        """Return the rule of the Trainer if the loss divides by the ``num_items_in_batch`` that it is given."""
        items = self._loss.items(micro_batch)
        if items is None:
            return None
        once, twice, four = (self.of(micro_batch, items * times) for times in (1, 2, 4))
        if self.same(once, twice, rounding=4):
            return None
        if not self.same(once - twice, 2 * (twice - four), rounding=4096):
            raise WeightError(
                f"The loss is {once:.6g}, {twice:.6g} and {four:.6g} with num_items_in_batch of {float(items):g}, and "
                "with twice and four times as many: it neither divides by it nor leaves it alone.",
                hint="divide the summed loss by num_items_in_batch, once.",
            )
        # A sum is divided once, by the count of all: in losses of 32 bits, that rounds as the undivided batch does.
        pure = abs(2 * twice - once) <= 4 * self._eps * abs(once)
        return self._loss.rule_named("items" if pure else "items_and_more")

    def at_labels(self, micro_batch: Any) -> Rule | None:
        """Return the rule if the loss is a mean over the labels that are not -100, with or without the first."""
        self.labels = math.inf
        name = labels_of(micro_batch)
        if name is None or not self._takes_ignored(micro_batch[name]):
            return None
        micro_batch = self._told_what_to_decode(micro_batch)
        there = micro_batch[name] != IGNORED
        self.labels = int(there.sum())
        if self.labels < 2:
            return None
        try:
            return self._over_labels(micro_batch, name, there)
        except Exception as error:
            if isinstance(error, WholeBatchError) or memory.is_out_of_memory(error):
                raise
            self.labels = math.inf  # a loss that knows no -100, or another label in its place; other errors come again
            return None

    def _over_labels(self, micro_batch: Any, name: str, there: Tensor) -> Rule | None:
        classes = self._classes(micro_batch, micro_batch[name])
        for rule in self._candidates(micro_batch, name, there):
            parts = halves(there, rule is SHIFTED and name == "labels")
            varied = {**micro_batch, name: of_classes(micro_batch[name], *parts, classes)}
            count, whole = float(rule.count(varied)), self.of(varied)
            if count < 2 or not math.isfinite(whole):
                continue
            masks = [masked(varied, name, part) for part in parts]
            if self.same(whole * count, sum(self.of(each) * float(rule.count(each)) for each in masks)):
                return rule
        return None

    def _told_what_to_decode(self, micro_batch: Any) -> Any:
        """Return a micro-batch in which labels are no input: an encoder-decoder model reads on from those before."""
        decode = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if decode is None or "decoder_input_ids" in micro_batch or "labels" not in micro_batch:
            return micro_batch
        return {**micro_batch, "decoder_input_ids": decode(labels=micro_batch["labels"].to(self._model.device))}

    def _classes(self, micro_batch: Any, labels: Tensor) -> int:
        """Return how many classes a label may be of; 1 where that is not known."""
        outputs = self._loss.outputs(self._model, micro_batch)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor) or logits.ndim != labels.ndim + 1:
            return 1
        # Of pixels the classes are not last, and logits may be fewer: too few classes do no harm, too many are none.
        return logits.shape[-1] if logits.shape[:-1] == labels.shape else min(logits.shape[1:])

    def _takes_ignored(self, labels: Tensor) -> bool:
        """Whether labels of -100 can be tried: on an accelerator, a loss that does not know them ends the process."""
        trainer = self._trainer
        own = trainer.compute_loss_func is None and hasattr(trainer.model, "loss_function")
        return own or bool((labels == IGNORED).any()) or trainer.args.device.type == "cpu"

    def _candidates(self, micro_batch: Any, name: str, there: Tensor) -> list[Rule]:
        if name == "shift_labels":
            return [SHIFTED]
        if there.ndim < 2:
            return [LABELS]
        # Labels in the first place alone: to a loss that shifts them there is nothing left.
        first = torch.full_like(micro_batch[name], IGNORED)
        first[..., 0] = micro_batch[name][there].max()
        loss = self.of({**micro_batch, name: first})
        return [SHIFTED, LABELS] if loss == 0 or math.isnan(loss) else [LABELS, SHIFTED]

    def at_rows(self, micro_batch: Any) -> Rule | None:
        """Return the rule if the loss is a mean over the rows."""
        rows = rows_of(micro_batch)
        if rows is None:
            return None
        if rows < 2:
            return ALL_ROWS  # each window is a single row
        seen = [micro_batch]
        name = labels_of(micro_batch)
        if name is not None:
            micro_batch = self._told_what_to_decode(micro_batch)
            classes = self._classes(micro_batch, micro_batch[name])
            parts_of_labels = first_row_and_rest(micro_batch[name] != IGNORED)
            varied = {**micro_batch, name: of_classes(micro_batch[name], *parts_of_labels, classes)}
            seen = [varied, micro_batch]  # one of the classes may be ignored, which only the labels as they are show
        return ALL_ROWS if all(self._adds_up_over_rows(each, rows) for each in seen) else None

    def _adds_up_over_rows(self, micro_batch: Any, rows: int) -> bool:
        whole, loss = LogicalBatch(micro_batch), self.of(micro_batch)
        try:
            parts = [self.of(whole.take(part)) * len(part) for part in (range(1), range(1, rows))]
        except Exception as error:
            if isinstance(error, WholeBatchError) or memory.is_out_of_memory(error):
                raise
            self.failed = error  # a loss that takes rows in pairs, of which a part may be half
            return False
        # Autocast rounds by what is in a batch.
        rounding = 2**20 if self._trainer.args.bf16 or self._trainer.args.fp16 else 1024
        return self.same(loss * rows, sum(parts), rounding)


@contextmanager
def looking(trainer: Any) -> Iterator[None]:
    """Let a model be looked at: in evaluation mode and without gradients."""
    training = {module: module.training for module in trainer.model.modules()}
    trainer.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
