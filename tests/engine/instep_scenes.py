"""What ranks do together that wait for each other with every pass. Run by `ranks.launch`; judged in test_instep.py."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import wholebatch as wb
from engine.sync_scenes import IN_STEP, LEAVES_PASSES, MLP, ROWS, SampleError, Shortage, Trial, part_of, raised, sharded
from menagerie import mean_square, mlp
from properties import flat, relative_error, sgd
from ranks import Place, Scenes
from wholebatch.evidence import reference

SCENES = Scenes()


@SCENES("a failure before the first pass")
def early_failure_in_step(place: Place) -> dict[str, Any]:
    """Ranks that wait for each other with every pass still hear of what went wrong before the first."""
    trial = Trial(MLP, "each")
    batch = MLP.batch(ROWS, torch.float64)
    mine = part_of(MLP, batch, place.share(ROWS))
    said = raised(lambda: trial.accumulator.step({"x": torch.ones(2, 5), "y": torch.ones(3)} if place.rank else mine))
    moved = trial.moved
    trial.accumulator.step(mine)
    trial.reference(batch)
    return {"said": said, "moved": moved, "off": trial.off}


@SCENES("a shortage in a loader", (2,) if LEAVES_PASSES else ())
def shortage_in_a_loader_in_step(place: Place) -> dict[str, Any]:
    """A loader's earlier micro-batches are gone, so the window cannot be made again; the next one can."""
    trial = Trial(MLP, "each")
    trouble = Shortage(trial.model, place, "backward", rows=2)
    active, trouble.active = trouble.active, False
    accumulator = wb.Accumulator(trial.wrapped, trial.optimizer, trouble.loss_fn, check=None, **IN_STEP)
    batch = MLP.batch(16, torch.float64)
    mine = [part_of(MLP, batch, range(start, start + 4)) for start in (8 * place.rank, 8 * place.rank + 4)]
    list(accumulator.updates(mine, micro_batches=2))
    trial.reference(batch)
    before, trouble.active = trial.weights, active
    said = raised(lambda: list(accumulator.updates(mine, micro_batches=2)))
    moved, trouble.active = float((trial.weights - before).norm()), False
    list(accumulator.updates(mine, micro_batches=2))
    trial.reference(batch)
    return {"said": said, "moved": moved, "off": trial.off}


@SCENES("a mean over nothing")
def mean_over_nothing_in_step(place: Place) -> dict[str, Any]:
    """The first row of one rank, and then every row of it, has no target, and its loss is 0 / 0."""

    def count(batch: Any) -> int:
        return int(batch["counts"].sum())

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        errors = (model(batch["x"]) - batch["y"]).square().mean(dim=1) * batch["counts"]
        return errors.sum() / batch["counts"].sum()

    trial = Trial(MLP, "each", loss_fn=loss_fn, targets=count)
    skipped = []
    for blank in (8, range(8, 12)):
        batch = {**MLP.batch(12, torch.float64), "counts": torch.ones(12, dtype=torch.float64)}
        batch["counts"][blank] = 0
        rows = range(8) if place.rank == 0 else range(8, 12)
        skipped.append(trial.accumulator.step(part_of(MLP, batch, rows)).skipped)
        reference.update(trial.judge, trial.judge_optimizer, loss_fn, batch, targets=count)
    return {"off": trial.off, "skipped": skipped}


@SCENES("targets that the loss counts")
def counted_by_the_loss_in_step(place: Place) -> dict[str, Any]:
    """Rows of one rank turn out to hold no target when the forward pass has sent something already."""

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        errors = (model(batch["x"]) - batch["y"]).square().mean(dim=1) * batch["counts"]
        return errors.sum(), int(batch["counts"].sum())

    def of_none(model: nn.Module, batch: Any) -> Any:
        counted = loss_fn(model, batch)
        return counted if counted[1] else None

    def count(batch: Any) -> int:
        return int(batch["counts"].sum())

    batch = {**MLP.batch(12, torch.float64), "counts": torch.ones(12, dtype=torch.float64)}
    batch["counts"][torch.tensor([2, 3, 8, 9, 10, 11])] = 0
    rows = range(8) if place.rank == 0 else range(8, 12)
    mine = part_of(MLP, batch, rows)
    found = {}
    for known in (True, False):
        trial = Trial(MLP, "each", loss_fn=loss_fn)
        trial.accumulator._setup.group._traffic.can_go_back &= known  # or as with an older PyTorch
        trial.accumulator.step(mine)
        spans = [mine, {name: each[2:4] for name, each in mine.items()}] if place.rank else [mine]
        list(trial.accumulator.updates(spans, micro_batches=len(spans)))
        for _ in range(2):
            reference.update(trial.judge, trial.judge_optimizer, loss_fn, batch, targets=count, reduction="sum")
        found[f"off, {known=}"] = trial.off
    said, moved = [], []
    for first in (0, 1):  # target of the first row, which stands in for passes of weight zero
        mine["counts"][0 if place.rank else slice(None)] = first if place.rank else 1
        trial = Trial(MLP, "each", loss_fn=of_none)
        said.append(raised(lambda trial=trial: trial.accumulator.step(mine))[1])
        moved.append(trial.moved)
    return found | {"said": said, "moved": moved}


