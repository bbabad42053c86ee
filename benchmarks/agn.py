"""Does accumulated gradient normalization hold what it claims, where ranks speak seldom and some are slow?

The paper (arXiv 1710.02368) claims that dividing what a rank has found by its local steps keeps asynchronous training
stable at large communication intervals, that this trains faster than waiting, and that it validates better than elastic
averaging (AEASGD) with many workers, 20 or more, and not with few. Here each claim is put to the pictures of the recipe
`images`, with a perceptron, and beside plain data parallel training (the mean gradient of all ranks at every step).

In virtual time: all ranks live in this process, each with a model, an optimizer and an accumulated gradient
normalization of its own, and every gradient is real, but the clock is not. A local step takes 1, or, one in twenty
times, 20 (a straggler), and an exchange 5, which is neither seen nor slowed by this machine. So runs of 20 ranks are
possible, and come out the same each time. Asynchronous ranks add to the class that rank 0 serves in a real run. Each
way chooses from the same learning rates, and plain training from two larger ones besides, by the validation loss at the
end of a run from a seed of its own; what is told of it comes from other seeds. A rate "diverged" if it ended above the
loss of guessing, or at none. A difference is believed from two standard errors on, over seeds; the 500 pictures are the
same for all.

With real processes, three of them: the same, on a real clock, through gloo and `torch.distributed.rpc`, where steps and
exchanges sleep for as long as they are said to take, and so cost this machine little.
"""

import heapq
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn import functional

import wholebatch as wb
from page import Bar, arguments, table, tell
from wholebatch.engine.ranks.center import Center, Vectors
from wholebatch.engine.ranks.exploration import vectors, views
from wholebatch.engine.ranks.served import Held
from wholebatch.recipes import images

ROWS = 16
"""Rows of a local step."""

STRAGGLES, STRAGGLE, EXCHANGE = 0.05, 20.0, 5.0
"""How often a step is slow, how long it takes then, and how long an exchange does. Unit: local steps."""

RATES = (0.001, 0.004, 0.016, 0.064, 0.25)
"""Learning rates that every way may choose from."""

HIGHER = (0.5, 1.0)
"""Plain data parallel training may take these too: it makes few steps, each with a mean over all ranks."""

WAYS = ("plain", "synchronous", "asynchronous", "not normalized", "elastic")
"""Plain data parallel training; accumulated gradient normalization, waiting and not; the latter without the division;
and elastic averaging."""

PROCESSES, REAL_LOCAL_STEPS, STEP_SECONDS = 3, 10, 0.004
"""The real runs: how many processes, local steps, and how long a step sleeps."""

GUESSING = math.log(images.KINDS)
"""The loss of a model that knows nothing."""


