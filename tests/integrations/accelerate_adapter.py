"""Our way of using Accelerate, as a system of the conformance suite: an accumulator for what was prepared.

Also for ``pytest --wholebatch-adapter=integrations.accelerate_adapter:system``.
"""

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import wholebatch as wb
from wholebatch.engine.losses import load_balancing
from wholebatch.evidence.conformance.adapters.loaders import data_loader
from wholebatch.evidence.conformance.adapters.wholebatch import compared, meeting
from wholebatch.evidence.conformance.scenes import BALANCE, ROWS, balance
from wholebatch.evidence.conformance.stopping import Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import LOOP, BadSample, PairTask, Trained, join, steps_of
from wholebatch.integrations.accelerate import accumulator, each_row_once


def fresh(steps, **options):
    """Return an accelerator, which shares its state with no other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=steps)
    return Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)


def train(task):
    """Train with `updates`, with `step`, or with windows in a loop of one's own."""
    return train_players(task) if isinstance(task, PairTask) else in_processes(task, train_one)


def train_one(task, process):
    accelerator = fresh(task.window)
    plain = wb.exact_batch_norm(meeting(task.make_model()))
    parts = [SGD(weights, lr=lr) for weights, lr in task.parts(plain)]
    steps = [steps_of(optimizer) for optimizer in parts]
    model, loader, *optimizers = accelerator.prepare(plain, data_loader(task), *parts)
    schedulers = [accelerator.prepare(LambdaLR(each, task.lr_factor)) for each in parts] if task.lr_factor else None

    def loss_fn(model, micro_batch):
        if task.compares is not None:
            return compared(task, model, micro_batch)
        pair = task.loss_sum(model, micro_batch), task.targets(micro_batch)
        if task.of_rows is balance:
            return (*pair, BALANCE * load_balancing(plain.route(micro_batch["input_ids"])))
        return (*pair, task.term(model, micro_batch)) if task.has_term else pair

    exact = accumulator(
        accelerator,
        model,
        optimizers,
        loss_fn,
        lr_scheduler=schedulers,
        micro_batch=wb.Rows(ROWS),
        clip_norm=task.clip_norm,
    )
    losses = []
    for _ in range(task.epochs):
        saved = saving(task, model, exact, process) if task.stops_before is not None else None
        for update in saved or updates_of(task, accelerator, loader, model, exact):
            if update.skipped is None:
                losses.append(update.loss)
                task.after_update(plain)
    return Trained(plain, sum(each() for each in steps), losses)


def updates_of(task, accelerator, loader, model, exact):
    if task.evaluates_after or task.fails_at is not None or task.zero_first:
        yield from own_loop(task, loader, model, exact)
    elif task.slices > 1:
        for loaded in loader:
            parts = task.cut(loaded)
            for start in range(0, len(parts), task.window):
                yield exact.step(join(parts[start : start + task.window]))
    else:
        steps = accelerator.gradient_accumulation_steps
        yield from exact.updates(each_row_once(accelerator, loader), micro_batches=steps)


def saving(task, model, exact, process):
    """Yield the updates of a loop that is stopped, and goes on, inside a window."""
    file = process.folder / "run.safetensors"
    losses = []
    done = wb.load(file, exact)["done"] if process.begins_at else 0
    for place in range(done, len(task.epoch)):
        if place == process.ends_before:
            wb.save(file, exact, extra={"done": place})
            raise Stopped(len(losses), losses)
        window = exact.open_window or exact.window()
        window.backward(task.loss(model, task.epoch[place]), targets=task.targets(task.epoch[place]))
        if (place + 1) % task.window == 0:
            losses.append(window.close().loss)
            yield window.update


def own_loop(task, loader, model, exact):
    micro_batches = list(enumerate(loader))
    for start in range(0, len(micro_batches), task.window):
        try:
            with exact.window() as window:
                for place, micro_batch in micro_batches[start : start + task.window]:
                    task.check(place)
                    if task.zero_first:
                        model.zero_grad()
                    window.backward(task.loss(model, micro_batch), targets=task.targets(micro_batch))
                    if place in task.evaluates_after:
                        task.evaluate(model)
        except BadSample:
            continue
        yield window.update


def train_players(task):
    """Let each of two prepared optimizers have windows of its own."""
    accelerator = fresh(1)
    players = task.make_model()
    both = players.discriminator, players.generator
    sgds = [SGD(player.parameters(), lr=task.lr) for player in both]
    steps = [steps_of(sgd) for sgd in sgds]
    *prepared, loader = accelerator.prepare(*both, *sgds, data_loader(task))
    exact = [accumulator(accelerator, model, sgd) for model, sgd in zip(prepared[:2], prepared[2:], strict=True)]
    for place, micro_batch in enumerate(loader, 1):
        losses = task.discriminator_loss(players, micro_batch), task.generator_loss(players, micro_batch)
        for each, loss in zip(exact, losses, strict=True):
            (each.open_window or each.window()).backward(loss, targets=len(micro_batch["real"]))
        for each, every in zip(exact, (task.window, task.generator_window), strict=True):
            if place % every == 0:
                each.open_window.close()
    return Trained(players, sum(each() for each in steps))


system = System(
    "accelerate-wholebatch",
    "Accelerate, with our accumulator",
    train,
    LOOP | {"ranks", "two optimizers", "exception"},
    ("accelerate", "torch"),
)
