"""What several ranks do together, scene by scene. Run by `ranks.launch`; judged in test_sync.py."""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import wholebatch as wb
from menagerie import BATCH_NORM, CALM, IGNORED, Animal, mean_square, mlp, num_labels, regression
from properties import flat, relative_error, sgd
from ranks import Place, Scenes
from wholebatch.core.batch import LogicalBatch
from wholebatch.engine.ranks import reduction, sync
from wholebatch.evidence import reference

SCENES = Scenes()
ROWS = 13
MLP = CALM["mlp"]
TEXTS = CALM["shared weights"]


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    """FSDP2: each child with weights of its own, and the rest with the root."""
    for child in model.children() if isinstance(model, nn.Sequential) else ():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model: nn.Module) -> nn.Module:
    """HSDP: two replicas of two shards each."""
    return sharded(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
    "each": sharded,
    "hsdp": replicated,
    "hsdp each": replicated,
}


ON = {2: ("bare", "ddp", "fsdp", "each"), 4: ("bare", "hsdp", "hsdp each")}
"""Which of them are tried on how many ranks."""


def part_of(animal: Animal, batch: Any, rows: Any) -> Any:
    return LogicalBatch(batch, **animal.cut).take(rows)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


class Trial:
    """The same animal twice: trained by all ranks together, and by the plain loop with the whole batch."""

    def __init__(
        self,
        animal: Animal,
        wrap: str = "bare",
        *,
        optimizer: Any = sgd,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        self.animal = animal
        self.model = animal.model(dtype)
        self.start = flat(self.model.parameters())
        self.wrapped = WRAPS[wrap](self.model)
        self.optimizer = optimizer(animal.trained(self.model))
        options = {"micro_batch": wb.Rows(2), "check": None, **animal.objective, **options}
        if wrap.endswith("each"):
            options["communication"] = "each"
        self.communication = {"communication": options["communication"]} if "communication" in options else {}
        self.clip_norm = options.get("clip_norm")
        self.accumulator = wb.Accumulator(
            self.wrapped, self.optimizer, options.pop("loss_fn", animal.loss_fn), **options
        )
        self.judge = animal.model(dtype)
        self.judge_optimizer = optimizer(animal.trained(self.judge))

    def reference(self, batch: Any) -> float:
        animal = self.animal
        rows = LogicalBatch(batch, **animal.cut).rows
        return float(
            reference.update(
                self.judge,
                self.judge_optimizer,
                animal.loss_fn,
                batch,
                targets=animal.targets or (lambda _batch: rows),
                reduction=animal.reduction,
                clip_norm=self.clip_norm,
            )
        )

    @property
    def weights(self) -> Tensor:
        whole = (each.full_tensor() if hasattr(each, "full_tensor") else each for each in self.model.parameters())
        return flat(whole)

    @property
    def off(self) -> float:
        """How far the change of the weights is from that of the plain loop."""
        return relative_error(self.weights - self.start, flat(self.judge.parameters()) - self.start)

    @property
    def moved(self) -> float:
        return float((self.weights - self.start).norm())


def shown(update: wb.Update) -> dict[str, Any]:
    return {
        name: value
        for name, value in update.to_dict().items()
        if name in ("loss", "targets", "rows", "micro_batches", "grad_norm", "skipped", "retries", "number")
    }


LEAVES_PASSES = hasattr(FSDPModule, "reset_iter_state")
"""Whether a rank can leave a pass of `fully_shard` in the middle."""


def for_each_wrap(
    name: str, scene: Callable[[Place, str], dict[str, Any]], ranks: tuple[int, ...] = (2, 4), *, in_step: bool = True
) -> None:
    for wrap in WRAPS:
        suits = tuple(each for each in ranks if wrap in ON[each] and (in_step or not wrap.endswith("each")))
        SCENES(f"{name} [{wrap}]", suits)(lambda place, wrap=wrap: scene(place, wrap))


IN_STEP: Any = {"micro_batch": wb.Rows(2), "communication": "each"}

NOT_IN_STEP = ("sparse gradients",)
"""What fully_shard itself cannot reduce."""


def every_animal(place: Place, wrap: str) -> dict[str, Any]:
    """Two updates of each animal, with a cut that differs between ranks."""
    found = {}
    for name, animal in CALM.items():
        if wrap == "each" and name in NOT_IN_STEP:
            continue
        trial = Trial(
            animal, wrap, optimizer=adamw if name != "sparse gradients" and name != "complex weights" else sgd
        )
        for rows in (ROWS, ROWS - 2):
            batch = animal.batch(rows, torch.float64)
            trial.accumulator.step(part_of(animal, batch, place.share(rows)))
            trial.reference(batch)
        found[name] = trial.off
    return found


for_each_wrap("every animal", every_animal, (2,))


def ragged(place: Place, wrap: str) -> dict[str, Any]:
    """T1, T2: rows hold 0 to 6 labels, and ranks different numbers of rows."""
    trial = Trial(TEXTS, wrap, clip_norm=0.1)
    updates, losses = [], []
    for rows in (ROWS, 8, ROWS):
        batch = TEXTS.batch(rows, torch.float64)
        updates.append(trial.accumulator.step(part_of(TEXTS, batch, place.share(rows))))
        losses.append(trial.reference(batch))
    return {
        "off": trial.off,
        "losses off": max(abs(one.loss - other) for one, other in zip(updates, losses, strict=True)),
        "updates": list(map(shown, updates)),
    }


for_each_wrap("ragged", ragged)


@SCENES("a mean over ranks is seen")
def mean_over_ranks(place: Place) -> dict[str, Any]:
    """The planted mistake: every rank counts as much as every other, whatever it holds."""
    before = sync.common_factor, sync.gradient_factor
    sync.common_factor, sync.gradient_factor = (lambda *_: 1.0), (lambda *_: 1 / place.ranks)
    try:
        trial = Trial(TEXTS)
        batch = TEXTS.batch(ROWS, torch.float64)
        trial.accumulator.step(part_of(TEXTS, batch, place.share(ROWS)))
        trial.reference(batch)
    finally:
        sync.common_factor, sync.gradient_factor = before
    return {"off": trial.off}


def loaders(place: Place, wrap: str) -> dict[str, Any]:
    """T3: each rank has another number of micro-batches, and its loader may or may not have a length."""
    sizes = [[3, 1, 2, 4, 1], [2, 3], [1], []][: place.ranks]
    starts = [sum(map(sum, sizes[:rank])) for rank in range(place.ranks)]
    batch = MLP.batch(sum(map(sum, sizes)), torch.float64)
    spans = []
    for start, cut in zip(starts, sizes, strict=True):
        ends = [start + sum(cut[: number + 1]) for number in range(len(cut))]
        spans.append([range(end - rows, end) for end, rows in zip(ends, cut, strict=True)])
    mine = [part_of(MLP, batch, span) for span in spans[place.rank]]
    found: dict[str, Any] = {}
    for kind, loader, per_window in (
        ("sized", mine, 2),
        ("unsized", lambda: iter(mine), 2),
        ("none at the end", [*mine, None], 2),
        ("ends at a window's end", lambda: iter(mine[:2]), 2),
        ("one a window", mine, 1),
    ):
        taken = [each[:2] for each in spans] if kind == "ends at a window's end" else spans
        trial = Trial(MLP, wrap)
        updates = []
        for epoch in range(2):
            made = list(trial.accumulator.updates(loader() if callable(loader) else loader, micro_batches=per_window))
            updates += made
            for number in range(len(made)):
                rows = [
                    row
                    for each in taken
                    for span in each[number * per_window : (number + 1) * per_window]
                    for row in span
                ]
                if rows:
                    trial.reference(part_of(MLP, batch, rows))
            assert epoch < 2
        found[kind] = {"off": trial.off, "updates": list(map(shown, updates))}
    return found


for_each_wrap("loaders", loaders)


def nothing_here(place: Place, wrap: str) -> dict[str, Any]:
    """T4: no labels, no rows or no batch on the last rank; then nowhere."""
    found: dict[str, Any] = {}
    last = place.rank == place.ranks - 1
    for kind in ("no labels", "no rows", "None", "an empty list", "no window"):
        trial = Trial(TEXTS, wrap)
        batch = TEXTS.batch(ROWS, torch.float64)
        rows = [*place.share(ROWS)]
        if kind == "no labels":
            blank = [row for rank in [place.ranks - 1] for row in Place(rank, place.ranks).share(ROWS)]
            batch["labels"][blank] = IGNORED
            mine = part_of(TEXTS, batch, rows)
        else:
            gone = set(Place(place.ranks - 1, place.ranks).share(ROWS))
            mine = part_of(TEXTS, batch, [] if last else rows)
            batch = part_of(TEXTS, batch, [row for row in range(ROWS) if row not in gone])
            if last and kind in ("None", "an empty list"):
                mine = None if kind == "None" else []
        if kind == "no window" and wrap.endswith("each"):
            continue  # in a loop of one's own nobody can make a pass in its stead
        if kind == "no window":
            with trial.accumulator.window() as window:
                if not last:
                    window.backward(TEXTS.loss_fn(trial.wrapped, mine), num_labels(mine), rows=len(mine["labels"]))
            update = window.update
        else:
            update = trial.accumulator.step(mine)
        trial.reference(batch)
        found[kind] = {"off": trial.off, "update": shown(update)}
    trial = Trial(TEXTS, wrap)
    batch = TEXTS.batch(place.ranks, torch.float64)
    batch["labels"][:] = IGNORED
    update = trial.accumulator.step(part_of(TEXTS, batch, [place.rank]))
    found["nowhere"] = {"moved": trial.moved, "update": shown(update) | {"loss": math.isnan(update.loss)}}
    return found


for_each_wrap("nothing here", nothing_here)


class Shortage:
    """Raises out of memory on one rank: in a forward pass, or when half of the gradients have arrived."""

    def __init__(self, model: nn.Module, place: Place, where: str, rows: int) -> None:
        self.active = place.rank == place.ranks - 1
        self.rows = rows
        self.where = where
        self.seen = 0
        self.times = 0
        if where == "backward":
            model[1].register_forward_hook(lambda _module, _input, output: self.watch(output))

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen = len(batch["x"])
        if self.where == "forward" and self.active and self.seen > self.rows:
            self.fail()
        return mean_square(model, batch)

    def watch(self, hidden: Tensor) -> None:
        if self.active and self.seen > self.rows and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self.fail())

    def fail(self) -> None:
        self.times += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def shortage(place: Place, wrap: str) -> dict[str, Any]:
    """T5: memory runs out on the last rank only; all cut finer together and make the same logical batch."""
    found: dict[str, Any] = {}
    batch = MLP.batch(32, torch.float64)
    mine = part_of(MLP, batch, place.share(32))
    for where in ("forward", "backward"):
        short = Trial(MLP, wrap, micro_batch=wb.Rows(8))
        trouble = Shortage(short.model, place, where, rows=2)
        accumulator = wb.Accumulator(
            short.wrapped,
            short.optimizer,
            trouble.loss_fn,
            micro_batch=wb.Rows(8),
            check=None,
            **short.communication,
        )
        torch.manual_seed(3)
        updates = [accumulator.step(mine) for _ in range(2)]
        state = torch.get_rng_state()
        calm = Trial(MLP, wrap, micro_batch=wb.Rows(2))
        torch.manual_seed(3)
        for _ in range(2):
            calm.accumulator.step(mine)
            short.reference(batch)
        found[where] = {
            "off": short.off,
            "equal": bool(torch.equal(short.weights, calm.weights)),
            "stream": bool(torch.equal(state, torch.get_rng_state())),
            "times": trouble.times,
            "retries": [each.retries for each in updates],
            "micro_batches": [each.micro_batches for each in updates],
            "reasons": accumulator.reasons,
        }
    return found


