"""Small models and rows for `WholeBatchTrainer`, and the plain loop that it is compared with."""

import copy
import gc
import tempfile
import warnings

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset

from properties import flat
from wholebatch.evidence import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say about themselves when they are loaded
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments  # noqa: F401 - for others

    from wholebatch.integrations.transformers import WholeBatchTrainer

# Each call of train() collects garbage, and would look through all of transformers each time.
gc.collect()
gc.freeze()

VOCABULARY = 20


class Tagger(nn.Module):
    """Says a word for every word; its loss is one of many that people write."""

    def __init__(self, loss="mean", dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, VOCABULARY)
        self.loss = loss
        self.double()

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.dropout(self.embedding(input_ids))
        logits = self.head(torch.tanh(hidden))
        return {"loss": self.loss_of(logits, labels), "logits": logits} if labels is not None else {"logits": logits}

    def loss_of(self, logits, labels):
        each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        there = (labels != -100).double()
        match self.loss:
            case "mean":
                return each.sum() / there.sum()
            case "shifted":
                return functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
            case "mean of rows":
                return (each.sum(1) / there.sum(1).clamp(min=1)).mean()
            case "penalty":
                return each.sum() / there.sum() + 0.1 * sum(weight.square().sum() for weight in self.parameters())
            case "weighted":
                weights = class_weights(labels)
                return (each * weights).sum() / weights.sum()
            case "sum":
                return each.sum()
        raise AssertionError(self.loss)


class TakesKeywords(Tagger):
    """The same with a forward pass that takes any keyword, and ignores it."""

    def forward(self, input_ids, labels=None, **_):
        return super().forward(input_ids, labels=labels)


class Pooled(Tagger):
    """Looks at the mean of all places, padding included."""

    def forward(self, input_ids, labels=None):
        hidden = self.embedding(input_ids)
        logits = self.head(torch.tanh(hidden + hidden.mean(dim=1, keepdim=True)))
        return {"loss": self.loss_of(logits, labels), "logits": logits}


def class_weights(labels):
    return torch.where(labels == -100, 0.0, 0.5 + (labels % 3).double())


def documents(rows, seed=0, masked=0.4):
    """Rows of very different lengths, of which some labels are not to be learned."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        length = int(torch.randint(3, 16, (), generator=draw))
        words = torch.randint(1, VOCABULARY, (length,), generator=draw)
        labels = torch.where(torch.rand(length, generator=draw) < masked, -100, words * 7 % VOCABULARY)
        labels[1] = 1
        made.append({"input_ids": words.tolist(), "labels": labels.tolist()})
    return made


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    parts = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    return {
        name: torch.tensor([part[name] + [fill[name]] * (longest - len(part[name])) for part in parts]) for name in fill
    }


def without_mask(micro_batch):
    return {name: part for name, part in micro_batch.items() if name != "attention_mask"}


class Stream(IterableDataset):
    """An epoch whose length nobody knows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def trainer_of(model, rows, folder, *, kind=WholeBatchTrainer, callbacks=(), options=None, **arguments):
    """A trainer of 2 rows by 4 micro-batches, in the order of the rows, with plain SGD."""
    chosen = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = kind(
        model,
        TrainingArguments(str(folder), **chosen | arguments),
        train_dataset=rows,
        **{"data_collator": pad, "callbacks": list(callbacks)} | (options or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(model, rows, **options):
    """Train in a folder of its own, and return the trainer."""
    with tempfile.TemporaryDirectory(prefix="wholebatch-trainer-") as folder:
        trainer = trainer_of(model, rows, folder, **options)
        trainer.train()
    return trainer


def plainly(model, rows, *, epochs=2, at_once=8, lr=0.5, collate=pad, forward=None):
    """Train a copy with the plain loop, `at_once` rows an update, and return it with the losses."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def loss_fn(model, batch):
        return forward(model, batch) if forward is not None else model(**batch)["loss"]

    losses = [
        float(reference.update(model, optimizer, loss_fn, collate(rows[start : start + at_once])))
        for _ in range(epochs)
        for start in range(0, len(rows), at_once)
    ]
    return model, losses


def change_error(start, trained, right):
    """How far off the change of the weights is, relative."""
    begin, end, aim = (flat(model.parameters()) for model in (start, trained, right))
    return float((end - aim).norm() / (aim - begin).norm())
