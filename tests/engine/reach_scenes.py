"""Micro-batches of several ranks that meet, scene by scene. Run by `ranks.launch`; judged in test_reach.py."""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from coupled import FEEDING, MEETING, NORMED, Towers, length_of, pairs
from engine.sync_scenes import WRAPS
from menagerie import Animal
from properties import flat, relative_error, state_of
from ranks import Place, Scenes
from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.meetings.reach import Near
from wholebatch.engine.ranks import sync
from wholebatch.evidence import reference

SCENES = Scenes()
ROWS = 11
COUPLED = {**MEETING, **FEEDING, **NORMED}


class Both:
    """The same animal twice: trained by all ranks together, and by the plain loop with the whole batch."""

    def __init__(
        self,
        animal: Animal,
        place: Place,
        *,
        exact: bool = False,
        dtype: torch.dtype = torch.float64,
        wrap: Any = None,
        **options: Any,
    ) -> None:
        self.animal, self.place = animal, place
        self.model, self.judge = animal.model(dtype), animal.model(dtype)
        if exact:
            wb.exact_batch_norm(self.model)
        self.batch = animal.batch(ROWS, dtype)
        self.start = flat(self.judge.parameters())
        model = self.model if wrap is None else wrap(self.model)
        self.steps = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.judge_steps = torch.optim.SGD(self.judge.parameters(), lr=0.05)
        options = {"micro_batch": wb.Rows(3), "check": None, **animal.objective, **options}
        self.accumulator = wb.Accumulator(model, self.steps, options.pop("loss_fn", animal.loss_fn), **options)

    @property
    def mine(self) -> Any:
        return self.rows(self.place.share(ROWS))

    def rows(self, rows: Any) -> Any:
        return LogicalBatch(self.batch, **self.animal.cut).take(rows)

    def judge_update(self, rows: Any = range(ROWS)) -> None:
        targets = self.animal.targets or (lambda _: len(rows))
        reference.update(
            self.judge,
            self.judge_steps,
            self.animal.loss_fn,
            self.rows(rows),
            targets=targets,
            reduction=self.animal.reduction,
        )

    def off(self) -> list[float]:
        """How far weights, as they have changed, and buffers are from those of one process."""
        right = flat(self.judge.parameters()) - self.start
        whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in self.model.parameters()]
        found = relative_error(flat(whole) - self.start, right)
        buffers = [each.double().flatten() for each in self.model.buffers()]
        if not buffers:
            return [found, 0.0]
        return [found, relative_error(torch.cat(buffers), flat(self.judge.buffers()))]


def raised(run: Any) -> list[str]:
    try:
        run()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


@SCENES("every animal", (2, 3))
def every_animal(place: Place) -> dict[str, Any]:
    """Uneven parts, and so different numbers of micro-batches; three updates."""
    found: dict[str, Any] = {}
    for name, animal in COUPLED.items():
        for lockstep in ("auto", "joined"):
            both = Both(animal, place, exact=name in NORMED, lockstep=lockstep)
            for _ in range(3):
                update = both.accumulator.step(both.mine)
                both.judge_update()
            assert update.rows == ROWS
            found[f"{name}, {lockstep}"] = both.off()
    return found


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))


@SCENES("wrapped")
def wrapped(place: Place) -> dict[str, Any]:
    """In DDP, whose buffers are its own affair elsewhere, and with FSDP2."""
    found: dict[str, Any] = {}
    for wrap in ("ddp", "fsdp"):
        for name in ("hard negatives", "twice gathered", "MLP", "ResNet"):
            animal = COUPLED[name]
            if name not in NORMED:
                animal = Animal(plain_mlp, animal.batch, animal.loss_fn)
            both = Both(animal, place, exact=name in NORMED, wrap=WRAPS[wrap])
            for _ in range(2):
                both.accumulator.step(both.mine)
                both.judge_update()
            found[f"{name}, {wrap}"] = both.off()
    return found


