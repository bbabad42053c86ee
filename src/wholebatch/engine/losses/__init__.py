"""Losses that see more than a micro-batch, or need less memory than the plain ones.

The first three compare rows, or count over them. They are exact however a logical batch is cut, since their
micro-batches meet; outside an accumulator they are ordinary losses of the rows that they are given.
"""

from wholebatch.engine.losses.balancing import load_balancing
from wholebatch.engine.losses.contrastive import batch_hard_triplet, info_nce
from wholebatch.engine.losses.head import linear_cross_entropy

__all__ = ["batch_hard_triplet", "info_nce", "linear_cross_entropy", "load_balancing"]
