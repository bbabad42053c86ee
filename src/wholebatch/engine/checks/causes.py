"""Why does the cut change the gradient? Experiments on a few rows, each of which names a cause.

With batch norm off; with another random state; with the rows given twice (a sum doubles, a mean does not); and with the
weights w that fit g = sum_k w_k g_k best: if some fit, the loss is a mean over other targets than those declared; if
none fits, it is not a sum over rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wholebatch.core.split import Indices
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.carrying import carried, is_spectral
from wholebatch.engine.checks.distance import errors, is_rounding
from wholebatch.engine.checks.pieces import Piece, Probe, compare, weighted_sum
from wholebatch.engine.checks.silence import DROPOUT, evaluating, silenced
from wholebatch.engine.device import input_device
from wholebatch.engine.randomness import RandomState


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a cut changes the gradient.

    Attributes:
        name: ``"batch norm"``, ``"dropout"``, ``"randomness"``, ``"carried over"``, ``"spectral norm"``,
            ``"reduction"``, ``"targets"``, ``"not finite"``, ``"balancing loss"`` or ``"not a sum over rows"``. A
            user's own step has further ones, in `wholebatch.evidence.certificate`.
        found: What was found, as a sentence.
        hint: What to do about it.
        where: The line to change, as in ``"my_file.py:23: optimizer.step()"``, or None where it is not known.
        layers: The layers that it is about, by their names in the model.
    """

    name: str
    found: str
    hint: str
    where: str | None = None
    layers: tuple[str, ...] = ()


_NOT_A_SUM = Cause(
    "not a sum over rows",
    "No weights turn the gradients of the parts into that of the whole: the loss is not a sum over rows, as with "
    "in-batch negatives, statistics of the batch, or a nonlinear function of a mean.",
    "let its micro-batches meet: wb.gather(x) returns the rows of the whole logical batch, wb.sum_over_batch(x) sums "
    "over it (wb.losses has info_nce, load_balancing and batch_hard_triplet); or write it as a sum over rows.",
)

_MEETS_AND_DIFFERS = Cause(
    "not a sum over rows",
    "The micro-batches meet, and still the gradient is not that of the undivided rows: something looks at the rows "
    "of a micro-batch as if they were all, or at all as if they were its own, or takes a gradient inside the loss.",
    "average over the rows that are here (queries) and compare them with all (keys, wb.gather); the places of the rows "
    "that are here are wb.own_rows(x), and a statistic of the batch is wb.sum_over_batch(x) / "
    "wb.sum_over_batch(len(x)). A gradient inside the loss is that of what all rows give: "
    "torch.autograd.grad(wb.gather(y).sum(), x, create_graph=True).",
)


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
        return found is None or is_rounding(found, probe.tolerance)

    def draws() -> bool:
        return _draws(probe, whole)

    def stirs() -> bool:
        return _stirs(probe, whole)

    spectral = {name: layer for name, layer in probe.model.named_modules() if is_spectral(layer) and layer.training}
    if agree() or (probe.coarsen(lambda: probe.run(whole)) and agree()):
        return [spectral_cause(list(spectral))] if spectral else causes  # its estimate is better by now
    buffers = carried(probe, whole)
    if buffers:
        return [carried_cause(buffers)]
    layers = batch_dependent_layers(probe.model)
    with evaluating([layer for name, layer in probe.model.named_modules() if name in layers]):
        if layers:
            causes.append(batch_norm_cause(layers))
            if agree():
                return causes
        if spectral:
            with evaluating(list(spectral.values())):
                if agree():
                    return [*causes, spectral_cause(list(spectral))]
        # What is drawn once in a while, as in LayerDrop, need not show in two runs; that it was drawn does.
        random = [random_cause(probe.model)]
        seen = random if draws() else []
        drawn = bool(seen) or stirs()
        if drawn and judged_in_training(probe, whole):
            with silenced(probe.model):
                return causes + ([] if agree() else _arithmetic_causes(probe, whole, parts)) + random
        with evaluating(list(probe.model.modules()) if drawn else []):
            try:
                if drawn and (agree() or draws() or stirs()):
                    return causes + random
            except Exception:  # some models give no loss in this mode, and what was found is all that can be
                return causes + random
            return causes + seen + _arithmetic_causes(probe, whole, parts)


def judged_in_training(probe: Probe, whole: Indices) -> bool:
    """Return whether a model gives the same gradient for the same rows in training mode, once dropout is silent.

    Then a gradient that the cut changes there is no matter of chance, even if evaluation mode shows nothing of it.
    """
    with silenced(probe.model):
        return not (_draws(probe, whole) or _stirs(probe, whole))


def _draws(probe: Probe, whole: Indices) -> bool:
    """Whether the same rows give another gradient the second time."""
    first, second = probe.run(whole), probe.run(whole)
    if first is None or second is None:
        return False
    return float((first.gradient - second.gradient).norm()) > probe.tolerance * float(first.gradient.norm())


def _stirs(probe: Probe, whole: Indices) -> bool:
    """Whether running some rows takes numbers from a random stream."""
    before = RandomState.now(input_device(probe.model))
    probe.run(whole)
    return not before.stands()


