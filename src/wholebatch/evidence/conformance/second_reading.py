"""A second judge: what is right, from the gradients of single rows, summed with ``torch.func``.

It shares no arithmetic with the first one: no batch is put together, no loss is divided, no optimizer is asked.
"""

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from wholebatch.evidence.conformance.models import IGNORED
from wholebatch.evidence.conformance.task import PairTask, Task, Trained

_BEYOND = frozenset(
    {"clipping", "term", "term of rows", "batch norm", "coupled", "schedule", "follows", "exception", "fp16", "bf16"}
)


def has_second_reading(task: Task | PairTask) -> bool:
    """Return whether a task is plain enough: supervised, and without terms, clipping, schedules or low precision."""
    return isinstance(task, Task) and not task.asks & _BEYOND


def second_reading(task: Task) -> Trained:
    """Return what plain SGD makes of a task that is plain enough, see `has_second_reading`."""
    assert has_second_reading(task)
    model = task.make_model()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def row_loss(weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, weights, (input_ids[None],))[0]
        chosen = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        loss_sum: Tensor = -(chosen * (labels != IGNORED)).sum()
        return loss_sum

    by_row = vmap(grad(row_loss), in_dims=(None, 0, 0))
    updates = 0
    for _, micro_batches in task.windows():
        rows = [part for part in micro_batches if part is not None]
        count = sum(int((part["labels"] != IGNORED).sum()) for part in rows)
        if count == 0:
            continue
        gradients = [by_row(weights, part["input_ids"], part["labels"]) for part in rows]
        for name in weights:
            total = torch.stack([part[name].sum(dim=0) for part in gradients]).sum(dim=0)
            weights[name] = weights[name] - task.lr * total / count
        updates += 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return Trained(model, updates)
