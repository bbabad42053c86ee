"""The gradient of a logical batch in JAX, cut and uncut; what is computed stands in `jax_scenes`."""

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("jax") is None or find_spec("optax") is None, reason="jax and optax are not installed"
)

SCENES = Path(__file__).with_name("jax_scenes.py")
EXACT = 1e-12
"""Relative, in float64: room for rounding alone."""

HINTS = {
    "no function": ("LossError", "sum_fn is a int", "(loss_sum, targets)"),
    "no optimizer": ("OptimizerError", "The optimizer is a int", "multi_steps(optax.adam(1e-3), 4)"),
    "no rows": ("SplitError", "0 rows", "1 or more"),
    "argnums": ("LossError", "argnums=1", "leave out 1"),
    "too few arguments": ("LossError", "2 arguments", "change argnums"),
    "disagree": ("SplitError", "['x'] 7, ['y'][0] 20", "f(params, batch, shared)"),
    "empty": ("SplitError", "no rows", "first dimension"),
    "a mean": ("LossError", "shape ()", "(loss_sum, targets)"),
    "no scalar": ("LossError", "loss_sum has the shape (8, 5)", "both scalars"),
    "no aux": ("LossError", "has_aux", "((loss_sum, targets), aux)"),
    "no targets": ("WeightError", "without targets", "targets=n"),
    "no window": ("OptimizerError", "0 micro-batches", "last=True"),
    "reduction": ("OptimizerError", "'none'", "'mean' or 'sum'"),
    "whole numbers": ("LossError", "['step'] int", "f(params, batch, shared)"),
    "a whole loss": ("LossError", "the dtype int", "floating point number"),
    "whole sums": ("WeightError", "int32", "jnp.float32"),
    "no dtype": ("WeightError", "'float99'", "jnp.float32"),
    "half a window": ("OptimizerError", "2.5 micro-batches", "a whole number"),
    "targets by row": ("WeightError", "the shape (2,)", "one scalar"),
    "float0": ("OptimizerError", "float0", "not trained"),
}


@cache
def answers():
    done = subprocess.run([sys.executable, str(SCENES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_gradient_is_that_of_the_undivided_batch():
    """20 rows in micro-batches of 1, 3 and all; a mean over what a mask leaves, alone, with a term beside it, or 0."""
    errors, _ = answers()["cuts"]
    assert len(errors) == 9
    assert max(errors.values()) <= EXACT


def test_the_bound_sees_a_mean_of_means():
    assert answers()["cuts"][1] > 0.1


@pytest.mark.parametrize("way", ["mean", "mean and once", "pmap", "vmap", "placed"])
def test_rows_may_be_spread_over_devices(way):
    """In `shard_map` with and without its checks, in `pmap`, in `vmap`, and where the arrays lie on four devices."""
    error, in_loops = answers()["devices"][0][way]
    assert error <= EXACT
    assert in_loops == 0  # devices speak once a logical batch


def test_the_look_at_loops_sees_a_message_a_pass():
    assert answers()["devices"][1] > 0


def test_memory_is_that_of_a_micro_batch():
    """Beside its arguments, a compiled function needs the same for 16 times the rows; uncut, it needs 16 times."""
    needs = answers()["memory"]
    for kind in ("cut", "ragged"):
        few, many = needs[kind]
        assert many <= 1.05 * few, kind
    few, many = needs["whole"]
    assert many > 10 * few
    assert needs["cut"][0] < few / 10


def test_sums_are_wider_than_parameters_in_16_bits():
    """1,024 micro-batches: within one eps of bfloat16, whatever their number; and the bound sees sums in bfloat16."""
    (wide, rotten), dtype = answers()["narrow"]
    assert wide <= 1
    assert rotten > 4
    assert dtype == "bfloat16"


def test_complex_gradients_keep_both_parts_in_a_sum_of_a_named_dtype():
    assert max(answers()["complex_numbers"]) <= EXACT


def test_a_batch_without_a_target_has_no_gradient():
    assert answers()["nothing"] == [0, 0]


def test_aux_arguments_and_keys():
    found = answers()["extras"]
    assert found["error"] <= EXACT
    assert found["scale"] <= EXACT
    assert found["aux"] == 20
    same, other, by_cut = found["keys"]
    assert same
    assert other
    assert by_cut <= EXACT  # keys of rows do not depend on the cut


def test_windows_of_ragged_micro_batches_make_exact_updates():
    """Momentum and clipping, windows of 3, 3 and 1 in each of two epochs."""
    found = answers()["steps"]
    assert found["ours"] <= EXACT
    assert found["updates"] == 6
    assert found["sums"] == [-(1 + 6) / 4, -(2 + 4) / 4]


def test_the_bound_sees_the_windows_of_optax():
    assert answers()["steps"]["optax"] > 0.01


def test_an_empty_window_is_no_update():
    assert answers()["steps"]["empty"] == [[0, 0], 1, False]


@pytest.mark.parametrize("case", HINTS)
def test_what_cannot_be_is_refused_with_a_hint(case):
    kind, found, hint = HINTS[case]
    said = answers()["refusals"][case]
    assert said.startswith(kind)
    assert found in said.partition("hint:")[0]
    assert hint in said.partition("hint:")[2]