@SCENES("by length")
def by_length(place: Place) -> dict[str, Any]:
    found = {}
    for name in ("two-sided", "two-sided by hand", "twice gathered", "triplets"):
        both = Both(COUPLED[name], place, micro_batch=wb.Tokens(9, length=length_of))
        for _ in range(2):
            both.accumulator.step(both.mine)
            both.judge_update()
        found[name] = both.off()
    return found


@SCENES("in fp32")
def in_fp32(place: Place) -> dict[str, Any]:
    found = {}
    for name in ("two-sided", "MLP", "twice gathered"):
        both = Both(COUPLED[name], place, exact=name in NORMED, dtype=torch.float32)
        both.accumulator.step(both.mine)
        both.judge_update()
        found[name] = both.off()[0] / torch.finfo(torch.float32).eps
    return found


@SCENES("apart")
def apart(place: Place) -> dict[str, Any]:
    """The mistake: micro-batches meet, but only those of their own rank."""
    found = {}
    kept = sync.Many.reach
    sync.Many.reach = lambda _self, cut, micro_batches, *_: Near(cut, micro_batches)  # type: ignore[method-assign, assignment]
    try:
        for name in ("two-sided", "MLP", "balanced experts", "twice gathered"):
            both = Both(COUPLED[name], place, exact=name in NORMED)
            both.accumulator.step(both.mine)
            both.judge_update()
            found[name] = both.off()
    finally:
        sync.Many.reach = kept  # type: ignore[method-assign]
    return found


@SCENES("idle")
def idle(place: Place) -> dict[str, Any]:
    """A rank has no rows in an update, the first of which nobody knows to meet."""
    found = {}
    for name in ("two-sided", "twice gathered", "MLP"):
        for lockstep in ("auto", "joined"):
            both = Both(COUPLED[name], place, exact=name in NORMED, lockstep=lockstep)
            for turn in range(3):
                whole = turn == 1
                if whole:
                    both.accumulator.step(both.mine)
                    both.judge_update()
                else:
                    part = range(5) if turn == 0 else range(4, 11)
                    giver = turn % 3 // 2
                    both.accumulator.step(both.rows(part) if place.rank == giver else None)
                    both.judge_update(part)
            found[f"{name}, {lockstep}"] = both.off()
    return found


@SCENES("loaders")
def loaders(place: Place) -> dict[str, Any]:
    """Windows of two micro-batches: three, three, and one on each rank, and one that only the first rank has."""
    parts = ([range(3), range(3, 5), range(8, 11), range(5, 8)], [range(5, 8)], [range(8, 11)])
    mine = [parts[0], [parts[1][0], parts[0][0]]][place.rank]
    windows = [
        [*parts[0][:2], *[parts[1][0], parts[0][0]]],
        [*parts[0][2:]],
    ]
    found = {}
    for name in ("two-sided", "twice gathered", "MLP"):
        both = Both(COUPLED[name], place, exact=name in NORMED)
        loader = [both.rows(part) for part in mine]
        for stream in (loader, iter(loader)):
            updates = list(both.accumulator.updates(stream, micro_batches=2))
            for window in windows:
                both.judge_update([row for part in window for row in part])
            assert len(updates) == 2
        found[name] = both.off()
    return found


@SCENES("nothing to learn")
def nothing_to_learn(place: Place) -> dict[str, Any]:
    """All targets are masked on one rank, whose rows are the negatives of the others."""

    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        left, right = model(batch["a"]), model(batch["b"])
        everyone, own = wb.gather(right), wb.own_rows(right)
        each = F.cross_entropy(left @ everyone.T, own, reduction="none")
        counts = batch["counts"]
        return (each * counts).sum(), counts.sum()

    def batch_of(rows: int, dtype: torch.dtype) -> Any:
        return {**pairs(rows, dtype), "counts": (torch.arange(rows) < 7).to(dtype)}

    animal = Animal(Towers, batch_of, loss_fn)
    found = {}
    for lockstep in ("replay", "joined"):
        both = Both(animal, place, lockstep=lockstep)
        for _ in range(2):
            both.accumulator.step(both.mine)
            both.judge_update()
        found[lockstep] = both.off()
    return found