for_each_wrap("shortage", shortage, in_step=LEAVES_PASSES)


def shortage_in_a_loader(place: Place, wrap: str) -> dict[str, Any]:
    """Memory runs out on the last rank, in the first or in the last micro-batch of a window that a loader has cut."""
    found: dict[str, Any] = {}
    batch = MLP.batch(8 * place.ranks, torch.float64)
    first = 8 * place.rank
    mine = [part_of(MLP, batch, range(first, first + 4)), part_of(MLP, batch, range(first + 4, first + 8))]
    for where in ("forward", "backward"):
        for number in (1, 2):
            trial = Trial(MLP, wrap)
            trouble = Shortage(trial.model, place, where, rows=2)
            at: list[int] = []

            def loss_fn(
                model: nn.Module, rows: Any, trouble: Shortage = trouble, at: list[int] = at, number: int = number
            ) -> Tensor:
                at.append(len(rows["x"]))
                trouble.rows = 2 if at.count(4) == number else 4
                return trouble.loss_fn(model, rows)

            accumulator = wb.Accumulator(trial.wrapped, trial.optimizer, loss_fn, check=None)
            updates = list(accumulator.updates(mine, micro_batches=2))
            trial.reference(batch)
            found[f"{where} of {number}"] = {
                "off": trial.off,
                "times": trouble.times,
                "retries": [each.retries for each in updates],
            }
    return found


