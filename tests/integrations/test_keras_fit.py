"""Keras' own ``fit``, cut and uncut, on both backends; what is trained stands in `keras_scenes`."""

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")

SCENES = Path(__file__).with_name("keras_scenes.py")
EXACT = 1e-12
"""Relative, in float64: room for rounding alone."""
REPORTED = {"torch": 1e-6, "jax": 1e-12}
"""Keras keeps metrics in float32 on PyTorch, whatever the policy."""

HINTS = {
    "batch norm": ("BatchNormError", "moving_mean", "GroupNormalization"),
    "a loss that is one number": ("LossError", "one number for all rows", "axis=-1"),
    "rows compared": ("LossError", "compares the rows", "wb.gather"),
    "rows that meet": ("MeetingError", "rows see each other", "check=None"),
    "a sum taken for a mean": ("LossError", "no mean over rows", "add_loss='sum'"),
    "no reduction": ("LossError", "'none'", "'sum_over_batch_size'"),
    "own accumulation": ("OptimizerError", "accumulates gradients itself", "once an update"),
    "own step": ("ConfigError", "train_step of its own", "GradientAccumulateOptimizer"),
    "no model": ("ConfigError", "NoneType", "keras.Model"),
    "no rows": ("SplitError", "0 rows", "1 or more"),
    "no micro-batches": ("WindowError", "2.5", "1 or more"),
    "no steps": ("OptimizerError", "accum_steps is 0", "1 or more"),
    "windows of windows": ("OptimizerError", "a GradientAccumulateOptimizer already", "the optimizer inside"),
    "an empty batch": ("SplitError", "has no rows", "out of the data"),
}


@cache
def answers(backend):
    command = [sys.executable, str(SCENES), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.mark.parametrize("name", ["weighted_rows", "class_weights", "masked_tokens", "two_outputs"])
def test_fit_makes_the_updates_of_the_undivided_batches(backend, name):
    """Updates of 16, 16 and 5 rows in each epoch, in micro-batches of 3; with what is reported."""
    error, reported, updates = answers(backend)[name]
    assert error <= EXACT
    assert reported <= REPORTED[backend]
    assert updates == (6 if name == "weighted_rows" else 3)


@pytest.mark.parametrize("data", ["sized", "unsized"])
def test_windows_of_micro_batches_make_the_updates_of_what_is_in_them(backend, data):
    """Windows of 16, 16 and 5 rows; without a length, each micro-batch is also padded on its own."""
    error, reported, updates = answers(backend)["windows"][data]
    assert error <= EXACT
    assert reported <= REPORTED[backend]
    assert updates == 3


def test_the_bound_sees_what_keras_does_itself(backend):
    """Means of means, and a tail that is left for later."""
    error, updates = answers(backend)["keras_itself"]
    assert error > 0.1
    assert updates == 2


@pytest.mark.parametrize("way", ["told", "called"])
def test_an_optimizer_is_exact_where_counts_are_equal(backend, way):
    error, updates = answers(backend)["optimizer"][way]
    assert error <= EXACT
    assert updates == 6


def test_the_bound_sees_a_window_that_goes_on_in_the_next_epoch(backend):
    error, updates = answers(backend)["optimizer"]["silent"]
    assert error > 0.1
    assert updates == 5  # of 18 micro-batches: four windows and a tail, which is not lost


def test_an_optimizer_that_is_told_the_targets_weighs_by_them(backend):
    before, after, updates = answers(backend)["declared"]
    assert before == [0, 0]
    assert after == [-(1 * 1 + 3 * 5) / 4, -(1 * 2 + 3 * 6) / 4]
    assert updates == 1


def test_weights_that_no_micro_batch_reaches_are_left_alone(backend):
    assert answers(backend)["out_of_reach"] <= EXACT


def test_weights_are_loaded_before_a_batch_has_come(backend):
    assert answers(backend)["loaded"] == 0


def test_a_batch_without_a_target_is_no_update(backend):
    assert answers(backend)["nothing_to_learn"] == [0, 0, 0]


def test_sums_are_wider_than_weights_in_16_bits(backend):
    assert answers(backend)["narrow_sums"] == -1
    stalled = torch.tensor(0.0, dtype=torch.bfloat16)
    for _ in range(512):
        stalled += 1 / 512
    assert stalled < 0.6  # what the test above would see


def test_an_overflow_skips_the_whole_update_and_lowers_the_scale_once(backend):
    assert answers(backend)["overflow"] == [True, 2]


def test_memory_is_that_of_a_micro_batch():
    """On JAX, where compiling says what a train step needs: the same for 16 times the rows; uncut, 16 times."""
    needs = answers("jax")["memory"]
    assert needs["cut"][1] <= 1.02 * needs["cut"][0]
    assert needs["whole"][1] > 10 * needs["whole"][0]
    assert needs["whole"][0] > needs["cut"][0]


def test_dropout_is_allowed(backend):
    assert answers(backend)["dropout"] > 0


def test_a_model_is_saved_with_its_micro_batch(backend):
    assert answers(backend)["kept"] == ["WholeBatchModel", 3, True, 6]


@pytest.mark.parametrize("case", HINTS)
def test_what_a_cut_batch_cannot_do_is_refused_with_a_hint(backend, case):
    kind, found, hint = HINTS[case]
    said = answers(backend)["refusals"][case]
    assert said.startswith(kind)
    assert found in said.partition("hint:")[0]
    assert hint in said.partition("hint:")[2]


@pytest.mark.parametrize(
    "case", ["batch norm, accepted", "batch norm, fixed", "rows that meet, accepted", "a sum said to be one"]
)
def test_what_is_said_is_accepted(backend, case):
    assert answers(backend)["refusals"][case] == "nothing"


def test_pytorch_stays_away_from_keras_on_jax():
    assert answers("jax")["torch loaded"] is False
    assert answers("torch")["torch loaded"] is True


@pytest.mark.parametrize(("room", "framework"), [("keras", "Keras"), ("jax", "JAX")])
def test_a_missing_framework_says_which_install_brings_it(room, framework):
    source = f"import sys; sys.modules[{room!r}] = None; import wholebatch.integrations.{room}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert f"MissingExtraError: wholebatch.integrations.{room} needs {framework}" in done.stderr
    assert f"hint: pip install 'wholebatch[{room}]'" in done.stderr


def test_another_backend_is_refused(tmp_path):
    """Keras on NumPy can be imported anywhere, and cannot train; what is said for TensorFlow is the same."""
    source = "import wholebatch.integrations.keras"
    environment = {"KERAS_BACKEND": "numpy", "KERAS_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert "Keras runs on numpy" in done.stderr
    assert "hint: set KERAS_BACKEND=torch or KERAS_BACKEND=jax" in done.stderr
