"""Optax on JAX: `MultiSteps` over the gradients of micro-batches, and `optax.microbatch` over a logical batch.

As in its guide "Gradient Accumulation" (`MultiSteps` averages the gradients that it is given, in ``accumulator_dtype``)
and in the docstring of `optax.microbatch`: its default accumulator adds up, so the function that it is given returns
sums, and whoever has only a mean asks for `AccumulationType.MEAN`. Of k micro-batches, each takes every k-th row, so
that others come together than in the loader.

`MultiSteps` is given the window as a number, or, where an epoch of known length has a short last window, as a function
of the updates before (``every_k_schedule``). The tail of a loader without a length it cannot follow. Its state is a
tree of arrays, and a run that is stopped goes on from these.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from wholebatch.evidence.conformance.models import IGNORED
from wholebatch.evidence.conformance.scenes import ROWS
from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import MicroBatch, NotExpressible, PairTask, Task, Trained, join


class Problem:
    """The scene's model in the words of JAX, with the weights of the original."""

    def __init__(self, task: Task) -> None:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        self.task = task
        self.model = task.make_model()
        self.weights = {name: _array(each) for name, each in self.model.named_parameters() if each.requires_grad}
        self._frozen = {name: _array(each) for name, each in self.model.named_parameters() if not each.requires_grad}
        self.exact = jnp.promote_types(self.weights["head.bias"].dtype, jnp.float32)

    def loss_sum(self, weights: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
        """Return the summed cross entropy over the labels, and their number."""
        import jax.numpy as jnp
        import optax

        every = {**self._frozen, **weights}
        hidden = jnp.tanh(every["embedding.weight"][input_ids])
        logits = (hidden @ every["head.weight"].T + every["head.bias"]).astype(self.exact)
        mask = labels != IGNORED
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, labels, 0))
        return each.sum(where=mask), mask.sum()

    def loss(self, weights: Any, input_ids: Any, labels: Any) -> Any:
        """Return the masked mean as one writes it, and the penalty."""
        loss_sum, count = self.loss_sum(weights, input_ids, labels)
        return loss_sum / count + self.penalty(weights)

    def penalty(self, weights: Any) -> Any:
        """Return the penalty on the weights, or nothing."""
        return (self.task.penalty or 0.0) * sum((weight**2).sum() for weight in weights.values())

    def optimizer(self) -> Any:
        """Return SGD with what the scene asks for."""
        import optax

        factor = self.task.lr_factor
        lr: float | Callable[[Any], Any] = self.task.lr
        if factor is not None:
            lr = lambda update: self.task.lr * factor(update)  # noqa: E731
        sgd = optax.sgd(lr)
        return sgd if self.task.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.task.clip_norm), sgd)

    def write_back(self, weights: Any) -> nn.Module:
        """Return the original model with these weights."""
        import numpy as np

        with torch.no_grad():
            for name, weight in weights.items():
                self.model.get_parameter(name).copy_(torch.from_numpy(np.array(weight, dtype=np.float64)))
        return self.model


