"""What did it bring? One logical batch cut, as a whole, and in the loop that one would have written."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.checks.silence import silenced
from wholebatch.engine.device import input_device
from wholebatch.engine.objective import LossFn, Objective, TargetsFn
from wholebatch.engine.transaction import Transaction
from wholebatch.evidence.certificate.gradients import undivided
from wholebatch.evidence.verify import verify

ROUNDS = 2
"""How often both loops run, taking turns; the fastest round of each counts."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One logical batch, trained in three ways.

    Attributes:
        gradient_error: 2-norm of the difference between cut and undivided gradient, relative to the latter, while
            dropout is silent. None where model or loss draw random numbers all the same.
        gradient_ok: Whether that is rounding, as `verify` judges it.
        cut_peak_bytes: Highest memory use with the batch cut. Unit: bytes.
        undivided_peak_bytes: The same with the batch as a whole. Unit: bytes.
        targets_per_second: Targets per CPU second of the accumulator.
        plain_targets_per_second: The same of the textbook loop: rows as they come, equally many a micro-batch.
        speedup: The former over the latter.
        why: Why the gradients were not compared; None where they were.
    """

    gradient_error: float | None
    gradient_ok: bool | None
    cut_peak_bytes: int | None
    undivided_peak_bytes: int | None
    targets_per_second: float
    plain_targets_per_second: float
    speedup: float
    why: str | None = None

    def to_dict(self) -> dict[str, float | str | None]:
        """Return the fields by name."""
        return asdict(self)


class Still(Optimizer):
    """Moves nothing, whatever the gradient is."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pass


def compare(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Sequence[Any],
    *,
    micro_batch: Rows | Tokens,
    collate: Callable[[list[Any]], Any],
    targets: TargetsFn | None = None,
    reduction: Reduction = "mean",
    plain_rows: int = 16,
    seed: int = 0,
) -> Comparison:
    """Measure what cutting a logical batch saves and costs. Weights, buffers and random state are left as they were;
    gradients are used up, as at the end of any training loop.

    Args:
        model: The module; as a whole, the batch must fit into memory once.
        loss_fn: As for `wb.Accumulator`, and so are `micro_batch`, `collate`, `targets` and `reduction`.
        batch: The rows of a logical batch.
        plain_rows: Rows a micro-batch in the textbook loop. Unit: rows.
        seed: Of the order in which the textbook loop meets the rows.

    Returns:
        The figures.
    """
    objective: dict[str, Any] = {"collate": collate, "targets": targets, "reduction": reduction}
    device = input_device(model)
    memory.release(device)  # so that peaks do not hold what is there from before
    still = Still(parameter for parameter in model.parameters() if parameter.requires_grad)
    accumulator = Accumulator(
        model, still, loss_fn, micro_batch=micro_batch, check=None, batch_norm="per_micro_batch", **objective
    )
    transaction = Transaction(model, device)
    transaction.begin()
    cut_peak = accumulator.step(batch).peak_bytes
    with silenced(model):  # it would draw other masks for the undivided batch
        found = verify(model, loss_fn, batch, micro_batch=micro_batch, **objective)
    by_chance = any(cause.name in ("dropout", "randomness") for cause in found.causes)
    memory.release(device)
    whole_peak, _ = undivided(model, Objective(loss_fn, targets, reduction), LogicalBatch(batch, collate=collate))
    shuffled = random.Random(seed).sample(list(batch), len(batch))
    counted = 0.0
    ours, plain = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        counted = accumulator.step(batch).targets
        ours.append(time.process_time() - start)
        start = time.process_time()
        textbook_window(model, still, loss_fn, shuffled, collate=collate, rows_a_micro_batch=plain_rows)
        plain.append(time.process_time() - start)
    transaction.roll_back()
    return Comparison(
        gradient_error=found.error if not by_chance else None,
        gradient_ok=found.ok if not by_chance else None,
        cut_peak_bytes=cut_peak,
        undivided_peak_bytes=whole_peak,
        targets_per_second=counted / min(ours),
        plain_targets_per_second=counted / min(plain),
        speedup=min(plain) / min(ours),
        why="model or loss draw random numbers, and others when the batch is cut" if by_chance else None,
    )


def textbook_window(
    model: nn.Module,
    optimizer: Any,
    loss_fn: LossFn,
    rows: Sequence[Any],
    *,
    collate: Callable[[list[Any]], Any],
    rows_a_micro_batch: int = 16,
) -> None:
    """Train on some rows as the tutorials do: equal slices, each loss divided by their number, one step at the end."""
    slices = [rows[start : start + rows_a_micro_batch] for start in range(0, len(rows), rows_a_micro_batch)]
    for part in slices:
        result = loss_fn(model, collate(list(part)))
        loss = result[0] / result[1] if isinstance(result, tuple) else result
        (loss / len(slices)).backward()
    optimizer.step()
    optimizer.zero_grad()
