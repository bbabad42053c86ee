"""Does every expert get its share? A loss over the whole logical batch."""

import torch
from torch import Tensor
from torch.nn import functional

from wholebatch.core.errors import LossError
from wholebatch.engine.meetings.meeting import sum_over_batch
from wholebatch.engine.precision import widened


def load_balancing(probabilities: Tensor, chosen: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """Return how unevenly the tokens of the logical batch are spread over the experts of a layer.

    With E experts, f_e the share of tokens that go to expert e, and P_e its mean probability,

        loss = E * sum_e f_e P_e,

    which is the number of experts that a token is sent to, k, where all is even. It is one number for the whole batch,
    not a mean over the tokens that are here: a mean of it over micro-batches is another loss, with another optimum. Add
    it to a loss that is a mean over its targets, or return it as the third of ``(loss_sum, targets, once)``.

    Args:
        probabilities: What the router gives each expert, after the softmax; shape ``[..., experts]``.
        chosen: The experts that each token is sent to; shape ``[...]`` or ``[..., k]``, integers. Default: the one with
            the largest probability.
        mask: Which tokens count; shape ``[...]``. Default: all.

    Returns:
        The loss, the same in every micro-batch; shape ``[]``, in float32 where `probabilities` are narrower.

    Raises:
        LossError: Shapes do not fit together, or an argument is not one of those above.
        MeetingError: See `wholebatch.sum_over_batch`.

    Example:
        >>> even, one_sided = torch.full((4, 2), 0.5), torch.tensor([[0.75, 0.25]] * 4)
        >>> load_balancing(even, torch.tensor([0, 1, 0, 1])), load_balancing(one_sided)
        (tensor(1.), tensor(1.5000))

    Source:
        Switch Transformers, arXiv 2101.03961, equation 4. Over the whole batch as in Demons in the Detail, arXiv
        2501.11873.
    """
    tokens, experts = probabilities.shape[:-1], probabilities.shape[-1] if probabilities.ndim else 0
    if experts == 0:
        raise LossError(
            f"probabilities {tuple(probabilities.shape)} have no experts.",
            hint="pass what the router gives each expert: [..., experts].",
        )
    chosen = probabilities.argmax(-1) if chosen is None else chosen
    chosen = chosen.unsqueeze(-1) if chosen.shape == tokens else chosen
    if chosen.shape[:-1] != tokens or (mask is not None and mask.shape != tokens):
        shapes = f"probabilities {tuple(probabilities.shape)}, chosen {tuple(chosen.shape)}"
        raise LossError(
            shapes + (f" and mask {tuple(mask.shape)}" if mask is not None else "") + " do not fit.",
            hint="pass probabilities [..., experts], and chosen [...] or [..., k] and mask [...] of the same tokens.",
        )
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise LossError(f"The chosen experts are {chosen.dtype}, not their numbers.", hint="pass integers.")
    at_hand = chosen.device.type == "cpu" and type(chosen) is Tensor and not torch.compiler.is_compiling()
    if at_hand and bool(((chosen < 0) | (chosen >= experts)).any()):  # an accelerator would have to be waited for
        raise LossError(
            f"The chosen experts go from {int(chosen.min())} to {int(chosen.max())}, and there are {experts} of them.",
            hint="number them from 0; tokens that no expert takes get any of these numbers, and False in mask=...",
        )
    wide = widened(probabilities)
    counts = torch.ones(tokens, dtype=wide.dtype, device=wide.device) if mask is None else mask.to(wide.dtype)
    sent = functional.one_hot(chosen.long(), experts).sum(-2) * counts.unsqueeze(-1)
    before = tuple(range(len(tokens)))
    total = sum_over_batch(counts.sum())
    share = sum_over_batch(sent.sum(before)) / total
    probability = sum_over_batch((wide * counts.unsqueeze(-1)).sum(before)) / total
    return experts * (share * probability).sum()