def _array(weight: torch.Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(weight.detach().double().numpy()).astype(str(weight.dtype).removeprefix("torch."))


def _arrays(batch: MicroBatch) -> tuple[Any, Any]:
    return batch["input_ids"].numpy(), batch["labels"].numpy()


def train(task: Task | PairTask) -> Trained:
    """Train with `MultiSteps`."""
    assert isinstance(task, Task)
    return in_processes(task, _train_multi_steps)


def _train_multi_steps(task: Task, process: Process) -> Trained:
    import jax
    import numpy as np
    import optax

    problem = Problem(task)
    weights = problem.weights
    optimizer = optax.MultiSteps(
        problem.optimizer(),
        every_k_schedule=_schedule(task),
        accumulator_dtype=problem.exact,  # float32, its default, would round what is in float64
    )
    state = optimizer.init(weights)
    gradient = jax.jit(jax.grad(problem.loss))

    def update(grads: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    apply = jax.jit(update)
    file = process.folder / "state.npz"
    if process.begins_at:
        saved = np.load(file)
        structure = jax.tree.structure((weights, state))
        weights, state = jax.tree.unflatten(structure, [saved[name] for name in saved])
    before, place = int(state.gradient_step), 0
    for _ in range(task.epochs):
        for loaded in task.loader():
            for micro_batch in task.cut(loaded):
                assert micro_batch is not None
                place += 1
                if place <= process.begins_at:
                    continue
                if place - 1 == process.ends_before:
                    np.savez(file, *jax.tree.leaves((weights, state)))
                    raise Stopped(int(state.gradient_step))
                weights, state = apply(gradient(weights, *_arrays(micro_batch)), state, weights)
                if task.follows and optimizer.has_updated(state):
                    task.after_update(problem.write_back(weights))
                if place - 1 in task.evaluates_after:
                    problem.loss(weights, *_arrays(micro_batch))
    return Trained(problem.write_back(weights), int(state.gradient_step) - before)


def _schedule(task: Task) -> Any:
    """The micro-batches of each update: a number, or a function of the updates before, where an epoch has a tail."""
    import jax.numpy as jnp

    tail = len(task.epoch) % task.window
    if tail == 0 or not task.sized:
        return task.window
    updates = math.ceil(len(task.epoch) / task.window)
    return lambda update: jnp.where(update % updates == updates - 1, tail, task.window)


def train_microbatch(task: Task | PairTask) -> Trained:
    """Train with `optax.microbatch`: it adds up loss, count and gradient, and the sums are divided once."""
    import jax

    assert isinstance(task, Task)
    if task.loss_form == "mean":
        return train_microbatch_mean(task)
    problem = Problem(task)

    def objective(weights: Any, batch: MicroBatch) -> tuple[Any, Any]:
        (loss_sum, count), grads = sums(weights, *_arrays(batch))
        if int(count) == 0:
            raise NotExpressible("who divides by the sum of the counts decides what a window without a label is")
        penalty, terms = jax.value_and_grad(problem.penalty)(weights)
        return loss_sum / count + penalty, jax.tree.map(lambda grad, term: grad / count + term, grads, terms)

    sums = _microbatched(jax.value_and_grad(problem.loss_sum, has_aux=True))
    return _update_by_batch(problem, objective)


def train_microbatch_mean(task: Task | PairTask) -> Trained:
    """Train with `optax.microbatch`, and have it average the loss, a mean, and its gradient."""
    import jax
    from optax.microbatching import AccumulationType

    assert isinstance(task, Task)
    problem = Problem(task)
    means = _microbatched(jax.value_and_grad(problem.loss), accumulator=AccumulationType.MEAN)
    return _update_by_batch(problem, lambda weights, batch: means(weights, *_arrays(batch)))


def _microbatched(function: Any, **options: Any) -> Any:
    import jax
    import optax

    return jax.jit(optax.microbatch(function, argnums=(1, 2), microbatch_size=ROWS, **options))


def _update_by_batch(problem: Problem, objective: Callable[[Any, MicroBatch], tuple[Any, Any]]) -> Trained:
    """Update with the objective of each logical batch, given whole."""
    import optax

    weights = problem.weights
    optimizer = problem.optimizer()
    state = optimizer.init(weights)
    losses = []
    for batch in _batches(problem.task):
        loss, grads = objective(weights, batch)
        updates, state = optimizer.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append(float(loss))
        if problem.task.follows:
            problem.task.after_update(problem.write_back(weights))
    return Trained(problem.write_back(weights), len(losses), losses)


def _batches(task: Task) -> Iterator[MicroBatch]:
    """Yield the logical batches, as a loader yields them that is asked for such; its length is never asked for."""
    for _, micro_batches in task.windows():
        yield join(micro_batches)


_LACKS = {"fp16": "it has no loss scale", "runs short": "what runs short is a model of PyTorch"}

_LACKS_OF_MICROBATCH = {**_LACKS, "stops": "a logical batch is one call, which is not saved half-way"}

_EXPRESSES = frozenset({"unsized", "slices", "clipping", "schedule", "term", "follows", "bf16"})

optax_multisteps = System(
    name="optax-multisteps",
    title="Optax, MultiSteps",
    train=train,
    expresses=_EXPRESSES | {"evaluation", "stops"},
    lacks=_LACKS,
    distributions=("optax", "jax"),
    install="pip install 'wholebatch[jax]'",
)

optax_microbatch = System(
    name="optax-microbatch",
    title="Optax, microbatch",
    train=train_microbatch,
    expresses=_EXPRESSES,
    lacks=_LACKS_OF_MICROBATCH,
    distributions=("optax", "jax"),
    install="pip install 'wholebatch[jax]'",
)

optax_microbatch_mean = System(
    name="optax-microbatch-mean",
    title="Optax, microbatch with the accumulator MEAN",
    train=train_microbatch_mean,
    expresses=_EXPRESSES,
    lacks=_LACKS_OF_MICROBATCH,
    distributions=("optax", "jax"),
    install="pip install 'wholebatch[jax]'",
)
