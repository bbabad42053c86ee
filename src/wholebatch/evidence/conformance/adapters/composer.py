"""MosaicML Composer: ``device_train_microbatch_size``, by samples, and with ``accumulate_train_batch_on_tokens``.

As in its guides "Using the Trainer" and "Automatic Microbatching" and in the docstring of `Trainer`: the loader yields
logical batches, which the Trainer cuts; the loss of a micro-batch counts by its samples, or by the tokens that a
`DataSpec` says generate loss. Clipping is its algorithm `GradientClipping`, a scheduler of PyTorch is stepped every
batch, and a `Callback` acts between micro-batches and after an update. The loss that is reported is that of the metric
``loss/train/total``, read from its `InMemoryLogger`.

Composer 0.32 asks for ``torch<2.7.1``, so it does not install beside the torch that wholebatch asks for.
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from wholebatch.evidence.conformance.adapters.loaders import dataset
from wholebatch.evidence.conformance.scenes import ROWS
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import (
    TERMS,
    MicroBatch,
    PairTask,
    Task,
    Trained,
    cross_entropy,
    join,
    steps_of,
)


def train(task: Task | PairTask) -> Trained:
    """Train with micro-batches that count by their samples."""
    assert isinstance(task, Task)
    return _train(task, on_tokens=False)


def train_on_tokens(task: Task | PairTask) -> Trained:
    """Train with micro-batches that count by the labels in them."""
    assert isinstance(task, Task)
    return _train(task, on_tokens=True)


def _train(task: Task, *, on_tokens: bool) -> Trained:
    from composer import Callback, DataSpec, Trainer
    from composer.algorithms import GradientClipping
    from composer.loggers import InMemoryLogger
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.make_model()

        def forward(self, batch: MicroBatch) -> Tensor:
            logits: Tensor = self.model(batch["input_ids"])
            return logits

        def loss(self, outputs: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
            mean = cross_entropy(outputs, batch["labels"]) / task.targets(batch)
            return {"total": mean + task.term(self.model, batch) if task.has_term else mean}

    class Between(Callback):
        place = 0

        def after_backward(self, *_: Any) -> None:
            if self.place in task.evaluates_after:
                task.evaluate(model.model)
            self.place += 1

        def batch_end(self, *_: Any) -> None:
            task.after_update(model.model)

    def tokens(batch: MicroBatch) -> dict[str, int]:
        return {"total": batch["labels"].numel(), "loss_generating": int(task.targets(batch))}

    model, log = Model(), InMemoryLogger()
    optimizer = SGD((weight for weight in model.parameters() if weight.requires_grad), lr=task.lr)
    steps = steps_of(optimizer)
    updates = task.epochs * math.ceil(len(task.epoch) / task.window)
    loader = DataLoader(dataset(task), batch_size=task.window, shuffle=False, collate_fn=join)
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=tokens),
        max_duration=f"{task.epochs}ep" if task.sized else f"{updates}ba",  # as its error message asks for
        optimizers=optimizer,
        schedulers=LambdaLR(optimizer, task.lr_factor) if task.lr_factor else None,
        step_schedulers_every_batch=True,
        algorithms=[] if task.clip_norm is None else [GradientClipping("norm", task.clip_norm)],
        callbacks=[Between()],
        loggers=[log],
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=ROWS,
        accumulate_train_batch_on_tokens=on_tokens,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    losses = [float(loss) for _, loss in log.data["loss/train/total"]]
    return Trained(model.model, steps(), losses)


_LACKS = {
    "fp16": "float16 needs a GPU: on a CPU, precision='amp_fp16' is an error",
    "two optimizers": "the Trainer takes one optimizer",
    "stops": "it saves between logical batches: a run that is stopped inside one repeats it",
    "runs short": "device_train_microbatch_size='auto' needs a GPU",
}

_EXPRESSES = frozenset({"unsized", "clipping", "schedule", *TERMS, "follows", "evaluation", "bf16"})

composer = System(
    name="composer",
    title="Composer",
    train=train,
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("mosaicml", "torch"),
    install="pip install mosaicml  # up to 0.32.1 it asks for torch<2.7.1",
)

composer_tokens = System(
    name="composer-tokens",
    title="Composer, accumulating on tokens",
    train=train_on_tokens,
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("mosaicml", "torch"),
    install="pip install mosaicml  # up to 0.32.1 it asks for torch<2.7.1",
)
