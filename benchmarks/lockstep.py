"""What does it cost that micro-batches meet?

CPU time and peak tensor memory of one update, on one thread, against the same window without meeting and against the
undivided batch, for windows of several lengths. Three models: two towers whose in-batch negatives are those of the
whole logical batch (replayed, joined, by GradCache where ``pip install gradcache`` was run, and by a loop written by
hand), once multilayer perceptrons, whose micro-batch takes some 8 ms, and once transformers, with some 100 ms, of which
the fixed costs of a micro-batch are a smaller part; and a residual network whose batch norm is exact (joined, in memory
and in a file in the folder for temporary files). All ways take turns, in a new order each round; a time is the median
over the rounds of the ratio to the window without meeting of the same round.

The loop written by hand is the floor of every replay: two forward passes and one backward pass, the loss once over all
rows, and nothing else - no random state, buffers, gradient norm or record, of which GradCache keeps the first alone.

Tensor memory is what PyTorch's operations hand out and is not freed yet, counted in every thread, above what was there
before the update (weights, rows). Scratch memory inside an operation is not seen. The rows that meet are held three
times in a replay: as they were brought, side by side, and as the gradient that enters there.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from page import Bar, arguments, spread, table, tell
from wholebatch.engine.fit.timeline import Timeline
from wholebatch.evidence.conformance.adapters.gradcache import gradcache, load

COUNTS = (2, 8, 32, 64)
APART, REPLAY, JOINED, UNDIVIDED, CACHED = "no meeting", "replay", "joined", "undivided", "GradCache"
IN_A_FILE = "joined, in a file"
FLOOR = "floor: two forward passes and one backward"
MIB = 1 << 20

Update = Callable[[], object]


@dataclass
class Case:
    """A model in several ways of running it."""

    name: str
    rows: int
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    loss: Callable[[nn.Module, Any], Tensor]
    apart: Callable[[nn.Module, Any], Tensor]
    ways: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    counts: tuple[int, ...] = COUNTS
    met_bytes: int = 0
    """What one row brings to the meetings. Unit: bytes."""

    def update(self, way: str, micro_batches: int) -> Update:
        """Return what makes one update of a window of so many micro-batches."""
        torch.manual_seed(0)
        model = self.build()
        if self.exact and way in (REPLAY, JOINED, IN_A_FILE):
            wb.exact_batch_norm(model)
        rows = self.rows * micro_batches
        batch = self.batch(rows)
        if way == CACHED:
            return cached(model, batch, self.rows)
        if way == FLOOR:
            return by_hand(model, batch, self.rows)
        accumulator = wb.Accumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            self.apart if way == APART else self.loss,
            micro_batch=wb.Rows(rows if way == UNDIVIDED else self.rows),
            lockstep="joined" if way == IN_A_FILE else way if way in (REPLAY, JOINED) else "auto",
            check=None,
            **({"batch_norm": "per_micro_batch"} if way == APART else {}),
        )

        def update() -> object:
            with wb.offload_to_file() if way == IN_A_FILE else nullcontext():
                return accumulator.step(batch)

        return update


class Towers(nn.Module):
    def __init__(self, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(layers):
            hidden += [nn.Linear(width, width), nn.GELU()]
        self.encoder = nn.Sequential(*hidden, nn.Linear(width, 128))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(x), dim=1)


class Encoders(nn.Module):
    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(self.embedding(x)).mean(1), dim=1)


def two_sided(model: nn.Module, batch: Any) -> Tensor:
    return wb.losses.info_nce(model(batch["a"]), model(batch["b"]), symmetric=True)


def two_sided_apart(model: nn.Module, batch: Any) -> Tensor:
    return two_sided_of_all(model(batch["a"]), model(batch["b"]))


def two_sided_of_all(queries: Tensor, keys: Tensor) -> Tensor:
    logits = queries @ keys.T / 0.07
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def cached(model: nn.Module, batch: Any, rows: int) -> Update:
    """Return one update by GradCache, in chunks of so many rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cache = load()(models=[model, model], chunk_sizes=rows, loss_fn=two_sided_of_all)

    def update() -> None:
        cache(batch["a"], batch["b"])
        optimizer.step()
        optimizer.zero_grad()

    return update


