"""Trains with Keras' own ``fit`` on one backend, and prints what came out as JSON: ``python keras_scenes.py torch``.

A process of its own, since Keras has one backend in each, and so that JAX is in float64 here alone. On PyTorch Keras
multiplies matrices in float32 whatever the policy, and on JAX it takes means so: the layers and losses here do neither.
"""

import json
import os
import sys
import tempfile
import warnings

os.environ["KERAS_BACKEND"] = BACKEND = sys.argv[1]
os.environ["KERAS_HOME"] = tempfile.mkdtemp()
if BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster

import keras
import numpy as np
from keras import ops

from wholebatch.core.errors import WholeBatchError
from wholebatch.integrations.keras import ExactWindows, GradientAccumulateOptimizer, WholeBatchModel
from wholebatch.integrations.keras.cutting import num_rows

warnings.simplefilter("ignore", UserWarning)  # Keras on a generator that ends, and on masks that a sum drops
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
RANDOM = np.random.default_rng(0)
ROWS, TIME = 37, 7
X, Y, W = RANDOM.normal(size=(ROWS, 6)), RANDOM.normal(size=(ROWS, 3)), RANDOM.random(ROWS)
IDS, LABELS = RANDOM.integers(1, 11, (ROWS, TIME)), RANDOM.integers(0, 5, (ROWS, TIME))
for row, length in enumerate(RANDOM.integers(1, TIME, ROWS)):
    IDS[row, length:] = 0


@keras.saving.register_keras_serializable()
class Mixed(keras.layers.Layer):
    """A dense layer in the dtype of its weights."""

    def __init__(self, units, square=False, **options):
        super().__init__(**options)
        self.units, self.square, self.supports_masking = units, square, True

    def build(self, shape):
        penalty = keras.regularizers.L2(0.01) if self.square else None
        self.kernel = self.add_weight(shape=(shape[-1], self.units), regularizer=penalty)
        self.bias = self.add_weight(shape=(self.units,))

    def call(self, x):
        out = ops.sum(x[..., None] * self.kernel, axis=-2) + self.bias
        return out * out if self.square else out

    def get_config(self):
        return {**super().get_config(), "units": self.units, "square": self.square}


class Added(keras.layers.Layer):
    """The sum over time."""

    def call(self, x):
        return ops.sum(x, axis=1)


class Squares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sum(ops.square(y_true - y_pred), axis=-1)


def rows():
    x = keras.Input((6,))
    hidden = Mixed(5, square=True, activity_regularizer=keras.regularizers.L2(0.1))(x)
    return keras.Model(x, Mixed(3)(hidden))


def tokens():
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, Mixed(5)(keras.layers.Embedding(11, 4, mask_zero=True)(ids)))


def both():
    ids = keras.Input((TIME,), dtype="int32")
    hidden = keras.layers.Embedding(11, 4, mask_zero=True)(ids)
    return keras.Model(ids, [Mixed(5, name="token")(hidden), Mixed(3, name="row")(Added()(hidden))])


def entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def sgd(**options):
    return keras.optimizers.SGD(0.3, momentum=0.9, **options)


def fitted(model, compiled, optimizer, x, y=None, epochs=2, **options):
    model.compile(optimizer, **compiled)
    history = model.fit(x, y, epochs=epochs, shuffle=False, verbose=0, **options).history
    return model, history


def same_start(make):
    """Return a function that makes models with the same weights."""
    weights = make().get_weights()

    def start():
        model = make()
        model.set_weights(weights)
        return model

    return start


def off(found, right):
    """Return the largest error of the weights, relative to the largest of each."""
    pairs = zip(found.get_weights(), right.get_weights(), strict=True)
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def history_off(found, right):
    assert set(found) == set(right)
    return max(float(abs(np.array(found[name]) - np.array(right[name])).max()) for name in right)


def whole(make, compiled, optimizer, x, y, micro_batch=3, **options):
    """Return how far `WholeBatchModel` is off, in weights and in what is reported, and its updates."""
    start = same_start(make)
    options.setdefault("epochs", 1)
    right, said = fitted(start(), compiled, optimizer(), x, y, batch_size=16, **options)
    model, history = fitted(
        WholeBatchModel(start(), micro_batch), compiled, optimizer(), x, y, batch_size=16, **options
    )
    return off(model.model, right), history_off(history, said), int(model.optimizer.iterations)


def refusal(build):
    try:
        build()
    except WholeBatchError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


SCENES = {}


def scene(function):
    SCENES[function.__name__] = function
    return function


