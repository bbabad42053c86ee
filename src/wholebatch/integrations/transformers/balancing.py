"""How are the experts of a mixture balanced over the logical batch? The models' own formula, over all micro-batches."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.engine.meetings.meeting import sum_over_batch

NAME = "load_balancing_loss_func"
"""How the models of transformers call it, each in a module of its own."""


def load_balancing_loss(
    gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
) -> Tensor | int:
    """Return the balancing loss of the Switch Transformer over the whole logical batch.

    With f_e the share of tokens that an expert is chosen for and p_e the mean probability that the router gives it,

        num_experts * sum over experts of f_e * p_e,

    a product of two means, which no mean over micro-batches comes to.

    Args:
        gate_logits: Of each layer, shape ``[tokens, num_experts]``; anything but a tuple has no loss.
        num_experts: Unit: experts.
        top_k: How many a token is sent to. Unit: experts.
        attention_mask: 0 for padding. Shape ``[rows, time]``.

    Source: https://arxiv.org/abs/2101.03961, equations 4 to 6.
    """
    if not isinstance(gate_logits, tuple) or not gate_logits or num_experts is None:
        return 0
    device = gate_logits[0].device
    chosen, likely, tokens = (torch.zeros(count, device=device) for count in (num_experts, num_experts, 1))
    for logits in gate_logits:
        probabilities = logits.to(device).softmax(dim=-1)
        counts = torch.ones(len(logits), device=device)
        if attention_mask is not None:
            counts = attention_mask.reshape(-1).to(counts)
        experts = probabilities.topk(top_k, dim=-1).indices
        chosen = chosen.index_add(0, experts.flatten(), counts.repeat_interleave(top_k))
        likely = likely + (probabilities.float() * counts.unsqueeze(-1)).sum(dim=0)
        tokens = tokens + counts.sum()
    chosen, likely, tokens = sum_over_batch(torch.cat([chosen, likely, tokens])).split([num_experts, num_experts, 1])
    loss: Tensor = num_experts * (chosen / tokens * likely / tokens).sum()
    return loss


@contextmanager
def balanced(model: nn.Module) -> Iterator[None]:
    """Let the models that are parts of a model balance over the logical batch, if they do it by this formula."""
    homes = {type(each).__module__ for each in model.modules()}
    before: dict[Any, Callable[..., Any]] = {}
    for home in filter(None, map(sys.modules.get, homes)):
        own = getattr(home, NAME, None)
        if own is not None and _is_the_same(own):
            before[home] = own
            setattr(home, NAME, load_balancing_loss)
    try:
        yield
    finally:
        for home, own in before.items():
            setattr(home, NAME, own)


def _is_the_same(own: Callable[..., Any]) -> bool:
    """Whether a function takes the same, and comes to the same on some numbers."""
    if list(inspect.signature(own).parameters) != list(inspect.signature(load_balancing_loss).parameters):
        return False
    draw = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(6, 4, generator=draw) for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return all(
        torch.allclose(own(logits, 4, 2, each), torch.as_tensor(load_balancing_loss(logits, 4, 2, each)))
        for each in (None, mask)
    )
