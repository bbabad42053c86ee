"""Does a collator draw random numbers, such as which words are masked? Then the same rows never come out twice."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.batch import LogicalBatch
from wholebatch.core.errors import SplitError
from wholebatch.core.tree import flatten
from wholebatch.engine.checks.check import ROWS, check_first
from wholebatch.engine.objective import Objective
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.ranks.wrapping import by_itself


def draws(collate: Callable[[list[Any]], Any], rows: Sequence[Any], device: torch.device) -> bool:
    """Return whether rows come out otherwise when they are collated once more. The random streams are left alone.

    Args:
        collate: Of the user.
        rows: A few of them.
        device: Whose random stream it may draw from, besides those of the CPU.
    """
    if not rows:
        return False
    before = RandomState.now(device)
    one = collate(copy.deepcopy(list(rows)))
    drew = not before.stands()
    other = collate(copy.deepcopy(list(rows)))
    before.restore()
    return drew or not _same(one, other)


def look(model: nn.Module, objective: Objective, micro_batch: Any) -> tuple[str, int] | None:
    """Compare rows of a micro-batch, cut and uncut, as `wb.Accumulator` does with rows that are collated again.

    Args:
        model: As it is, not wrapped.
        objective: What is to be trained.
        micro_batch: Collated once; its tensors are cut by rows.

    Returns:
        As `check_first`.

    Raises:
        VerifyError: The cut changes the gradient.
    """
    try:
        rows = LogicalBatch(micro_batch)
    except SplitError:
        return (
            "The first batch was not compared cut and uncut: its tensors disagree on how many rows there are.",
            logging.INFO,
        )
    return by_itself(check_first)(model, objective, rows, range(min(rows.rows, ROWS)))


def _same(one: Any, other: Any) -> bool:
    mine, yours = (flatten(each)[0] for each in (one, other))
    return len(mine) == len(yours) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a is b or a == b)
        for (_, a, _), (_, b, _) in zip(mine, yours, strict=True)
    )