@scene
def weighted_rows():
    compiled = {"loss": Squares(), "metrics": [Squares_metric()], "weighted_metrics": ["mse"]}
    adam = lambda: keras.optimizers.AdamW(0.01, clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2)  # noqa: E731
    return whole(rows, compiled, adam, X, Y, epochs=2, sample_weight=W)


def Squares_metric():
    return keras.metrics.MeanMetricWrapper(lambda a, b: ops.sum(ops.square(a - b), axis=-1), name="squares")


@scene
def class_weights():
    weights = {0: 1.0, 1: 2.0, 2: 3.0, 3: 0.5, 4: 0.0}
    plain = lambda: keras.Sequential([keras.Input((6,)), Mixed(5)])  # noqa: E731
    compiled = {"loss": entropy(reduction="mean_with_sample_weight")}
    return whole(plain, compiled, lambda: sgd(clipvalue=0.01), X, LABELS[:, 0], class_weight=weights)


@scene
def masked_tokens():
    compiled = {"loss": entropy(ignore_class=3, reduction="mean_with_sample_weight")}
    return whole(tokens, compiled, lambda: sgd(global_clipnorm=0.5), IDS, LABELS)


@scene
def two_outputs():
    compiled = {
        "loss": {"token": entropy(reduction="mean_with_sample_weight"), "row": Squares()},
        "loss_weights": {"token": 0.3, "row": 2.0},
        "metrics": {"row": [Squares_metric()]},
    }
    targets = {"token": LABELS, "row": Y}
    return whole(both, compiled, lambda: sgd(global_clipnorm=0.1), IDS, targets, validation_data=(IDS, targets))


@scene
def windows():
    """Micro-batches of 4 rows in windows of 4, with a tail of two micro-batches: array, and a loader without length."""
    start = same_start(tokens)
    compiled = {"loss": entropy(reduction="mean_with_sample_weight")}
    right, said = fitted(start(), compiled, sgd(), IDS, LABELS, epochs=1, batch_size=16)

    def ragged():
        """Each micro-batch as long as its longest row, as a loader would pad it."""
        for first in range(0, ROWS, 4):
            part = slice(first, first + 4)
            length = int((IDS[part] != 0).sum(axis=1).max())
            yield IDS[part, :length], LABELS[part, :length]

    found = {}
    for name, data in (("unsized", ragged()), ("sized", (IDS, LABELS))):
        model = ExactWindows(start(), 4)
        options = {"batch_size": 4, "validation_data": (IDS, LABELS)} if name == "sized" else {}
        arrays = data if name == "sized" else (data,)
        model, history = fitted(model, compiled, sgd(), *arrays, epochs=1, **options)
        updates = int(model.optimizer.iterations)
        found[name] = off(model.model, right), history_off({"loss": history["loss"]}, said), updates
    return found


@scene
def keras_itself():
    """The same windows with Keras' own accumulation."""
    start = same_start(tokens)
    compiled = {"loss": entropy(reduction="mean_with_sample_weight")}
    right, _ = fitted(start(), compiled, sgd(), IDS, LABELS, epochs=1, batch_size=16)
    own, _ = fitted(start(), compiled, sgd(gradient_accumulation_steps=4), IDS, LABELS, epochs=1, batch_size=4)
    return off(own, right), int(own.optimizer.iterations)


@scene
def optimizer():
    """Equal counts and a tail of one micro-batch; with the length of the epoch, with the callback, with neither."""
    start = same_start(rows)
    compiled = {"loss": Squares()}
    x, y = X[:36], Y[:36]
    right, _ = fitted(start(), compiled, sgd(clipnorm=0.1), x, y, batch_size=16)
    told = GradientAccumulateOptimizer(sgd(clipnorm=0.1), 4, steps_per_epoch=9)
    called = GradientAccumulateOptimizer(sgd(clipnorm=0.1), 4)
    silent = GradientAccumulateOptimizer(sgd(clipnorm=0.1), 4)
    found = {}
    ways = (("told", told, []), ("called", called, [called.at_epoch_end()]), ("silent", silent, []))
    for name, each, callbacks in ways:
        model, _ = fitted(start(), compiled, each, x, y, batch_size=4, callbacks=callbacks)
        found[name] = off(model, right), int(each.iterations)
    return found


