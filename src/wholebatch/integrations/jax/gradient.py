"""How does a JAX function get the gradient of a logical batch with the memory of a micro-batch?"""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wholebatch.core.errors import LossError, SplitError
from wholebatch.integrations.jax.passes import Passes
from wholebatch.integrations.jax.sums import require_sum_in, sum_in, untrainable


def value_and_grad(
    sum_fn: Callable[..., Any],
    micro_batch: int = 8,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: Any = None,
    accumulate_in: Any = None,
) -> Callable[..., Any]:
    """Return a function that gives the mean loss of a logical batch and its gradient, micro-batch by micro-batch.

    With S_k the sum and n_k the targets of micro-batch k, the value is ``sum_k S_k / sum_k n_k`` and the gradient is
    that of the value, as if the batch had not been cut: not a mean of means. It is meant for `jax.jit`, where all
    micro-batches share the memory of one. The last may be smaller; it is a pass of its own, and nothing is padded.

    Args:
        sum_fn: ``sum_fn(params, micro_batch, *shared)`` returns ``(loss_sum, targets)``: a scalar, and what it is to be
            divided by, of which no gradient is taken. Or ``(loss_sum, targets, once)``, where `once` is a scalar that
            does not average over targets, such as a penalty on the weights: it is added to the mean as it stands. The
            micro-batches share it by their rows, so that a mean over rows is right there too. With `has_aux` it returns
            ``(that, aux)``.
        micro_batch: Rows that one pass sees.
        argnums: Which arguments the gradient is of, as in `jax.grad`; the second is the batch and cannot be.
        has_aux: Whether there is `aux`: a pytree of sums over rows, such as a number of right answers. It is added up.
        axis_name: The axis, or axes, over which the rows are spread, inside `jax.shard_map`, `jax.pmap` or `jax.vmap`:
            sums and targets are added up over it as well, once and not once a micro-batch. The parameters are the same
            on all devices; the rows may be more on one than on another.
        accumulate_in: Dtype of the running sum of gradients. None: float32 where parameters are narrower, and else
            theirs.

    Returns:
        ``f(params, batch, *shared, rng=None)``: `batch` is a pytree of arrays with the same number of rows; `shared`
        goes whole to each micro-batch. With a key as `rng`, each micro-batch gets one that is made of it as
        ``rng=key``, on each device another. It returns ``(value, grads)``, or ``((value, aux), grads)`` with
        `has_aux`. Gradients have the dtype of their parameters. A batch without any target has a value of zero, plus
        `once`, and no gradient beside that of `once`.

    Raises:
        SplitError: `micro_batch` is no positive number, or the arrays of a batch do not agree on the number of rows.
        LossError: `sum_fn` cannot be called, what it returns is not what is said above, or a gradient is asked for of
            whole numbers.
        WeightError: `accumulate_in` is no dtype of floating point numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def squares(weight, batch):
        ...     error = batch["x"] * weight - batch["y"]
        ...     return (error**2 * batch["mask"]).sum(), batch["mask"].sum()
        >>> batch = {"x": jnp.arange(5.0), "y": jnp.ones(5), "mask": jnp.array([1, 1, 0, 1, 1])}
        >>> value, grad = jax.jit(value_and_grad(squares, micro_batch=2))(jnp.float32(1), batch)
        >>> float(value), float(grad)
        (3.5, 9.0)
    """
    if not callable(sum_fn):
        raise LossError(
            f"sum_fn is a {type(sum_fn).__name__}, which cannot be called.",
            hint="pass a function: sum_fn(params, micro_batch) returns (loss_sum, targets).",
        )
    if type(micro_batch) is not int or micro_batch < 1:
        raise SplitError(
            f"A micro-batch of {micro_batch!r} rows was asked for.", hint="micro_batch is a whole number, 1 or more."
        )
    require_sum_in(accumulate_in)
    places = tuple(argnums) if isinstance(argnums, Sequence) else (index(argnums),)
    if not places or 1 in places or min(places) < 0:
        raise LossError(
            f"A gradient was asked for with argnums={argnums!r}.",
            hint="count from 0 for the first argument, and leave out 1: the batch is cut, and its rows have no sum.",
        )

    def of_the_batch(params: Any, batch: Any, *shared: Any, rng: Any = None) -> Any:
        arguments = [params, None, *shared]
        if max(places) >= len(arguments):
            raise LossError(
                f"A gradient was asked for with argnums={argnums!r}, and there are {len(arguments)} arguments.",
                hint="give the function as many, or change argnums.",
            )
        if whole := untrainable([arguments[place] for place in places]):
            raise LossError(
                f"A gradient was asked for of what is no floating point number: {', '.join(whole)}.",
                hint="keep what is not trained out of the parameters, and hand it over after the batch: "
                "f(params, batch, shared).",
            )
        if rng is not None and axis_name is not None:
            rng = jax.random.fold_in(rng, lax.axis_index(axis_name))
        group = _Group(axis_name)
        passes = Passes(batch, micro_batch)
        objective = _Objective(sum_fn, places, has_aux, [group.local(each) for each in arguments], rng)
        kinds = objective.kinds(passes)
        zeros = group.local(_zeros(kinds, objective.differentiated, accumulate_in))

        if kinds.has_once:
            # The mean and the term beside it share a pass, so what the sum is divided by has to be known before. Only
            # the count of these passes is used: compiled, they compute nothing else.
            counts = passes.added(zeros.targets, lambda part, number, _: objective.parts(part, number).targets)
            per_target = _reciprocal(group.sum(counts))
            rows = group.sum(passes.rows)
            sums = passes.added(
                zeros, lambda part, number, size: objective.sums(part, number, per_target, once=size / rows)
            )
            sums = group.sum(sums)
            value, grads = sums.loss, sums.grads
        else:
            sums = group.sum(passes.added(zeros, lambda part, number, _: objective.sums(part, number)))
            per_target = _reciprocal(sums.targets)
            value = sums.loss * per_target
            grads = jax.tree.map(lambda leaf: leaf * per_target.astype(leaf.real.dtype), sums.grads)
        grads = jax.tree.map(
            lambda leaf, like: leaf.astype(jnp.result_type(like)), grads, [arguments[place] for place in places]
        )
        return ((value, sums.aux) if has_aux else value), (tuple(grads) if isinstance(argnums, Sequence) else grads[0])

    return of_the_batch


