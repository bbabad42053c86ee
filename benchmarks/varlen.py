"""How many real tokens a second, when the lengths of rows vary strongly?

Real (unpadded) tokens per CPU second, on one thread, for one logical batch of documents: `wb.Accumulator` with a token
budget against the loop that one would write, which meets the rows in random order, 16 a micro-batch, each padded to its
longest. Model, loss and rows are the same, and so is the update: both divide by the tokens of the logical batch. The
error beside is that of the gradient, relative to the sum of the gradients of single unpadded rows in float64, from
the same weights; the judge shares no code with either loop. That it would see a mistake is shown by the error of a mean
of means.

The ceiling is the same accumulator on dense rows, all of one length, without padding. They hold as many tokens as the
documents, and do as much work: since attention costs a token in proportion to its row's length s, rows of different
lengths cost as much as equal ones of length sum(s^2) / sum(s), the length of the row in which the mean token stands.
Dense rows of the plain mean length are shown as well; they do less attention a token, so no order of rows can reach
them.

The documents are the paragraphs of the embedded novel, cut at 512 and at 2,048 bytes, and the embedded docstrings, cut
at 512; of each corpus every n-th row by length, so that the sample pads as the whole corpus does. The weights stay as
they are (learning rate 0), so that every round does the same. Takes three to six minutes of one core.
"""

import json
import lzma
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import wholebatch as wb
from page import Bar, arguments, table, tell
from wholebatch.recipes import text as recipe

PLAIN_ROWS = 16
"""Rows a micro-batch in the hand-written loop."""

NOVEL = "the novel's paragraphs"
CORPORA = {
    (NOVEL, 512): 2.0,
    (NOVEL, 2048): 3.5,
    ("docstrings", 512): 3.0,
}
"""The corpora with the bytes that they are cut at, and how many times the hand-written loop each must reach."""

HAND, OURS, DENSE, MEAN = "hand-written loop", "wb.Accumulator", "dense, equal work", "dense, mean length"

ROUND = (OURS, DENSE, HAND, MEAN, DENSE, OURS)
"""The order in a round: the same forwards and backwards, so that a machine that slows down favours nobody."""


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