@scene
def declared():
    """A loop of one's own that says how many targets each gradient is of: 1, none, 3, and an end without a fourth."""
    made = keras.Variable(np.zeros(2))
    each = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 4)
    for grad, targets in (([1.0, 2.0], 1), ([np.nan, np.nan], 0), ([5.0, 6.0], 3)):
        each.apply([ops.convert_to_tensor(np.array(grad))], [made], targets=targets)
    before = made.numpy().tolist()
    each.close()
    return before, made.numpy().tolist(), int(each.iterations)


class Lazy(keras.Model):
    """Has a layer that no row reaches."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = Mixed(3), Mixed(3)

    def build(self, shape):
        self.used.build(shape)
        self.idle.build(shape)

    def call(self, x):
        return self.used(x)


@scene
def out_of_reach():
    """Weights without a gradient under a decay of weights, which on PyTorch leaves them alone."""

    def make():
        model = Lazy()
        model.build((None, 6))
        return model

    start = same_start(make)
    decaying = lambda: sgd(weight_decay=0.1)  # noqa: E731
    right, _ = fitted(start(), {"loss": Squares()}, decaying(), X[:32], Y[:32], batch_size=16)
    each = GradientAccumulateOptimizer(decaying(), 4)
    model, _ = fitted(start(), {"loss": Squares()}, each, X[:32], Y[:32], batch_size=4)
    return off(model, right)


@scene
def loaded():
    """Weights that are loaded into a model around before a batch has come."""
    first = WholeBatchModel(rows(), 3)
    second = WholeBatchModel(rows(), 5)
    with tempfile.TemporaryDirectory() as folder:
        first.save_weights(f"{folder}/kept.weights.h5")
        second.load_weights(f"{folder}/kept.weights.h5")
    return off(second, first)


@scene
def nothing_to_learn():
    """A logical batch in which every position is masked."""
    start = same_start(tokens)
    model = WholeBatchModel(start(), 3)
    compiled = {"loss": entropy(reduction="mean_with_sample_weight")}
    _, history = fitted(model, compiled, sgd(), np.zeros_like(IDS[:16]), LABELS[:16], epochs=1, batch_size=16)
    moved = max(float(abs(a - b).max()) for a, b in zip(model.model.get_weights(), start().get_weights(), strict=True))
    return moved, history["loss"][0], int(model.optimizer.iterations)


@scene
def narrow_sums():
    """512 gradients of one, each a 512th of the mean, for a weight in bfloat16: it goes from 0 to -1, or stalls."""

    class Gain(keras.layers.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(1,), initializer="zeros")

        def call(self, x):
            return x * self.gain

    class Itself(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred[:, 0]

    inner = keras.Sequential([keras.Input((1,)), Gain(dtype="bfloat16")])
    ones = np.ones((512, 1))
    model, _ = fitted(
        WholeBatchModel(inner, 1),
        {"loss": Itself()},
        keras.optimizers.SGD(1.0),
        ones,
        ones,
        epochs=1,
        batch_size=512,
    )
    return float(ops.convert_to_numpy(ops.cast(model.model.weights[0], "float32"))[0])


@scene
def overflow():
    """One row whose gradient is infinite under a loss scale: no update, and half the scale."""
    inner = keras.Sequential([keras.Input((6,)), Mixed(3)])
    x = np.where(np.arange(ROWS)[:, None] == 4, 1e308, X)
    scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=4.0)
    before = inner.get_weights()
    fitted(WholeBatchModel(inner, 3), {"loss": Squares()}, scaled, x[:16], Y[:16], epochs=1, batch_size=16)
    unmoved = all((a == b).all() for a, b in zip(before, inner.get_weights(), strict=True))
    after = float(ops.convert_to_numpy(scaled.dynamic_scale))
    return unmoved, after


@scene
def dropout():
    """Return how far the weights moved."""
    inner = keras.Sequential([keras.Input((1,)), keras.layers.Dropout(0.5, seed=3), Mixed(1)])
    before = inner.get_weights()[-2:]
    fitted(
        WholeBatchModel(inner, 1),
        {"loss": Squares()},
        keras.optimizers.SGD(1e-3),
        np.ones((16, 1)),
        np.ones((16, 1)),
        epochs=1,
        batch_size=16,
    )
    after = inner.get_weights()[-2:]
    return max(float(abs(a - b).max()) for a, b in zip(after, before, strict=True))


@scene
def kept():
    """A model around a model is saved and read, and trains on."""
    inner = keras.Sequential([keras.Input((6,)), Mixed(3)])
    model, _ = fitted(WholeBatchModel(inner, 3), {"loss": "mse"}, sgd(), X, Y, epochs=1, batch_size=16)
    file = os.path.join(os.environ["KERAS_HOME"], "model.keras")  # noqa: PTH118
    model.save(file)
    again = keras.models.load_model(file)
    same = all((a == b).all() for a, b in zip(model.get_weights(), again.get_weights(), strict=True))
    again.fit(X, Y, batch_size=16, verbose=0)
    return type(again).__name__, again.micro_batch, same, int(again.optimizer.iterations)


@scene
def refusals():
    def fits(layers, loss="mse", options=(), y=Y, **given):
        inner = keras.Sequential([keras.Input((6,)), *layers])
        before = inner.get_weights()
        try:
            fit(inner, loss, options, y, given)
        except WholeBatchError:
            assert all((a == b).all() for a, b in zip(before, inner.get_weights(), strict=True))
            raise

    def fit(inner, loss, options, y, given):
        fitted(WholeBatchModel(inner, 3, **given), {"loss": loss}, sgd(**dict(options)), X, y, epochs=1, batch_size=16)

    class OwnStep(keras.Model):
        def train_step(self, *data):
            return {}

    class Centred(keras.layers.Layer):
        def call(self, x):
            return x - ops.sum(x, axis=0, keepdims=True) / ops.shape(x)[0]

    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(ops.square(x)))
            return x

    normed = [Mixed(3), keras.layers.BatchNormalization()]
    fixed = [Mixed(3), keras.layers.BatchNormalization(trainable=False)]
    return {
        "batch norm": refusal(lambda: fits(normed)),
        "batch norm, accepted": refusal(lambda: fits(normed, batch_norm="per_micro_batch")),
        "batch norm, fixed": refusal(lambda: fits(fixed)),
        "a loss that is one number": refusal(lambda: fits([Mixed(3)], lambda a, b: ops.mean(ops.square(a - b)))),
        "rows compared": refusal(lambda: fits([Mixed(3)], keras.losses.Circle(), y=LABELS[:, 0])),
        "rows that meet": refusal(lambda: fits([Mixed(3), Centred()])),
        "rows that meet, accepted": refusal(lambda: fits([Mixed(3), Centred()], check=None)),
        "a sum taken for a mean": refusal(lambda: fits([Mixed(3), Adds()])),
        "a sum said to be one": refusal(lambda: fits([Mixed(3), Adds()], add_loss="sum")),
        "no reduction": refusal(lambda: fits([Mixed(3)], Squares(reduction="none"))),
        "own accumulation": refusal(lambda: fits([Mixed(3)], options={"gradient_accumulation_steps": 2})),
        "own step": refusal(lambda: WholeBatchModel(OwnStep())),
        "no model": refusal(lambda: WholeBatchModel(None)),
        "no rows": refusal(lambda: WholeBatchModel(rows(), micro_batch=0)),
        "no micro-batches": refusal(lambda: ExactWindows(rows(), micro_batches=2.5)),
        "no steps": refusal(lambda: GradientAccumulateOptimizer("sgd", 0)),
        "windows of windows": refusal(lambda: GradientAccumulateOptimizer(GradientAccumulateOptimizer("sgd"))),
        "an empty batch": refusal(lambda: num_rows((np.ones((0, 6)), np.ones((0, 1)), None))),
    }


def memory():
    """Return the bytes that the compiled train step needs beside its arguments, by rows, cut and uncut."""
    keras.config.set_dtype_policy("float32")
    found = {}
    for name in ("cut", "whole"):
        layers = [keras.layers.Dense(64, activation="relu") for _ in range(4)]
        model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(1)])
        model = WholeBatchModel(model, 64) if name == "cut" else model
        fitted(model, {"loss": "mse"}, keras.optimizers.SGD(0.1), np.ones((64, 16)), np.ones((64, 1)), epochs=1)
        optimizing, metrics = model.optimizer.variables, model.metrics_variables
        every = (model.trainable_variables, model.non_trainable_variables, optimizing, metrics)
        state = tuple([variable.value for variable in variables] for variables in every)
        found[name] = []
        for count in (512, 8192):
            data = tuple(jax.ShapeDtypeStruct((count, width), "float32") for width in (16, 1))
            compiled = jax.jit(model.train_step).lower(state, data).compile()
            found[name].append(compiled.memory_analysis().temp_size_in_bytes)
    return found


if BACKEND == "jax":
    scene(memory)

if __name__ == "__main__":
    answers = {"torch loaded": "torch" in sys.modules}
    for name in sys.argv[2:] or SCENES:
        keras.utils.set_random_seed(1)
        answers[name] = SCENES[name]()
    print(json.dumps(answers))
