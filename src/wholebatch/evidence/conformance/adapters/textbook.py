"""The textbook loop: divide each loss by the micro-batches of a window, step at every k-th, zero the gradients.

As most tutorials have it, and PyTorch's "Automatic Mixed Precision examples" under "Gradient accumulation", and under
"Working with Multiple Models, Losses, and Optimizers" where there are two optimizers: one scaler for both. A checkpoint
holds what "Saving and Loading a General Checkpoint" puts there. When memory runs out, the error ends the run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import LOOP, BadSample, PairTask, Task, Trained, steps_of


def train(task: Task | PairTask) -> Trained:
    """Train in a loop written by hand."""
    return _train_players(task) if isinstance(task, PairTask) else in_processes(task, _train_one)


def _train_one(task: Task, process: Process) -> Trained:
    model = task.make_model()
    optimizers = [SGD(weights, lr=lr) for weights, lr in task.parts(model)]
    file = process.folder / "checkpoint.pt"
    if process.begins_at:
        _load(file, model, optimizers)
    schedulers = [LambdaLR(optimizer, task.lr_factor) for optimizer in optimizers] if task.lr_factor else []
    fp16 = task.precision == "fp16"
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    steps, given_up = [steps_of(optimizer) for optimizer in optimizers], -1
    for epoch in range(task.epochs):
        for i, loaded in enumerate(task.loader()):
            for j, micro_batch in enumerate(task.cut(loaded)):
                place = epoch * len(task.epoch) + i * task.slices + j
                if place < process.begins_at:
                    continue
                if place == process.ends_before:
                    _save(file, model, optimizers)
                    raise Stopped(sum(each() for each in steps))
                if task.zero_first:
                    model.zero_grad()
                if place // task.window == given_up:
                    continue
                if micro_batch is not None:
                    try:
                        task.check(place)
                    except BadSample:
                        given_up = place // task.window
                        continue
                    with torch.autocast("cpu", torch.float16, enabled=fp16):
                        loss = task.loss(model, micro_batch) / task.window
                    torch.autograd.backward(scaler.scale(loss))
                if place in task.evaluates_after:
                    task.evaluate(model)
                if (i * task.slices + j + 1) % task.window == 0:
                    for optimizer in optimizers:
                        scaler.unscale_(optimizer)
                    if task.clip_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
                    for optimizer in optimizers:
                        scaler.step(optimizer)
                    scaler.update()
                    model.zero_grad()
                    for scheduler in schedulers:
                        scheduler.step()
                    task.after_update(model)
    return Trained(model, sum(each() for each in steps))


def _save(file: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    torch.save(
        {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dicts": [optimizer.state_dict() for optimizer in optimizers],
        },
        file,
    )


def _load(file: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    checkpoint = torch.load(file, weights_only=True)
    model.load_state_dict(checkpoint["model_state_dict"])
    for optimizer, state in zip(optimizers, checkpoint["optimizer_state_dicts"], strict=True):
        optimizer.load_state_dict(state)


def _train_players(task: PairTask) -> Trained:
    model = task.make_model()
    of_discriminator = SGD(model.discriminator.parameters(), lr=task.lr)
    of_generator = SGD(model.generator.parameters(), lr=task.lr)
    steps = [steps_of(of_discriminator), steps_of(of_generator)]
    for place, micro_batch in enumerate(task.epoch, 1):
        losses = task.discriminator_loss(model, micro_batch), task.generator_loss(model, micro_batch)
        players = (of_discriminator, task.window), (of_generator, task.generator_window)
        for loss, (_, every) in zip(losses, players, strict=True):
            torch.autograd.backward(loss / every)
        for optimizer, every in players:
            if place % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return Trained(model, sum(each() for each in steps))


textbook = System(
    name="textbook",
    title="the textbook loop",
    train=train,
    expresses=LOOP | {"two optimizers", "exception", "fp16"},
    distributions=("torch",),
    install="pip install 'wholebatch[torch]'",
)