def _arithmetic_causes(probe: Probe, whole: Indices, parts: Sequence[Indices]) -> list[Cause]:
    """What is wrong with the division itself, given that the model is deterministic and no layer sees the batch."""
    undivided = probe.run(whole)
    size = float(undivided.gradient.norm()) if undivided is not None else 0.0
    if not math.isfinite(size):
        return [
            Cause(
                "not finite",
                "The gradient of the rows is infinite or not a number, as a whole already.",
                "look at the rows, and at divisions, logarithms and square roots in the loss.",
            )
        ]
    if probe.meets:  # parts that are run alone would be other batches
        return [_MEETS_AND_DIFFERS]
    twice = probe.run([*whole, *whole])
    pieces = [piece for part in parts if (piece := probe.run(part)) is not None]
    if undivided is None or twice is None or not pieces:
        return []
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
    # A part without a target may be 0 / 0, as in a masked mean written by hand; it weighs nothing.
    gradients = gradients.where(gradients.isfinite().all(dim=0), 0.0)
    fit = torch.linalg.lstsq(gradients, undivided.gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
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
    reached = _reached_by_a_term(probe, undivided, pieces)
    if reached:
        return [
            Cause(
                "balancing loss",
                "A term of the loss depends on which rows are together, as a load-balancing loss does, so that it is "
                f"another one for each micro-batch. It reaches {_listed(reached)}; all other parameters have the "
                "gradient of the undivided batch.",
                "compute it over the whole logical batch, from statistics that are summed over all micro-batches: "
                "wb.losses.load_balancing, or wb.sum_over_batch(x). A mean over another number than the targets is "
                "one of them: its sum, divided by wb.sum_over_batch(count). A term that has nothing to do with rows, "
                "such as a regulariser beside a sum, is the third of (loss_sum, targets, once).",
            )
        ]
    return [_NOT_A_SUM]


def _reached_by_a_term(probe: Probe, undivided: Piece, pieces: Sequence[Piece]) -> list[str]:
    """Return the parameters whose gradient the cut changes, if there are others whose gradient it leaves alone."""
    cut, scale = weighted_sum(pieces)
    gradient = undivided.gradient / undivided.targets if undivided.is_sum else undivided.gradient
    found = errors(cut, gradient, scale, probe.sizes)
    average = float(scale.norm()) / max(1, len(scale)) ** 0.5
    sizes = [float(each.norm()) / max(1, len(each)) ** 0.5 for each in scale.split_with_sizes(probe.sizes)]
    untouched = any(
        error <= probe.tolerance and size > 0.03 * average for error, size in zip(found, sizes, strict=True)
    )
    return [name for name, error in zip(probe.names, found, strict=True) if error > probe.tolerance and untouched]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def carried_cause(buffers: Sequence[str]) -> Cause:
    """Return the cause that these buffers and attributes are, by their names in the model."""
    return Cause(
        "carried over",
        f"The gradient depends on what every forward pass changes in the model ({_listed(buffers)}): a micro-batch "
        "sees what the one before it left, and an update changes it once for each.",
        "change it once an update, after accumulator.step(batch), and hold it fixed in the forward pass.",
        layers=tuple(buffers),
    )


def batch_norm_cause(layers: Sequence[str]) -> Cause:
    """Return the cause that these layers are, by their names in the model."""
    return Cause(
        "batch norm",
        f"Layers in training mode compute over the rows that they are given: {', '.join(layers)}.",
        'use wb.exact_batch_norm(model), wb.convert_batch_norm(model, to="group") or wb.freeze_batch_norm(model).',
        layers=tuple(layers),
    )


def spectral_cause(layers: Sequence[str]) -> Cause:
    """Return the cause that these layers are, by their names in the model."""
    return Cause(
        "spectral norm",
        f"Spectral norm improves its estimate in every forward pass ({_listed(layers)}), once a micro-batch when the "
        "batch is cut, so that the two differ by what the estimate has gained.",
        "this is no mistake; to compare exactly, call model.eval() first.",
        layers=tuple(layers),
    )


def meets_nobody_cause() -> Cause:
    """Return the cause that micro-batches are which would have to meet, in a loop that runs each by itself."""
    return Cause(
        "not a sum over rows",
        "Model or loss look at the rows of the whole logical batch (wb.gather, wb.sum_over_batch, exact batch norm), "
        "and in a step of your own each micro-batch is alone, so that its rows are all they see.",
        "let wb.Accumulator run the micro-batches: accumulator.step(batch), or accumulator.updates(loader, "
        "micro_batches=n).",
    )


def random_cause(model: nn.Module) -> Cause:
    """Return the cause that random numbers are, with the dropout layers of a model by name."""
    names = [
        name for name, layer in model.named_modules() if isinstance(layer, DROPOUT) and layer.training and layer.p > 0
    ]
    if names:
        return Cause(
            "dropout",
            f"Dropout draws other masks when the batch is cut: {', '.join(names[:5])}. The update is that of other "
            "masks of the same distribution.",
            "this is no mistake; to compare exactly, call model.eval() first.",
            layers=tuple(names),
        )
    return Cause(
        "randomness",
        "Model or loss draw random numbers (functional dropout, noise, sampling), and others when the batch is cut.",
        "this is no mistake if it is meant; to compare exactly, call model.eval() or fix the draws by row.",
    )
