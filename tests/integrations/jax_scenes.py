"""Computes gradients with JAX in float64, on four devices of one CPU, and prints what came out as JSON."""

import json
import os
import re
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from wholebatch.core.errors import WholeBatchError
from wholebatch.integrations.jax import multi_steps, value_and_grad

jax.config.update("jax_enable_x64", True)
RANDOM = np.random.default_rng(0)
PARAMS = {"kernel": jnp.array(RANDOM.normal(size=(5, 3))), "bias": jnp.array(RANDOM.normal(size=3))}
BATCH = {
    "x": RANDOM.normal(size=(20, 5)),
    "y": [RANDOM.normal(size=(20, 3)), RANDOM.random((20, 3)) < 0.3],
}


def squares(params, batch):
    y, mask = batch["y"]
    error = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"]) - y
    return (error**2 * mask).sum(), mask.sum()


def penalized(params, batch):
    return *squares(params, batch), 0.1 * (params["kernel"] ** 2).sum() + jnp.abs(batch["x"] @ params["kernel"]).mean()


def undivided(sum_fn, params, batch):
    loss_sum, targets, *once = sum_fn(params, batch)
    return loss_sum / targets + sum(once)


def off(found, right):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def part(batch, rows):
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def unpenalized(params, batch):
    return *squares(params, batch), 0


def cuts():
    """Return the largest error over cuts, with and without a term beside the mean."""
    found = {}
    for sum_fn in (squares, penalized, unpenalized):
        right = jax.jit(jax.value_and_grad(partial(undivided, sum_fn)))(PARAMS, BATCH)
        for micro_batch in (1, 3, 100):
            got = jax.jit(value_and_grad(sum_fn, micro_batch))(PARAMS, BATCH)
            found[f"{sum_fn.__name__} by {micro_batch}"] = off(got, right)
    mean = jax.jit(jax.value_and_grad(partial(undivided, squares)))
    means = [mean(PARAMS, part(BATCH, slice(start, start + 4))) for start in range(0, 20, 4)]
    mean_of_means = jax.tree.map(lambda *leaves: sum(leaves) / 5, *means)
    return found, off(mean_of_means, mean(PARAMS, BATCH))


def in_loops(text):
    """Return how many reductions over devices stand in the loops of a compiled function."""
    bodies = re.findall(r"body=(%[\w.\-]+)", text)
    return sum(text.partition(f"\n{body} (")[2].partition("\n}")[0].count(" all-reduce(") for body in bodies)