for_each_wrap("shortage in a loader", shortage_in_a_loader, in_step=False)


def short_after_sending(place: Place, wrap: str) -> dict[str, Any]:
    """What other ranks have been sent cannot be taken back by parts; the window can as a whole."""
    before, reduction.BUCKET_BYTES = reduction.BUCKET_BYTES, 100
    try:
        trial = Trial(MLP, wrap)
        trouble = Shortage(trial.model, place, "backward", rows=2)
        accumulator = wb.Accumulator(trial.wrapped, trial.optimizer, trouble.loss_fn, check=None)
        batch = MLP.batch(4, torch.float64)
        said = raised(lambda: list(accumulator.updates([batch], micro_batches=1)))
        moved = trial.moved
        trouble.active = False
        list(accumulator.updates([part_of(MLP, batch, range(2 * place.rank, 2 * place.rank + 2))], micro_batches=2))
        trial.reference(batch)
    finally:
        reduction.BUCKET_BYTES = before
    return {"said": said, "moved": moved, "off": trial.off}


for_each_wrap("short after gradients were sent", short_after_sending, (2,), in_step=False)


@SCENES("no finer cut")
def no_finer_cut(place: Place) -> dict[str, Any]:
    """T5: memory runs out in a single row of one rank."""
    trial = Trial(MLP)
    trouble = Shortage(trial.model, place, "forward", rows=0)
    accumulator = wb.Accumulator(trial.model, trial.optimizer, trouble.loss_fn, micro_batch=wb.Rows(4), check=None)
    said = raised(lambda: accumulator.step(part_of(MLP, MLP.batch(12, torch.float64), place.share(12))))
    return {"said": said, "moved": trial.moved}


