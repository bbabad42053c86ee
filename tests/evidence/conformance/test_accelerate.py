"""What the suite finds in Accelerate, checked against gradients of single rows."""

import math

import pytest
import torch
from readings import BY_NAME, FIRST_TRAPS, verdict_of
from torch.optim import SGD

from wholebatch.evidence.conformance.adapters import accelerate as page
from wholebatch.evidence.conformance.judge import change_error, compare, expected, judge
from wholebatch.evidence.conformance.task import Trained

peer = pytest.importorskip("accelerate")

OFF = {
    "accelerate": {
        "T1-ragged-counts": (0.67, 1, "a mean of means"),
        "T3-tail": (0.33, 6, "a short window is divided by the number of a full one"),
        "T3-tail-unsized": (0.33, 6, "a short window is divided by the number of a full one"),
        "T3-shorter-than-a-window": (0.25, 2, "a short window is divided by the number of a full one"),
        "T4-masked-micro-batch": (math.inf, 1, "the mean over no label"),
        "T4-masked-window": (math.inf, 3, "the mean over no label"),
        "T4-none": (0.42, 3, "a mean of means"),
    },
    "accelerate-long": {"T4-masked-window": (math.inf, 3, "the mean over no label")},
}
"""How far off they are, their updates, and why."""

SYSTEMS = [page.accelerate, page.accelerate_long]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system):
    found = {scene.name: verdict_of(system, scene) for scene in FIRST_TRAPS if scene.task.asks <= system.expresses}
    off = OFF[system.name]
    assert {name for name, verdict in found.items() if verdict.outcome == "fail"} == set(off)
    assert len(found) > len(off)
    for scene, (error, updates, why) in off.items():
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene
        assert why in found[scene].why, scene


class Watched(peer.Accelerator):
    """Writes down what it is asked."""

    said: list[str]

    def prepare(self, *parts, **options):
        Watched.said += [f"prepare {type(part).__name__}" for part in parts]
        return super().prepare(*parts, **options)

    def accumulate(self, *models):
        Watched.said.append("accumulate")
        return super().accumulate(*models)

    def backward(self, loss, **options):
        Watched.said.append(f"backward, which divides by {self.gradient_accumulation_steps}")
        super().backward(loss, **options)

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        Watched.said.append(f"clip, as sync_gradients is {self.sync_gradients}")
        return super().clip_grad_norm_(parameters, max_norm, norm_type)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_is_driven_is_accelerate_as_its_guide_says(system, monkeypatch):
    monkeypatch.setattr(peer, "Accelerator", Watched)
    Watched.said = []
    trained = system.train(BY_NAME["T9-clipping"].task)  # two windows of four
    body = ["accumulate"] if system is page.accelerate else []
    body = [*body, "backward, which divides by 4"]
    window = [*body * 4, "clip, as sync_gradients is True"]
    prepared = [f"prepare {kind}" for kind in ("Tagger", "SGD", "DataLoader", "DataLoader")]
    assert Watched.said == [*prepared, *window * 2]
    assert trained.updates == 2


def test_the_short_window_at_the_end_is_divided_by_a_full_one():
    """Why T3-tail fails: it is an update, and its two means are divided by 4."""
    task = BY_NAME["T3-tail"].task
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for _, micro_batches in task.windows():
        for micro_batch in micro_batches:
            (task.loss(model, micro_batch) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert change_error(task.make_model(), page.train(task).model, model) < 1e-12


def test_without_its_division_the_means_are_added_up_and_that_is_named(monkeypatch):
    """A planted mistake, where Accelerate as it is passes."""

    class Adds(peer.Accelerator):
        def backward(self, loss, **options):
            super().backward(loss * self.gradient_accumulation_steps, **options)

    assert verdict_of(page.accelerate, BY_NAME["T2-mean"]).outcome == "pass"
    monkeypatch.setattr(peer, "Accelerator", Adds)
    verdict = verdict_of(page.accelerate, BY_NAME["T2-mean"])
    assert verdict.error == pytest.approx(3.0, rel=1e-6)
    assert "divided by nothing" in verdict.why


def test_two_windows_in_a_batch_need_the_switch_that_the_guide_names(monkeypatch):
    """Without it the end of the loader is taken for the end of a window, also where the last batch holds two."""
    scene = BY_NAME["T7-two-windows-in-a-batch"]
    assert verdict_of(page.accelerate, scene).outcome == "pass"
    plugin = peer.utils.GradientAccumulationPlugin
    monkeypatch.setattr(
        peer.utils, "GradientAccumulationPlugin", lambda **options: plugin(num_steps=options["num_steps"])
    )
    verdict = verdict_of(page.accelerate, scene)
    assert (verdict.outcome, verdict.updates > 4) == ("fail", True)


def test_two_models_are_trained_by_hand_and_the_generator_leaves_its_gradient():
    assert judge(page.accelerate, BY_NAME["T7-two-optimizers"]).outcome == "pass"
    verdict = judge(page.accelerate, BY_NAME["T7-gan"])
    assert verdict.error == pytest.approx(0.75, rel=0.05)
    assert "the discriminator steps with what the generator's loss has left in it" in verdict.why


def shared_state():
    """The state is shared by all accelerators of a process; a script has one."""
    peer.state.AcceleratorState._reset_state(reset_partial_state=True)
    peer.state.GradientState._reset_state()


def test_float16_on_a_cpu_is_float32():
    shared_state()
    accelerator = peer.Accelerator(cpu=True, mixed_precision="fp16")
    assert (accelerator.native_amp, accelerator.scaler) == (False, None)
    shared_state()
    for system in SYSTEMS:
        for name in ("T10-overflow", "T10-two-optimizers", "T10-one-of-two-overflows"):
            verdict = judge(system, BY_NAME[name])
            assert verdict.outcome == "not expressible"
            assert "float16 needs a GPU" in verdict.why


def test_two_optimizers_under_its_own_scaler_divide_the_second_twice():
    """What it would do on a GPU: its own optimizers and its own clipping, with the scaler of a CPU put in by hand.

    The first optimizer updates the scaler, which forgets that the gradient of the second is divided already.
    """
    scene = BY_NAME["T10-two-optimizers"]
    task = scene.task
    shared_state()
    accelerator = peer.Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=task.window)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    model = task.make_model()
    optimizers = [accelerator.prepare(SGD(weights, lr=lr)) for weights, lr in task.parts(model)]
    for micro_batch in task.epoch:
        with accelerator.accumulate(model):
            with torch.autocast("cpu", torch.float16):
                loss = task.loss(model, micro_batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), task.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    shared_state()
    verdict = compare("accelerate", scene, Trained(model, 4), expected(task))
    assert verdict.outcome == "fail"
    assert "the second optimizer's gradient is divided by the loss scale twice" in verdict.why