def by_hand(model: nn.Module, batch: Any, rows: int) -> Update:
    """Return one update by the least that a replay has to do, in micro-batches of so many rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update() -> None:
        pairs = list(zip(batch["a"].split(rows), batch["b"].split(rows), strict=True))
        with torch.no_grad():
            brought = [(model(a), model(b)) for a, b in pairs]
        queries, keys = (torch.cat(each).requires_grad_() for each in zip(*brought, strict=True))
        two_sided_of_all(queries, keys).backward()
        assert queries.grad is not None
        assert keys.grad is not None
        entering = zip(queries.grad.split(rows), keys.grad.split(rows), strict=True)
        for (a, b), gradients in zip(pairs, entering, strict=True):
            torch.autograd.backward([model(a), model(b)], gradients)
        optimizer.step()
        optimizer.zero_grad()

    return update


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def resnet(width: int = 32, blocks: int = 6) -> nn.Module:
    body = [Residual(width) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


CONTRASTIVE = (APART, REPLAY, JOINED, UNDIVIDED, FLOOR, *([CACHED] if gradcache.versions() else []))

CASES = [
    Case(
        "two towers, in-batch negatives",
        32,
        Towers,
        lambda rows: {"a": torch.randn(rows, 512), "b": torch.randn(rows, 512)},
        two_sided,
        two_sided_apart,
        CONTRASTIVE,
        met_bytes=2 * 128 * 4,
    ),
    Case(
        "two transformers, in-batch negatives",
        32,
        Encoders,
        lambda rows: {"a": torch.randint(256, (rows, 32)), "b": torch.randint(256, (rows, 32))},
        two_sided,
        two_sided_apart,
        CONTRASTIVE,
        met_bytes=2 * 128 * 4,
        counts=COUNTS[:-1],
    ),
    Case(
        "residual network, batch norm in 12 layers",
        8,
        resnet,
        lambda rows: {"x": torch.randn(rows, 3, 16, 16), "y": torch.randint(10, (rows,))},
        classify,
        classify,
        (APART, JOINED, IN_A_FILE, UNDIVIDED),
        exact=True,
    ),
]


def seconds(update: Update) -> float:
    start = time.process_time()
    update()
    return time.process_time() - start


def peak_bytes(update: Update) -> int:
    """Return what the tensors of one update take at most, above what was there before."""
    update()
    with Timeline(torch.device("cpu")) as timeline:
        update()
    return timeline.peak_bytes


def measure(case: Case, micro_batches: int, rounds: int) -> tuple[list[list[str]], dict[str, float], dict[str, int]]:
    """Return the rows of a table, and each way's time relative to no meeting, and its peak."""
    updates = {way: case.update(way, micro_batches) for way in case.ways}
    peaks = {way: peak_bytes(update) for way, update in updates.items()}
    taken: dict[str, list[float]] = {way: [] for way in case.ways}
    order, shuffle = list(case.ways), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for way in order:
            taken[way].append(seconds(updates[way]))
    ratios, rows = {}, []
    if CACHED in taken:
        pairs = zip(taken[REPLAY], taken[CACHED], strict=True)
        ratios[f"{REPLAY} to {CACHED}"] = statistics.median(one / other for one, other in pairs)
    for way in case.ways:
        each = [one / other for one, other in zip(taken[way], taken[APART], strict=True)]
        ratios[way] = statistics.median(each)
        rows.append(
            [
                way,
                str(micro_batches),
                f"{statistics.median(taken[way]) * 1e3:.1f}",
                f"{ratios[way]:.3f}",
                spread(each),
                f"{peaks[way] / MIB:.2f}",
            ]
        )
    return rows, ratios, peaks


def main() -> int:
    parser = arguments(__doc__, "benchmarks/lockstep.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, found = [], []
    for case in CASES:
        rows = []
        for count in case.counts[:2] if options.quick else case.counts:
            more, ratios, peaks = measure(case, count, 3 if options.quick else 15)
            rows += more
            label = f"{case.name}, {count} micro-batches"
            if REPLAY in ratios:
                found.append(Bar(f"{label}: time of replay", ratios[REPLAY], 1.4))
                room = peaks[APART] + 3 * case.met_bytes * case.rows * count
                found.append(
                    Bar(f"{label}: peak of replay, to one micro-batch and what met", peaks[REPLAY] / room, 1.05)
                )
            if CACHED in ratios:
                found.append(Bar(f"{label}: time of replay to GradCache", ratios[f"{REPLAY} to {CACHED}"], 1.0))
            found.append(Bar(f"{label}: time of joined", ratios[JOINED], 1.3))
        headings = ["way", "micro-batches", "ms an update", "to no meeting", "middle half of rounds", "tensors, MiB"]
        texts.append(f"## {case.name}, {case.rows} rows a micro-batch\n\n{table(headings, rows)}")
    text = "\n\n".join(texts)
    if gradcache.versions() is None:
        text += f"\n\nGradCache is not installed ({gradcache.install}), so nothing is said of it."
    packages = ["wholebatch", "torch", *(["gradcache"] if gradcache.versions() else [])]
    return tell("Micro-batches that meet", "lockstep", options, packages, text, found)


if __name__ == "__main__":
    sys.exit(main())
