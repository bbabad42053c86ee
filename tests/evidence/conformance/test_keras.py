"""What the suite finds in Keras, checked against gradients of single rows; each backend in a process of its own."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from wholebatch.evidence.conformance.adapters.keras import keras_jax, keras_torch
from wholebatch.evidence.conformance.judge import Verdict, compare, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.second_reading import second_reading
from wholebatch.evidence.conformance.task import Task, Trained, flat

pytestmark = pytest.mark.skipif(
    find_spec("keras") is None,  # to import it here would choose a backend for all tests
    reason="keras is not installed",
)

ROUNDING = 1e-6
"""On PyTorch and JAX, Keras multiplies matrices or takes a tanh in float32, also under the policy float64."""

OFF = {
    "T1-ragged-counts": (0.67, 1),
    "T3-tail": (0.33, 5),
    "T3-tail-unsized": (0.33, 5),
    "T3-shorter-than-a-window": (0.52, 1),
    "T4-masked-micro-batch": (0.27, 1),
    "T4-masked-window": (0.55, 3),
}
"""How far off Keras is, and its updates: means of means, windows that run on into the next epoch, empty updates."""

RIGHT = ("T2-keywords", "T2-mean", "T2-sum-over-count")

RUN = """
import functools, sys
import torch
from wholebatch.evidence.conformance.adapters.keras import keras_jax, keras_torch
from wholebatch.evidence.conformance.scenes import SCENES

name, file, planted, *scenes = sys.argv[1:]
if planted == "sum":
    import keras
    keras.losses.SparseCategoricalCrossentropy = functools.partial(
        keras.losses.SparseCategoricalCrossentropy, reduction="sum"
    )
system = {each.name: each for each in (keras_torch, keras_jax)}[name]
found = {}
for scene in SCENES:
    if scene.name in scenes:
        trained = system.train(scene.task)
        found[scene.name] = trained.model.state_dict(), trained.updates
torch.save(found, file)
"""


@pytest.mark.parametrize("system", [keras_torch, keras_jax], ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system, tmp_path):
    """Three of the four traps catch Keras; where micro-batches are alike and windows full, it is right."""
    found = verdicts(system, tmp_path, [*OFF, *RIGHT])
    for scene, (error, updates) in OFF.items():
        assert found[scene].outcome == "fail", scene
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene
    assert {scene: found[scene].outcome for scene in RIGHT} == dict.fromkeys(RIGHT, "pass")


@pytest.mark.parametrize("system", [keras_torch, keras_jax], ids=lambda system: system.name)
def test_of_a_window_that_overflows_only_one_micro_batch_is_skipped(system, tmp_path):
    """The next one takes its place, so that the only update is that of micro-batches of two windows."""
    (scene,) = (scene for scene in SCENES if scene.name == "T10-overflow")
    weights, updates = trained(system, tmp_path, [scene.name])[scene.name]
    assert updates == 1
    start = flat(scene.task.make_model())
    model = scene.task.make_model()
    model.load_state_dict(weights)
    change = flat(model) - start
    for places, is_it in (((0, 2, 3, 4), True), ((4, 5, 6, 7), False)):
        model = scene.task.make_model()
        sum(scene.task.loss(model, scene.task.epoch[place]) for place in places).backward()
        wanted = torch.cat([-scene.task.lr / 4 * weight.grad.double().flatten() for weight in model.parameters()])
        error = float((change - wanted).norm() / wanted.norm())
        assert (error <= scene.tolerance) == is_it, (places, error)


def test_a_planted_mistake_is_found(tmp_path):
    """A loss that is summed instead of averaged, where Keras as it is passes."""
    verdict = verdicts(keras_torch, tmp_path, ["T2-mean"], planted="sum")["T2-mean"]
    assert verdict.outcome == "fail"
    assert verdict.error == pytest.approx(9.0, rel=1e-3)  # the mean is over 10 labels


@pytest.mark.parametrize("system", [keras_torch, keras_jax], ids=lambda system: system.name)
def test_there_is_no_way_to_say_that_a_micro_batch_is_none(system):
    (scene,) = (scene for scene in SCENES if scene.name == "T4-none")
    assert judge(system, scene).outcome == "not expressible"


def verdicts(system, folder: Path, names: list[str], planted: str = "nothing") -> dict[str, Verdict]:
    """Return what the second judge says about some scenes."""
    found = trained(system, folder, names, planted)
    said = {}
    for scene in SCENES:
        if scene.name in names:
            assert isinstance(scene.task, Task)
            weights, updates = found[scene.name]
            model = scene.task.make_model()
            model.load_state_dict(weights)
            near = replace(scene, tolerance=ROUNDING)
            said[scene.name] = compare(system.name, near, Trained(model, updates), second_reading(scene.task))
    return said


def trained(system, folder: Path, names: list[str], planted: str = "nothing") -> dict[str, tuple[dict, int]]:
    """Return the weights of some scenes, trained in a process of its own, and the number of updates."""
    file = folder / "trained.pt"
    command = [sys.executable, "-c", RUN, system.name, str(file), planted, *names]
    environment = {**os.environ, **system.environment, "KERAS_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(file)
