"""Which of all rows is mine? Losses that compare the rows of a micro-batch with those of the whole logical batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, SupportsFloat

import torch
from torch import Tensor
from torch.nn import functional

from wholebatch.core.errors import LossError
from wholebatch.engine.losses.tiles import told_apart
from wholebatch.engine.meetings.call import Order
from wholebatch.engine.meetings.company import here, meet
from wholebatch.engine.meetings.meeting import gather, own_rows, rows_in_order
from wholebatch.engine.precision import widened


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    negatives: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Return how hard it is to tell each query's key from the keys of all other rows of the logical batch.

    For the query q_i of row i, and the keys of all rows,

        loss_i = -log( exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T) ),

    averaged over the rows that are here. The similarity is the plain product: normalise both for the cosine.

    Args:
        queries: Shape ``[rows, width]``.
        keys: The match of each query, row by row; shape ``[rows, width]``.
        temperature: T. A tensor may learn; a learned scale s, as in CLIP, is ``temperature=1 / s.exp()``.
        symmetric: Average with the other direction, in which keys look for their queries.
        negatives: Keys that match nobody, such as hard negatives of each row, as further candidates for the queries of
            all rows. Shape ``[rows, width]`` or ``[rows, several, width]``.
        tile: Compare so many rows at a time with all others: similarities exist for these alone, and are computed again
            in the backward pass. None: some 1 MiB of them on a CPU, 64 elsewhere. Unit: rows.

    Returns:
        The mean over the rows that are here; shape ``[]``.

    Raises:
        LossError: Shapes do not fit together, or an argument is not one of those above.
        MeetingError: See `wholebatch.gather`.

    Example:
        >>> image, text = functional.normalize(torch.randn(4, 8)), functional.normalize(torch.randn(4, 8))
        >>> loss = info_nce(image, text, temperature=0.1)
        >>> bool(torch.isclose(loss, functional.cross_entropy(image @ text.T / 0.1, torch.arange(4))))
        True

    Source:
        Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748; two-sided as in CLIP, arXiv
        2103.00020; the negatives of all rows for all queries as in DPR, arXiv 2004.04906.
    """
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise LossError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} are not row by row the same.",
            hint="pass two tensors [rows, width], where row i of one belongs to row i of the other.",
        )
    if negatives is not None and (
        negatives.ndim not in (2, 3) or (len(negatives), negatives.shape[-1]) != tuple(keys.shape)
    ):
        raise LossError(
            f"negatives {tuple(negatives.shape)} do not go with keys {tuple(keys.shape)}.",
            hint="pass one or several for each row: [rows, width] or [rows, several, width].",
        )
    if tile is not None and not _is_rows(tile):
        raise LossError(f"A tile of {tile} rows holds nothing.", hint="pass a positive number of rows, or None.")
    if not _divides(temperature):
        raise LossError(
            f"temperature={temperature!r} divides no similarity.",
            hint="pass a number above 0, or a tensor that learns.",
        )
    if isinstance(temperature, Tensor) and temperature.numel() != 1 and temperature.shape != (len(queries), 1):
        raise LossError(
            f"A temperature of shape {tuple(temperature.shape)} divides no similarity.",
            hint="pass a single number, or one for each query: [rows, 1].",
        )
    own = own_rows(queries)
    # In 32 bits at least what the temperature divides: its gradient adds up all rows.
    parts = [(widened(queries) / temperature).unsqueeze(1), widened(keys).unsqueeze(1)]
    if negatives is not None:
        parts.append(widened(negatives).reshape(len(keys), -1, keys.shape[1]))
    brought = torch.cat(parts, 1)
    compare = partial(told_apart, tile=tile, multiply_in=_multiplied_in(queries, keys))
    company = here()
    if company is not None and company.ranks > 1:
        return _of_own(brought, own, symmetric, compare).mean()
    each = partial(_of_all, both_ways=symmetric, compare=compare)
    if company is None:
        return each([brought], [None], Order(None)).mean()
    return meet("wb.losses.info_nce", brought, each).index_select(0, own).mean()  # type: ignore[no-any-return]


def _divides(temperature: object) -> bool:
    return isinstance(temperature, Tensor) or (isinstance(temperature, SupportsFloat) and float(temperature) > 0)


def _is_rows(said: object) -> bool:
    return isinstance(said, int) and said >= 1