@SCENES("masks")
def masks(place: Place) -> dict[str, Any]:
    """Padding on all ranks; the judge has the same layer over the undivided batch."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            with wb.mask_batch_norm(kept):
                return self.net(x)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["a"], batch["length"] > 3), batch["b"])

    both = Both(Animal(lambda: wb.exact_batch_norm(Masked()), pairs, loss_fn), place)
    for _ in range(2):
        both.accumulator.step(both.mine)
        both.judge_update()
    return {"off": both.off()}


@SCENES("failures")
def failures(place: Place) -> dict[str, Any]:
    """One rank fails, wherever it is: no rank moves, both say why, and the next update is right."""
    due: list[str] = []

    def fail(*_: Any) -> None:
        due.clear()
        raise ValueError("of my own")

    def coupled(model: Any, batch: Any, *, feeding: bool) -> Tensor:
        where = due[0] if due and place.rank == 1 else ""
        if where == "before":
            fail()
        x = model(batch["a"])
        everyone = wb.gather(x)
        if where == "between":
            fail()
        y = (x @ everyone.T).softmax(1) @ everyone if feeding else model(batch["b"])
        loss = F.cross_entropy(x @ everyone.T, wb.own_rows(x)) + (y * wb.sum_over_batch(y.sum(0))).mean()
        if where == "after":
            fail()
        if where == "backward" and x.requires_grad:
            x.register_hook(fail)
        return loss

    found: dict[str, Any] = {}
    for feeding in (False, True):
        animal = Animal(Towers, pairs, partial(coupled, feeding=feeding))
        for where in ("before", "between", "after", "backward"):
            for known in (False, True):
                both = Both(animal, place)
                if known:
                    both.accumulator.step(both.mine)
                    both.judge_update()
                due.append(where)
                before = state_of(both.model, both.steps)
                said = raised(lambda both=both: both.accumulator.step(both.mine))
                after = state_of(both.model, both.steps)
                due.clear()
                both.accumulator.step(both.mine)
                both.judge_update()
                changed = [key for key in before if before[key] != after[key]]
                found[f"{feeding}, {where}, {known}"] = [*said, changed, both.off()]
    return found


@SCENES("shortage")
def shortage(place: Place) -> dict[str, Any]:
    """In a pass of one rank: the first, in the middle of a window, or its last, when others are done with theirs."""
    found: dict[str, Any] = {}
    for name, way, due in product(("two-sided", "twice gathered", "MLP"), ("step", "updates"), (3, 4, 5, 6)):
        both = Both(COUPLED[name], place, exact=name in NORMED)
        plain, passes, failed = both.animal.loss_fn, [], []

        def loss_fn(
            model: Any, batch: Any, plain: Any = plain, passes: Any = passes, failed: Any = failed, due: int = due
        ) -> Any:
            passes.append(1)
            loss = plain(model, batch)
            if place.rank == 1 and not failed and len(passes) >= due and len(next(iter(batch.values()))) > 1:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

        accumulator = wb.Accumulator(both.model, both.steps, loss_fn, micro_batch=wb.Rows(3), check=None)
        parts = LogicalBatch(both.mine)
        loaded = [parts.take(range(start, min(start + 3, parts.rows))) for start in range(0, parts.rows, 3)]
        retries = 0
        for _ in range(3):
            if way == "step":
                retries += accumulator.step(both.mine).retries
            else:
                (update,) = accumulator.updates(loaded, micro_batches=len(loaded))
                retries += update.retries
            both.judge_update()
        found[f"{name}, {way}, {due}"] = [retries, both.off()]
    return found


@SCENES("shortage in the first check")
def shortage_in_the_first_check(place: Place) -> dict[str, Any]:
    """One rank cuts its rows, and runs out of memory when they are compared; then another, which has to cut too."""
    both = Both(COUPLED["MLP"], place, exact=True)
    plain, due = both.animal.loss_fn, [1]

    def loss_fn(model: Any, batch: Any) -> Any:
        if due:
            due.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, batch)

    rows = LogicalBatch(both.mine).rows
    size = rows if place.rank else rows - 1
    accumulator = wb.Accumulator(both.model, both.steps, loss_fn, micro_batch=wb.Rows(size))
    update = accumulator.step(both.mine)
    both.judge_update()
    return {"retries": update.retries, "off": both.off(), "cut": [size, update.micro_batches]}


@SCENES("other places")
def other_places(place: Place) -> dict[str, Any]:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        x = model(batch["a"])
        if place.rank == 0:
            return (x @ wb.gather(x).T).mean()
        return (x @ wb.gather(x * 1).T).mean()

    def fewer(model: Any, batch: Any) -> Tensor:
        x = model(batch["a"])
        total = wb.sum_over_batch(x.sum(0))
        if place.rank == 0:
            total = total + wb.sum_over_batch(x.square().sum(0)).detach()
        return (x * total).mean()

    def nowhere(model: Any, batch: Any) -> Tensor:
        x = model(batch["a"])
        return (x * (wb.sum_over_batch(x.sum(0)) if place.rank == 0 else 1)).mean()

    def unlike(model: Any, batch: Any) -> Tensor:
        x = model(batch["a"])
        return (x * wb.sum_over_batch(x.sum(0)[: 3 + place.rank]).sum()).mean()

    found = {}
    for name, each in (("other", loss_fn), ("fewer", fewer), ("nowhere", nowhere), ("unlike", unlike)):
        both = Both(COUPLED["two-sided"], place, loss_fn=each)
        found[name] = raised(lambda both=both: both.accumulator.step(both.mine))
        again = Both(COUPLED["two-sided"], place)
        again.accumulator.step(again.mine)
        again.judge_update()
        found[f"{name}, then"] = again.off()
    return found


@SCENES("numbers")
def numbers_and_masks(place: Place) -> dict[str, Any]:
    seen: list[Any] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        x = model(batch["a"])
        seen[:] = [
            wb.sum_over_batch(len(x)),
            wb.gather(batch["label"] == 1).tolist(),
            wb.gather(batch["label"]).tolist(),
            [*wb.own_rows(x).tolist()],
        ]
        return x.mean()

    both = Both(COUPLED["two-sided"], place, loss_fn=loss_fn, micro_batch=wb.Rows(4))
    both.accumulator.step(both.mine)
    return {"seen": seen, "labels": both.batch["label"].tolist()}


@SCENES("own window")
def own_window(place: Place) -> dict[str, Any]:
    both = Both(COUPLED["two-sided"], place)

    def by_hand() -> None:
        with both.accumulator.window() as window:
            window.backward(both.animal.loss_fn(both.model, both.mine), len(both.mine["a"]))

    return {"said": raised(by_hand)}


@SCENES("penalty")
def penalty(place: Place) -> dict[str, Any]:
    """A gradient inside the loss, through layers that look at the rows of all ranks; then an update without it."""
    late = [True]

    def loss_fn(model: Any, batch: Any) -> Tensor:
        x = batch["a"].clone().requires_grad_()
        said = model(x)
        loss = F.mse_loss(said, batch["b"])
        if not late:
            return loss
        (slope,) = torch.autograd.grad(wb.gather(said).sum(), x, create_graph=True)
        return loss + slope.square().sum(1).mean()

    both = Both(COUPLED["MLP"], place, exact=True, loss_fn=loss_fn)
    before = flat(both.model.parameters())
    said = raised(lambda: both.accumulator.step(both.mine))
    moved = relative_error(flat(both.model.parameters()), before)
    late.clear()
    both.accumulator.step(both.mine)
    both.judge_update()
    return {"said": said, "moved": moved, "then": both.off()}
