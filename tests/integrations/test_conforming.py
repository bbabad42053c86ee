"""The scenes of the conformance suite on Keras and JAX through the integrations; those of Keras itself fail six."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("optax")
pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")

TRAPS = {
    "T1-ragged-counts",
    "T3-tail",
    "T3-tail-unsized",
    "T3-shorter-than-a-window",
    "T4-masked-window",
    "T9-clipping",
}
"""Scenes that none of them may leave out; the first five are among those that Keras itself fails."""


@pytest.mark.parametrize(
    "name",
    [
        "whole-torch",
        "windows-torch",
        "gradient-jax",
        "steps-jax",
        pytest.param("whole-jax", marks=pytest.mark.slow),
        pytest.param("windows-jax", marks=pytest.mark.slow),
    ],
)
def test_every_scene_that_can_be_expressed_passes(name, tmp_path):
    here = Path(__file__).with_name("conforming.py")
    backend = name.partition("-")[2]
    environment = {**os.environ, "KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = {scene: (outcome, why) for scene, outcome, why in map(json.loads, done.stdout.splitlines())}
    judged = {scene: said for scene, said in verdicts.items() if said[0] != "not expressible"}
    assert {scene: said for scene, said in judged.items() if said[0] != "pass"} == {}
    assert judged.keys() >= TRAPS
