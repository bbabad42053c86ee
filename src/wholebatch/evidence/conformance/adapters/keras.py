"""Keras 3, on PyTorch and on JAX: ``optimizer=SGD(gradient_accumulation_steps=k)`` and ``model.fit``.

As in the docstrings of `keras.optimizers.Optimizer` (``gradient_accumulation_steps``: the average of the gradients
since the last update; schedules count micro-batches) and of `SparseCategoricalCrossentropy` (``ignore_class``), and in
the guide "Training & evaluation with the built-in methods". In float16 the policy is ``mixed_float16``, under which
`compile` scales the loss with a `LossScaleOptimizer` around the optimizer, as the guide "Mixed precision" has it. What
``fit`` reports is a mean over the epoch so far, so no update has a loss. Its own moving average (``use_ema``) does not
begin at the first weights, so the scene is not put to it. A run that is stopped goes on with `BackupAndRestore`, which
saves after so many batches (``save_freq``).
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from wholebatch.evidence.conformance.adapters.loaders import dataset
from wholebatch.evidence.conformance.models import IGNORED, TIME, VOCABULARY, WIDTH, Overflowing
from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import PairTask, Task, Trained


def train(task: Task | PairTask, *, backend: str) -> Trained:
    """Train with ``model.fit``."""
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    import keras

    assert isinstance(task, Task)
    assert keras.backend.backend() == backend
    return in_processes(task, _train)


def _train(task: Task, process: Process) -> Trained:
    import keras

    plain = task.make_model()
    dtype = str(next(plain.parameters()).dtype).removeprefix("torch.")
    # losses and learning rates are in floatx, whatever the policy; the documentation advises against 16 bits for it
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    keras.config.set_dtype_policy("mixed_float16" if task.precision == "fp16" else dtype)
    model = _build(task, plain)
    optimizer = keras.optimizers.SGD(
        learning_rate=_schedule(task) if task.lr_factor else task.lr,
        gradient_accumulation_steps=task.window,
        global_clipnorm=task.clip_norm,
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED),
    )
    loader: Any = DataLoader(dataset(task), batch_size=1, shuffle=False, collate_fn=_pair)
    updates = 0  # that the optimizer has made when training begins
    callbacks: list[Any] = []

    class Stops(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
            nonlocal updates
            updates = int(optimizer.iterations)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            if batch + 1 == process.ends_before:
                raise Stopped(int(optimizer.iterations))

    if task.stops_before is not None:
        backup = keras.callbacks.BackupAndRestore(str(process.folder / "backup"), save_freq=task.stops_before)
        callbacks = [backup, Stops()]
    model.fit(loader, epochs=task.epochs, shuffle=False, verbose=0, callbacks=callbacks)
    _write_back(model, plain)
    return Trained(plain, int(optimizer.iterations) - updates)


def _pair(parts: list[Any]) -> tuple[Any, Any]:
    (part,) = parts
    return part["input_ids"], part["labels"]


def _build(task: Task, plain: nn.Module) -> Any:
    """The scene's model in the words of Keras, with the weights of the original."""
    import keras

    penalty = keras.regularizers.L2(task.penalty) if task.penalty is not None else None
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH, embeddings_regularizer=penalty, name="embedding")
    dense = keras.layers.Dense(VOCABULARY, kernel_regularizer=penalty, bias_regularizer=penalty, name="head")
    input_ids = keras.Input((TIME,), dtype="int64")
    hidden = keras.layers.Activation("tanh")(embedding(input_ids))
    if isinstance(plain, Overflowing):
        gain = keras.layers.Embedding(VOCABULARY, 1, trainable=False, dtype="float32", name="gain")
        hidden = keras.layers.Multiply(dtype="float32")([hidden, gain(input_ids)])
        gain.set_weights([plain.gain.numpy()])
    model = keras.Model(input_ids, dense(hidden))
    weights = {name: weight.detach().double().numpy() for name, weight in plain.named_parameters()}
    embedding.set_weights([weights["embedding.weight"]])
    dense.set_weights([weights["head.weight"].T, weights["head.bias"]])
    embedding.trainable = plain.get_parameter("embedding.weight").requires_grad
    return model


def _write_back(model: Any, plain: nn.Module) -> None:
    """Give the original the weights that were trained."""
    import numpy as np

    embedding, dense = model.get_layer("embedding"), model.get_layer("head")
    trained = {
        "embedding.weight": embedding.get_weights()[0],
        "head.weight": dense.get_weights()[0].T,
        "head.bias": dense.get_weights()[1],
    }
    with torch.no_grad():
        for name, weight in trained.items():
            plain.get_parameter(name).copy_(torch.from_numpy(np.array(weight, dtype=np.float64)))


def _schedule(task: Task) -> Any:
    """The schedule by updates, for an optimizer whose documentation says that it counts micro-batches."""
    import keras

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            assert task.lr_factor is not None
            return task.lr * task.lr_factor(keras.ops.cast(step // task.window, "float64"))

    return Schedule()


ROUNDING = 1e-6
"""On PyTorch and JAX, Keras multiplies matrices or takes a tanh in float32, also under the policy float64."""

_LACKS = {"two optimizers": "compile takes one optimizer", "runs short": "what runs short is a model of PyTorch"}

_EXPRESSES = frozenset({"unsized", "clipping", "schedule", "term", "fp16", "bf16", "stops"})

keras_torch = System(
    name="keras-torch",
    title="Keras on PyTorch",
    train=partial(train, backend="torch"),
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("keras", "torch"),
    install="pip install 'wholebatch[keras]'",
    environment={"KERAS_BACKEND": "torch"},
    rounding=ROUNDING,
)

keras_jax = System(
    name="keras-jax",
    title="Keras on JAX",
    train=partial(train, backend="jax"),
    expresses=_EXPRESSES,
    lacks=_LACKS,
    distributions=("keras", "jax", "torch"),
    install="pip install 'wholebatch[keras]'",
    environment={"KERAS_BACKEND": "jax"},
    rounding=ROUNDING,
)