def tensors(split: str) -> tuple[Tensor, Tensor]:
    pictures, kinds = images.collate(list(images.data(split)))
    return pictures.flatten(1), kinds


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, images.KINDS))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def stream(rank: int, ranks: int, seed: int, train: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a rank sees: its own share of the rows, drawn without end."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    pictures, kinds = (each[rank::ranks] for each in train)
    while True:
        for places in torch.randperm(len(kinds), generator=draw).split(ROWS):
            yield pictures[places], kinds[places]


@dataclass
class Judge:
    """Validates the center, in equal distances of time.

    Attributes:
        model: Takes the center's weights.
        every: Unit: local steps.
        losses, accuracies: One each time.
    """

    model: nn.Module
    validation: tuple[Tensor, Tensor]
    every: float

    def __post_init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def until(self, clock: float, center: Callable[[], Vectors]) -> None:
        """Validate for each point in time that has passed."""
        if (len(self.losses) + 1) * self.every > clock:
            return
        with torch.no_grad():
            for parameter, values in views(list(self.model.parameters()), center()):
                parameter.copy_(values)
            said = self.model(self.validation[0])
        loss = functional.cross_entropy(said, self.validation[1]).item()
        accuracy = (said.argmax(1) == self.validation[1]).float().mean().item()
        while (len(self.losses) + 1) * self.every <= clock:
            self.losses.append(loss)
            self.accuracies.append(accuracy)


class Near(Center):
    """A center in this process: the class that rank 0 serves, without the way there."""

    def __init__(self, held: Held) -> None:
        self._held = held

    def start(self, _: Vectors) -> Vectors:
        return self._held.commit(None)[0]

    def commit(self, found: Vectors | None) -> tuple[Vectors, int]:
        return self._held.commit(found)[0], 0

    def finish(self) -> Vectors:
        return self._held.commit(None)[0]

    def close(self, failure: str | None = None) -> None:
        pass


@dataclass(frozen=True)
class Setting:
    """One run in virtual time."""

    way: str
    ranks: int
    local_steps: int
    lr: float
    seed: int


def virtual(setting: Setting, time_given: float, train: Any, validation: Any) -> Judge:
    """Return how a run validated."""
    torch.manual_seed(setting.seed)
    models = [perceptron() for _ in range(setting.ranks)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    judge = Judge(perceptron(), validation, time_given / 40)
    streams = [stream(rank, setting.ranks, setting.seed, train) for rank in range(setting.ranks)]
    draw = torch.Generator().manual_seed(setting.seed)

    def work(steps: int) -> float:
        slow = int((torch.rand(steps, generator=draw) < STRAGGLES).sum())
        return steps + slow * (STRAGGLE - 1)

    {"plain": _plain, "synchronous": _synchronous, "elastic": _elastic}.get(setting.way, _asynchronous)(
        setting, time_given, models, streams, work, judge
    )
    return judge


def _plain(setting: Setting, time_given: float, models: Any, streams: Any, work: Any, judge: Judge) -> None:
    # All weights are the same, so one model computes the mean gradient of all ranks' rows.
    model, clock = models[0], 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
    while clock < time_given:
        batches = [next(each) for each in streams]
        model.zero_grad()
        loss_fn(model, (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))).backward()
        clock += max(work(1) for _ in streams) + EXCHANGE
        judge.until(clock, lambda: vectors(list(model.parameters())))
        optimizer.step()


def _explorers(setting: Setting, models: Any, held: Held) -> list[Any]:
    return [
        wb.AccumulatedGradientNormalization(
            model,
            torch.optim.SGD(model.parameters(), lr=setting.lr),
            loss_fn,
            local_steps=setting.local_steps,
            normalize=setting.way != "not normalized",
            center=Near(held),
        )
        for model in models
    ]


def _asynchronous(setting: Setting, time_given: float, models: Any, streams: Any, work: Any, judge: Judge) -> None:
    held = Held(vectors(list(models[0].parameters())), setting.ranks)
    explorers = _explorers(setting, models, held)
    ready = [(work(setting.local_steps), rank) for rank in range(setting.ranks)]
    heapq.heapify(ready)
    while ready[0][0] < time_given:
        clock, rank = heapq.heappop(ready)
        judge.until(clock, lambda: held.commit(None)[0])
        for _ in range(setting.local_steps):
            explorers[rank].step(next(streams[rank]))
        heapq.heappush(ready, (clock + EXCHANGE + work(setting.local_steps), rank))
    judge.until(time_given, lambda: held.commit(None)[0])


def _synchronous(setting: Setting, time_given: float, models: Any, streams: Any, work: Any, judge: Judge) -> None:
    # Each rank explores from the center as it was, so the sum of what they find is put together here.
    center, clock = vectors(list(models[0].parameters())), 0.0
    while clock < time_given:
        clock += max(work(setting.local_steps) for _ in streams) + EXCHANGE
        judge.until(clock, center.copy)
        helds = [Held(center, 1) for _ in models]
        explorers = [_explorers(setting, [model], held)[0] for model, held in zip(models, helds, strict=True)]
        for explorer, rows in zip(explorers, streams, strict=True):
            for _ in range(setting.local_steps):
                explorer.step(next(rows))
        found = [held.commit(None)[0] for held in helds]
        center = [old + sum(new - old for new in each) for old, *each in zip(center, *found, strict=True)]


def _elastic(setting: Setting, time_given: float, models: Any, streams: Any, work: Any, judge: Judge) -> None:
    # arXiv 1412.6651: rank and center move towards each other by 0.9 / n of their distance.
    moving = 0.9 / setting.ranks
    center = vectors(list(models[0].parameters()))
    optimizers = [torch.optim.SGD(model.parameters(), lr=setting.lr) for model in models]
    ready = [(work(setting.local_steps), rank) for rank in range(setting.ranks)]
    heapq.heapify(ready)
    while ready[0][0] < time_given:
        clock, rank = heapq.heappop(ready)
        judge.until(clock, center.copy)
        parameters = list(models[rank].parameters())
        for _ in range(setting.local_steps):
            optimizers[rank].zero_grad()
            loss_fn(models[rank], next(streams[rank])).backward()
            optimizers[rank].step()
        with torch.no_grad():
            distance = [moving * (own - each) for own, each in zip(vectors(parameters), center, strict=True)]
            for each, towards in zip(center, distance, strict=True):
                each.add_(towards)
            for parameter, towards in views(parameters, distance):
                parameter.sub_(towards)
        heapq.heappush(ready, (clock + EXCHANGE + work(setting.local_steps), rank))
    judge.until(time_given, center.copy)


@dataclass(frozen=True)
class Outcome:
    """What came of a way at its best learning rate.

    Attributes:
        lr: The rate with the lowest validation loss at the end, from the first seed.
        rates: How many were tried.
        diverged: How many of them ended above the loss of guessing, from the first seed.
        runs: At that rate, from other seeds.
    """

    lr: float
    rates: int
    diverged: int
    runs: list[Judge]

    @property
    def loss(self) -> float:
        return statistics.fmean(each.losses[-1] for each in self.runs)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(each.accuracies[-1] for each in self.runs)

    @property
    def doubt(self) -> float:
        """The standard error of the accuracy."""
        if len(self.runs) < 2:
            return math.inf
        return statistics.stdev(each.accuracies[-1] for each in self.runs) / len(self.runs) ** 0.5

    def time_to(self, accuracy: float) -> float:
        """When the mean accuracy first reached a mark; infinite if never. Unit: local steps."""
        for place, reached in enumerate(zip(*(each.accuracies for each in self.runs), strict=True)):
            if statistics.fmean(reached) >= accuracy:
                return (place + 1) * self.runs[0].every
        return math.inf


def tuned(way: str, ranks: int, local_steps: int, time_given: float, seeds: int, data: Any) -> Outcome:
    """Return what a way reaches with its best learning rate."""
    rates = (*RATES, *HIGHER) if way == "plain" else RATES
    first = {lr: virtual(Setting(way, ranks, local_steps, lr, 0), time_given, *data) for lr in rates}
    ends = {lr: judge.losses[-1] if judge.losses[-1] < math.inf else math.inf for lr, judge in first.items()}
    lr = min(ends, key=lambda each: ends[each])
    runs = [virtual(Setting(way, ranks, local_steps, lr, seed), time_given, *data) for seed in range(1, seeds + 1)]
    return Outcome(lr, len(rates), sum(not end < GUESSING for end in ends.values()), runs)


def verdict(gain: float, doubt: float) -> str:
    """Return what a difference says, at two standard errors."""
    if abs(gain) <= 2 * doubt or math.isnan(gain):
        return "undecided"
    return "shown" if gain > 0 else "refuted"


def real(rank: int, way: str, lr: float, seconds: float, port: str, folder: str) -> None:
    """One of three real processes; the first writes down how the center validates at the end."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = stream(rank, PROCESSES, 0, tensors("train"))
    draw = torch.Generator().manual_seed(rank)
    steps = 0

    def work() -> None:
        time.sleep(STEP_SECONDS * (STRAGGLE if float(torch.rand((), generator=draw)) < STRAGGLES else 1))

    if way == "plain":
        wrapped = nn.parallel.DistributedDataParallel(model)
        end = time.monotonic() + seconds
        with wrapped.join():
            while time.monotonic() < end:
                optimizer.zero_grad()
                work()
                loss_fn(wrapped, next(rows)).backward()
                optimizer.step()
                steps += 1
                time.sleep(STEP_SECONDS * EXCHANGE)
    else:
        with wb.AccumulatedGradientNormalization(
            model, optimizer, loss_fn, local_steps=REAL_LOCAL_STEPS, synchronous=way == "synchronous"
        ) as exploring:
            distributed.barrier()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                work()
                step = exploring.step(next(rows))
                steps += 1
                if step.merged:
                    time.sleep(STEP_SECONDS * EXCHANGE)
    if rank == 0:
        pictures, kinds = tensors("validation")
        with torch.no_grad():
            accuracy = (model(pictures).argmax(1) == kinds).float().mean().item()
        Path(folder, "found.json").write_text(json.dumps({"accuracy": accuracy, "steps": steps}))
    distributed.barrier()
    distributed.destroy_process_group()


def with_processes(rates: dict[str, float], seconds: float) -> str:
    """Return the table of the real runs."""
    rows = []
    for way, lr in rates.items():
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            free.close()
            torch.multiprocessing.spawn(real, (way, lr, seconds, port, folder), nprocs=PROCESSES)
            found = json.loads(Path(folder, "found.json").read_text())
        rows.append([way, f"{lr:g}", str(found["steps"]), f"{found['accuracy']:.3f}"])
    return table([f"{PROCESSES} processes, {seconds:g} s", "rate", "steps of rank 0", "accuracy"], rows)


def main() -> int:
    parser = arguments(__doc__, "benchmarks/agn.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [(4, 5)] if options.quick else [(4, 10), (20, 10), (20, 40)]
    time_given, seeds, seconds = (60.0, 1, 1.0) if options.quick else (400.0, 3, 6.0)
    data = tensors("train"), tensors("validation")
    found: dict[tuple[str, int, int], Outcome] = {}
    rows = []
    for ranks, local_steps in settings:
        for way in WAYS:
            outcome = found[way, ranks, local_steps] = tuned(way, ranks, local_steps, time_given, seeds, data)
            mark = found["plain", ranks, local_steps].accuracy
            rows.append(
                [
                    f"{ranks} ranks, {local_steps} local steps, {way}",
                    f"{outcome.lr:g}",
                    f"{outcome.diverged} of {outcome.rates}",
                    f"{outcome.loss:.3f}",
                    f"{outcome.accuracy:.3f} ({outcome.doubt:.3f})",
                    f"{outcome.time_to(mark):.0f}",
                ]
            )
    headings = ["virtual time", "best rate", "diverged", "loss", "accuracy (std. error)", "plain's accuracy after"]
    claims, found_bars = judged(found, settings, time_given)
    real_rates = {way: found[way, *settings[0]].lr for way in ("plain", "synchronous", "asynchronous")}
    size = (
        f"Fashion-MNIST, 2,000 pictures to train and 500 to validate, {ROWS} rows a local step, {seeds} seeds, "
        f"{time_given:g} units of virtual time."
    )
    text = "\n\n".join(
        [
            size,
            table(headings, rows),
            table(["claim", "measured", "so it is"], claims),
            with_processes(real_rates, seconds),
        ]
    )
    return tell("Accumulated gradient normalization", "agn", options, ["wholebatch", "torch"], text, found_bars)


def judged(
    found: dict[tuple[str, int, int], Outcome], settings: list[tuple[int, int]], time_given: float
) -> tuple[list[list[str]], list[Bar]]:
    """Return what becomes of each claim, and the bars."""
    most = settings[-1]
    agn, undivided = found["asynchronous", *most], found["not normalized", *most]
    claims = [
        [
            f"stable at {most[0]} ranks and {most[1]} local steps, where the sum of the steps is not",
            f"{agn.diverged} and {undivided.diverged} of {len(RATES)} rates diverge",
            "shown" if agn.diverged < undivided.diverged else "refuted",
        ]
    ]
    best = undivided.accuracy - agn.accuracy
    claims.append(
        [
            "and no small rate makes up for the division",
            f"accuracy {agn.accuracy - undivided.accuracy:+.3f} against the sum at its best rate",
            verdict(-best, math.hypot(agn.doubt, undivided.doubt)),
        ]
    )
    bars = [Bar("rates that diverge, divided", agn.diverged, 0, digits=0)]
    for ranks, local_steps in settings:
        agn, plain, waiting, elastic = (
            found[way, ranks, local_steps] for way in ("asynchronous", "plain", "synchronous", "elastic")
        )
        here = f"{ranks} ranks, {local_steps} local steps"
        share = agn.time_to(plain.accuracy) / time_given
        claims += [
            [
                f"faster than plain data parallel training: {here}",
                f"its accuracy after {share:.2f} of its time",
                "shown" if share < 1 else "refuted",
            ],
            [
                f"better than waiting for the slowest: {here}",
                f"accuracy {agn.accuracy - waiting.accuracy:+.3f}",
                verdict(agn.accuracy - waiting.accuracy, math.hypot(agn.doubt, waiting.doubt)),
            ],
        ]
        gain, doubt = agn.accuracy - elastic.accuracy, math.hypot(agn.doubt, elastic.doubt)
        if ranks < 20:
            said = "shown" if gain <= 2 * doubt else "refuted"
            claims.append([f"no gain over elastic averaging with few: {here}", f"accuracy {gain:+.3f}", said])
        else:
            claims.append(
                [f"better than elastic averaging with many: {here}", f"accuracy {gain:+.3f}", verdict(gain, doubt)]
            )
        bars.append(Bar(f"share of plain's time to plain's accuracy, {here}", share, 1.0))
    return claims, bars


if __name__ == "__main__":
    sys.exit(main())
