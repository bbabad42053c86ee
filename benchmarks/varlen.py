"""How many real tokens a second, when the lengths of rows vary strongly?

Real (unpadded) tokens per CPU second, on one thread, for one logical batch of documents: `wb.Accumulator` with a token
budget against the loop that one would write, which meets the rows in random order, 16 a micro-batch, each padded to its
longest. Model, loss and rows are the same, and so is the update: both divide by the tokens of the logical batch. The
error beside is that of the gradient, relative to the sum of the gradients of single unpadded rows in float64, from
the same weights; the judge shares no code with either loop. That it would see a mistake is shown by the error of a mean
of means.

Dense, unpadded input, for the same accumulator, is rows of one length that hold as many tokens as the documents. Of
which length, is said in three ways. *Full rows*: a text that is cut into pieces of the longest length, as language
models are trained where padding is to be avoided; it does more attention a token. *Equal work*: since attention costs a
token in proportion to its row's length s, rows of different lengths cost as much as equal ones of length
sum(s^2) / sum(s), the length of the row in which the mean token stands; this is the ceiling, and a cut that wastes
nothing reaches it. *Mean length*: the same number of rows; they do less attention a token, so no order of rows can
reach them.

The peers train the same model on the same rows, driven as their documentation says (peers.py), all rows in one window.
Lightning and the Trainer in random order pad as the hand-written loop does. The Trainer grouping by length
(train_sampling_strategy="group_by_length") sorts the rows here, because all of them are one logical batch; in a longer
epoch it groups over up to fifty logical batches, and so changes which rows meet in one. With "batch_rebalance" it cuts
the sorted rows of each window into micro-batches of equal cost: as many as the hand-written loop has, or twice as many.
The bar is judged against the former, by an accumulator whose budget is the largest of its micro-batches, so that both
need the same memory. What counts is the time from the begin of the epoch to its update. Lightning's update is a mean of
means, as documented; the others make that of the logical batch.

The documents are the paragraphs of the embedded novel, cut at 512 and at 2,048 bytes, and the embedded docstrings, cut
at 512; of each corpus every n-th row by length, so that the sample pads as the whole corpus does. The weights stay as
they are (learning rate 0), so that every round does the same. Takes about twenty minutes of one core.

Each way lives in a process of its own (apart.py), as it would for whoever trains with it alone: most micro-batches have
a shape of their own, oneDNN compiles kernels for each and keeps 1,024 of them, too few for all ways together. Each
round has fresh processes: where one's memory happens to lie makes it 2 % faster or slower for as long as it lives.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import peers
import wholebatch as wb
from apart import Apart
from documents import DOCSTRINGS, NOVEL, dense, documents, padding, sample
from page import Bar, arguments, table, tell
from wholebatch.recipes import text as recipe

PLAIN_ROWS = 16
"""Rows a micro-batch in the hand-written loop."""

CORPORA = {
    (NOVEL, 512): 2.0,
    (NOVEL, 2048): 3.5,
    (DOCSTRINGS, 512): 3.0,
}
"""The corpora with the bytes that they are cut at, and how many times the hand-written loop each must reach."""

HAND, OURS = "hand-written loop", "wb.Accumulator"
FULL, DENSE, MEAN = "dense, full rows", "dense, equal work", "dense, mean length"
LIGHTNING, TRAINER, GROUPED = "Lightning", "Trainer", "Trainer, group_by_length"
REBALANCED = {rows: f"Trainer, batch_rebalance, {rows} rows" for rows in (PLAIN_ROWS, PLAIN_ROWS // 2)}
"""The strongest rival, with so many rows a micro-batch on average."""

RIVAL = REBALANCED[PLAIN_ROWS]
"""The one that the bar is about."""

AS_LARGE = "wb.Accumulator, as large as that"
"""With micro-batches as large as the largest of the rival."""

TWICE = (OURS, DENSE, AS_LARGE, *REBALANCED.values())
ROUND = (*TWICE, HAND, GROUPED, FULL, MEAN, TRAINER, LIGHTNING, *reversed(TWICE))
"""The order in a round: the same forwards and backwards, so that a machine that slows down favours nobody."""


def slices(rows: Sequence[bytes]) -> list[list[bytes]]:
    return [list(rows[start : start + PLAIN_ROWS]) for start in range(0, len(rows), PLAIN_ROWS)]


Shape: TypeAlias = tuple[int, int]
"""Blocks of the transformer, and its longest row."""


class Contender:
    """A model with an optimizer that moves nothing and keeps the gradient of its last step."""

    def __init__(self, blocks: int, longest: int) -> None:
        torch.manual_seed(0)
        self.model = recipe.ByteTransformer(width=64, heads=2, blocks=blocks)
        self.model.position = nn.Embedding(longest, 64)
        nn.init.normal_(self.model.position.weight, std=0.02)
        nn.init.normal_(self.model.head.weight, std=0.05)  # from zeros, only the head would have a gradient
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer.register_step_post_hook(self._keep)  # Lightning makes the last gradient inside the step
        self.gradient: list[Tensor] = []

    def _keep(self, *_arguments: object) -> None:
        grads = [parameter.grad for parameter in self.model.parameters()]
        self.gradient = [grad.clone() for grad in grads if grad is not None]


def hand_written(contender: Contender, rows: Sequence[bytes], *, mean_of_means: bool = False) -> None:
    """Make an update as one would write it, or as most people do: with the mean of the micro-batches' means."""
    parts = slices(rows)
    tokens = sum(map(len, rows))
    for part in parts:
        loss_sum, targets = recipe.loss(contender.model, recipe.collate(part))
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
    """One of the things that take turns, in its own process.

    Attributes:
        update: Makes an update, and returns the CPU seconds that it took.
        contender: Whose update it is.
        parts: The micro-batches of the last update.
    """

    update: Callable[[], float]
    contender: Contender
    parts: list[list[bytes]]

    def run(self) -> float:
        """Make an update, and return the CPU seconds that it took."""
        return self.update()

    def shown(self) -> list[list[bytes]]:
        """Return the micro-batches of the last update."""
        return self.parts

    def moved(self) -> list[np.ndarray]:
        """Return the gradient of the last update."""
        return [each.numpy() for each in self.contender.gradient]


