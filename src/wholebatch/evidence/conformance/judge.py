"""What is right, and how far off is a system? The undivided batch, the verdict, and the name of the mistake."""

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence import reference
from wholebatch.evidence.conformance import mistakes
from wholebatch.evidence.conformance.encoders import as_drawn
from wholebatch.evidence.conformance.models import with_enough_memory
from wholebatch.evidence.conformance.scenes import Scene
from wholebatch.evidence.conformance.second_reading import has_second_reading, second_reading
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import MicroBatch, NotExpressible, PairTask, Task, Trained, flat, join

LOSS_TOLERANCE = 1e-3
"""How far a reported loss may be off, relative: systems round what they log."""

OTHER_PURPOSE = "it is a way to say"
"""How the reason begins why a system is not asked for what it is not for."""

NO_WAY = "its adapter has no way to say: "
"""How the reason begins why a system is not asked for what its adapter does not know."""

_READINGS_TOLERANCE = 1e-11
"""How far the two readings may be apart: both are in float64."""

Outcome = Literal["pass", "fail", "refuses", "not expressible"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a system made of a scene.

    Attributes:
        system: Its name.
        scene: The name of the scene.
        outcome: ``"pass"``; ``"fail"``; ``"refuses"``, where it raises an error; ``"not expressible"``, where there is
            no documented way to say what the scene asks for.
        error: The change of the weights against that of the undivided batches: 2-norm of the difference, relative.
            Infinite where weights are not finite; None where nothing was trained.
        updates: Optimizer steps; None where nothing was trained.
        updates_due: Optimizer steps of the undivided batches.
        loss_error: The largest relative error of the losses that the system reports; None where it reports none.
        confirmed: Whether the second reading of what is right comes to the same error and the same number of updates
            due; None where it has nothing to say, as nothing was trained or the scene is beyond it.
        why: What is wrong, with the name of the mistake where it is a known one; what was raised; what is missing.
    """

    system: str
    scene: str
    outcome: Outcome
    error: float | None = None
    updates: int | None = None
    updates_due: int | None = None
    loss_error: float | None = None
    confirmed: bool | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON: an infinite error becomes the text ``"not finite"``."""
        fields = asdict(self)
        return {name: "not finite" if value == float("inf") else value for name, value in fields.items()}


def judge(system: System, scene: Scene) -> Verdict:
    """Let a system train a scene, and return the verdict."""
    if not system.requires <= scene.task.asks:
        why = f"{OTHER_PURPOSE}: {', '.join(sorted(system.requires))}"
        return Verdict(system.name, scene.name, "not expressible", why=why)
    lacking = scene.task.asks - system.expresses
    if lacking:
        reasons = list(dict.fromkeys(system.lacks[word] for word in sorted(lacking) if word in system.lacks))
        why = "; ".join(reasons) or NO_WAY + ", ".join(sorted(lacking))
        return Verdict(system.name, scene.name, "not expressible", why=why)
    ranks = scene.task.ranks if isinstance(scene.task, Task) else 1
    if ranks > 1 and os.environ.get("WORLD_SIZE") != str(ranks):
        why = f"it is for {ranks} processes, such as torchrun --nproc-per-node {ranks} starts"
        return Verdict(system.name, scene.name, "not expressible", why=why)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            warnings.simplefilter("ignore")  # a warning is no refusal, also where warnings are errors
            trained = system.train(scene.task)
    except NotExpressible as missing:
        return Verdict(system.name, scene.name, "not expressible", why=str(missing))
    except Exception as error:  # whatever a system says instead of training is its refusal
        first = (str(error).strip() or "no message").splitlines()[0]
        return Verdict(system.name, scene.name, "refuses", why=f"{type(error).__name__}: {first}")
    task = as_drawn(scene.task, trained.model) if isinstance(scene.task, Task) else scene.task
    scene = replace(scene, task=task, tolerance=max(scene.tolerance, system.rounding))
    verdict = compare(system.name, scene, trained, expected(scene.task))
    return replace(verdict, confirmed=_confirmed(verdict, scene, trained))


def _confirmed(verdict: Verdict, scene: Scene, trained: Trained) -> bool | None:
    if not isinstance(scene.task, Task) or not has_second_reading(scene.task):
        return None
    right = second_reading(scene.task)
    error = change_error(scene.task.make_model(), trained.model, right.model)
    assert verdict.error is not None
    same = error == verdict.error or abs(error - verdict.error) <= _READINGS_TOLERANCE * max(1.0, error)
    return same and right.updates == verdict.updates_due


def compare(system: str, scene: Scene, trained: Trained, right: Trained) -> Verdict:
    """Return the verdict on what was trained, given what is right."""
    start = scene.task.make_model()
    error = change_error(start, trained.model, right.model)
    loss_error = None if trained.losses is None or right.losses is None else _loss_error(trained.losses, right.losses)
    wrong = []
    if not error <= scene.tolerance:
        finite = error < float("inf")
        wrong.append(f"the change of the weights is {error:.2g} off" if finite else "the weights are not finite")
        named = mistakes.name(scene.task, trained.model, right.model, scene.tolerance)
        wrong += [named] if named else []
    if trained.updates != right.updates:
        wrong.append(f"{trained.updates} update{'s' * (trained.updates != 1)} instead of {right.updates}")
    if loss_error is not None and not loss_error <= max(LOSS_TOLERANCE, scene.tolerance):
        wrong.append(f"the reported loss is {loss_error:.2g} off")
    return Verdict(
        system,
        scene.name,
        "fail" if wrong else "pass",
        error=error,
        updates=trained.updates,
        updates_due=right.updates,
        loss_error=loss_error,
        why="; ".join(wrong),
    )


def change_error(start: nn.Module, found: nn.Module, right: nn.Module) -> float:
    """Return how far the change of weights and buffers is from the right one, relative; infinite if not finite."""
    begin, moved, due = (flat(model) for model in (start, found, right))
    error = float((moved - due).norm() / (due - begin).norm())
    return error if error == error else float("inf")


def expected(task: Task | PairTask) -> Trained:
    """Return what plain SGD makes of the undivided logical batches, in the loop of `wholebatch.evidence.reference`."""
    return _expected_of_players(task) if isinstance(task, PairTask) else _expected(task)


def _expected(task: Task) -> Trained:
    model = with_enough_memory(task.make_model())
    parts = task.parts(model)
    optimizer = SGD([{"params": weights, "lr": lr} for weights, lr in parts])
    scheduler = LambdaLR(optimizer, task.lr_factor) if task.lr_factor else None

    def loss_fn(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, ...]:
        pair = task.loss_sum(model, batch), task.targets(batch)
        return (*pair, task.term(model, batch)) if task.has_term else pair

    losses = []
    for number, (first, micro_batches) in enumerate(task.windows()):
        batch = join(micro_batches)
        given_up = task.fails_at is not None and first <= task.fails_at < first + len(micro_batches)
        if given_up or number in task.overflows or int(task.targets(batch)) == 0:
            continue
        loss = reference.update(model, optimizer, loss_fn, batch, clip_norm=task.clip_norm)  # type: ignore[no-untyped-call]
        losses.append(float(loss))
        if scheduler is not None:
            scheduler.step()
        task.after_update(model)
    return Trained(model, len(losses) * len(parts), losses)


def _expected_of_players(task: PairTask) -> Trained:
    """Each player steps with the gradient of its own loss over its own window, taken at the window's first weights."""
    model = task.make_model()
    players = (
        (model.discriminator, task.discriminator_loss, task.window),
        (model.generator, task.generator_loss, task.generator_window),
    )
    gradients: list[tuple[Tensor, ...]] = [(), ()]
    updates = 0
    for place in range(len(task.epoch)):
        for number, (player, loss_of, window) in enumerate(players):
            if place % window == 0:
                batch = join(task.epoch[place : place + window])
                gradients[number] = torch.autograd.grad(loss_of(model, batch), list(player.parameters()))
        for number, (player, _, window) in enumerate(players):
            if (place + 1) % window == 0:
                with torch.no_grad():
                    for weight, gradient in zip(player.parameters(), gradients[number], strict=True):
                        weight.sub_(task.lr * gradient)
                updates += 1
    return Trained(model, updates)


def _loss_error(found: Sequence[float], right: Sequence[float]) -> float:
    if len(found) != len(right):
        return float("inf")
    errors = [abs(one - other) / abs(other) for one, other in zip(found, right, strict=True)]
    return max((error if error == error else float("inf") for error in errors), default=0.0)
