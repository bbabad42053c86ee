"""Which rows? Documents of strongly varying length, and dense rows to compare them with."""

import json
import lzma
import random
import re
from collections.abc import Sequence

from wholebatch.recipes import text as recipe

NOVEL = "the novel's paragraphs"
DOCSTRINGS = "docstrings"


def documents(corpus: str, longest: int) -> list[bytes]:
    """Return all rows of a corpus."""
    folder = recipe.NOVEL.parent
    if corpus == NOVEL:
        with lzma.open(recipe.NOVEL, "rt", encoding="utf-8") as novel:
            texts = [re.sub(r"\s+", " ", each).strip() for each in re.split(r"\n\s*\n", novel.read())]
    else:
        with lzma.open(folder / "stdlib_pairs_3000.jsonl.xz", "rt", encoding="utf-8") as pairs:
            texts = [json.loads(line)["doc"] for line in pairs]
    return [each.encode()[:longest] for each in texts if each]


def sample(rows: Sequence[bytes], wanted: int) -> list[bytes]:
    """Return rows whose lengths are spread as those of all rows are, in random order."""
    by_length = sorted(rows, key=len)
    chosen = [by_length[(2 * place + 1) * len(rows) // (2 * wanted)] for place in range(wanted)]
    return random.Random(0).sample(chosen, wanted)


def dense(tokens: int, length: int) -> list[bytes]:
    """Return rows of one length that hold about as many tokens."""
    draw = random.Random(0)
    return [bytes(draw.choices(range(97, 123), k=length)) for _ in range(max(1, round(tokens / length)))]


def padding(parts: Sequence[Sequence[bytes]]) -> float:
    """Return how many positions there are for each real token."""
    padded = sum(len(rows) * max(map(len, rows)) for rows in parts)
    return padded / sum(len(row) for rows in parts for row in rows)
