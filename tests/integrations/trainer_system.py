"""`WholeBatchTrainer` as a system of the conformance suite, used as a script for the Trainer uses it.

A row of the dataset is a row of the scene, collated by the Trainer's own collator, so that a batch of the loader is a
micro-batch of the scene. Batch norm is made exact, and rows that are compared are compared by `wb.losses`.
"""

import tempfile

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import wholebatch as wb
from integrations.trainer_models import Stream, TrainerCallback, trainer_of
from wholebatch.engine.losses import batch_hard_triplet, info_nce, load_balancing
from wholebatch.evidence.conformance.adapters.wholebatch import meeting
from wholebatch.evidence.conformance.coupled import MARGIN, in_batch_negatives
from wholebatch.evidence.conformance.scenes import BALANCE, balance, divergence
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import TERMS, Trained, cross_entropy, steps_of


class Model(nn.Module):
    """The scene's model as a Trainer wants it: it takes labels, and returns its loss."""

    def __init__(self, task):
        super().__init__()
        self.model = wb.exact_batch_norm(meeting(task.make_model()))
        self._task = task

    def forward(self, input_ids, labels=None):
        logits = self.model(input_ids)
        if labels is None:
            return {"logits": logits, **self.term({"input_ids": input_ids})}
        loss = self.loss_of(logits, labels) + self.term({"input_ids": input_ids}).get("term", 0.0)
        return {"loss": loss, "logits": logits}

    def loss_of(self, outputs, labels):
        if self._task.compares is None:
            return self._task.loss_of(self.model, outputs, labels)
        if self._task.compares is not in_batch_negatives:
            return batch_hard_triplet(outputs, labels, margin=MARGIN)
        queries, keys = outputs.unbind(dim=1)
        return info_nce(queries, keys, temperature=self.model.log_temperature.exp(), symmetric=True)

    def term(self, rows):
        if self._task.of_rows is balance:
            return {"term": BALANCE * load_balancing(self.model.route(rows["input_ids"]))}
        return {"term": self._task.term(self.model, rows)} if self._task.has_term else {}


class TakesKeywords(Model):
    """The same with a forward pass that takes any keyword, and ignores it."""

    def forward(self, input_ids, labels=None, **_):
        return super().forward(input_ids, labels)


def rows_of(task):
    return [
        {name: tensor[row] for name, tensor in micro_batch.items()}
        for micro_batch in task.epoch
        for row in range(len(micro_batch["labels"]))
    ]


def make(task):
    return (TakesKeywords if task.takes_keywords else Model)(task)


def train(task):
    """Train with the loss that the model returns."""
    return train_loss_fn(task) if task.of_rows is divergence else train_with(task, make(task))


def train_loss_func(task):
    """Train with ``compute_loss_func``: a sum divided by the items that it is told, or a mean that ignores them."""
    if task.of_rows is divergence:
        return train_loss_fn(task)
    model = make(task)

    def loss_func(outputs, labels, num_items_in_batch=None):
        if task.loss_form == "sum over count" and task.compares is None:
            loss = cross_entropy(outputs["logits"], labels) / num_items_in_batch
        else:
            loss = model.loss_of(outputs["logits"], labels)
        return loss + outputs.get("term", 0.0)

    return train_with(task, model, compute_loss_func=loss_func)


def train_loss_fn(task):
    """Train with ``loss_fn``, which says apart what counts once: a term that averages over something else."""
    model = make(task)

    def loss_fn(model, rows):
        model = getattr(model, "module", model)
        pair = task.loss_sum(model.model, rows), task.targets(rows)
        return (*pair, *model.term(rows).values())

    # A row may hold more labels than another, and the term counts positions: only micro-batches weigh both alike.
    return train_with(task, model, loss_fn=loss_fn, check=None if task.of_rows is divergence else "first")


def train_with(task, model, **options):
    optimizer = SGD((weight for weight in model.parameters() if weight.requires_grad), lr=task.lr)
    steps = steps_of(optimizer)
    rows = rows_of(task)
    at_once = len(task.epoch[0]["labels"])
    updates = task.epochs * -(-len(task.epoch) // task.whole_window)

    class Callback(TrainerCallback):
        place = 0

        def on_step_end(self, *_, **__):
            if trainer.last_update.applied:
                task.after_update(model.model)
            self.on_substep_end()

        def on_substep_end(self, *_, **__):
            if self.place in task.evaluates_after:
                model.eval()
                with torch.no_grad():
                    for micro_batch in trainer.get_eval_dataloader():
                        task.loss_sum(model.model, micro_batch)
                        break
                model.train()
            self.place += 1

    with tempfile.TemporaryDirectory(prefix="wholebatch-trainer-") as folder:
        trainer = trainer_of(
            model,
            rows if task.sized else Stream(rows),
            folder,
            callbacks=[Callback()],
            per_device_train_batch_size=at_once,
            per_device_eval_batch_size=at_once,
            gradient_accumulation_steps=task.window,
            num_train_epochs=task.epochs,
            max_steps=-1 if task.sized else updates,
            max_grad_norm=task.clip_norm or 0.0,
            options={
                "data_collator": None,
                "eval_dataset": rows,
                "optimizers": (optimizer, LambdaLR(optimizer, task.lr_factor or (lambda _: 1.0))),
                "targets": task.targets if task.compares is not None else None,
                **options,
            },
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(model.model, steps(), losses)


EXPRESSES = frozenset(
    {"ranks", "unsized", "clipping", "schedule", *TERMS, "follows", "evaluation", "bf16", "runs short"}
)

whole_batch_trainer = System("trainer", "WholeBatchTrainer", train, EXPRESSES)
whole_batch_trainer_loss_func = System(
    "trainer-loss-func", "WholeBatchTrainer with compute_loss_func", train_loss_func, EXPRESSES
)
