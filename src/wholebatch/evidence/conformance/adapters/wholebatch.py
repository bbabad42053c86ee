"""wholebatch: `updates` over a loader of micro-batches, `step` over logical batches, or windows in one's own loop.

Batch norm is made exact. Losses that compare or count rows are those of `wb.losses`, and a layer that standardises sums
by `wb.sum_over_batch`, so that they see the whole logical batch. On several ranks each has a loader of its own rows,
and the model is bare, in DistributedDataParallel, or sharded by FSDP2.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.core.record import Update
from wholebatch.core.split import Rows
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.checkpoint.saving import load, save
from wholebatch.engine.losses import batch_hard_triplet, info_nce, load_balancing
from wholebatch.engine.meetings.exactnorm import exact_batch_norm
from wholebatch.engine.meetings.meeting import sum_over_batch
from wholebatch.evidence.conformance import encoders
from wholebatch.evidence.conformance.coupled import MARGIN, hard_triplets, in_batch_negatives
from wholebatch.evidence.conformance.scenes import BALANCE, ROWS, balance
from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import LOOP, BadSample, MicroBatch, PairTask, Task, Trained, join, steps_of


def train(task: Task | PairTask) -> Trained:
    """Train with `wb.Accumulator`."""
    if isinstance(task, PairTask):
        return _train_players(task)
    return in_processes(task, _train_one) if task.ranks == 1 else _train_on_ranks(task, lambda model: model)


def train_ddp(task: Task | PairTask) -> Trained:
    """Train on several ranks, in DistributedDataParallel."""
    assert isinstance(task, Task)
    return _train_on_ranks(task, nn.parallel.DistributedDataParallel)


def train_fsdp2(task: Task | PairTask) -> Trained:
    """Train on several ranks, sharded."""
    from torch.distributed.fsdp import fully_shard

    assert isinstance(task, Task)

    def shard(model: nn.Module) -> nn.Module:
        scalars = {weight for weight in model.parameters() if weight.ndim == 0}  # which fully_shard cannot spread
        fully_shard(model, mesh=init_device_mesh("cpu", (task.ranks,)), ignored_params=scalars)
        return model

    return _train_on_ranks(task, shard)


def _train_on_ranks(task: Task, wrap: Callable[[nn.Module], nn.Module]) -> Trained:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    plain = meeting(task.make_model())
    model = wrap(plain)

    def loss_fn(model: nn.Module, micro_batch: MicroBatch) -> Tensor | tuple[Tensor, Tensor]:
        if task.compares is not None:
            return compared(task, model, micro_batch)
        return task.loss_sum(model, micro_batch), task.targets(micro_batch)

    accumulator = Accumulator(model, SGD(model.parameters(), lr=task.lr), loss_fn)
    losses = []
    for _ in range(task.epochs):
        own = task.epoch[distributed.get_rank() :: task.ranks]
        losses += [
            update.loss for update in accumulator.updates(own, micro_batches=task.window) if update.skipped is None
        ]
    whole = task.make_model()
    state = {
        name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in plain.state_dict().items()
    }
    whole.load_state_dict(state)
    return Trained(whole, len(losses), losses)


def _train_one(task: Task, process: Process) -> Trained:
    model = exact_batch_norm(meeting(task.make_model()))
    optimizers = [SGD(weights, lr=lr) for weights, lr in task.parts(model)]
    steps = [steps_of(optimizer) for optimizer in optimizers]

    def loss_fn(model: nn.Module, micro_batch: MicroBatch) -> Tensor | tuple[Tensor, ...]:
        if task.compares is not None:
            return compared(task, model, micro_batch)
        pair = task.loss_sum(model, micro_batch), task.targets(micro_batch)
        if task.of_rows is balance:
            return (*pair, BALANCE * load_balancing(model.route(micro_batch["input_ids"])))  # type: ignore[operator]
        return (*pair, task.term(model, micro_batch)) if task.has_term else pair

    accumulator = Accumulator(
        model,
        optimizers,
        loss_fn,
        micro_batch=Rows(ROWS),
        clip_norm=task.clip_norm,
        lr_scheduler=[LambdaLR(optimizer, task.lr_factor) for optimizer in optimizers] if task.lr_factor else None,
        precision="fp16" if task.precision == "fp16" else "fp32",
    )
    losses: list[float] = []
    for update in _updates(task, model, accumulator, process):
        if update.skipped is None:
            losses.append(update.loss)
            task.after_update(model)
    return Trained(model, sum(each() for each in steps), losses)


class Standardised(nn.Module):
    """The layer of the scene, as "Write your own batch-coupled layer" has it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = sum_over_batch(len(x))
        centred = x - sum_over_batch(x.sum(0)) / rows
        return centred / (sum_over_batch(centred.square().sum(0)) / rows + 1e-5).sqrt()


