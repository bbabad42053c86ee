"""Does the cut change the gradient, and if so, why? A few rows as a whole against the same rows in parts.

With g the gradient of the loss over some rows and g_k those over its parts, a loss that averages over n targets obeys

    g = sum_k (n_k / n) g_k

whatever the cut. Where it does not, experiments tell why: with batch norm off, with another random state, with the
rows given twice (a sum doubles, a mean does not), and with the weights w that fit g = sum_k w_k g_k best (if some
fit, the loss is a mean over other targets than those declared; if none fits, it is not a sum over rows).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wholebatch.core.errors import VerifyError
from wholebatch.core.split import Indices, LogicalBatch
from wholebatch.core.weights import mean_weights
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.device import input_device, move
from wholebatch.engine.objective import Objective
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.transaction import Transaction

ROWS = 8
"""How many rows the first check looks at."""

SAMPLE = 4096
"""How many entries of each parameter's gradient the first check keeps; a second gradient would take memory."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a cut changes the gradient.

    Attributes:
        name: ``"batch norm"``, ``"dropout"``, ``"randomness"``, ``"reduction"``, ``"targets"`` or ``"not a sum over
            rows"``.
        found: What was found, as a sentence.
        hint: What to do about it.
    """

    name: str
    found: str
    hint: str


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
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        rows: LogicalBatch,
        *,
        sample: int | None = None,
    ) -> None:
        self.model = model
        self._objective = objective
        self._rows = rows
        self._sample = sample
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]
        self.sizes = [_num_entries(parameter, sample) for parameter in self._parameters]

    @property
    def eps(self) -> float:
        """The rounding unit of the coarsest weights; on hardware that multiplies in TF32, that of TF32."""
        eps = max(torch.finfo(parameter.dtype).eps for parameter in self._parameters)
        tf32 = input_device(self.model).type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return max(eps, 2.0**-10) if tf32 else eps

    @property
    def tolerance(self) -> float:
        """How far rounding alone may take the cut gradient from the uncut one, relative to its size."""
        return (4096 if self.eps < 1e-5 else 32) * self.eps

    def run(self, indices: Indices) -> Piece | None:
        """Return what some rows give, or None where there is nothing to learn from them."""
        sums = GradientSum(self._parameters, [], "weights")
        micro_batch = move(self._rows.take(indices), input_device(self.model))
        count = self._objective.count(micro_batch, len(indices))
        if float(count) == 0:
            return None
        sums.start()
        try:
            part = self._objective(self.model, micro_batch, count)
            if part is None or float(part.targets) == 0:
                return None
            losses = [part.loss]
            weights = [torch.ones_like(part.loss)]
            if part.once is not None and part.once.requires_grad:
                losses.append(part.once)
                weights.append(torch.full_like(part.once, float(part.targets)))
            torch.autograd.backward(losses, weights)
            gradient = flat_gradient(self._parameters, self._sample)
        finally:
            sums.roll_back()
        return Piece(float(part.targets), part.reduction == "sum", gradient)


def flat_gradient(parameters: Iterable[nn.Parameter], sample: int | None = None) -> Tensor:
    """Return the gradients of some parameters, one after the other, in float64 on the CPU.

    Args:
        parameters: Whose ``.grad`` is taken; None is zero.
        sample: At most so many entries of each, evenly spaced; None: all.

    Returns:
        Shape ``[entries]``; a complex entry counts as two.
    """
    return torch.cat([_entries(parameter, _num_entries(parameter, sample)) for parameter in parameters])


def _num_entries(parameter: nn.Parameter, sample: int | None) -> int:
    entries = parameter.numel() * (2 if parameter.is_complex() else 1)
    return min(entries, sample) if sample is not None else entries


def _entries(parameter: nn.Parameter, size: int) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(size, dtype=torch.float64)
    grad = parameter.grad.detach()
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    flat = (torch.view_as_real(grad) if grad.is_complex() else grad).flatten()
    return flat[:: max(1, flat.numel() // max(1, size))][:size].to("cpu", torch.float64)


def errors(cut: Tensor, whole: Tensor, scale: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the relative error of each parameter's gradient.

    Args:
        cut: Gradient from the parts, all parameters one after the other. Shape ``[entries]``.
        whole: Gradient of the undivided rows. Shape ``[entries]``.
        scale: How large the parts' gradients are, entry by entry, before they cancel. Shape ``[entries]``.
        sizes: Entries of each parameter.

    Returns:
        For each parameter the 2-norm of the difference over that of the parts; a parameter with hardly any gradient is
        measured against 3 % of the average.
    """
    average = float(scale.norm()) / max(1, len(scale)) ** 0.5
    result = []
    for difference, size in zip(
        (cut - whole).split_with_sizes(list(sizes)), scale.split_with_sizes(list(sizes)), strict=True
    ):
        floor = max(float(size.norm()), 0.03 * average * len(size) ** 0.5)
        error = float(difference.norm())
        result.append(error / floor if floor > 0 else error)
    return result


