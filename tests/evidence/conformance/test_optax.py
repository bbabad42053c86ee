"""What the suite finds in Optax, checked against gradients of single rows; in a process whose JAX is in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wholebatch.evidence.conformance.adapters.optax import optax_microbatch, optax_microbatch_mean, optax_multisteps
from wholebatch.evidence.conformance.judge import Verdict, compare, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.second_reading import second_reading
from wholebatch.evidence.conformance.task import Task, Trained

pytest.importorskip("optax")

OFF = {
    "optax-multisteps": {
        "T1-ragged-counts": (0.67, 1),
        "T3-tail-unsized": (0.33, 5),
        "T4-masked-micro-batch": (0.27, 1),
        "T4-masked-window": (0.55, 3),
    },
    "optax-microbatch": {},
    # its micro-batches take every fourth row, so they are others than those of the loader
    "optax-microbatch-mean": {
        "T1-ragged-counts": (0.33, 1),
        "T4-masked-micro-batch": (0.30, 1),
        "T4-masked-window": (0.53, 3),
    },
}
"""How far off they are, and their updates: means of means, a window that runs on into the next epoch, empty updates."""

NOT_EXPRESSIBLE = {
    "optax-multisteps": {"T4-none"},
    "optax-microbatch": {"T4-none", "T4-masked-window"},
    "optax-microbatch-mean": {"T4-none"},
}

RUN = """
import functools, sys
import optax, torch
from wholebatch.evidence.conformance.adapters import optax as page
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.task import NotExpressible

name, file, planted, *scenes = sys.argv[1:]
if planted == "sum":
    optax.MultiSteps = functools.partial(optax.MultiSteps, use_grad_mean=False)
system = {each.name: each for each in (page.optax_multisteps, page.optax_microbatch, page.optax_microbatch_mean)}[name]
found = {}
for scene in SCENES:
    if scene.name in scenes:
        try:
            trained = system.train(scene.task)
        except NotExpressible:
            continue
        found[scene.name] = trained.model.state_dict(), trained.updates, trained.losses
torch.save(found, file)
"""

SYSTEMS = [optax_multisteps, optax_microbatch, optax_microbatch_mean]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system, tmp_path):
    """Where gradients are averaged, three of the four traps are there; where sums are added up, none is."""
    names = [scene.name for scene in SCENES if scene.trap in ("T1", "T2", "T3", "T4") and scene.name != "T4-none"]
    found = verdicts(system, tmp_path, names)
    assert set(names) - set(found) == NOT_EXPRESSIBLE[system.name] - {"T4-none"}
    off = OFF[system.name]
    assert {name for name, verdict in found.items() if verdict.outcome == "fail"} == set(off)
    for scene, (error, updates) in off.items():
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene
        named = "runs on into the next epoch" if scene == "T3-tail-unsized" else "a mean of means"
        assert named in found[scene].why, scene


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_there_is_no_way_to_say_that_a_micro_batch_is_none(system):
    (scene,) = (scene for scene in SCENES if scene.name == "T4-none")
    assert judge(system, scene).outcome == "not expressible"


def test_a_planted_mistake_is_found(tmp_path):
    """Gradients that are added up instead of averaged, where Optax as it is passes."""
    verdict = verdicts(optax_multisteps, tmp_path, ["T2-mean"], planted="sum")["T2-mean"]
    assert verdict.outcome == "fail"
    assert verdict.error == pytest.approx(3.0, rel=1e-6)  # 4 micro-batches
    assert "divided by nothing" in verdict.why


def verdicts(system, folder: Path, names: list[str], planted: str = "nothing") -> dict[str, Verdict]:
    """Return what the second judge says about the scenes that the system could train."""
    file = folder / "trained.pt"
    command = [sys.executable, "-c", RUN, system.name, str(file), planted, *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(file)
    said = {}
    for scene in SCENES:
        if scene.name in found:
            assert isinstance(scene.task, Task)
            weights, updates, losses = found[scene.name]
            model = scene.task.make_model()
            model.load_state_dict(weights)
            said[scene.name] = compare(system.name, scene, Trained(model, updates, losses), second_reading(scene.task))
    return said
