"""Does the cut change the gradient? Some rows as a whole against the same rows in parts.

With g the gradient of the loss over some rows and g_k those over its parts, a loss that averages over n targets obeys

    g = sum_k (n_k / n) g_k

whatever the cut.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.split import Indices
from wholebatch.core.weights import mean_weights
from wholebatch.engine.backward import run_backward
from wholebatch.engine.checks.distance import errors
from wholebatch.engine.checks.flat import flat_gradient, num_entries
from wholebatch.engine.checks.rounding import CoarsestDtype
from wholebatch.engine.device import input_device, move
from wholebatch.engine.holding import Holding
from wholebatch.engine.meetings.company import among, recomputing_with
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.meetings.joined import run_joined
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.reach import Near
from wholebatch.engine.meetings.singly import Alone
from wholebatch.engine.objective import Objective, Part
from wholebatch.engine.precision import Precision


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows, run through the model: their declared targets and the gradient of what the loss function returned."""

    targets: float
    is_sum: bool
    gradient: Tensor


class Probe:
    """Runs rows of a batch through model and loss, and leaves no trace.

    Args:
        model: The module.
        objective: What is to be trained.
        rows: The batch.
        sample: How many entries of each parameter's gradient are kept; None: all.
        precision: In which forward passes run; None: as the weights are.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rows: LogicalBatch,
        *,
        sample: int | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.model = model
        self._objective = objective
        self._rows = rows
        self._sample = sample
        self._device = input_device(model)
        self._precision = precision or Precision("fp32", self._device)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]
        self.sizes = [num_entries(parameter, sample) for parameter in self.parameters]
        self.meets = bool(exact_layers(model))
        self._weights_eps = max(torch.finfo(each.dtype).eps for each in self.parameters)
        self._seen_eps = 0.0

    @property
    def eps(self) -> float:
        """The rounding unit of the coarsest weights or, where it was seen, arithmetic; with TF32, that of TF32."""
        eps = max(self._weights_eps, self._precision.eps, self._seen_eps)
        tf32 = self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return max(eps, 2.0**-10) if tf32 else eps

    @property
    def tolerance(self) -> float:
        """How far rounding alone may take the cut gradient from the uncut one, relative to its size.

        A loss that is steep in its rows, such as one with a low temperature, rounds more than its weights do. In
        float64 there is room for that: no mistake worth a name is as small as 1e-8.
        """
        eps = self.eps
        if eps < 1e-12:
            return 2.0**26 * eps
        return (4096 if eps < 1e-5 else 16) * eps

    @property
    def autocasts(self) -> bool:
        """Whether forward passes run under autocast, which rounds more than the weights do."""
        return not self._precision.as_is

    @contextmanager
    def as_the_weights_are(self) -> Iterator[None]:
        """Run without autocast for a while, and judge by the rounding of the weights."""
        before = self._precision, self._seen_eps
        self._precision, self._seen_eps = Precision("fp32", self._device), 0.0
        try:
            yield
        finally:
            self._precision, self._seen_eps = before

    def coarsen(self, run: Callable[[], object]) -> bool:
        """Look in which dtypes something computes, and allow for the rounding of the coarsest.

        A loss may enter autocast by itself, and a layer may compute in float32 under weights in float64.

        Args:
            run: What is looked at. Its backward pass is not, where that runs in another thread.

        Returns:
            Whether there was anything coarser than what was known.
        """
        before = self.eps
        with CoarsestDtype() as seen:
            run()
        self._seen_eps = max(self._seen_eps, seen.eps)
        return self.eps > before

    def run(self, indices: Indices) -> Piece | None:
        """Return what some rows give, or None where there is nothing to learn from them."""
        alone = Alone(moving=Moving(self.model))
        with among(alone):
            part = self._forward(indices)
        self.meets = self.meets or bool(alone.met)
        if part is None:
            return None
        losses, weights = _entering(part, 1.0)
        with recomputing_with(alone):
            return Piece(float(part.targets), part.reduction == "sum", self._gradient(losses, weights))

    def together(self, whole: Indices, parts: Sequence[Indices]) -> Tensor | None:
        """Return the gradient of the objective over parts that meet, or None where there is nothing to learn.

        Args:
            whole: The rows, in the order in which they stand when they are undivided.
            parts: The same rows, cut.
        """
        places = {row: place for place, row in enumerate(whole)}
        near = Near([[places[row] for row in part] for part in parts], len(parts))
        runs = [partial(self._forward, part) for part in parts]
        found, minutes = run_joined(runs, near, model=self.model, device=self._device, moving=Moving(self.model))
        learned = [part for part in found if part is not None]
        if not learned:
            return None
        total = sum(float(part.targets) for part in learned)
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        for part in learned:
            more = _entering(part, (1.0 if part.reduction == "sum" else float(part.targets)) / total)
            losses += more[0]
            weights += more[1]
        with recomputing_with(minutes):
            return self._gradient(losses, weights)

    def _forward(self, indices: Indices) -> Part | None:
        micro_batch = move(self._rows.take(indices), self._device)
        count = self._objective.count(micro_batch, len(indices))
        if float(count) == 0 and not self.meets:
            return None
        with self._precision.autocast():
            part = self._objective(self.model, micro_batch, count, graph=float(count) > 0)
        return None if part is None or float(part.targets) == 0 else part

    def _gradient(self, losses: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        holding = Holding(self.parameters, [])
        holding.begin()
        try:
            run_backward(losses, weights)
            return flat_gradient(self.parameters, self._sample).double()
        finally:
            holding.end(used_up=False)


def _entering(part: Part, weight: float) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of a part, and the gradients that enter at them."""
    losses, weights = [part.loss], [torch.full_like(part.loss, weight)]
    if part.once is not None and part.once.requires_grad:
        losses.append(part.once)
        weights.append(torch.full_like(part.once, weight * float(part.targets)))
    return losses, weights