def compare(probe: Probe, whole: Indices, parts: Sequence[Indices]) -> list[float] | None:
    """Return the relative error of each parameter's gradient, parts against whole; None: nothing to learn."""
    pieces = [piece for part in parts if (piece := probe.run(part)) is not None]
    undivided = probe.run(whole)
    if undivided is None or not pieces:
        return None
    cut, scale = _sum(pieces)
    gradient = undivided.gradient / undivided.targets if undivided.is_sum else undivided.gradient
    return errors(cut, gradient, scale, probe.sizes)


def scale_of_parts(probe: Probe, parts: Sequence[Indices]) -> Tensor:
    """Return how large the weighted gradients of the parts are before they cancel. Shape ``[entries]``."""
    return _sum([piece for part in parts if (piece := probe.run(part)) is not None])[1]


def diagnose(probe: Probe, whole: Indices, parts: Sequence[Indices]) -> list[Cause]:
    """Return why the gradient of the parts is not that of the whole; nothing where it is.

    Args:
        probe: Runs the rows.
        whole: The undivided rows.
        parts: The same rows, cut.
    """
    causes: list[Cause] = []

    def agree() -> bool:
        found = compare(probe, whole, parts)
        return found is None or max(found) <= probe.tolerance

    if agree():
        return causes
    layers = batch_dependent_layers(probe.model)
    with _evaluating([layer for name, layer in probe.model.named_modules() if name in layers]):
        if layers:
            causes.append(
                Cause(
                    "batch norm",
                    f"Layers in training mode compute over the rows that they are given: {', '.join(layers)}.",
                    'use wb.convert_batch_norm(model, to="group") or wb.freeze_batch_norm(model).',
                )
            )
            if agree():
                return causes
        first, second = probe.run(whole), probe.run(whole)
        if first is None or second is None:
            return causes
        random = float((first.gradient - second.gradient).norm()) > probe.tolerance * float(first.gradient.norm())
        if random:
            causes.append(_random_cause(probe.model))
        with _evaluating(list(probe.model.modules()) if random else []):
            if random and agree():
                return causes
            return causes + _arithmetic_causes(probe, whole, parts)


def check_first(
    model: nn.Module,
    objective: Objective,
    rows: LogicalBatch,
    fitting: Indices,
    *,
    lengths: Sequence[int] | None = None,
) -> str | None:
    """Compare a few rows of the first logical batch, cut and uncut, and leave no trace.

    Randomness and batch norm are left to their own rules here: a model that draws random numbers, or computes over
    the batch by the user's wish, is compared in evaluation mode.

    Args:
        model: The module.
        objective: What is to be trained.
        rows: The first logical batch.
        fitting: Rows that are known to fit into memory together.
        lengths: Length of each row, where known; the rows that are looked at then take no more tokens than `fitting`.

    Returns:
        What was found, as a sentence, or None where there was nothing to compare.

    Raises:
        VerifyError: The cut changes the gradient; the error names the cause.
    """
    pieces = _few(rows.rows, fitting, lengths)
    if not pieces:
        return "The first batch was not compared cut and uncut: no two of its rows are known to fit together."
    probe = Probe(model, objective, rows, sample=SAMPLE)
    transaction = Transaction(model, input_device(model))
    transaction.begin()
    try:
        dependent = set(batch_dependent_layers(model))
        with _evaluating([layer for name, layer in model.named_modules() if name in dependent]):
            worst = max(_compare_piece(probe, piece) for piece in pieces)
    finally:
        transaction.roll_back()
    compared = sum(map(len, pieces))
    return f"The first batch was compared cut and uncut on {compared} rows: equal to {worst:.1e} (relative)."