class _Sums(NamedTuple):
    """What is added up."""

    loss: Any
    targets: Any
    aux: Any
    grads: Any


class _Parts(NamedTuple):
    """What a micro-batch has, or how it looks."""

    loss: Any
    targets: Any
    once: Any
    aux: Any

    @property
    def has_once(self) -> bool:
        return self.once is not None


class _Objective:
    """What the user declares, of one micro-batch."""

    def __init__(self, sum_fn: Any, places: tuple[int, ...], has_aux: bool, arguments: list[Any], rng: Any) -> None:
        self._sum_fn, self._places, self._has_aux = sum_fn, places, has_aux
        self._arguments, self._rng = arguments, rng
        self.differentiated = [arguments[place] for place in places]

    def kinds(self, passes: Passes) -> _Parts:
        """Return the shapes of what a micro-batch has, which is looked at and not computed."""
        kinds: _Parts = jax.eval_shape(lambda part: self.parts(part, jnp.int32(0)), passes.first())
        for name, kind in (("loss_sum", kinds.loss), ("targets", kinds.targets), ("once", kinds.once)):
            if kind is not None and (
                kind.shape != ()
                or jnp.issubdtype(kind.dtype, jnp.complexfloating)
                or (name == "loss_sum" and not jnp.issubdtype(kind.dtype, jnp.floating))
            ):
                raise LossError(
                    f"{name} has the shape {kind.shape} and the dtype {kind.dtype}.",
                    hint="sum_fn returns (loss_sum, targets): the sum over the rows of the micro-batch and what it is "
                    "to be divided by, both scalars, and the sum a floating point number.",
                )
        return kinds

    def parts(self, part: Any, number: Any) -> _Parts:
        """Return what a micro-batch has."""
        return self._read(self._call(self.differentiated, part, number))

    def sums(self, part: Any, number: Any, per_target: Any = 1, once: Any = 0) -> _Sums:
        """Return what a micro-batch adds."""

        def scalar(differentiated: list[Any]) -> tuple[Any, _Parts]:
            parts = self._read(self._call(differentiated, part, number))
            value = parts.loss if parts.once is None else parts.loss * per_target + parts.once * once
            return value, parts

        (value, parts), grads = jax.value_and_grad(scalar, has_aux=True)(self.differentiated)
        return _Sums(value, parts.targets, parts.aux, grads)

    def _call(self, differentiated: list[Any], part: Any, number: Any) -> Any:
        arguments = list(self._arguments)
        for place, value in zip(self._places, differentiated, strict=True):
            arguments[place] = value
        arguments[1] = part
        extra = {} if self._rng is None else {"rng": jax.random.fold_in(self._rng, number)}
        return self._sum_fn(*arguments, **extra)

    def _read(self, returned: Any) -> _Parts:
        aux = None
        if self._has_aux:
            if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], tuple):
                raise LossError(
                    f"With has_aux, sum_fn returned {_said(returned)}.",
                    hint="return ((loss_sum, targets), aux), where aux is a pytree of sums over rows.",
                )
            returned, aux = returned
        if not isinstance(returned, tuple) or len(returned) not in (2, 3):
            raise LossError(
                f"sum_fn returned {_said(returned)}.",
                hint="return (loss_sum, targets): the sum over the rows of the micro-batch, and what it is to be "
                "divided by, such as the number of labels that count.",
            )
        loss, targets, *once = (jnp.asarray(each) for each in returned)
        return _Parts(loss, lax.stop_gradient(targets), once[0] if once else None, jax.tree.map(jnp.asarray, aux))


