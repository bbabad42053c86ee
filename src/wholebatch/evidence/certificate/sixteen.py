"""Are gradients added up in 16 bits, and what becomes of such a sum?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wholebatch.evidence.certificate.rehearsal import Rehearsal

LONG = 1024
"""How many micro-batches a window is imagined to have, to say what becomes of a sum in 16 bits."""


def summed_in_16_bits(found: Rehearsal) -> bool:
    """Whether what the optimizer was given is a sum that was rounded to 16 bits after each addition.

    Both sums are known: that one, and the one in 32 bits or more, rounded once. What was given is nearer to one of
    them. With two terms they are the same, so it takes three.

    Args:
        found: What the step did with a window.
    """
    if found.in_16_bits is None or found.rounded_once is None or found.passes < 3 or len(found.steps) != 1:
        return False
    given, exact = found.gradient.double(), found.incoming
    factor = torch.dot(given, exact) / torch.dot(exact, exact).clamp(min=1e-300)
    near = float((given - factor * found.in_16_bits).norm())
    return near < 0.8 * float((given - factor * found.rounded_once).norm())


def stagnation(brought: Sequence[Tensor], parameters: Sequence[nn.Parameter], sizes: Sequence[int]) -> float:
    """Return how far off a sum in 16 bits is after `LONG` micro-batches like those of a window, relative.

    Args:
        brought: What each backward pass brought. Shape of each: ``[entries]``.
        parameters: In whose dtype the sums are, or in bfloat16 if that is a wide one.
        sizes: Entries of each parameter.
    """
    off = exact = 0.0
    rounds = max(2, -(-LONG // len(brought)))
    for parameter, *parts in zip(parameters, *(each.split_with_sizes(list(sizes)) for each in brought), strict=True):
        right = torch.stack(parts).sum(0) * rounds
        total = torch.zeros_like(right, dtype=sixteen(parameter.dtype))
        for _ in range(rounds):
            for part in parts:
                total += part.to(total.dtype)
        off += float((total.double() - right).square().sum())
        exact += float(right.square().sum())
    return math.sqrt(off / max(exact, 1e-300))


def sixteen(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of 16 bits that belongs to one: itself, or bfloat16."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
