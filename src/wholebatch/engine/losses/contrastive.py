"""Which of all rows is mine? Losses that compare the rows of a micro-batch with those of the whole logical batch."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from wholebatch.core.errors import LossError
from wholebatch.engine.meetings.meeting import gather, own_rows


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
        tile: Compare so many rows at a time with all others, and compute their similarities again in the backward pass:
            memory of one tile in place of the whole matrix, for one product more. None: all at once. Unit: rows.

    Returns:
        The mean over the rows that are here; shape ``[]``.

    Raises:
        LossError: Shapes do not fit together.
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
    own = own_rows(queries)
    candidates = gather(keys)
    if negatives is not None:
        if negatives.ndim not in (2, 3) or (len(negatives), negatives.shape[-1]) != tuple(keys.shape):
            raise LossError(
                f"negatives {tuple(negatives.shape)} do not go with keys {tuple(keys.shape)}.",
                hint="pass one or several for each row: [rows, width] or [rows, several, width].",
            )
        candidates = torch.cat([candidates, gather(negatives).flatten(0, -2)])
    if tile is not None and tile < 1:
        raise LossError(f"A tile of {tile} rows holds nothing.", hint="pass a positive number of rows, or None.")
    loss = _told_apart(queries, candidates, temperature, own, tile)
    if symmetric:
        loss = (loss + _told_apart(keys, gather(queries), temperature, own, tile)) / 2
    return loss


def _told_apart(
    anchors: Tensor, candidates: Tensor, temperature: float | Tensor, own: Tensor, tile: int | None
) -> Tensor:
    """The mean over the anchors of the cross entropy of their candidates, tile by tile."""
    if tile is None or tile >= len(anchors):
        return functional.cross_entropy(anchors @ candidates.T / temperature, own)

    def summed(some: Tensor, everyone: Tensor, temperature: float | Tensor, own: Tensor) -> Tensor:
        return functional.cross_entropy(some @ everyone.T / temperature, own, reduction="sum")

    tiles = [slice(start, start + tile) for start in range(0, len(anchors), tile)]
    parts = [
        checkpoint(
            summed,
            anchors[each],
            candidates,
            temperature,
            own[each],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for each in tiles
    ]
    total: Tensor = torch.stack(parts).sum()
    return total / len(anchors)


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
        LossError: Shapes do not fit together.
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
    wide = embeddings.float() if embeddings.element_size() < 4 else embeddings
    everyone, known = gather(wide), gather(labels)
    # The product form of the distance would lose its digits where rows are near, and only in large batches.
    distance = torch.cdist(wide, everyone, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels.unsqueeze(1) == known
    other = ~same
    like = same.scatter(1, own_rows(labels).unsqueeze(1), False)
    farthest = distance.masked_fill(~like, -torch.inf).amax(1)
    nearest = distance.masked_fill(~other, torch.inf).amin(1)
    counts = like.any(1) & other.any(1)
    gap = torch.where(counts, farthest, 0.0) - torch.where(counts, nearest, 0.0)
    each = functional.softplus(gap) if margin == "soft" else functional.relu(gap + margin)
    return torch.where(counts, each, 0.0).mean()
