"""How far is one gradient from another, parameter by parameter, and is that more than rounding?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def norm(entries: Tensor) -> float:
    """Return the 2-norm, added up in 64 bits where the squares may be too small or too large for fewer.

    Args:
        entries: Shape ``[entries]``.
    """
    entries = entries if entries.element_size() > 2 else entries.float()
    found = float(torch.linalg.vector_norm(entries))
    if 1e-12 < found < 1e15 or entries.dtype == torch.float64:
        return found
    return float(torch.linalg.vector_norm(entries, dtype=torch.float64))


def errors(cut: Tensor, whole: Tensor, scale: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the relative error of each parameter's gradient.

    Args:
        cut: Gradient from the parts, all parameters one after the other. Shape ``[entries]``.
        whole: Gradient of the undivided rows. Shape ``[entries]``.
        scale: How large the parts' gradients are, entry by entry, before they cancel. Shape ``[entries]``.
        sizes: Entries of each parameter.

    Returns:
        For each parameter the 2-norm of the difference over that of the parts; a parameter with hardly any gradient is
        measured against 3 % of the average.
    """
    parts, scales = (each.split_with_sizes(list(sizes)) for each in (cut - whole, scale))
    return relative(list(map(norm, parts)), list(map(norm, scales)), sizes)


def relative(differences: Sequence[float], scales: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return differences over scales, as `errors` does, from the norms of both."""
    average = math.hypot(*scales) / max(1, sum(sizes)) ** 0.5
    floors = [max(scale, 0.03 * average * size**0.5) for scale, size in zip(scales, sizes, strict=True)]
    return [error / floor if floor > 0 else error for error, floor in zip(differences, floors, strict=True)]


def is_rounding(found: Sequence[float], tolerance: float) -> bool:
    """Return whether errors are no more than rounding; one that is not a number is more.

    Args:
        found: Relative errors.
        tolerance: The largest that counts as rounding.
    """
    return all(error <= tolerance for error in found)
