"""A language model's head and loss in one, whose logits never exist as a whole."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from wholebatch.core.errors import LossError


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: Literal["auto"] | int = "auto",
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias``, whose logits never exist as a whole.

    With a large vocabulary the logits are most of a language model's memory. Here a few positions at a time go through
    the head: their logits become a loss and, at once, the gradient of `hidden` and `weight`, and are forgotten. So
    nothing is computed twice, and the backward pass only multiplies.

    Losses and the gradient of `weight` are added up in float32 where the weights are narrower: sums over many positions
    would stagnate.

    Args:
        hidden: What the head sees; shape ``[..., width]``.
        weight: The head; shape ``[classes, width]``.
        labels: Class of each position; shape ``[...]``, integers. Those equal to `ignore_index` are not learned.
        bias: Shape ``[classes]``, or None.
        ignore_index: The label of positions that do not count.
        reduction: ``"mean"`` over the positions that count, or their ``"sum"``.
        chunk: Positions at a time; ``"auto"``: so many that their logits take about as much memory as `hidden`. Unit:
            positions.

    Returns:
        The loss; shape ``[]``, in float32 where the weights are narrower. A mean over nothing is not a number.

    Raises:
        LossError: Shapes do not fit together, a label is no class, or an argument is not one of those above.

    Example:
        >>> hidden, weight = torch.randn(2, 7, 16), torch.randn(1000, 16)
        >>> labels = torch.randint(1000, (2, 7))
        >>> loss = linear_cross_entropy(hidden, weight, labels)
        >>> plain = functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
        >>> bool(torch.isclose(loss, plain))
        True

    Source:
        Chunked heads as in "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
    """
    _check_kinds(hidden, weight, labels, bias)
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise LossError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit.",
            hint="pass hidden [..., width], weight [classes, width] and labels [...] with the same leading shape.",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LossError(
            f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}.", hint="pass one number a class."
        )
    _check_dtypes(hidden, weight, bias)
    if chunk != "auto" and not isinstance(chunk, int):
        raise LossError(f"chunk={chunk!r} is no number of positions.", hint='pass chunk="auto" or a positive number.')
    positions = labels.numel()
    rows = max(1, positions * weight.shape[1] // weight.shape[0]) if chunk == "auto" else chunk
    if rows < 1:
        raise LossError(f"A chunk of {rows} positions holds nothing.", hint='pass chunk="auto" or a positive number.')
    if not isinstance(ignore_index, int):
        raise LossError(f"ignore_index={ignore_index!r} is no label.", hint="pass a whole number, or leave it out.")
    if reduction not in ("mean", "sum"):
        raise LossError(f"reduction={reduction!r} is not one of the choices.", hint='pass "mean" or "sum".')
    kept = labels.flatten()
    _check_labels(kept, len(weight), ignore_index)
    kept = kept.long()
    loss: Tensor = _Head.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, kept, ignore_index, rows)  # type: ignore[no-untyped-call]
    return loss if reduction == "sum" else loss / (kept != ignore_index).sum()


def _check_kinds(hidden: object, weight: object, labels: object, bias: object) -> None:
    """Refuse what is no tensor."""
    named = {"hidden": hidden, "weight": weight, "labels": labels} | ({"bias": bias} if bias is not None else {})
    for name, each in named.items():
        if not isinstance(each, Tensor):
            raise LossError(
                f"{name} is a {type(each).__name__}, not a tensor.",
                hint="pass tensors; of a layer its parameters: weight=head.weight, bias=head.bias.",
            )


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse dtypes that are not multiplied with one another."""
    dtypes = {"hidden": hidden.dtype, "weight": weight.dtype} | ({"bias": bias.dtype} if bias is not None else {})
    if len(set(dtypes.values())) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        said = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise LossError(f"The head cannot multiply {said}.", hint="bring them to one dtype, or run it under autocast.")


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse labels that are no classes; on an accelerator, which would have to be waited for, indexing does."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LossError(f"Labels are {labels.dtype}, not the numbers of classes.", hint="pass integers: labels.long().")
    if labels.device.type != "cpu" or type(labels) is not Tensor or torch.compiler.is_compiling():
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise LossError(
            f"A label is {int(labels[wrong][0])}, and classes are 0 to {classes - 1}; ignore_index is {ignore_index}.",
            hint="pass ignore_index=... if it marks what is not to be learned.",
        )


class _Head(torch.autograd.Function):
    """The summed loss of a head, with its gradient taken in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, rows: int
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        for start in range(0, len(labels), rows):
            part, label = hidden[start : start + rows], labels[start : start + rows]
            logits = functional.linear(part, weight, bias)
            counts = (label != ignore_index).unsqueeze(1)
            place = label.masked_fill(label == ignore_index, 0).unsqueeze(1)
            log_p = logits.to(wide).log_softmax(dim=1)
            loss -= (log_p.gather(1, place) * counts).sum()
            if wants_hidden or wants_weight or wants_bias:
                d_logits = log_p.exp_().scatter_add_(1, place, log_p.new_full((), -1.0).expand_as(place)).mul_(counts)
                narrow = d_logits.to(logits.dtype)
                if d_hidden is not None:
                    d_hidden[start : start + rows] = narrow @ weight
                if d_weight is not None:
                    d_weight += narrow.T @ part
                if d_bias is not None:
                    d_bias += d_logits.sum(dim=0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(of_weight),
            None if d_bias is None else (d_bias * grad).to(of_bias),
            None,
            None,
            None,
        )