class _Group:
    """The devices over which rows are spread, or one."""

    def __init__(self, axis_name: Any) -> None:
        self._axes = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)

    def sum(self, tree: Any) -> Any:
        """Return the sums over the devices."""
        return lax.psum(tree, self._axes) if self._axes else tree

    def local(self, tree: Any) -> Any:
        """Return it as a device's own: else `jax.shard_map` adds up the gradient of what all devices share over them
        in each pass, which costs a message a micro-batch and would count every device's rows again at the end.
        """
        return jax.tree.map(self._local, tree) if self._axes else tree

    def _local(self, leaf: Any) -> Any:
        manual = jax.sharding.get_abstract_mesh().manual_axes  # inside jax.vmap, what all share is not told apart
        shared = tuple(
            axis for axis in self._axes if axis in manual and axis not in getattr(jax.typeof(leaf), "vma", ())
        )
        return lax.pcast(leaf, shared, to="varying") if shared else leaf


def _zeros(kinds: _Parts, differentiated: list[Any], accumulate_in: Any) -> _Sums:
    """Return sums of nothing, in dtypes that many additions do not spoil."""

    def wide(dtype: Any) -> Any:
        return jnp.promote_types(dtype, jnp.float32 if jnp.issubdtype(dtype, jnp.inexact) else jnp.int32)

    def zero(kind: Any) -> Any:
        return jnp.zeros(kind.shape, wide(kind.dtype))

    def running(leaf: Any) -> Any:
        return jnp.zeros(jnp.shape(leaf), sum_in(leaf, accumulate_in))

    return _Sums(
        zero(kinds.loss), zero(kinds.targets), jax.tree.map(zero, kinds.aux), jax.tree.map(running, differentiated)
    )


def _reciprocal(targets: Any) -> Any:
    """Return one over the targets, and zero where there is none, so that nothing becomes NaN."""
    return jnp.where(targets == 0, 0, 1 / jnp.where(targets == 0, 1, targets))


def _said(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"a tuple of {len(returned)}"
    return f"an array of shape {jnp.shape(returned)}" if hasattr(returned, "shape") else f"a {type(returned).__name__}"
