"""The Hugging Face Trainer: with the loss of the model, and with ``compute_loss_func``.

As in its guides "Gradient accumulation" and "Trainer features" (custom loss function) and in the docstrings of
`Trainer`, `TrainerCallback` and `TrainingArguments`: the model returns its loss, a mean; or
``compute_loss_func(outputs, labels, num_items_in_batch)`` divides a sum by the items of the whole accumulated batch.

On a function that returns a mean the guides disagree. "Gradient accumulation" says that the Trainer divides it by
``gradient_accumulation_steps``, "Trainer features" that the function has to see to that itself. It does divide if its
attribute ``loss_is_scaled_for_ga`` is False, as its docstring asks for where a loss of one's own is a mean; so there it
is set. With the loss of the model it is left alone: there the Trainer looks at the signature, and decides.

The loss that is reported is that of ``log_history``, logged at each update. An evaluation inside a window begins in
``on_substep_end``, over ``get_eval_dataloader()``. For a lack of memory there is ``auto_find_batch_size=True``, where
the loader cuts rows. Its float16 needs a GPU: on a CPU ``fp16=True`` trains in float32.
"""

import math
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence.conformance.adapters.loaders import dataset, only, recut
from wholebatch.evidence.conformance.scenes import ROWS
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import TERMS, PairTask, Task, Trained, cross_entropy, join, steps_of


class Model(nn.Module):
    """The scene's model as the Trainer wants it: it takes labels, and returns its loss, as its documentation asks."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.make_model()
        self._task = task

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        if labels is None:
            rows = {"input_ids": input_ids}
            return {"logits": logits, **({"term": self._task.term(self.model, rows)} if self._task.has_term else {})}
        loss: Tensor = self._task.loss_of(self.model, logits, labels)
        if self._task.has_term:
            loss = loss + self._task.term(self.model, {"input_ids": input_ids, "labels": labels})
        return {"loss": loss, "logits": logits}


class TakesKeywords(Model):
    """The same with a forward pass that takes any keyword, and ignores it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        return super().forward(input_ids, labels)


def train(task: Task | PairTask) -> Trained:
    """Train with the loss that the model returns."""
    assert isinstance(task, Task)
    return _train(task, _model(task))


def train_loss_func(task: Task | PairTask) -> Trained:
    """Train with ``compute_loss_func``: a sum divided by the items, or, where the user has nothing else, a mean."""
    assert isinstance(task, Task)

    def loss_func(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if task.loss_form == "sum over count":
            loss: Tensor = cross_entropy(outputs["logits"], labels) / num_items_in_batch
        else:
            loss = task.loss_of(model.model, outputs["logits"], labels)
        return loss + outputs["term"] if task.has_term else loss

    model = _model(task)
    scaled = None if task.loss_form == "sum over count" else False
    return _train(task, model, scaled, compute_loss_func=loss_func)


def _model(task: Task) -> Model:
    return TakesKeywords(task) if task.takes_keywords else Model(task)


def _train(task: Task, model: Model, loss_is_scaled: bool | None = None, **options: Any) -> Trained:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    optimizer = SGD((weight for weight in model.parameters() if weight.requires_grad), lr=task.lr)
    steps = steps_of(optimizer)
    runs_short = "runs short" in task.asks
    updates = task.epochs * math.ceil(len(task.epoch) / task.whole_window)

    class Callback(TrainerCallback):
        place = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            task.after_update(model.model)
            self.on_substep_end()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            if self.place in task.evaluates_after:
                model.eval()
                with torch.no_grad():
                    for micro_batch in trainer.get_eval_dataloader():
                        task.loss_sum(model.model, micro_batch)
                        break
                model.train()
            self.place += 1

    with tempfile.TemporaryDirectory(prefix="wholebatch-trainer-") as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=ROWS if runs_short else 1,
                auto_find_batch_size=runs_short,
                per_device_eval_batch_size=1,
                gradient_accumulation_steps=task.window,
                num_train_epochs=task.epochs,
                max_steps=-1 if task.sized else updates,  # needed where the length is not known
                max_grad_norm=task.clip_norm or 0.0,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=dataset(recut(task, 1) if runs_short else task),
            eval_dataset=dataset(task),
            data_collator=join if runs_short else only,
            optimizers=(optimizer, LambdaLR(optimizer, task.lr_factor or (lambda _: 1.0))),
            callbacks=[Callback()],
            **options,
        )
        trainer.loss_is_scaled_for_ga = loss_is_scaled
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(model.model, steps(), losses)


_LACKS = {
    "fp16": "float16 needs a GPU: on a CPU, fp16=True trains in float32",
    "two optimizers": "the Trainer takes one optimizer",
    "stops": "it saves after updates: a run that is stopped inside a window repeats it",
}

_EXPRESSES = frozenset(
    {"ranks", "unsized", "clipping", "schedule", *TERMS, "follows", "evaluation", "bf16", "runs short"}
)

transformers = System(
    name="transformers",
    title="Hugging Face Trainer",
    train=train,
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("transformers", "accelerate", "torch"),
    install="pip install 'wholebatch[transformers]'",
)

transformers_loss_func = System(
    name="transformers-loss-func",
    title="Hugging Face Trainer with compute_loss_func",
    train=train_loss_func,
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("transformers", "accelerate", "torch"),
    install="pip install 'wholebatch[transformers]'",
)