@dataclass
class Measured:
    """A way, as it is seen from here.

    Attributes:
        apart: Where it runs.
        parts: Its micro-batches.
        seconds: CPU seconds of an update, round by round.
    """

    apart: Apart
    parts: list[list[bytes]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def begin(self, apart: Apart) -> None:
        """Go on in another process: make a first update there, and see what its micro-batches are."""
        self.apart = apart
        self.apart.call("run")
        self.parts = self.apart.call("shown")

    @property
    def tokens(self) -> int:
        """Real tokens of an update."""
        return sum(len(row) for rows in self.parts for row in rows)

    @property
    def largest(self) -> int:
        """Padded tokens of the largest micro-batch."""
        return max(len(rows) * max(map(len, rows)) for rows in self.parts)

    @property
    def rate(self) -> float:
        """Real tokens per CPU second."""
        return self.tokens / statistics.median(self.seconds)

    def error(self, exact: Sequence[Tensor]) -> float:
        """Return how far its gradient is off."""
        return error([torch.from_numpy(each) for each in self.apart.call("moved")], exact)


def timed(update: Callable[[], object]) -> Callable[[], float]:
    """Return the update as something that returns the CPU seconds that it took."""

    def run() -> float:
        start = time.process_time()
        update()
        return time.process_time() - start

    return run


def by_hand(shape: Shape, batch: list[bytes]) -> Way:
    contender = Contender(*shape)
    return Way(timed(lambda: hand_written(contender, batch)), contender, slices(batch))


def accumulated(shape: Shape, batch: list[bytes], budget: int) -> Way:
    contender = Contender(*shape)
    cut = wb.Tokens(budget, length=len)
    accumulator = wb.Accumulator(
        contender.model, contender.optimizer, recipe.loss, micro_batch=cut, collate=recipe.collate, check=None
    )
    parts = [[batch[row] for row in part] for part in cut.cut(list(map(len, batch)))]
    return Way(timed(lambda: accumulator.step(batch)), contender, parts)


def with_lightning(shape: Shape, batch: list[bytes]) -> Way:
    """A loader in random order, and the mean loss of a micro-batch."""
    contender = Contender(*shape)
    parts: list[list[bytes]] = []

    def collate(rows: list[bytes]) -> Tensor:
        parts.append(rows)
        return recipe.collate(rows)

    def mean_loss(model: nn.Module, micro_batch: Tensor) -> Tensor:
        loss_sum, targets = recipe.loss(model, micro_batch)
        return loss_sum / targets

    def run() -> float:
        parts.clear()
        loader = DataLoader(batch, PLAIN_ROWS, shuffle=True, collate_fn=collate)
        begin, update = peers.with_lightning(
            contender.model, contender.optimizer, mean_loss, loader, window=len(loader), updates=1
        )
        return update - begin

    return Way(run, contender, parts)


class Logits(nn.Module):
    """The model as the Trainer wants it: with names for what goes in and what comes out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids)}


def with_trainer(shape: Shape, batch: list[bytes], sampling: str, rows: int = PLAIN_ROWS) -> Way:
    """A dataset of the rows, and a loss that is a sum over the items of the window."""
    contender = Contender(*shape)
    parts: list[list[bytes]] = []
    dataset = [{"input_ids": row} for row in batch]

    def collate(items: list[dict[str, bytes]]) -> dict[str, Tensor]:
        parts.append([item["input_ids"] for item in items])
        tokens = recipe.collate(parts[-1])
        return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == recipe.PADDING, -100)}

    def loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs["logits"].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch

    def run() -> float:
        parts.clear()
        begin, update = peers.with_trainer(
            Logits(contender.model),
            contender.optimizer,
            None,
            dataset,
            window=len(batch) // rows,
            updates=1,
            collate=collate,
            rows=rows,
            loss_of_outputs=loss,
            sampling=sampling,
        )
        return update - begin

    return Way(run, contender, parts)


def ratio(way: Measured, other: Measured) -> float:
    """Return how many times the rate of `other` this one reached: the median over the rounds."""
    return statistics.median(
        (way.tokens / ours) / (other.tokens / theirs) for ours, theirs in zip(way.seconds, other.seconds, strict=True)
    )


def measure(corpus: str, longest: int, *, rows: int, rounds: int, budget: int, blocks: int) -> tuple[str, list[Bar]]:
    """Return the table of one corpus, and its bars."""
    batch = sample(documents(corpus, longest), rows)
    tokens, squares = sum(map(len, batch)), sum(len(row) ** 2 for row in batch)
    work, mean = round(squares / tokens), round(tokens / rows)

    shape = (blocks, longest)
    ways: dict[str, Measured] = {}
    for _ in range(rounds):
        with ExitStack() as stack:

            def apart(name: str, make: Callable[..., Way], *given: object) -> None:
                begun = stack.enter_context(Apart(make, shape, *given))
                ways.setdefault(name, Measured(begun)).begin(begun)

            apart(HAND, by_hand, batch)
            apart(OURS, accumulated, batch, budget)
            apart(DENSE, accumulated, dense(tokens, work), budget)
            apart(FULL, accumulated, dense(tokens, longest), budget)
            apart(MEAN, accumulated, dense(tokens, mean), budget)
            apart(LIGHTNING, with_lightning, batch)
            apart(TRAINER, with_trainer, batch, "random")
            apart(GROUPED, with_trainer, batch, "group_by_length")
            for each, name in REBALANCED.items():
                apart(name, with_trainer, batch, "batch_rebalance", each)
            apart(AS_LARGE, accumulated, batch, ways[RIVAL].largest)
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for name in ROUND:
                taken[name].append(ways[name].apart.call("run"))
            for name, seconds in taken.items():
                ways[name].seconds.append(statistics.mean(seconds))
            judged = Contender(*shape)
            exact = exact_gradient(judged, batch)
            documents_seen = {name: way for name, way in ways.items() if name not in (FULL, DENSE, MEAN)}
            errors = {name: way.error(exact) for name, way in documents_seen.items()}
    for name, way in documents_seen.items():
        if sorted(row for part in way.parts for row in part) != sorted(batch):
            raise RuntimeError(f"{name} did not see each row once")
    few = batch[: 4 * PLAIN_ROWS]
    hand_written(judged, few, mean_of_means=True)
    mistaken = error(judged.gradient, exact_gradient(judged, few))
    lines = [
        [
            name,
            f"{padding(way.parts):.2f}",
            f"{len(way.parts)}",
            f"{way.largest:,}",
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
        "largest",
        "tokens a CPU second",
        "to the hand-written loop",
        "error of the gradient",
    ]
    name = f"{corpus} at {longest:,} bytes"
    text = (
        f"## {name}\n\n{rows} rows, {tokens:,} tokens, {budget} tokens a micro-batch; dense rows of {longest}, "
        f"{work} and {mean} bytes.\n\n{table(headings, lines)}\n\n"
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
        Bar(f"{name}: to dense, full rows", ratio(ways[OURS], ways[FULL]), 0.95, most=False),
        Bar(f"{name}: to dense rows of equal work", ratio(ways[OURS], ways[DENSE]), 0.95, most=False),
        Bar(f"{name}: as large, to {RIVAL}", ratio(ways[AS_LARGE], ways[RIVAL]), 1.05, most=False, digits=2),
        Bar(f"{name}: error of the gradient", errors[OURS], 1e-6, digits=None),
    ]


def main() -> int:
    parser = arguments(__doc__, "benchmarks/varlen.py")
    parser.add_argument("--rows", type=int, help="rows of the logical batch (512; with --quick 128)")
    parser.add_argument(
        "--rounds", type=int, help="rounds, each in fresh processes that warm up first (5; with --quick 1)"
    )
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
    kept = int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024"))
    text = (
        f"A byte-level transformer: width 64, 2 heads, blocks {options.blocks}, {weights:,} weights; float32. "
        f"oneDNN keeps {kept:,} kernels. The largest micro-batch is given in padded tokens."
    )
    return tell(
        "Tokens a second on rows of varying length",
        "varlen",
        options,
        ["wholebatch", "torch", *peers.PACKAGES],
        "\n\n".join([text, *texts]),
        found,
    )


if __name__ == "__main__":
    sys.exit(main())
