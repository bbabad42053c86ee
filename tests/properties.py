"""Named properties of training with a window, claimed by the tests. The judge is the plain loop, uncut."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import wholebatch as wb
from menagerie import Animal
from wholebatch.core.batch import LogicalBatch
from wholebatch.evidence import reference

MakeUpdate = Callable[[nn.Module, Optimizer, Any], object]
"""Makes one update of a model from a logical batch."""


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Plain steps of 1: the change of the weights is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    """One vector in float64; complex numbers as two, sparse tensors dense, None left out."""
    dense = [x.detach().to_dense() if x.layout != torch.strided else x.detach() for x in tensors if x is not None]
    return torch.cat([(torch.view_as_real(x) if x.is_complex() else x).flatten().double() for x in dense])


def relative_error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def change(
    animal: Animal,
    make_update: MakeUpdate,
    batches: Sequence[Any],
    *,
    dtype: torch.dtype = torch.float64,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd,
) -> Tensor:
    """What some updates change in the weights of a fresh model."""
    model = animal.model(dtype)
    steps = optimizer(animal.trained(model))
    before = flat(model.parameters())
    for batch in batches:
        make_update(model, steps, batch)
    return flat(model.parameters()) - before


def gradient_of(animal: Animal, make_update: MakeUpdate, batch: Any, *, dtype: torch.dtype) -> Tensor:
    """The gradient with which the optimizer steps."""
    model = animal.model(dtype)
    steps = sgd(animal.trained(model))
    seen: list[Tensor] = []
    steps.register_step_pre_hook(lambda *_: seen.append(flat(p.grad for p in animal.trained(model))))
    make_update(model, steps, batch)
    return seen[0]


def undivided(animal: Animal, **options: Any) -> MakeUpdate:
    """The plain loop with the whole batch at once."""

    def make(model: nn.Module, optimizer: Optimizer, batch: Any) -> object:
        rows = LogicalBatch(batch, **animal.cut).rows
        targets = animal.targets or (lambda _batch: rows)
        return reference.update(
            model, optimizer, animal.loss_fn, batch, targets=targets, reduction=animal.reduction, **options
        )

    return make


def stepped(animal: Animal, micro_batch: wb.Rows | wb.Tokens, **options: Any) -> MakeUpdate:
    """`Accumulator.step` on the whole batch."""

    def make(model: nn.Module, optimizer: Optimizer, batch: Any) -> object:
        accumulator = wb.Accumulator(
            model, optimizer, animal.loss_fn, micro_batch=micro_batch, check=None, **animal.objective, **options
        )
        return accumulator.step(batch)

    return make


def parts(animal: Animal, batch: Any, counts: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """Micro-batches of so many rows each, in order, with their rows."""
    logical, start = LogicalBatch(batch, **animal.cut), 0
    for rows in counts:
        yield logical.take(range(start, start + rows)), rows
        start += rows
    assert start == logical.rows


def updated(animal: Animal, counts: Sequence[int], **options: Any) -> MakeUpdate:
    """`Accumulator.updates` on micro-batches of so many rows."""

    def make(model: nn.Module, optimizer: Optimizer, batch: Any) -> object:
        accumulator = wb.Accumulator(model, optimizer, animal.loss_fn, check=None, **animal.objective, **options)
        loader = (part for part, _ in parts(animal, batch, counts))
        (update,) = accumulator.updates(loader, micro_batches=len(counts))
        return update

    return make


def windowed(animal: Animal, counts: Sequence[int], *, known: bool = False, **options: Any) -> MakeUpdate:
    """`Accumulator.window` in a loop of one's own; with `known`, the targets of the window are told beforehand."""

    def make(model: nn.Module, optimizer: Optimizer, batch: Any) -> object:
        count = animal.targets or (lambda _: None)
        accumulator = wb.Accumulator(model, optimizer, reduction=animal.reduction, **options)
        total = animal.targets(batch) if animal.targets else sum(counts)
        with accumulator.window(targets=total if known else None) as window:
            for part, rows in parts(animal, batch, counts):
                counted = count(part)
                window.backward(animal.loss_fn(model, part), rows if counted is None else counted, rows=rows)
        return window.update

    return make


def assert_invariant_to_the_cut(
    animal: Animal, ways: Iterable[MakeUpdate], rows: int, *, dtype: torch.dtype = torch.float64, within: float = 1e-12
) -> None:
    """Every way of cutting makes the update of the undivided batch, up to rounding; `within` is relative."""
    batch = animal.batch(rows, dtype)
    right = gradient_of(animal, undivided(animal), batch, dtype=dtype)
    for make_update in ways:
        assert relative_error(gradient_of(animal, make_update, batch, dtype=dtype), right) <= within


def assert_invariant_to_order(animal: Animal, make_update: MakeUpdate, rows: int, order: Sequence[int]) -> None:
    """The order of the rows in a logical batch changes rounding only."""
    batch = animal.batch(rows, torch.float64)
    reordered = LogicalBatch(batch, **animal.cut).take(list(order))
    found = change(animal, make_update, [reordered])
    assert relative_error(found, change(animal, make_update, [batch])) <= 1e-12


def assert_linear_in_the_loss(animal: Animal, way: Callable[[Animal], MakeUpdate], rows: int, factor: float) -> None:
    """A loss that is `factor` times as large makes a gradient that is `factor` times as large."""

    def scaled(model: nn.Module, batch: Any) -> Any:
        result = animal.loss_fn(model, batch)
        if isinstance(result, tuple):
            loss, count, *once = result
            return (factor * loss, count, *(factor * term for term in once))
        return factor * result

    batch = animal.batch(rows, torch.float64)
    larger = Animal(**{**vars(animal), "loss_fn": scaled})
    once = change(animal, way(animal), [batch])
    assert relative_error(change(larger, way(larger), [batch]), factor * once) <= 1e-12


def fingerprint(value: Any) -> Any:
    """Plain values that are equal when, and only when, every bit is."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        real = torch.view_as_real(dense) if dense.is_complex() else dense
        return str(value.dtype), tuple(value.shape), real.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return {name: fingerprint(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(entry) for entry in value]
    return value


def state_of(model: nn.Module, *steppers: Any) -> dict[str, Any]:
    """Everything that training moves, bit by bit: weights, buffers, gradients, optimizers, schedules, streams."""
    return fingerprint(
        {
            "weights": dict(model.named_parameters()),
            "buffers": dict(model.named_buffers()),
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "steppers": [stepper.state_dict() for stepper in steppers],
            "modes": {name: module.training for name, module in model.named_modules()},
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
        }
    )


@contextmanager
def assert_leaves_no_trace(model: nn.Module, *steppers: Any) -> Iterator[None]:
    """What happens in the block is as if it had never happened, bit by bit."""
    before = state_of(model, *steppers)
    yield
    after = state_of(model, *steppers)
    assert [name for name in before if before[name] != after[name]] == []