class StumblingSGD(torch.optim.SGD):
    """Runs out of memory once, after half of the weights have moved."""

    stumbles = 0

    def step(self, closure: Any = None) -> Any:
        if self.stumbles:
            self.stumbles -= 1
            first = self.param_groups[0]["params"][0]
            with torch.no_grad():
                first.sub_(first.grad)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(closure)


@SCENES("shortage in the optimizer's step")
def shortage_in_the_step(place: Place) -> dict[str, Any]:
    trial = Trial(MLP, optimizer=lambda parameters: StumblingSGD(parameters, lr=1.0))
    trial.judge_optimizer = sgd(trial.judge.parameters())
    trial.optimizer.stumbles = int(place.rank == 0)
    batch = MLP.batch(ROWS, torch.float64)
    trial.accumulator.step(part_of(MLP, batch, place.share(ROWS)))
    trial.reference(batch)
    return {"off": trial.off}


def raised(do: Callable[[], object]) -> list[str]:
    """The kind of exception that leaves a call, and what it says."""
    try:
        do()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


class SampleError(Exception):
    pass


def failure(place: Place, wrap: str) -> dict[str, Any]:
    """The user's own code raises on one rank, wherever it is; and the run goes on."""
    found: dict[str, Any] = {}
    batch = MLP.batch(ROWS, torch.float64)
    mine = part_of(MLP, batch, place.share(ROWS))
    last = place.rank == place.ranks - 1

    def bad(model: nn.Module, batch: Any) -> Tensor:
        if last and failing[0]:
            raise SampleError("row 7 is broken")
        return mean_square(model, batch)

    def bad_targets(batch: Any) -> int:
        if last and failing[0]:
            raise SampleError("row 7 has no label")
        return len(batch["x"])

    def loader() -> Iterator[Any]:
        yield mine
        if last:
            raise SampleError("no file for row 7")
        yield mine

    def hooked(hidden: Tensor) -> None:
        if last and failing[0]:
            hidden.register_hook(fail_in_backward)

    def fail_in_backward(_gradient: Tensor) -> None:
        raise SampleError("in a hook")

    failing = [True]
    for kind in ("loss", "targets", "backward", "batch", "loader", "window", "rollback"):
        failing[0] = True
        if wrap.endswith("each") and kind in ("window", "rollback"):
            continue  # in a loop of one's own nobody knows how many passes are left
        trial = Trial(MLP, wrap, loss_fn=bad) if kind == "loss" else Trial(MLP, wrap)
        accumulator = trial.accumulator
        if kind == "targets":
            trial = Trial(MLP, wrap)
            accumulator = wb.Accumulator(
                trial.wrapped,
                trial.optimizer,
                mean_square,
                targets=bad_targets,
                micro_batch=wb.Rows(2),
                check=None,
                **trial.communication,
            )
        if kind == "backward":
            trial.model[1].register_forward_hook(lambda _module, _input, output: hooked(output))
        if kind == "batch" and last:
            said = raised(lambda accumulator=accumulator: accumulator.step({"x": torch.ones(2, 5), "y": torch.ones(3)}))
        elif kind == "loader":
            said = raised(lambda accumulator=accumulator: list(accumulator.updates(loader(), micro_batches=3)))
        elif kind in ("window", "rollback"):

            def own_loop(kind: str = kind, trial: Trial = trial) -> None:
                with trial.accumulator.window() as window:
                    window.backward(mean_square(trial.wrapped, mine), len(mine["x"]), rows=len(mine["x"]))
                    if last and kind == "rollback":
                        window.rollback()
                    elif last:
                        raise SampleError("in my loop")

            said = raised(own_loop)
        else:
            said = raised(lambda accumulator=accumulator: accumulator.step(mine))
        moved = trial.moved
        failing[0] = False
        accumulator.step(mine)
        trial.reference(batch)
        found[kind] = {"said": said, "moved": moved, "off": trial.off}
    return found


