"""A second judge: what is right, from the gradients of single rows, summed with ``torch.func``.

It shares no arithmetic with the first one: no batch is put together, no loss is divided, no optimizer is asked.
"""

import torch
from torch.func import functional_call, grad, vmap

from wholebatch.evidence.conformance.models import IGNORED
from wholebatch.evidence.conformance.task import Task, Trained


def second_reading(task: Task) -> Trained:
    """Return what plain SGD makes of a supervised task without clipping, terms, schedules or low precision."""
    assert not task.asks & {"clipping", "term", "schedule", "follows", "exception", "fp16", "bf16"}
    model = task.make_model()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def row_loss(weights, input_ids, labels):
        logits = functional_call(model, weights, (input_ids[None],))[0]
        chosen = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -(chosen * (labels != IGNORED)).sum()

    by_row = vmap(grad(row_loss), in_dims=(None, 0, 0))
    updates = 0
    for _, micro_batches in task.windows():
        rows = [part for part in micro_batches if part is not None]
        count = sum(int((part["labels"] != IGNORED).sum()) for part in rows)
        if count == 0:
            continue
        gradients = [by_row(weights, part["input_ids"], part["labels"]) for part in rows]
        for name in weights:
            total = sum(part[name].sum(dim=0) for part in gradients)
            weights[name] = weights[name] - task.lr * total / count
        updates += 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return Trained(model, updates)
