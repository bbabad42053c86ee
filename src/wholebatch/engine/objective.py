"""What does a micro-batch add to the window? The declared objective: a loss, and the targets that it averages over."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

from wholebatch.core.errors import LossError, WeightError
from wholebatch.core.weights import Count, Reduction, check_count, check_reduction

LossFn: TypeAlias = Callable[[Any, Any], Any]
"""``loss_fn(model, micro_batch)``: a mean or a sum as declared, or ``(loss_sum, targets)`` with or without ``once``."""

TargetsFn: TypeAlias = Callable[[Any], Any]
"""``targets(micro_batch)``: what the loss of these rows divides by."""


@dataclass(slots=True)
class Part:
    """What one micro-batch adds.

    Attributes:
        loss: Mean or sum over its targets, with a graph. Shape ``[]``.
        reduction: Which of the two.
        targets: What it averages over. Unit: targets.
        once: A term that acts once a window, such as a regulariser, or None. Shape ``[]``.
        counted: Whether the loss function itself said how many targets there are.
    """

    loss: Tensor
    reduction: Reduction
    targets: Count
    once: Tensor | None = None
    counted: bool = False


def part_of(result: Any, *, targets: Count | None, reduction: Reduction, graph: bool = True) -> Part:
    """Return what a loss function's result means.

    Args:
        result: A loss, ``(loss_sum, targets)`` or ``(loss_sum, targets, once)``.
        targets: What the loss averages over, where the result does not say. Unit: targets.
        reduction: What a loss that stands alone is.
        graph: Whether a loss without a graph is an error.

    Raises:
        LossError: The loss is not a tensor of one number, or has no graph.
        WeightError: Nobody says how many targets there are, or both sides do.
    """
    if isinstance(result, tuple):
        if len(result) not in (2, 3):
            raise LossError(
                f"The loss function returned a tuple of {len(result)}.",
                hint="return a loss, (loss_sum, targets), or (loss_sum, targets, once).",
            )
        loss, counted = result[0], plain_count(result[1])
        once = result[2] if len(result) == 3 else None
        check_count(counted)
        _check_loss(loss, graph)
        if once is not None:
            _check_scalar(once, "The term that acts once a window")
        return Part(loss, "sum", counted, once, counted=True)
    if targets is None:
        raise WeightError(
            "A loss came without its targets, so that nobody knows what it averages over.",
            hint="say how many: window.backward(loss, targets=n).",
        )
    targets = plain_count(targets)
    check_count(targets)
    _check_loss(result, graph)
    return Part(result, reduction, targets)


def learns(part: Part | None) -> TypeGuard[Part]:
    """Return whether there is a part, and it holds targets, as far as that can be told without asking a device."""
    return part is not None and (isinstance(part.targets, Tensor) or bool(part.targets != 0))


def plain_count(count: Count) -> Count:
    """Return a count as a plain number wherever that asks no device for it: a tensor on an accelerator stays one."""
    if type(count) is int:
        return count
    if isinstance(count, Tensor):
        if count.device.type != "cpu" or count.numel() != 1:
            return count
        count = count.detach().reshape(())
    return _plain(count.tolist() if hasattr(count, "tolist") else count)  # NumPy's numbers have it too


def _plain(number: Any) -> Any:
    return int(number) if isinstance(number, bool) else number


class Objective:
    """The objective as it was declared: a loss function, what it averages over, and what it returns.

    Args:
        loss_fn: ``loss_fn(model, micro_batch)``.
        targets: ``targets(micro_batch)``; None means the rows.
        reduction: What `loss_fn` returns.

    Attributes:
        counts: Whether the loss function has returned its targets too.

    Raises:
        LossError: `loss_fn` cannot be called with a model and a micro-batch.
        WeightError: `targets` cannot be called, or the reduction does not exist.
    """

    def __init__(self, loss_fn: LossFn | None, targets: TargetsFn | None, reduction: Reduction) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise LossError(
                f"loss_fn is a {type(loss_fn).__name__}, which cannot be called.",
                hint="pass a function: loss_fn(model, micro_batch).",
            )
        _check_arguments(loss_fn)
        if targets is not None and not callable(targets):
            raise WeightError(
                f"targets is a {type(targets).__name__}, which cannot be called.",
                hint="pass a function of the micro-batch, such as lambda batch: (batch['labels'] != -100).sum().",
            )
        self.loss_fn = loss_fn
        self.targets = targets
        self.reduction = check_reduction(reduction)
        self.counts = False

    def count(self, micro_batch: Any, rows: int | None) -> Count:
        """Return the declared targets of a micro-batch: a plain number wherever that asks no device for it.

        None where nothing is declared and nobody knows the rows: then the loss function has to count. A micro-batch of
        None has none.

        Raises:
            WeightError: They are negative or not a number, or there is no way to count them.
        """
        if micro_batch is None:
            return 0
        if self.targets is None:
            return rows
        counted = plain_count(self.targets(micro_batch))
        check_count(counted)
        return counted

    def __call__(self, model: Any, micro_batch: Any, count: Count, *, graph: bool = True) -> Part | None:
        """Run the loss function.

        Args:
            model: As it was given to the accumulator.
            micro_batch: What `loss_fn` takes.
            count: The declared targets. Unit: targets.
            graph: Whether a loss without a graph is an error.

        Returns:
            What the micro-batch adds, or None where the loss function returned None: nothing to learn here.

        Raises:
            LossError: See `part_of`.
            WeightError: The loss function counts its targets, and `targets` does so too; or nobody does.
        """
        if self.loss_fn is None:
            raise LossError(
                "This accumulator has no loss function.",
                hint="pass loss_fn to wb.Accumulator, or use accumulator.window() and window.backward(loss, n).",
            )
        try:
            result = self.loss_fn(model, micro_batch)
        except (AttributeError, LookupError, TypeError) as error:
            if count is None and isinstance(micro_batch, list):  # rows, and the loss takes them for a micro-batch
                raise _uncounted() from error
            raise
        if result is None:
            return None
        if not isinstance(result, tuple):
            if count is None:
                raise _uncounted()
            _check_loss(result, graph)
            return Part(result, self.reduction, count)
        self.counts = True
        part = part_of(result, targets=count, reduction=self.reduction, graph=graph)
        if self.targets is not None:
            raise WeightError(
                "The loss function returned (loss_sum, targets), and targets=... was given as well.",
                hint="let one of them count: leave out targets=..., or return the loss alone.",
            )
        return part


def _uncounted() -> WeightError:
    return WeightError(
        "The tensors of a micro-batch disagree on its rows, or it is no dict, list or tuple of tensors, so that its "
        "targets cannot be counted.",
        hint="pass targets=..., a function that counts what the loss averages over, or return (loss_sum, targets). Of "
        "a list of rows, let the loader collate it (collate_fn=...), or hand it to accumulator.step(rows) as a logical "
        "batch.",
    )


def _check_arguments(loss_fn: LossFn | None) -> None:
    """Refuse what compares outputs with labels, as losses of `torch.nn` do, and what takes other arguments."""
    kind = loss_fn if inspect.isroutine(loss_fn) else type(loss_fn)
    name, home = getattr(kind, "__name__", ""), getattr(kind, "__module__", None) or ""
    if home in ("torch.nn.functional", "torch._C._nn") or home.startswith("torch.nn.modules.loss"):
        raise LossError(
            f"loss_fn is {name}, which compares outputs with labels; it is called as loss_fn(model, micro_batch).",
            hint="write the forward pass around it, as in "
            "def loss_fn(model, micro_batch): return criterion(model(micro_batch['x']), micro_batch['y']).",
        )
    try:
        signature = inspect.signature(getattr(loss_fn, "forward", loss_fn)) if loss_fn is not None else None
    except (TypeError, ValueError):  # something built in may not say what it takes
        return
    try:
        if signature is not None:
            signature.bind(None, None)
    except TypeError:
        raise LossError(
            f"loss_fn takes {signature}, and it is called as loss_fn(model, micro_batch).",
            hint="let it take these two, the model first; bind everything else beforehand, with functools.partial.",
        ) from None


def _check_loss(loss: Any, graph: bool) -> None:
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        _check_scalar(loss, "The loss")
    if graph:
        require_graph(loss)


def require_graph(loss: Tensor) -> None:
    """Raise an error if no gradient can be computed from a loss."""
    if not loss.requires_grad:
        raise LossError(
            "The loss has no graph, so that no gradient can be computed from it.",
            hint="return the loss as the model gave it: without .item(), .detach() or torch.no_grad().",
        )


def _check_scalar(loss: Any, what: str) -> None:
    if not isinstance(loss, Tensor):
        raise LossError(
            f"{what} is a {type(loss).__name__}, not a tensor.",
            hint="return a tensor with one number; a model output with a .loss needs return output.loss.",
        )
    if loss.numel() != 1:
        raise LossError(
            f"{what} is no scalar: its shape is {tuple(loss.shape)}.",
            hint='add it up, as in (loss.sum(), loss.numel()), or average it with reduction="mean".',
        )
    if loss.is_complex():
        raise LossError(f"{what} is complex.", hint="return a real number, such as its absolute value.")
