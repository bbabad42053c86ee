"""GradCache: ``GradCache(models, chunk_sizes, loss_fn)`` and its ``cache_step``, once for each logical batch.

As in its README: a cache step takes a whole batch, runs it in chunks without graphs, hands what came out to
``loss_fn``, and runs the chunks again to bring the gradient back; zeroing and stepping stay with the loop. Labels go to
the loss as a keyword. The loop collects the micro-batches of a logical batch, and a chunk is one of them.

The distribution ``gradcache`` 0.0.1 holds the authors' code, but imports itself by the name of its repository,
``grad_cache``, which it does not have: as installed, ``from gradcache import GradCache`` is an ImportError. So its own
package is made known by that name as well; nothing in it is changed. Its float16 is that of CUDA.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import PairTask, Task, Trained, join, steps_of


def load() -> Any:
    """Return the class `GradCache` of the authors."""
    import gradcache

    sys.modules.setdefault("grad_cache", gradcache)
    from gradcache.grad_cache import GradCache

    return GradCache


def train(task: Task | PairTask) -> Trained:
    """Train with a cache step a logical batch."""
    assert isinstance(task, Task)
    model = task.make_model()
    optimizer = SGD((weight for weight in model.parameters() if weight.requires_grad), lr=task.lr)
    scheduler = LambdaLR(optimizer, task.lr_factor) if task.lr_factor else None
    steps = steps_of(optimizer)

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        loss = task.loss_of(model, outputs, labels)
        return loss + task.term(model, {}) if task.penalty is not None else loss

    losses = []
    for _, micro_batches in task.windows():
        batch = join(micro_batches)
        chunk = max(len(each["labels"]) for each in micro_batches if each is not None)
        cache = load()(models=[model], chunk_sizes=chunk, loss_fn=loss_fn)
        losses.append(float(cache(batch["input_ids"], labels=batch["labels"])))
        if task.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        task.after_update(model)
    return Trained(model, steps(), losses)


gradcache = System(
    name="gradcache",
    title="GradCache",
    train=train,
    expresses=frozenset(
        {"unsized", "None", "clipping", "schedule", "term", "batch norm", "coupled", "follows", "bf16", "runs short"}
    ),
    lacks={"fp16": "its float16 is that of CUDA", "stops": "a logical batch is one call, which is not saved half-way"},
    distributions=("gradcache", "torch"),
    install="pip install gradcache",
)