def compare(
    probe: Probe, whole: Indices, parts: Sequence[Indices], *, before: Callable[[], None] = lambda: None
) -> list[float] | None:
    """Return the relative error of each parameter's gradient, parts against whole; None: nothing to learn.

    Parts that meet run in lockstep: alone, each would be another batch. `before` is called before each of the two.
    """
    before()
    undivided = probe.run(whole)
    before()
    if probe.meets:
        together = probe.together(whole, parts)
        if undivided is None or together is None:
            return None
        cut, scale = together, together.abs()
    else:
        pieces = [piece for part in parts if (piece := probe.run(part)) is not None]
        if undivided is None or not pieces:
            return None
        cut, scale = weighted_sum(pieces)
    gradient = undivided.gradient / undivided.targets if undivided.is_sum else undivided.gradient
    return errors(cut, gradient, scale, probe.sizes)


def scale_of_parts(probe: Probe, parts: Sequence[Indices]) -> Tensor:
    """Return how large the weighted gradients of the parts are before they cancel. Shape ``[entries]``.

    Of parts that meet only their sum is known.
    """
    if probe.meets:
        together = probe.together(sorted(row for part in parts for row in part), parts)
        assert together is not None
        return together.abs()
    return weighted_sum([piece for part in parts if (piece := probe.run(part)) is not None])[1]


def weighted_sum(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Return the sum of the parts' gradients as the objective is declared, and the sum of their absolute values.

    Args:
        pieces: The parts, one or more.

    Returns:
        Two tensors of shape ``[entries]``.
    """
    weights = mean_weights([piece.targets for piece in pieces])
    total = sum(piece.targets for piece in pieces)
    factors = [1 / total if piece.is_sum else weight for piece, weight in zip(pieces, weights, strict=True)]
    terms = torch.stack([factor * piece.gradient for factor, piece in zip(factors, pieces, strict=True)])
    return terms.sum(0), terms.abs().sum(0)
