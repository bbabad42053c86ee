"""Accelerate: ``accelerator.accumulate``, and its longer recipe for samples of variable size.

As in its guide "Performing gradient accumulation with Accelerate": everything prepared, the body of the loop inside
``with accelerator.accumulate(model)``, and what belongs to an update under ``if accelerator.sync_gradients``. Where one
batch of the loader holds several micro-batches, its end is not taken for that of the epoch:
``GradientAccumulationPlugin(sync_with_dataloader=False)``. The guide allows only one backward pass inside
``accumulate``, so two models with a loss each are trained as under "Converting it to Accelerate", which counts and
divides by hand.

A run is saved with ``save_state``, and goes on with ``load_state`` and ``skip_first_batches``, as in its guide
"Checkpointing"; for a lack of memory there is ``find_executable_batch_size``, inside of which, as in "Memory
Utilities", everything is made anew.

It reports no loss. On a CPU, ``mixed_precision="fp16"`` trains in float32 without a word, so float16 is not put to it.
"""

import math
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence.conformance.adapters.loaders import data_loader, recut
from wholebatch.evidence.conformance.scenes import ROWS
from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import LOOP, TERMS, PairTask, Task, Trained, steps_of


def train(task: Task | PairTask) -> Trained:
    """Train with ``accelerator.accumulate``."""
    if isinstance(task, PairTask):
        return _train_players(task)
    return _train_what_fits(task) if "runs short" in task.asks else in_processes(task, _train_one)


def _train_what_fits(task: Task) -> Trained:
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=ROWS)  # type: ignore[untyped-decorator]
    def inner_training_loop(batch_size: int) -> Trained:
        return _train_one(recut(task, batch_size), Process())

    trained: Trained = inner_training_loop()
    return trained


def _accelerator(steps: int, *, slices: int = 1) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    # The state is shared by all accelerators of a process; a script has one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=slices == 1)
    return Accelerator(cpu=True, gradient_accumulation_plugin=plugin)


def _train_one(task: Task, process: Process) -> Trained:
    accelerator = _accelerator(task.window, slices=task.slices)
    plain = task.make_model()
    sgd = SGD((weight for weight in plain.parameters() if weight.requires_grad), lr=task.lr)
    steps = steps_of(sgd)
    model, optimizer, loader, evaluation = accelerator.prepare(plain, sgd, data_loader(task), data_loader(task))
    scheduler = accelerator.prepare(LambdaLR(sgd, task.lr_factor)) if task.lr_factor else None
    if process.begins_at:
        accelerator.load_state(process.folder)
        loader = accelerator.skip_first_batches(loader, process.begins_at)
    place = process.begins_at
    for _ in range(task.epochs):
        for loaded in loader:
            for micro_batch in task.cut(loaded):
                if place == process.ends_before:
                    accelerator.save_state(process.folder)
                    raise Stopped(steps())
                with accelerator.accumulate(model):
                    if task.zero_first:
                        optimizer.zero_grad()
                    if micro_batch is not None:
                        accelerator.backward(task.loss(model, micro_batch))
                    if task.clip_norm is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), task.clip_norm)
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                    if not task.zero_first:
                        optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        task.after_update(plain)
                if place in task.evaluates_after:
                    _evaluate(task, model, evaluation)
                place += 1
    return Trained(plain, steps())


_LACKS = {"fp16": "float16 needs a GPU: on a CPU, mixed_precision='fp16' trains in float32"}


def _evaluate(task: Task, model: Any, evaluation: Any) -> None:
    """Begin an evaluation over a prepared loader, and break it off."""
    model.eval()
    with torch.no_grad():
        for micro_batch in evaluation:
            task.loss_sum(model, micro_batch)
            break
    model.train()


def _train_players(task: PairTask) -> Trained:
    accelerator = _accelerator(1)
    players = task.make_model()
    sgds = [SGD(player.parameters(), lr=task.lr) for player in (players.discriminator, players.generator)]
    steps = [steps_of(sgd) for sgd in sgds]
    # prepared in place on one CPU, so that the losses of the task see the prepared models
    *_, of_discriminator, of_generator, loader = accelerator.prepare(
        players.discriminator, players.generator, *sgds, data_loader(task)
    )
    for index, micro_batch in enumerate(loader):
        accelerator.backward(task.discriminator_loss(players, micro_batch) / task.window)
        accelerator.backward(task.generator_loss(players, micro_batch) / task.generator_window)
        for optimizer, every in ((of_discriminator, task.window), (of_generator, task.generator_window)):
            if (index + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return Trained(players, sum(each() for each in steps))


def train_long(task: Task | PairTask) -> Trained:
    """Train as in "Gradient accumulation on training samples of variable size": read ahead, count, divide the sum."""
    assert isinstance(task, Task)
    accelerator = _accelerator(task.window)
    plain = task.make_model()
    sgd = SGD((weight for weight in plain.parameters() if weight.requires_grad), lr=task.lr)
    steps = steps_of(sgd)
    model, optimizer, loader, evaluation = accelerator.prepare(plain, sgd, data_loader(task), data_loader(task))
    scheduler = accelerator.prepare(LambdaLR(sgd, task.lr_factor)) if task.lr_factor else None
    total = math.ceil(len(loader) / task.window)
    remainder = len(loader) % task.window or task.window
    place = 0
    for _ in range(task.epochs):
        iterator = iter(loader)
        for update in range(total):
            samples = [next(iterator) for _ in range(task.window if update != total - 1 else remainder)]
            items = sum(task.targets(sample) for sample in samples)
            items = accelerator.gather(items).sum().item()
            for sample in samples:
                loss = task.loss_sum(model, sample)
                loss = loss * task.window * accelerator.num_processes / items
                if task.has_term:
                    loss = loss + task.term(model, sample)
                accelerator.backward(loss)
                if place in task.evaluates_after:
                    _evaluate(task, model, evaluation)
                place += 1
            if task.clip_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), task.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            task.after_update(plain)
    return Trained(plain, steps())


accelerate = System(
    name="accelerate",
    title="Accelerate",
    train=train,
    expresses=LOOP | {"ranks"},
    lacks=_LACKS,
    distributions=("accelerate", "torch"),
    install="pip install 'wholebatch[accelerate]'",
)

accelerate_long = System(
    name="accelerate-long",
    title="Accelerate, its recipe for samples of variable size",
    train=train_long,
    expresses=frozenset({"ranks", "clipping", "schedule", *TERMS, "follows", "evaluation", "bf16"}),
    lacks={
        **_LACKS,
        "stops": "the recipe says nothing of checkpoints; Accelerate's own are those of the other way to use it",
        "runs short": "the recipe says nothing of memory; Accelerate's own means are those of the other way to use it",
    },
    distributions=("accelerate", "torch"),
    install="pip install 'wholebatch[accelerate]'",
)
