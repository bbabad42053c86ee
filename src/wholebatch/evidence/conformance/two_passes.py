"""What goes wrong where a batch is run twice, piece by piece, as gradient caches do it?

First without graphs, to know what the loss makes of all rows, and then with graphs, to bring its gradient back.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import SGD

from wholebatch.evidence.conformance.encoders import Encoder, with_draws
from wholebatch.evidence.conformance.task import Task

PIECEWISE = "batch norm or another layer sees micro-batches, although the loss sees all rows"
ANEW = "the second pass draws other random numbers than the first"


def two_passes(task: Task, found: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the mistakes of loops that run a batch twice: what is wrong, and the model at the end of such a loop.

    Args:
        task: What was asked, whose rows meet.
        found: The model of the run that is off; has what it drew at random.
    """
    if isinstance(found, Encoder) and any(len(draws) > 1 for draws in found.drawn.values()):
        yield ANEW, cached(task, first=with_draws(task, found.drawn, 0))
    yield PIECEWISE, cached(task, first=task)


def cached(task: Task, *, first: Task) -> nn.Module:
    """Return the model at the end of a run in which each logical batch is run twice, in its micro-batches.

    Args:
        task: What the second pass draws and trains.
        first: The same task, as the first pass draws it.
    """
    model, other = task.make_model(), first.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for _, micro_batches in task.windows():
        there = [each for each in micro_batches if each is not None]
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            rows = torch.cat([other(each["input_ids"]) for each in there]).requires_grad_()
        model.load_state_dict(other.state_dict())  # the first pass has moved the running statistics as well
        torch.autograd.backward(task.loss_of(model, rows, torch.cat([each["labels"] for each in there])))
        assert rows.grad is not None
        parts = torch.split(rows.grad, [len(each["input_ids"]) for each in there])
        for each, gradient in zip(there, parts, strict=True):
            torch.autograd.backward(model(each["input_ids"]), gradient)
        optimizer.step()
        optimizer.zero_grad()
    return model