def slices(rows: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [rows[start : start + PLAIN_ROWS] for start in range(0, len(rows), PLAIN_ROWS)]


class Contender:
    """A model with an optimizer that moves nothing and keeps the gradient with which it was called."""

    def __init__(self, blocks: int, longest: int) -> None:
        torch.manual_seed(0)
        self.model = recipe.ByteTransformer(width=64, heads=2, blocks=blocks)
        self.model.position = nn.Embedding(longest, 64)
        nn.init.normal_(self.model.position.weight, std=0.02)
        nn.init.normal_(self.model.head.weight, std=0.05)  # from zeros, only the head would have a gradient
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer.register_step_pre_hook(self._keep)
        self.gradient: list[Tensor] = []

    def _keep(self, *_arguments: object) -> None:
        grads = [parameter.grad for parameter in self.model.parameters()]
        self.gradient = [grad.clone() for grad in grads if grad is not None]


def hand_written(contender: Contender, rows: Sequence[bytes], *, mean_of_means: bool = False) -> None:
    """Make an update as one would write it, or as most people do: with the mean of the micro-batches' means."""
    parts = slices(rows)
    tokens = sum(map(len, rows))
    for part in parts:
        loss_sum, targets = recipe.loss(contender.model, recipe.collate(list(part)))
        loss = loss_sum / targets / len(parts) if mean_of_means else loss_sum / tokens
        loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad()


def exact_gradient(contender: Contender, rows: Sequence[bytes]) -> list[Tensor]:
    """Return the gradient of the mean over all tokens, in float64, row by row and without any padding."""
    model = Contender(len(contender.model.blocks), len(contender.model.position.weight)).model.double()
    model.load_state_dict(contender.model.state_dict())
    for row in rows:
        tokens = torch.tensor(list(row))[None]
        nn.functional.cross_entropy(model(tokens)[0], tokens[0], reduction="sum").backward()
    total = sum(map(len, rows))
    return [parameter.grad / total for parameter in model.parameters() if parameter.grad is not None]


def error(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the 2-norm of the difference, relative to that of the exact gradient."""
    off = sum(float((ours.double() - theirs).square().sum()) for ours, theirs in zip(gradient, exact, strict=True))
    return (off / sum(float(each.square().sum()) for each in exact)) ** 0.5


@dataclass
class Way:
    """One of the things that take turns: what it runs, what it pads, and its CPU seconds, round by round."""

    run: Callable[[], object]
    tokens: int
    padding: float
    micro_batches: int
    seconds: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Run once, and return the CPU seconds that it took."""
        start = time.process_time()
        self.run()
        return time.process_time() - start

    @property
    def rate(self) -> float:
        """Real tokens per CPU second."""
        return self.tokens / statistics.median(self.seconds)


def ratio(way: Way, other: Way) -> float:
    """Return how many times the rate of `other` this one reached: the median over the rounds."""
    return statistics.median(
        (way.tokens / ours) / (other.tokens / theirs) for ours, theirs in zip(way.seconds, other.seconds, strict=True)
    )


def measure(corpus: str, longest: int, *, rows: int, rounds: int, budget: int, blocks: int) -> tuple[str, list[Bar]]:
    """Return the table of one corpus, and its bars."""
    batch = sample(documents(corpus, longest), rows)
    tokens, squares = sum(map(len, batch)), sum(len(row) ** 2 for row in batch)
    by_hand, ours = Contender(blocks, longest), Contender(blocks, longest)
    cut = wb.Tokens(budget, length=len)

    def accumulated(contender: Contender, batch: list[bytes]) -> Way:
        accumulator = wb.Accumulator(
            contender.model, contender.optimizer, recipe.loss, micro_batch=cut, collate=recipe.collate, check=None
        )
        parts = [[batch[row] for row in part] for part in cut.cut(list(map(len, batch)))]
        return Way(lambda: accumulator.step(batch), sum(map(len, batch)), padding(parts), len(parts))

    parts = slices(batch)
    ways = {
        HAND: Way(lambda: hand_written(by_hand, batch), tokens, padding(parts), len(parts)),
        OURS: accumulated(ours, batch),
        DENSE: accumulated(Contender(blocks, longest), dense(tokens, round(squares / tokens))),
        MEAN: accumulated(Contender(blocks, longest), dense(tokens, round(tokens / rows))),
    }
    exact = exact_gradient(by_hand, batch)
    for way in ways.values():
        way.run()
    for _ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for name in ROUND:
            taken[name].append(ways[name].time())
        for name, seconds in taken.items():
            ways[name].seconds.append(statistics.mean(seconds))
    errors = {HAND: error(by_hand.gradient, exact), OURS: error(ours.gradient, exact)}
    few = batch[: 4 * PLAIN_ROWS]
    hand_written(by_hand, few, mean_of_means=True)
    mistaken = error(by_hand.gradient, exact_gradient(by_hand, few))
    lines = [
        [
            name,
            f"{way.padding:.2f}",
            f"{way.micro_batches}",
            f"{way.rate:,.0f}",
            f"{ratio(way, ways[HAND]):.2f}",
            f"{errors[name]:.1e}" if name in errors else "",
        ]
        for name, way in ways.items()
    ]
    headings = [
        "way",
        "positions a token",
        "micro-batches",
        "tokens a CPU second",
        "to the hand-written loop",
        "error of the gradient",
    ]
    name = f"{corpus} at {longest:,} bytes"
    text = (
        f"## {name}\n\n{rows} rows, {tokens:,} tokens, {cut} a micro-batch; dense rows of {round(squares / tokens)} "
        f"and {round(tokens / rows)} bytes.\n\n{table(headings, lines)}\n\n"
        f"A mean of means over {len(few)} of these rows: {mistaken:.1e} off."
    )
    return text, [
        Bar(
            f"{name}: to the hand-written loop",
            ratio(ways[OURS], ways[HAND]),
            CORPORA[corpus, longest],
            most=False,
            digits=2,
        ),
        Bar(f"{name}: to dense rows of equal work", ratio(ways[OURS], ways[DENSE]), 0.95, most=False),
        Bar(f"{name}: error of the gradient", errors[OURS], 1e-6, digits=None),
    ]


def main() -> int:
    parser = arguments(__doc__, "benchmarks/varlen.py")
    parser.add_argument("--rows", type=int, help="rows of the logical batch (512; with --quick 128)")
    parser.add_argument("--rounds", type=int, help="rounds, after one for warming up (5; with --quick 1)")
    parser.add_argument("--budget", type=int, default=2048, help="tokens a micro-batch (2048)")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of the transformer (1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, found = [], []
    for corpus, longest in CORPORA:
        text, bars = measure(
            corpus,
            longest,
            rows=options.rows or (128 if options.quick else 512),
            rounds=options.rounds or (1 if options.quick else 5),
            budget=options.budget,
            blocks=options.blocks,
        )
        texts.append(text)
        found += bars
    model = Contender(options.blocks, 512).model
    weights = sum(parameter.numel() for parameter in model.parameters())
    text = f"A byte-level transformer: width 64, 2 heads, blocks {options.blocks}, {weights:,} weights; float32."
    return tell(
        "Tokens a second on rows of varying length",
        "varlen",
        options,
        ["wholebatch", "torch"],
        "\n\n".join([text, *texts]),
        found,
    )


if __name__ == "__main__":
    sys.exit(main())