@SCENES("weights outside of their layer")
def weights_outside_in_step(place: Place) -> dict[str, Any]:
    """A penalty of the weights would reach this rank's shares alone, and count there by this rank's targets."""

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, int, Tensor]:
        return MLP.loss_fn(model, batch) * len(batch["x"]), len(batch["x"]), model[0].weight.square().sum()

    trial = Trial(MLP, "each", loss_fn=loss_fn)
    mine = part_of(MLP, MLP.batch(8, torch.float64), range(6) if place.rank else range(6, 8))
    return {"said": raised(lambda: trial.accumulator.step(mine)), "moved": trial.moved}


@SCENES("no way back")
def no_way_back(place: Place) -> dict[str, Any]:
    """As with an older PyTorch: all ranks fail at once, since nobody could let the others out of a pass."""
    found: dict[str, Any] = {"said": [], "next": []}
    batch = MLP.batch(8, torch.float64)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), SampleError("row 7 is broken")):
        trial = Trial(MLP, "each", loss_fn=lambda *_, error=error: fail(error))
        trial.accumulator._setup.group._traffic.can_go_back = False
        found["said"].append(raised(lambda trial=trial: trial.accumulator.step(batch)))
        found["next"].append(raised(lambda trial=trial: trial.accumulator.step(batch))[0])
    return found | {"moved": trial.moved}


def fail(error: Exception) -> Tensor:
    raise error


@SCENES("passes that differ")
def passes_that_differ(place: Place) -> dict[str, Any]:
    """A layer that all ranks leave out of some passes is sent less often than was expected."""
    trial = Trial(MLP, "each")
    group: Any = trial.accumulator._setup.group
    batch = MLP.batch(8, torch.float64)
    trial.accumulator.step(batch)
    steady = group._traffic.can_go_back
    trial.accumulator._making._forward.objective.loss_fn = lambda model, batch: model[0](batch["x"]).sum()
    trial.accumulator.step(batch)
    return {"steady": steady, "unsteady": group._traffic.can_go_back}


class FullyShardedDataParallel(nn.Sequential):
    """Stands in for the older wrapper, which needs an accelerator."""


@SCENES("refused")
def refused_in_step(_place: Place) -> dict[str, Any]:
    model = sharded(mlp())
    older = FullyShardedDataParallel(mlp())
    half = mlp().double()
    fully_shard(half[0])

    def each(model: nn.Module, **options: Any) -> wb.Accumulator:
        options = {"micro_batch": wb.Rows(2), "communication": "each", **options}
        return wb.Accumulator(model, sgd(model.parameters()), mean_square, **options)

    return {
        "auto": raised(lambda: each(model, micro_batch="auto")),
        "reduce_in": raised(lambda: each(model, reduce_in="bf16")),
        "a choice": raised(lambda: each(model, communication="twice")),
        "half": raised(lambda: each(half).step(MLP.batch(4, torch.float64))),
        "older": raised(lambda: wb.Accumulator(older, sgd(older.parameters()), mean_square)),
    }


@SCENES("sums in 16 bits")
def narrow_in_step(place: Place) -> dict[str, Any]:
    """One row 600 times: in bfloat16 the sum stands still when it is 256 times as large as what is added."""
    found: dict[str, Any] = {}
    row = part_of(MLP, MLP.batch(4, torch.bfloat16), [0])
    wide = MLP.model(torch.bfloat16).double()
    reference.gradient(wide, mean_square, {name: each.double() for name, each in row.items()})
    right = flat(each.grad for each in wide.parameters())
    mine = {name: each.expand(300, *each.shape[1:]) for name, each in row.items()}
    for accumulate_in in ("fp32", "compensated", "weights"):
        trial = Trial(MLP, "each", dtype=torch.bfloat16, micro_batch=wb.Rows(1), accumulate_in=accumulate_in)
        seen: list[Tensor] = []
        trial.optimizer.register_step_pre_hook(
            lambda *_, trial=trial, seen=seen: seen.append(flat(p.grad.full_tensor() for p in trial.model.parameters()))
        )
        update = trial.accumulator.step(mine)
        found[accumulate_in] = {
            "off": relative_error(seen[0], right),
            "norm off": abs(update.grad_norm / float(right.norm()) - 1),
        }
    return found


@SCENES("a loop of one's own")
def own_loop_in_step(place: Place) -> dict[str, Any]:
    """Equally many passes, in a window that ranks close together; clipped, with an inf on one rank first."""
    trial = Trial(MLP, "each", clip_norm=0.1)
    batch = MLP.batch(8 * place.ranks, torch.float64)
    mine = [part_of(MLP, batch, range(8 * place.rank + start, 8 * place.rank + start + 4)) for start in (0, 4)]
    skipped = []
    for spoilt in (True, False):
        with trial.accumulator.window() as window:
            for rows in mine:
                loss = mean_square(trial.wrapped, rows)
                window.backward(loss * math.inf if spoilt and place.rank else loss, 4, rows=4)
        skipped.append(window.update.skipped)
    trial.reference(batch)
    return {"off": trial.off, "skipped": skipped, "rows": window.update.rows}