def _sum(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Return the sum of the parts' gradients as the objective is declared, and the sum of their absolute values."""
    weights = mean_weights([piece.targets for piece in pieces])
    total = sum(piece.targets for piece in pieces)
    factors = [1 / total if piece.is_sum else weight for piece, weight in zip(pieces, weights, strict=True)]
    terms = torch.stack([factor * piece.gradient for factor, piece in zip(factors, pieces, strict=True)])
    return terms.sum(0), terms.abs().sum(0)


def _arithmetic_causes(probe: Probe, whole: Indices, parts: Sequence[Indices]) -> list[Cause]:
    """What is wrong with the division itself, given that the model is deterministic and no layer sees the batch."""
    undivided = probe.run(whole)
    twice = probe.run([*whole, *whole])
    pieces = [piece for part in parts if (piece := probe.run(part)) is not None]
    if undivided is None or twice is None or not pieces:
        return []
    size = float(undivided.gradient.norm())
    doubles = float((twice.gradient - 2 * undivided.gradient).norm()) <= probe.tolerance * 2 * size
    stays = float((twice.gradient - undivided.gradient).norm()) <= probe.tolerance * size
    if doubles and not undivided.is_sum:
        return [
            Cause(
                "reduction",
                "The loss doubles when every row is given twice: it is a sum, declared as a mean.",
                'pass reduction="sum", or let loss_fn return the mean over its targets.',
            )
        ]
    if stays and undivided.is_sum:
        return [
            Cause(
                "reduction",
                "The loss stays the same when every row is given twice: it is a mean, declared as a sum.",
                'pass reduction="mean" with targets=..., or let loss_fn return a sum.',
            )
        ]
    gradients = torch.stack([piece.gradient for piece in pieces], dim=1)
    fit = torch.linalg.lstsq(gradients, undivided.gradient.unsqueeze(1)).solution.squeeze(1)
    left = float((gradients @ fit - undivided.gradient).norm())
    if left <= probe.tolerance * max(size, float((gradients.abs() @ fit.abs()).norm())):
        declared = ", ".join(f"{piece.targets:g}" for piece in pieces)
        actual = ", ".join(f"{weight:.3g}" for weight in (fit / fit.sum() if not undivided.is_sum else fit).tolist())
        return [
            Cause(
                "targets",
                f"The parts hold {declared} targets as declared ({undivided.targets:g} as a whole), but the loss "
                f"weighs them by {actual}: it does not average over the targets that are counted.",
                "let targets=... count exactly what the loss averages over, such as (labels != -100).sum() for "
                "cross_entropy with ignored labels.",
            )
        ]
    return [
        Cause(
            "not a sum over rows",
            "No weights turn the gradients of the parts into that of the whole: the loss is not a sum over rows, as "
            "with in-batch negatives, statistics of the batch, or a nonlinear function of a mean.",
            "compute it on an undivided logical batch, or write it as a sum over rows.",
        )
    ]


def _random_cause(model: nn.Module) -> Cause:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    names = [
        name for name, layer in model.named_modules() if isinstance(layer, kinds) and layer.training and layer.p > 0
    ]
    if names:
        return Cause(
            "dropout",
            f"Dropout draws other masks when the batch is cut: {', '.join(names[:5])}. The update is that of other "
            "masks of the same distribution.",
            "this is no mistake; to compare exactly, call model.eval() first.",
        )
    return Cause(
        "randomness",
        "Model or loss draw random numbers (functional dropout, noise, sampling), and others when the batch is cut.",
        "this is no mistake if it is meant; to compare exactly, call model.eval() or fix the draws by row.",
    )


def _compare_piece(probe: Probe, piece: list[int]) -> float:
    """Return the relative error of one row against the others; raise if it is more than rounding, and not random."""
    parts = [piece[:1], piece[1:]]
    error = max(compare(probe, piece, parts) or [0.0])
    if error <= probe.tolerance:
        return error
    with _evaluating(list(probe.model.modules())):
        error = max(compare(probe, piece, parts) or [0.0])
        if error <= probe.tolerance:
            return error
        causes = diagnose(probe, piece, parts)
    raise VerifyError(
        f"The cut changes the gradient: on {len(piece)} rows of the first batch, one against the others, it is off by "
        f"{error:.2g} (relative). " + " ".join(cause.found for cause in causes),
        hint=" ".join(cause.hint for cause in causes) or "look closer with wb.verify(model, loss_fn, batch).",
    )


def _few(num_rows: int, fitting: Indices, lengths: Sequence[int] | None) -> list[list[int]]:
    """Choose some rows, as different as can be, in pieces that take no more memory than `fitting` does."""
    rows = list(range(num_rows))
    together = min(ROWS, len(fitting))
    if lengths is not None:
        room = len(fitting) * max(lengths[row] for row in fitting)
        rows = [row for row in sorted(rows, key=lambda row: lengths[row]) if together * lengths[row] <= room]
    looked_at = min(ROWS, len(rows))
    if min(together, looked_at) < 2:
        return []
    chosen = [rows[place * (len(rows) - 1) // (looked_at - 1)] for place in range(looked_at)]
    pieces = [chosen[start : start + together] for start in range(0, looked_at, together)]
    return [piece for piece in pieces if len(piece) > 1]


@contextmanager
def _evaluating(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put layers into evaluation mode, each by itself, and back again."""
    modes = [(layer, layer.training) for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
