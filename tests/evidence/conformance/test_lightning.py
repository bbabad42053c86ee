"""What the suite finds in Lightning, checked against gradients of single rows."""

import math
import warnings

import pytest
import torch
from readings import BY_NAME, FIRST_TRAPS, verdict_of
from torch.optim import SGD

from wholebatch.evidence.conformance.adapters import lightning as page
from wholebatch.evidence.conformance.judge import change_error, judge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say about themselves when they are loaded
    peer = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer, about what it is not asked to do

OFF = {
    "lightning": {
        "T1-ragged-counts": (0.67, 1, "a mean of means"),
        "T3-tail": (0.33, 6, "a short window is divided by the number of a full one"),
        "T3-tail-unsized": (0.33, 6, "a short window is divided by the number of a full one"),
        "T3-shorter-than-a-window": (0.25, 2, "a short window is divided by the number of a full one"),
        "T4-masked-micro-batch": (0.27, 1, "a mean of means"),
        "T4-masked-window": (0.55, 3, "a mean of means"),
        "T4-none": (0.46, 2, "a window whose last micro-batch is None is dropped"),
    },
    "lightning-manual": {
        "T1-ragged-counts": (0.67, 1, "a mean of means"),
        "T3-tail": (0.50, 4, "the tail of an epoch is carried into the next"),
        "T3-tail-unsized": (0.50, 4, "the tail of an epoch is carried into the next"),
        "T3-shorter-than-a-window": (1.0, 0, "the tail of an epoch is dropped"),
        "T4-masked-micro-batch": (math.inf, 1, "the mean over no label"),
        "T4-masked-window": (math.inf, 3, "the mean over no label"),
        "T4-none": (0.42, 2, "a window whose last micro-batch is None is carried into the next"),
    },
}
"""How far off they are, their updates, and why."""

SYSTEMS = [page.lightning, page.lightning_manual]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system):
    found = {scene.name: verdict_of(system, scene) for scene in FIRST_TRAPS}
    off = OFF[system.name]
    assert {name for name, verdict in found.items() if verdict.outcome == "fail"} == set(off)
    assert {verdict.outcome for name, verdict in found.items() if name not in off} == {"pass"}
    for scene, (error, updates, why) in off.items():
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene
        assert why in found[scene].why, scene


class Watched(peer.Trainer):
    """Keeps the trainers that are made, and what they were asked to fit."""

    made: list[tuple]

    def fit(self, module, loader, evaluation=None):
        Watched.made.append((self, module))
        super().fit(module, loader, evaluation)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_is_driven_is_a_trainer_as_its_guides_say(system, monkeypatch):
    monkeypatch.setattr(peer, "Trainer", Watched)
    Watched.made = []
    trained = system.train(BY_NAME["T9-clipping"].task)  # two windows of four
    ((trainer, module),) = Watched.made
    automatic = system is page.lightning
    assert isinstance(module, peer.LightningModule)
    assert module.automatic_optimization is automatic
    assert trainer.accumulate_grad_batches == (4 if automatic else 1)
    assert trainer.gradient_clip_val == (0.05 if automatic else None)
    assert trainer.global_step == trained.updates == 2
    assert next(module.parameters()).dtype == torch.float64


def by_hand(task, order):
    """Train by a list of what to do: a number adds the gradient of that micro-batch, a quarter; words speak."""
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for each in order:
        if each == "step":
            optimizer.step()
        elif each == "zero":
            optimizer.zero_grad()
        else:
            (task.loss(model, task.epoch[each]) / 4).backward()
    return model


@pytest.mark.parametrize(
    ("system", "order"),
    [
        (page.lightning, [1, 2, 3, "step", "zero", 4, 5, 6, "zero", 8, 9, 11, "step"]),
        (page.lightning_manual, [1, 2, 3, "step", "zero", 4, 5, 6, 8, 9, 11, "step"]),
    ],
    ids=["automatic", "manual"],
)
def test_a_none_at_the_end_of_a_window_takes_its_step_away(system, order):
    """Why T4-none fails: batches 0, 7 and 10 are None, and what is to be done at the eighth is not done.

    Automatic optimization zeroes at the first batch of the next window, so these gradients are lost; manual
    optimization steps with both.
    """
    task = BY_NAME["T4-none"].task
    assert [place for place, each in enumerate(task.epoch) if each is None] == [0, 7, 10]
    assert change_error(task.make_model(), system.train(task).model, by_hand(task, order)) < 1e-12


def test_an_evaluation_inside_a_window_zeroes_what_manual_optimization_had_gathered():
    """As it does not accumulate by itself, the trainer takes each batch for the end of a window."""
    task = BY_NAME["T7-evaluation"].task
    assert task.evaluates_after == {5}
    right = by_hand(task, [0, 1, 2, 3, "step", "zero", 6, 7, "step"])
    assert change_error(task.make_model(), page.lightning_manual.train(task).model, right) < 1e-12
    assert judge(page.lightning, BY_NAME["T7-evaluation"]).outcome == "pass"


def test_without_its_option_it_steps_after_each_micro_batch_and_that_is_named(monkeypatch):
    """A planted mistake, where Lightning as it is passes."""

    class Forgets(peer.Trainer):
        def __init__(self, **options):
            super().__init__(**{**options, "accumulate_grad_batches": 1})

    assert verdict_of(page.lightning, BY_NAME["T2-mean"]).outcome == "pass"
    monkeypatch.setattr(peer, "Trainer", Forgets)
    verdict = verdict_of(page.lightning, BY_NAME["T2-mean"])
    assert verdict.updates == 4
    assert "the optimizer steps after each micro-batch" in verdict.why


def test_toggled_optimizers_keep_two_players_apart(monkeypatch):
    """Why T7-gan passes, which in other loops of one's own fails."""
    import contextlib

    scene = BY_NAME["T7-gan"]
    assert judge(page.lightning_manual, scene).outcome == "pass"
    monkeypatch.setattr(peer.LightningModule, "toggled_optimizer", lambda *_: contextlib.nullcontext())
    verdict = judge(page.lightning_manual, scene)
    assert "the discriminator steps with what the generator's loss has left in it" in verdict.why
    assert judge(page.lightning, scene).why == "its adapter has no way to say: two players"


def test_float16_on_a_cpu_is_bfloat16():
    """So nothing can overflow there, and T10-overflow asks for what this machine cannot do."""
    trainer = peer.Trainer(accelerator="cpu", precision="16-mixed", logger=False, enable_checkpointing=False)
    assert trainer.precision == "bf16-mixed"
    for system in SYSTEMS:
        for name in ("T10-overflow", "T10-two-optimizers", "T10-one-of-two-overflows"):
            verdict = judge(system, BY_NAME[name])
            assert verdict.outcome == "not expressible"
            assert "float16 needs a GPU" in verdict.why