def devices():
    """Return the errors over four devices, and how many reductions were compiled: at all, and in loops."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    here, spread = PartitionSpec(), PartitionSpec("rows")

    def compiled(function, checked=True):
        whole = jax.shard_map(function, mesh=mesh, in_specs=(here, spread), out_specs=here, check_vma=checked)
        return jax.jit(whole).lower(PARAMS, BATCH).compile()

    def a_message_a_pass(params, batch):
        def add(carried, row):
            _, grads = jax.value_and_grad(partial(undivided, squares))(
                params, jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, 1), batch)
            )
            return jax.tree.map(lambda old, new: old + lax.psum(new, "rows"), carried, grads), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(5))[0]

    mean = jax.jit(jax.value_and_grad(partial(undivided, squares)))(PARAMS, BATCH)
    both = jax.jit(jax.value_and_grad(partial(undivided, penalized)))(PARAMS, BATCH)
    found = {}
    for name, sum_fn, right, checked in (("mean", squares, mean, True), ("mean and once", penalized, both, False)):
        everywhere = compiled(value_and_grad(sum_fn, 2, axis_name="rows"), checked)
        found[name] = off(everywhere(PARAMS, BATCH), right), in_loops(everywhere.as_text())
    by_device = jax.tree.map(lambda leaf: leaf.reshape(4, 5, *leaf.shape[1:]), BATCH)
    each = jax.pmap(value_and_grad(squares, 2, axis_name="rows"), axis_name="rows", in_axes=(None, 0))(
        PARAMS, by_device
    )
    found["pmap"] = off(jax.tree.map(lambda leaf: leaf[1], each), mean), 0
    placed = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, spread))
    each = jax.vmap(value_and_grad(squares, 2, axis_name="rows"), axis_name="rows", in_axes=(None, 0))(
        PARAMS, by_device
    )
    found["vmap"] = off(jax.tree.map(lambda leaf: leaf[1], each), mean), 0
    found["placed"] = off(jax.jit(value_and_grad(squares, 3))(PARAMS, placed), mean), 0
    return found, in_loops(compiled(a_message_a_pass, checked=False).as_text())


def memory():
    """Return the bytes that compiled functions need beside their arguments, by rows, cut and uncut."""
    params = {"in": jnp.ones((16, 256), jnp.float32), "out": jnp.ones((256, 1), jnp.float32)}

    def wide(params, batch):
        hidden = batch @ params["in"]
        for _ in range(8):
            hidden = jnp.sin(hidden)
        return (hidden @ params["out"]).sum(), batch.shape[0]

    def needs(function, rows):
        batch = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
        return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    cut = value_and_grad(wide, 64)
    whole = jax.value_and_grad(partial(undivided, wide))
    return {
        "cut": [needs(cut, rows) for rows in (1024, 16384)],
        "ragged": [needs(cut, rows) for rows in (1024 + 7, 16384 + 7)],
        "whole": [needs(whole, rows) for rows in (1024, 16384)],
    }


def narrow():
    """Return the errors of 1,024 micro-batches with parameters in bfloat16, and of sums in bfloat16. Unit: eps."""
    params = jnp.ones(4, jnp.bfloat16)
    batch = jnp.asarray(1 + RANDOM.random((1024, 4)), jnp.bfloat16)

    def linear(params, batch):
        return (batch * params).sum(), batch.shape[0]

    right = np.asarray(batch, np.float64).mean(axis=0)
    _, wide = jax.jit(value_and_grad(linear, 1))(params, batch)
    _, rotten = jax.jit(value_and_grad(linear, 1, accumulate_in=jnp.bfloat16))(params, batch)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    return [float(np.abs(np.asarray(each, np.float64) / right - 1).max() / eps) for each in (wide, rotten)], str(
        wide.dtype
    )


def complex_numbers():
    """Return the errors of complex parameters whose gradients add up in a dtype that is named after real ones."""
    weight = {"w": jnp.asarray(RANDOM.normal(size=5) + 1j * RANDOM.normal(size=5))}

    def sizes(params, batch):
        return (jnp.abs(batch["x"] @ params["w"] - 1) ** 2).sum(), len(batch["x"])

    right = jax.grad(partial(undivided, sizes))(weight, BATCH)
    _, grads = value_and_grad(sizes, 3, accumulate_in=jnp.float64)(weight, BATCH)
    optimizer = multi_steps(optax.sgd(1.0), 1, accumulate_in=jnp.float64)
    updates, _ = optimizer.update(right, optimizer.init(weight), weight, targets=20)
    return [off(grads, right), off(jax.tree.map(jnp.negative, updates), right)]


def nothing():
    """Return value and gradient of a batch in which no target counts."""
    empty = {**BATCH, "y": [BATCH["y"][0], np.zeros((20, 3), bool)]}
    value, grads = jax.jit(value_and_grad(squares, 3))(PARAMS, empty)
    return float(value), float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(grads)))


def extras():
    """Return what aux, several arguments, shared arguments and keys come to."""

    def counted(params, batch, scale):
        loss_sum, targets = squares(params, batch)
        return (loss_sum * scale, targets), {"rows": jnp.float32(batch["x"].shape[0])}

    (value, aux), (grads, by_scale) = value_and_grad(counted, 3, argnums=(0, 2), has_aux=True)(PARAMS, BATCH, 2.0)
    right, of_all = jax.value_and_grad(lambda params: 2 * undivided(squares, params, BATCH))(PARAMS)

    def drawn(_, batch, rng):
        return jax.random.uniform(rng, batch["x"].shape[:1]).sum(), batch["x"].shape[0]

    first, again, other = (
        float(value_and_grad(drawn, 3)(1.0, BATCH, rng=jax.random.key(seed))[0]) for seed in (0, 0, 1)
    )

    def by_row(_, batch):
        return jax.vmap(jax.random.uniform)(batch["key"]).sum(), batch["key"].shape[0]

    keys = {"key": jax.random.split(jax.random.key(0), 20)}
    rowwise = [float(value_and_grad(by_row, size)(1.0, keys)[0]) for size in (3, 20)]
    return {
        "error": off((value, grads), (right, of_all)),
        "scale": abs(float(by_scale) * 2 - float(value)),
        "aux": float(aux["rows"]),
        "keys": [first == again, first != other, abs(rowwise[0] - rowwise[1])],
    }


def steps():
    """Return the errors of windows of ragged micro-batches with Adam and clipping: ours, and those of Optax."""

    def optimizer():
        return optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9))

    parts = [part(BATCH, slice(k, min(k + 3, 20))) for k in range(0, 20, 3)]  # 7 micro-batches: windows of 3, 3 and 1
    mean = jax.jit(jax.value_and_grad(partial(undivided, squares)))

    def run(wrapped, update, close):
        params, state = PARAMS, wrapped.init(PARAMS)
        for _ in range(2):
            for each in parts:
                _, grads = mean(params, each)
                changes, state = update(grads, state, params, each)
                params = optax.apply_updates(params, changes)
            if close:
                changes, state = wrapped.close(state, params)
                params = optax.apply_updates(params, changes)
        return params, state

    params, plain, state = PARAMS, optimizer(), optimizer().init(PARAMS)
    for _ in range(2):
        for rows in (slice(0, 9), slice(9, 18), slice(18, 20)):
            _, grads = mean(params, part(BATCH, rows))
            changes, state = plain.update(grads, state, params)
            params = optax.apply_updates(params, changes)
    exact = multi_steps(optimizer(), 3)
    step = jax.jit(lambda grads, state, params, each: exact.update(grads, state, params, targets=each["y"][1].sum()))
    ours, ended = run(exact, step, close=True)
    theirs = optax.MultiSteps(optimizer(), 3, accumulator_dtype=jnp.float64)
    found, _ = run(theirs, jax.jit(lambda grads, state, params, _: theirs.update(grads, state, params)), close=False)
    sums = multi_steps(optax.sgd(1.0), None, reduction="sum")
    state = sums.init(jnp.zeros(2))
    for grads, targets, last in (([1.0, 2.0], 1, False), ([jnp.nan, jnp.nan], 0, False), ([6.0, 4.0], 3, True)):
        changes, state = sums.update(jnp.array(grads), state, jnp.zeros(2), targets=targets, last=last)
    empty, after = sums.close(state, jnp.zeros(2))
    return {
        "ours": off(ours, params),
        "updates": int(ended.updates),
        "optax": off(found, params),
        "sums": np.asarray(changes).tolist(),
        "empty": [np.asarray(empty).tolist(), int(after.updates), bool(after.updated)],
    }


def refusals():
    def refusal(call):
        try:
            call()
        except WholeBatchError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    optimizer = multi_steps(optax.sgd(1.0), 2)
    return {
        "no function": refusal(lambda: value_and_grad(3)),
        "no optimizer": refusal(lambda: multi_steps(3, 2)),
        "no rows": refusal(lambda: value_and_grad(squares, 0)),
        "argnums": refusal(lambda: value_and_grad(squares, argnums=1)),
        "too few arguments": refusal(lambda: value_and_grad(squares, argnums=2)(PARAMS, BATCH)),
        "disagree": refusal(lambda: value_and_grad(squares)(PARAMS, {**BATCH, "x": BATCH["x"][:7]})),
        "empty": refusal(lambda: value_and_grad(squares)(PARAMS, part(BATCH, slice(0)))),
        "a mean": refusal(lambda: value_and_grad(lambda p, b: squares(p, b)[0])(PARAMS, BATCH)),
        "no scalar": refusal(lambda: value_and_grad(lambda _, b: (b["x"], 1))(PARAMS, BATCH)),
        "no aux": refusal(lambda: value_and_grad(squares, has_aux=True)(PARAMS, BATCH)),
        "no targets": refusal(lambda: optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))),
        "no window": refusal(lambda: multi_steps(optax.sgd(1.0), 0)),
        "reduction": refusal(lambda: multi_steps(optax.sgd(1.0), 2, reduction="none")),
        "whole numbers": refusal(lambda: value_and_grad(squares)({**PARAMS, "step": 3}, BATCH)),
        "a whole loss": refusal(lambda: value_and_grad(lambda _, b: (b["y"][1].sum(), 1))(PARAMS, BATCH)),
        "whole sums": refusal(lambda: value_and_grad(squares, accumulate_in=jnp.int32)),
        "no dtype": refusal(lambda: multi_steps(optax.sgd(1.0), 2, accumulate_in="float99")),
        "half a window": refusal(lambda: multi_steps(optax.sgd(1.0), 2.5)),
        "targets by row": refusal(
            lambda: optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), targets=jnp.ones(2))
        ),
        "float0": refusal(
            lambda: optimizer.update(np.zeros(2, jax.dtypes.float0), optimizer.init(jnp.ones(2, int)), targets=1)
        ),
    }


if __name__ == "__main__":
    answers = {scene.__name__: scene() for scene in (memory, devices)}
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster
    answers |= {scene.__name__: scene() for scene in (cuts, narrow, complex_numbers, nothing, extras, steps, refusals)}
    print(json.dumps(answers))
