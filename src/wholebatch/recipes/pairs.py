"""Pairs: two encoders find the body of a Python function by its docstring.

The rows are 2,500 functions of the Python standard library, and 500 for validation. A docstring has to be nearer to its
own body than to the bodies of all other rows of the *logical* batch (InfoNCE), wherever the micro-batches are cut: the
more rows, the harder the question. In micro-batches that do not meet, each would only look among its own few rows.
"""

import json
import lzma
import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from wholebatch.engine.losses import info_nce

FUNCTIONS = Path(__file__).parent / "data" / "stdlib_pairs_3000.jsonl.xz"
BUCKETS = 1 << 14
"""How many words are told apart; those that fall into one bucket count as one."""

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
LONGEST = {"doc": 64, "code": 192}
"""Words of a docstring and of a body that are read."""

PADDING = 0
"""The bucket of what is no word."""

NO_WORD = 1
"""The bucket of a text without words; a word may share it."""

Row: TypeAlias = tuple[list[int], list[int]]
"""The words of a docstring and those of the body, as buckets."""

defaults: dict[str, Any] = {
    "logical_batch": "512 rows",
    "micro_batch": "64 rows",
    "epochs": 16,
    "lr": 5e-3,
}


def words(text: str, longest: int) -> list[int]:
    """Return the buckets of a text's words; names are taken apart, as in ``readLine`` or ``read_line``.

    Args:
        text: A docstring or a body.
        longest: Words that are kept at the most.
    """
    found = [zlib.crc32(word.lower().encode()) % (BUCKETS - 1) + 1 for word in WORD.findall(text)]
    return found[:longest] or [NO_WORD]


@cache
def _functions() -> list[Row]:
    with lzma.open(FUNCTIONS, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [(words(each["doc"], LONGEST["doc"]), words(_body(each["code"]), LONGEST["code"])) for each in found]


def _body(code: str) -> str:
    """What stands below the signature: with the name it would be too easy."""
    return code.partition("\n")[2] or code


def data(split: str) -> Sequence[Row]:
    """Return functions; every sixth is held out for validation."""
    held_out = split == "validation"
    return [row for place, row in enumerate(_functions()) if (place % 6 == 5) == held_out]


def collate(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return the words of the docstrings and those of the bodies, each of shape ``[rows, words]``, padded."""
    docs, bodies = zip(*rows, strict=True)
    return _padded(docs), _padded(bodies)


def _padded(texts: Sequence[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=PADDING)


def loss(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the two-sided InfoNCE among all rows of the logical batch, averaged over the rows that are here."""
    docs, bodies = micro_batch
    queries, keys = model(docs, bodies)
    unwrapped: Any = getattr(model, "module", model)
    return info_nce(queries, keys, temperature=unwrapped.temperature, symmetric=True)


@torch.no_grad()
def measure(model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of docstrings to which, of all rows, their own body is the nearest."""
    device = next(model.parameters()).device
    found = [
        model(*(side.to(device) for side in collate(list(rows[at : at + 100])))) for at in range(0, len(rows), 100)
    ]
    queries, keys = (torch.cat(side) for side in zip(*found, strict=True))
    nearest = (queries @ keys.T).argmax(1)
    return {"retrieval_at_1": int((nearest == torch.arange(len(rows), device=device)).sum()) / len(rows)}


class Tower(nn.Module):
    """A text as a point on the sphere: a weighted mean of its words, each with a weight that is learned.

    Args:
        embedding: Of the words; the two towers share it.
        width: Of a point.
    """

    def __init__(self, embedding: nn.Embedding, width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = nn.Embedding(BUCKETS, 1)
        nn.init.zeros_(self.weight.weight)
        self.turn = nn.Linear(embedding.embedding_dim, width)

    def forward(self, words_RW: Tensor) -> Tensor:  # noqa: N803 - R rows, W words
        """Return points of length 1, shape ``[rows, width]``."""
        weight_RW = self.weight(words_RW).squeeze(2).masked_fill(words_RW == PADDING, -torch.inf)  # noqa: N806
        mean = torch.einsum("rw,rwf->rf", weight_RW.softmax(1), self.embedding(words_RW))
        return F.normalize(self.turn(mean), dim=1)


class DualEncoder(nn.Module):
    """Two towers, one for docstrings and one for bodies.

    Args:
        width: Of words and of points.

    Attributes:
        temperature: Of the loss; it is learned.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        embedding = nn.Embedding(BUCKETS, width)
        self.doc, self.body = Tower(embedding, width), Tower(embedding, width)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    @property
    def temperature(self) -> Tensor:
        """Shape ``[]``; at least 0.01."""
        return (-self.log_scale).exp().clamp(min=0.01)

    def forward(self, docs: Tensor, bodies: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points of docstrings and bodies, each of shape ``[rows, width]``."""
        return self.doc(docs), self.body(bodies)


def model() -> nn.Module:
    """Return two towers that share their words, 2,162,945 parameters."""
    return DualEncoder()