for_each_wrap("failure", failure, in_step=LEAVES_PASSES)


def random_faults(place: Place, wrap: str, seed: int = 0) -> dict[str, Any]:
    """One fault in each logical batch, on a rank and at a place drawn at random."""
    draw = random.Random(f"{seed} faults of {wrap} on {place.ranks}")
    trial = Trial(MLP, wrap, micro_batch=wb.Rows(4))
    fault: dict[str, Any] = {}

    def strike(kind: str, rows: int) -> None:
        if fault["kind"] != kind or fault["rank"] != place.rank or (kind.startswith("short") and rows == 1):
            return
        fault["seen"] += 1
        if fault["seen"] == fault["at"]:
            if kind in ("short", "short in backward"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            if kind in ("raise", "raise in backward"):
                raise SampleError(f"at {rows} rows")
            time.sleep(0.2)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        rows = len(batch["x"])
        for kind in ("short", "raise", "stop"):
            strike(kind, rows)
        loss = mean_square(model, batch)
        if fault["kind"] == "infinite" and fault["rank"] == place.rank:
            loss = loss * math.inf
        loss.register_hook(
            lambda _: [strike(kind, rows) for kind in ("short in backward", "raise in backward")] and None
        )
        return loss

    accumulator = wb.Accumulator(
        trial.wrapped, trial.optimizer, loss_fn, micro_batch=wb.Rows(4), check=None, **trial.communication
    )
    found = []
    kinds = ["none", "short", "short in backward", "raise", "raise in backward", "stop", "infinite", "empty"]
    for number in range(32):
        if number % len(kinds) == 0:
            draw.shuffle(kinds)
        fault.update(kind=kinds[number % len(kinds)], rank=draw.randrange(place.ranks), at=draw.randint(1, 2), seen=0)
        rows = draw.randint(place.ranks, 30)
        batch = MLP.batch(rows, torch.float64)
        mine = part_of(MLP, batch, place.share(rows))
        if fault["kind"] == "empty":
            gone = set(Place(fault["rank"], place.ranks).share(rows))
            batch = part_of(MLP, batch, [row for row in range(rows) if row not in gone])
            mine = None if place.rank == fault["rank"] else mine
        before = trial.weights
        made: list[wb.Update] = []
        said = raised(lambda mine=mine, made=made: made.append(accumulator.step(mine)))
        applied = bool(made) and made[0].applied
        if applied:
            trial.reference(batch)
        found.append(
            {
                "kind": fault["kind"],
                "said": said[0],
                "applied": applied,
                "moved": bool((trial.weights != before).any()),
                "struck": fault["seen"] >= fault["at"],
                "off": trial.off if trial.moved else 0.0,
            }
        )
    return {"faults": found}


for_each_wrap("random faults", random_faults, in_step=LEAVES_PASSES)


def not_finite(place: Place, wrap: str) -> dict[str, Any]:
    """T10: an infinity on one rank skips the update everywhere; in fp16 the scale is lowered once, on all ranks."""
    found: dict[str, Any] = {}
    for precision in ("fp32", "fp16"):
        spoilt = [True]

        def loss_fn(model: nn.Module, batch: Any, spoilt: list[bool] = spoilt) -> Tensor:
            loss = mean_square(model, batch)
            return loss * (float("inf") if spoilt[0] and place.rank == 0 else 1.0)

        trial = Trial(MLP, wrap, loss_fn=loss_fn, precision=precision, dtype=torch.float32)
        batch = MLP.batch(ROWS, torch.float32)
        mine = part_of(MLP, batch, place.share(ROWS))
        skipped = trial.accumulator.step(mine)
        moved = trial.moved
        scale = trial.accumulator._precision.scale()
        spoilt[0] = False
        applied = trial.accumulator.step(mine)
        trial.reference(batch)
        found[precision] = {
            "skipped": skipped.skipped,
            "moved": moved,
            "applied": applied.applied,
            "scale": None if scale is None else float(scale),
            "off": trial.off,
        }
    mine = part_of(MLP, MLP.batch(ROWS, torch.float64), place.share(ROWS))
    trial = Trial(MLP, wrap, on_nonfinite="raise", loss_fn=lambda model, batch: mean_square(model, batch) / place.rank)
    found["raise"] = {"said": raised(lambda: trial.accumulator.step(mine)), "moved": trial.moved}
    return found


for_each_wrap("not finite", not_finite, (2,))


@SCENES("sums in 16 bits")
def narrow(place: Place) -> dict[str, Any]:
    """T10: bfloat16 weights, summed in 32 bits or compensated over 40 micro-batches, against float64."""
    found = {}
    for kind, options in {
        "fp32": {},
        "compensated": {"accumulate_in": "compensated"},
        "weights": {"accumulate_in": "weights"},
        "bf16 on the wire": {"reduce_in": "bf16"},
    }.items():
        trial = Trial(MLP, dtype=torch.bfloat16, micro_batch=wb.Rows(1), **options)
        seen: list[Tensor] = []
        trial.optimizer.register_step_pre_hook(
            lambda *_, trial=trial, seen=seen: seen.append(flat(p.grad for p in trial.model.parameters()))
        )
        batch = MLP.batch(40, torch.bfloat16)
        trial.accumulator.step(part_of(MLP, batch, place.share(40)))
        wide = Trial(MLP, dtype=torch.float64)
        wide.model.load_state_dict({k: v.double() for k, v in MLP.model(torch.bfloat16).state_dict().items()})
        reference.gradient(wide.model, mean_square, {k: v.double() for k, v in batch.items()})
        right = flat(p.grad for p in wide.model.parameters())
        found[kind] = relative_error(seen[0], right)
    return found


@SCENES("weights gathered in 16 bits")
def mixed(place: Place) -> dict[str, Any]:
    """fully_shard with weights in 32 bits that are gathered, and trained with, in 16."""
    found: dict[str, Any] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    batch = MLP.batch(40, torch.float32)
    for communication in ("once", "each"):
        model = MLP.model(torch.float32)
        judge = MLP.model(torch.float32)
        fully_shard(model, mp_policy=policy)
        accumulator = wb.Accumulator(
            model,
            sgd(model.parameters()),
            lambda model, batch: mean_square(lambda x: model(x).float(), batch),
            micro_batch=wb.Rows(1),
            check=None,
            communication=communication,
        )
        start = flat(judge.parameters())
        accumulator.step(part_of(MLP, batch, place.share(40)))
        reference.update(judge, sgd(judge.parameters()), mean_square, batch)
        change = flat(each.full_tensor() for each in model.parameters()) - start
        found[communication] = relative_error(change, flat(judge.parameters()) - start)
    wide = fully_shard(MLP.model(torch.float32), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    accumulator = wb.Accumulator(wide, sgd(wide.parameters()), mean_square, check=None, micro_batch=wb.Rows(2))
    found["refused"] = raised(lambda: accumulator.step(batch))
    return found


@SCENES("in which dtype gradients travel")
def travel(place: Place) -> dict[str, Any]:
    found = {}
    for reduce_in in (None, "fp32", "bf16"):
        trial = Trial(MLP, reduce_in=reduce_in)
        batch = MLP.batch(ROWS, torch.float64)
        mine = part_of(MLP, batch, place.share(ROWS))
        trial.accumulator.step(mine)
        trial.reference(batch)
        found[str(reduce_in)] = {
            "off": trial.off,
            "sent": sent_by(lambda trial=trial, mine=mine: trial.accumulator.step(mine)),
        }
    return found


def sent_by(do: Callable[[], object]) -> list[tuple[str, int]]:
    """Each collective that a call makes, and its bytes, as the profiler has recorded them.

    By name, the largest first: Gloo's threads begin with what is sent side by side in any order.
    """
    nbytes = {"double": 8, "float": 4, "c10::BFloat16": 2, "unsigned char": 1, "long int": 8}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        do()
    sent = [
        (event.name, math.prod(event.input_shapes[0]) * nbytes[event.input_dtypes[0]])
        for event in profile.events()
        if event.name.startswith("gloo:")
    ]
    return sorted(sent, key=lambda each: (each[0], -each[1]))


def counted(place: Place, wrap: str) -> dict[str, Any]:
    """What is sent in one window, whatever the number of micro-batches, and in a window of each other kind."""
    found: dict[str, Any] = {}
    batch = MLP.batch(24, torch.float64)
    mine = part_of(MLP, batch, place.share(24))
    trial = Trial(MLP, wrap)
    trial.accumulator.step(mine)
    found["gradient"] = sum(each.numel() * 8 for each in trial.model.parameters())
    for rows in (1, 4, 24):
        again = Trial(MLP, wrap, micro_batch=wb.Rows(rows))
        again.accumulator.step(mine)
        found[f"step of {rows}"] = sent_by(lambda again=again: again.accumulator.step(mine))
    found["updates"] = sent_by(lambda: list(trial.accumulator.updates([mine, mine, mine], micro_batches=2)))
    found["unsized"] = sent_by(lambda: list(trial.accumulator.updates(iter([mine, mine]), micro_batches=2)))

    def own_loop() -> None:
        with trial.accumulator.window() as window:
            for _ in range(3):
                window.backward(mean_square(trial.wrapped, mine), len(mine["x"]))

    found["window"] = sent_by(own_loop)
    return found


for_each_wrap("counted", counted, (2,))


def by_default(place: Place, wrap: str) -> dict[str, Any]:
    """Nothing but what has to be said: the cut is planned, and the first batch is looked at."""
    found = {}
    for kind, options in {"auto": {"micro_batch": "auto"}, "budget": {"micro_batch": "auto", "memory": "2GiB"}}.items():
        trial = Trial(MLP, wrap, check="first", **options)
        batch = MLP.batch(ROWS, torch.float64)
        trial.accumulator.step(part_of(MLP, batch, place.share(ROWS)))
        trial.reference(batch)
        found[kind] = {"off": trial.off, "reasons": trial.accumulator.reasons}
    trial = Trial(MLP, wrap, check="first", micro_batch=wb.Rows(2))
    trial.accumulator.step(part_of(MLP, batch, place.share(ROWS)))
    trial.reference(batch)
    found["check"] = {"off": trial.off, "reasons": trial.accumulator.reasons}
    if wrap in ("bare", "ddp") and place.rank == 0:
        plan = wb.plan(trial.wrapped, trial.optimizer, mean_square, batch, memory="1GiB", timed=False)
        found["plan"] = {"off": 0.0, "reasons": [], "fits": plan.fits}
        verified = wb.verify(trial.wrapped, mean_square, batch)
        found["verify"] = {"off": verified.error, "reasons": [], "ok": verified.ok}
    return found


for_each_wrap("by default", by_default, (2,), in_step=False)


@SCENES("while the backward pass runs")
def overlapping(place: Place) -> dict[str, Any]:
    """Buckets are sent before the last backward pass is over, and not before."""
    before, reduction.BUCKET_BYTES = reduction.BUCKET_BYTES, 100
    try:
        trial = Trial(MLP, micro_batch=wb.Rows(2))
        told: list[str] = []
        wire = trial.accumulator._setup.group.wire
        add_up = wire.add_up
        wire.add_up = lambda tensor, **options: (told.append(f"sent {tensor.numel()}"), add_up(tensor, **options))[1]
        next(trial.model.parameters()).register_post_accumulate_grad_hook(lambda _: told.append("first layer done"))
        batch = MLP.batch(ROWS, torch.float64)
        for _ in range(2):
            told.clear()
            trial.accumulator.step(part_of(MLP, batch, place.share(ROWS)))
            trial.reference(batch)
    finally:
        reduction.BUCKET_BYTES = before
    return {"off": trial.off, "told": told, "passes": -(-len(place.share(ROWS)) // 2)}


@SCENES("gradients that arrive after their bucket was sent")
def nested(place: Place) -> dict[str, Any]:
    """A nested backward pass, as in reentrant checkpointing of a shared layer, comes back to a parameter."""
    found = {}
    for name, shared in {"shared": True, "once": False}.items():
        animal = Animal(lambda shared=shared: Nested(shared), regression, mean_square)
        trial = Trial(animal, micro_batch=wb.Rows(2))
        sent = []
        for _ in range(2):
            batch = animal.batch(ROWS, torch.float64)
            mine = part_of(animal, batch, place.share(ROWS))
            sent.append(len(sent_by(lambda trial=trial, mine=mine: trial.accumulator.step(mine))))
            trial.reference(batch)
        found[name] = {"off": trial.off, "sent": sent}
    return found


class Nested(nn.Module):
    """The same layer inside a recomputed block and, perhaps, outside of it."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.layer, x.detach().requires_grad_(), use_reentrant=True)
        return self.last(self.layer(hidden) if self.shared else hidden)


class Experts(nn.Module):
    """One expert a rank, and one that nobody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(5))

    def forward(self, x: Tensor, experts: list[int]) -> Tensor:
        return sum(self.experts[expert](x) for expert in experts)


@SCENES("parameters used on some ranks")
def experts(place: Place) -> dict[str, Any]:
    """What no rank has used is not moved by weight decay; what one has used is moved on all."""
    torch.manual_seed(0)
    model = Experts().double()
    judge = copy.deepcopy(model)
    optimizer, other = adamw(model.parameters()), adamw(judge.parameters())
    batch = MLP.batch(4 * place.ranks, torch.float64)
    mine = part_of(MLP, batch, range(4 * place.rank, 4 * place.rank + 4))
    accumulator = wb.Accumulator(
        model,
        optimizer,
        lambda model, batch: mean_square(lambda x: model(x, [place.rank]), batch),
        micro_batch=wb.Rows(2),
        check=None,
    )
    sent = [len(sent_by(lambda: accumulator.step(mine))) for _ in range(2)]
    for _ in range(2):
        other.zero_grad()
        sum(
            mean_square(lambda x, rank=rank: judge(x, [rank]), part_of(MLP, batch, range(4 * rank, 4 * rank + 4)))
            / place.ranks
            for rank in range(place.ranks)
        ).backward()
        other.step()
    idle = model.experts[place.ranks]
    return {
        "off": relative_error(flat(model.parameters()), flat(judge.parameters())),
        "idle moved": float((idle.weight - judge.experts[place.ranks].weight).detach().norm()),
        "states": len(optimizer.state),
        "sent": sent,
    }


@SCENES("two players")
def gan(place: Place) -> dict[str, Any]:
    """T7: two accumulators whose windows are open at the same time, as in a GAN."""
    first, second = Trial(MLP), Trial(MLP)
    batch = MLP.batch(ROWS, torch.float64)
    mine = part_of(MLP, batch, place.share(ROWS))
    with first.accumulator.window() as one, second.accumulator.window() as other:
        one.backward(mean_square(first.model, mine), len(mine["x"]))
        other.backward(mean_square(second.model, mine), len(mine["x"]))
    first.reference(batch)
    second.reference(batch)
    return {"off": max(first.off, second.off)}


@SCENES("unequal at the start")
def unequal(place: Place) -> dict[str, Any]:
    """Weights are those of rank 0; another model, or other options, are an error on every rank."""
    torch.manual_seed(place.rank)
    model = mlp().double()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, check=None, micro_batch=wb.Rows(2))
    accumulator.step(MLP.batch(4, torch.float64))
    torch.manual_seed(0)
    judge = mlp().double()
    reference.update(judge, sgd(judge.parameters()), mean_square, MLP.batch(4, torch.float64))
    other = nn.Linear(5, 3 + place.rank)
    apart = wb.Accumulator(other, sgd(other.parameters()), mean_square)
    rate = torch.optim.SGD(model.parameters(), lr=1.0 + place.rank)
    hasty = wb.Accumulator(model, rate, mean_square)
    return {
        "off": relative_error(flat(model.parameters()), flat(judge.parameters())),
        "reasons": accumulator.reasons,
        "another model": raised(lambda: apart.step(MLP.batch(4, torch.float32))),
        "another rate": raised(lambda: hasty.step(MLP.batch(4, torch.float64))),
    }


@SCENES("refused")
def refused(_place: Place) -> dict[str, Any]:
    """What is not exact over ranks is an error, not another update."""
    batch = MLP.batch(6, torch.float64)

    def norm(batch_norm: str = "refuse") -> object:
        model = BATCH_NORM.model()
        return wb.Accumulator(
            model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(9), check=None, batch_norm=batch_norm
        ).step(batch)

    def consuming() -> object:
        model = MLP.model()
        return wb.Accumulator(model, wb.AdamA(model.parameters()), mean_square)

    def static() -> object:
        model = DistributedDataParallel(MLP.model(), static_graph=True)
        return wb.Accumulator(model, sgd(model.parameters()), mean_square)

    return {
        "batch norm": raised(norm),
        "batch norm of parts": raised(lambda: norm("per_micro_batch")),
        "AdamA": raised(consuming),
        "static graph": raised(static),
        "dtype": raised(lambda: wb.Accumulator(MLP.model(), [], reduce_in="int8")),
    }
