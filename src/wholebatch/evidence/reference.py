"""The plain loop with the whole batch at once: what every update is judged by.

It imports nothing from the package, so that the judge shares no code with the judged.
"""

import torch


def gradient(model, loss_fn, batch, *, targets=None, reduction="mean"):  # type: ignore[no-untyped-def]
    """Return the loss of an undivided batch and leave its gradient in ``.grad``, as any training loop does.

    Args:
        model: The module.
        loss_fn: ``loss_fn(model, batch)``: a loss, ``(loss_sum, targets)`` or ``(loss_sum, targets, once)``.
        batch: The whole logical batch, as the model takes it.
        targets: ``targets(batch)``; what a sum is divided by.
        reduction: Whether a loss that stands alone is a ``"mean"`` or a ``"sum"``.

    Returns:
        The loss. Shape ``[]``.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> loss = gradient(layer, lambda model, x: model(x).mean(), torch.ones(4, 2))
        >>> layer.weight.grad
        tensor([[1., 1.]])
    """
    model.zero_grad()
    result = loss_fn(model, batch)
    if isinstance(result, tuple):
        loss_sum, divisor, *once = result
        loss = loss_sum / divisor + sum(term for term in once if term is not None)
    else:
        loss = result / targets(batch) if reduction == "sum" else result
    loss.backward()
    return loss.detach()


def update(model, optimizer, loss_fn, batch, *, clip_norm=None, **objective):  # type: ignore[no-untyped-def]
    """Make one update from an undivided batch and return its loss; arguments as for `gradient`."""
    loss = gradient(model, loss_fn, batch, **objective)  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss
