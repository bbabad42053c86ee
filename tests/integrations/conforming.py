"""The conformance scenes in the words of the integrations: ``KERAS_BACKEND=jax python conforming.py whole-jax``.

Systems, joined by commas, and after them scenes, if it is not to be all. Also for pytest:
``--wholebatch-adapter=integrations.conforming:whole_torch``.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from wholebatch.evidence.conformance.adapters import keras as page
from wholebatch.evidence.conformance.adapters import optax as optax_page
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.models import IGNORED
from wholebatch.evidence.conformance.scenes import ROWS, SCENES
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import PairTask, Task, Trained, join


def fit(task: Task | PairTask, *, backend: str, windows: bool) -> Trained:
    """Train with ``fit``: on logical batches that `WholeBatchModel` cuts, or on micro-batches in `ExactWindows`."""
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    import keras

    from wholebatch.integrations.keras import ExactWindows, WholeBatchModel

    assert isinstance(task, Task)
    assert keras.backend.backend() == backend
    plain = task.make_model()
    dtype = str(next(plain.parameters()).dtype).removeprefix("torch.")
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    keras.config.set_dtype_policy("mixed_float16" if task.precision == "fp16" else dtype)
    inner = page._build(task, plain)
    optimizer = keras.optimizers.SGD(
        # it counts updates, not micro-batches
        learning_rate=page._schedule(replace(task, window=1)) if task.lr_factor else task.lr,
        global_clipnorm=task.clip_norm,
    )
    model: Any = ExactWindows(inner, task.window) if windows else WholeBatchModel(inner, ROWS)
    # the mean over labels that count, of which a window without a label has none
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED)
    model.compile(optimizer=optimizer, loss=loss)
    parts = list(task.epoch) if windows else [join(window) for _, window in replace(task, epochs=1).windows()]
    data = _Sized(parts) if task.sized else _Unsized(parts)
    loader: Any = DataLoader(data, batch_size=1, shuffle=False, collate_fn=page._pair)
    model.fit(loader, epochs=task.epochs, shuffle=False, verbose=0)
    page._write_back(inner, plain)
    return Trained(plain, int(optimizer.iterations))


class _Sized(Dataset[Any]):
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> Any:
        return self.parts[place]


class _Unsized(IterableDataset[Any]):
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __iter__(self) -> Any:
        return iter(self.parts)


def gradient(task: Task | PairTask) -> Trained:
    """Train with `value_and_grad` on logical batches."""
    import jax
    import optax

    from wholebatch.integrations.jax import value_and_grad

    assert isinstance(task, Task)
    problem = optax_page.Problem(task)

    def declared(weights: Any, batch: Any) -> Any:
        loss_sum, targets = problem.loss_sum(weights, *batch)
        return (loss_sum, targets, problem.penalty(weights)) if task.penalty else (loss_sum, targets)

    step = jax.jit(value_and_grad(declared, ROWS))
    weights, optimizer, losses = problem.weights, problem.optimizer(), []
    state = optimizer.init(weights)
    for batch in optax_page._batches(task):
        inputs, labels = optax_page._arrays(batch)
        if (labels == IGNORED).all():
            continue  # whose loop it is decides that this is no update
        loss, grads = step(weights, (inputs, labels))
        updates, state = optimizer.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append(float(loss))
        if task.follows:
            task.after_update(problem.write_back(weights))
    return Trained(problem.write_back(weights), len(losses), losses)


def steps(task: Task | PairTask) -> Trained:
    """Train with `multi_steps` on micro-batches."""
    import jax
    import optax

    from wholebatch.integrations.jax import multi_steps

    assert isinstance(task, Task)
    problem = optax_page.Problem(task)
    weights, optimizer = problem.weights, multi_steps(problem.optimizer(), task.window)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights: Any, state: Any, inputs: Any, labels: Any) -> Any:
        targets = (labels != IGNORED).sum()
        return optimizer.update(jax.grad(problem.loss)(weights, inputs, labels), state, weights, targets=targets)

    def apply(updates: Any) -> Any:
        changed = optax.apply_updates(weights, updates)
        if task.follows and bool(state.updated):
            task.after_update(problem.write_back(changed))
        return changed

    for _ in range(task.epochs):
        for loaded in task.loader():
            for micro_batch in task.cut(loaded):
                assert micro_batch is not None
                updates, state = step(weights, state, *optax_page._arrays(micro_batch))
                weights = apply(updates)
        updates, state = optimizer.close(state, weights)
        weights = apply(updates)
    return Trained(problem.write_back(weights), int(state.updates))


def _keras(backend: str, windows: bool) -> System:
    like = page.keras_torch if backend == "torch" else page.keras_jax
    name = f"{'windows' if windows else 'whole'}-{backend}"
    return replace(like, name=name, title=name, train=partial(fit, backend=backend, windows=windows))


whole_torch, whole_jax = _keras("torch", False), _keras("jax", False)
windows_torch, windows_jax = _keras("torch", True), _keras("jax", True)
gradient_jax = replace(optax_page.optax_microbatch, name="gradient-jax", title="value_and_grad", train=gradient)
steps_jax = replace(
    optax_page.optax_multisteps,
    name="steps-jax",
    title="multi_steps",
    train=steps,
    expresses=optax_page.optax_microbatch.expresses,
)

SYSTEMS = {each.name: each for each in (whole_torch, whole_jax, windows_torch, windows_jax, gradient_jax, steps_jax)}


if __name__ == "__main__":
    names, wanted = sys.argv[1].split(","), sys.argv[2].split(",") if len(sys.argv) > 2 else []
    for name in names:
        for scene in SCENES:
            alone = isinstance(scene.task, Task) and scene.task.ranks == 1
            if alone and (not wanted or scene.name in wanted):
                verdict = judge(SYSTEMS[name], scene)
                print(json.dumps([name, scene.name, verdict.outcome, verdict.why]))