def _is_number(said: object) -> bool:
    return isinstance(said, SupportsFloat | Tensor)


def _of_all(
    values: Sequence[Tensor], beside: Sequence[None], order: Order, *, both_ways: bool, compare: Callable[..., Tensor]
) -> Tensor:
    """Return the loss of all rows of the logical batch, once for all micro-batches.

    Args:
        values: Of each micro-batch: query, key, and further candidates of its rows; shape ``[rows, 2 or more, width]``.
        beside: Nothing.
        order: Where they stand in the logical batch.
        both_ways: Whether keys look for their queries as well.
        compare: As `told_apart`.
    """
    queries, keys, candidates = _parted(rows_in_order(values, beside, order))
    return compare(queries, candidates, torch.arange(len(keys), device=keys.device), both_ways=both_ways)


def _of_own(brought: Tensor, own: Tensor, symmetric: bool, compare: Callable[..., Tensor]) -> Tensor:
    """Return the loss of the rows that are here. On several ranks each has its own to do, instead of all."""
    mine, mine_as_keys, _ = _parted(brought)
    queries, _, candidates = _parted(gather(brought))
    loss = compare(mine, candidates, own, both_ways=False)
    if symmetric:
        loss = (loss + compare(mine_as_keys, queries, own, both_ways=False)) / 2
    return loss


def _parted(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys, and the candidates of all queries: the keys, and what else there is."""
    parts = torch.split_with_sizes(rows, [1, 1, rows.shape[1] - 2], 1)  # one gradient for all of them
    queries, keys, further = (each.flatten(0, 1) for each in parts)
    return queries, keys, torch.cat([keys, further]) if len(further) else keys


def _multiplied_in(one: Tensor, other: Tensor) -> torch.dtype:
    """Return the dtype in which the two would be multiplied here, also under autocast."""
    kind, dtype = one.device.type, torch.promote_types(one.dtype, other.dtype)
    return torch.get_autocast_dtype(kind) if dtype == torch.float32 and torch.is_autocast_enabled(kind) else dtype


def batch_hard_triplet(embeddings: Tensor, labels: Tensor, *, margin: float | Literal["soft"] = 0.2) -> Tensor:
    """Return how much nearer a row is to its farthest like than to its nearest unlike, in the whole logical batch.

    With d the Euclidean distance, and for each row as the anchor,

        loss = max(0, margin + max d(anchor, same label) - min d(anchor, other label)),

    averaged over the rows that are here. An anchor that is alone with its label, or whose label is the only one, counts
    as 0.

    Args:
        embeddings: Shape ``[rows, width]``.
        labels: Whom each row shows; shape ``[rows]``.
        margin: In units of distance; ``"soft"`` takes ``log(1 + exp(...))`` in place of the maximum with 0.

    Returns:
        The mean over the rows that are here; shape ``[]``.

    Raises:
        LossError: Shapes do not fit together, or an argument is not one of those above.
        MeetingError: See `wholebatch.gather`.

    Example:
        >>> embeddings = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> batch_hard_triplet(embeddings, torch.tensor([0, 0, 1, 1]), margin=0.5)
        tensor(0.6250)

    Source:
        In Defense of the Triplet Loss for Person Re-Identification, arXiv 1703.07737.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise LossError(
            f"embeddings {tuple(embeddings.shape)} and labels {tuple(labels.shape)} do not fit.",
            hint="pass embeddings [rows, width] and one label a row.",
        )
    if margin != "soft" and not _is_number(margin):
        raise LossError(f"margin={margin!r} is no distance.", hint='pass a number, or "soft".')
    embeddings = widened(embeddings)
    everyone, known = gather(embeddings), gather(labels)
    # The product form of the distance would lose its digits where rows are near, and only in large batches.
    distance = torch.cdist(embeddings, everyone, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels.unsqueeze(1) == known
    other = ~same
    like = same.scatter(1, own_rows(labels).unsqueeze(1), False)
    farthest = distance.masked_fill(~like, -torch.inf).amax(1)
    nearest = distance.masked_fill(~other, torch.inf).amin(1)
    counts = like.any(1) & other.any(1)
    gap = torch.where(counts, farthest, 0.0) - torch.where(counts, nearest, 0.0)
    each = functional.softplus(gap) if margin == "soft" else functional.relu(gap + margin)
    return torch.where(counts, each, 0.0).mean()