def meeting(model: nn.Module) -> nn.Module:
    """Return a model in whose standardising layer micro-batches meet."""
    if isinstance(model, encoders.StandardisedTagger):
        model.standardised = Standardised()
    return model


def compared(task: Task, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the loss of a scene in which rows are compared, from `wb.losses`; shape ``[]``."""
    points = model(micro_batch["input_ids"])
    if task.compares is in_batch_negatives:
        encoder = getattr(model, "module", model)
        assert isinstance(encoder, encoders.Encoder)
        queries, keys = points.unbind(dim=1)
        return info_nce(queries, keys, temperature=encoder.log_temperature.exp(), symmetric=True)
    assert task.compares is hard_triplets
    return batch_hard_triplet(points, micro_batch["labels"], margin=MARGIN)


def _updates(task: Task, model: nn.Module, accumulator: Accumulator, process: Process) -> Iterator[Update]:
    """Yield the updates of the loop that fits what the user has."""
    if task.stops_before is not None:
        yield from _saving(task, model, accumulator, process)
        return
    if task.evaluates_after or task.fails_at is not None or task.zero_first:
        yield from _own_loop(task, model, accumulator)
        return
    for _ in range(task.epochs):
        if task.slices > 1:
            for loaded in task.loader():
                parts = task.cut(loaded)
                for start in range(0, len(parts), task.window):
                    yield accumulator.step(join(parts[start : start + task.window]))
        else:
            yield from accumulator.updates(task.loader(), micro_batches=task.window)


def _saving(task: Task, model: nn.Module, accumulator: Accumulator, process: Process) -> Iterator[Update]:
    """Yield the updates of a loop that is stopped, and goes on, inside a window."""
    file = process.folder / "run.safetensors"
    losses: list[float] = []
    done = load(file, accumulator)["done"] if process.begins_at else 0
    for first, micro_batches in task.windows():
        left = micro_batches[max(0, done - first) :]
        if not left:
            continue
        with accumulator.window() as window:
            for place, micro_batch in enumerate(left, max(first, done)):
                if place == process.ends_before:
                    save(file, accumulator, extra={"done": place})
                    raise Stopped(len(losses), losses)
                assert micro_batch is not None
                window.backward(task.loss(model, micro_batch), targets=task.targets(micro_batch))
        assert window.update is not None
        losses.append(window.update.loss)
        yield window.update


def _own_loop(task: Task, model: nn.Module, accumulator: Accumulator) -> Iterator[Update]:
    """Yield the updates of a loop that looks at each micro-batch itself."""
    for first, micro_batches in task.windows():
        try:
            with accumulator.window() as window:
                for place, micro_batch in enumerate(micro_batches, first):
                    task.check(place)
                    if task.zero_first:
                        model.zero_grad()
                    if micro_batch is not None and int(task.targets(micro_batch)) > 0:
                        window.backward(task.loss(model, micro_batch), targets=task.targets(micro_batch))
                    if place in task.evaluates_after:
                        task.evaluate(model)
        except BadSample:
            continue
        if window.update is not None:
            yield window.update


def _train_players(task: PairTask) -> Trained:
    model = task.make_model()
    players = model.discriminator, model.generator
    both = [Accumulator(player, SGD(player.parameters(), lr=task.lr)) for player in players]
    windows = [accumulator.window() for accumulator in both]
    updates = 0
    for place, micro_batch in enumerate(task.epoch, 1):
        losses = task.discriminator_loss(model, micro_batch), task.generator_loss(model, micro_batch)
        for window, loss in zip(windows, losses, strict=True):
            window.backward(loss, targets=len(micro_batch["real"]))
        for player, every in enumerate((task.window, task.generator_window)):
            if place % every == 0:
                updates += windows[player].close().skipped is None
                windows[player] = both[player].window()
    for window in windows:
        window.rollback()
    return Trained(model, updates)


wholebatch = System(
    name="wholebatch",
    title="wholebatch",
    train=train,
    expresses=LOOP | {"ranks", "two optimizers", "exception", "fp16"},
    distributions=("wholebatch", "torch"),
    install="pip install 'wholebatch[torch]'",
)

wholebatch_ddp = System(
    name="wholebatch-ddp",
    title="wholebatch, in DistributedDataParallel",
    train=train_ddp,
    expresses=frozenset({"ranks", "coupled"}),
    requires=frozenset({"ranks"}),
    distributions=("wholebatch", "torch"),
    install="pip install 'wholebatch[torch]'",
)

wholebatch_fsdp2 = System(
    name="wholebatch-fsdp2",
    title="wholebatch, sharded by FSDP2",
    train=train_fsdp2,
    expresses=frozenset({"ranks", "coupled"}),
    requires=frozenset({"ranks"}),
    distributions=("wholebatch", "torch"),
    install="pip install 'wholebatch[torch]'",
)
