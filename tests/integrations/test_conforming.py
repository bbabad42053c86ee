"""The scenes of the conformance suite on Keras and JAX through the integrations."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("optax")
pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")

SCENES = ["T1-ragged-counts", "T3-tail-unsized", "T4-masked-window", "T9-regulariser", "T9-clipping"]
"""Those that Keras or Optax fail as they are, and terms outside the mean. `conforming` runs all, in minutes."""


@pytest.mark.parametrize("names", ["whole-torch,windows-torch", "gradient-jax,steps-jax"])
def test_the_scenes_pass(names, tmp_path):
    here = Path(__file__).with_name("conforming.py")
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # it compiles faster
    command = [sys.executable, str(here), names, ",".join(SCENES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [verdict for verdict in verdicts if verdict[2] != "pass"] == []
    assert len(verdicts) == 2 * len(SCENES)
