"""How does what a window has summed become one update? Divided and clipped in one go, then one step; or refused."""

import math

import torch

from wholebatch.core.errors import NonFiniteError, WeightError
from wholebatch.engine import memory
from wholebatch.engine.rules import Rules
from wholebatch.engine.weighing import Reading

_NOTHING = "no micro-batch held a target or made a loss (loss_fn returned None), so there was nothing to learn"


def why_skipped(rules: Rules, read: Reading, *, scaled: bool, micro_batches: int) -> str | None:
    """Return why a window makes no update; None: it makes one.

    Args:
        rules: Of the accumulator.
        read: What the window came to.
        scaled: Whether there was a loss scale.
        micro_batches: How many it had.

    Raises:
        WeightError: Targets that were counted on the device are negative or not a number.
        NonFiniteError: The loss or the gradient is not finite, and ``on_nonfinite="raise"``.
    """
    if not (math.isfinite(read.targets) and read.least >= 0):
        raise WeightError(
            f"The targets of a window add up to {read.targets}, and a micro-batch holds {read.least}.",
            hint="targets are what the loss averages over: 0 or more, such as (labels != -100).sum().",
        )
    if read.targets == 0:
        return _NOTHING
    if math.isfinite(read.norm) and math.isfinite(read.loss):
        return None
    rules.precision.settle(read.scaled_norm)
    what = f"the loss is {read.loss}" if not math.isfinite(read.loss) else f"the norm of the gradient is {read.norm}"
    # With a loss scale, an infinite gradient under a finite loss says that the scale was too high: it has been
    # lowered.
    if rules.on_nonfinite == "raise" and not (scaled and math.isfinite(read.loss)):
        raise NonFiniteError(
            f"A window of {micro_batches} micro-batches is not finite: {what}.",
            hint="look at the rows of this logical batch and at the learning rate; weights are as before.",
        )
    return what


def move(rules: Rules, read: Reading, *, attempts: int) -> BaseException | None:
    """Move the weights, once or not at all.

    Args:
        rules: Of the accumulator.
        read: What the window came to.
        attempts: How often the optimizers may try where memory runs out.

    Returns:
        What is still to be raised, although the weights have moved; see `Stepping.step`.

    Raises:
        Exception: What a step raised. Weights and state are as before.
    """
    clip = 1.0 if rules.clip_norm is None else min(1.0, rules.clip_norm / (read.norm + 1e-6))
    group = rules.setup.group
    with group.moving(), rules.precision.settling(read.scaled_norm):
        group.deliver(rules.sums, read.factor * clip)
        if rules.before_step is not None:
            rules.before_step()
        late = _step(rules, attempts)
        torch.clear_autocast_cache()  # or an autocast around the whole loop would go on with the old weights
    return late


def _step(rules: Rules, attempts: int) -> BaseException | None:
    """Step the optimizers. After a shortage of memory a step goes in pieces."""
    for _ in range(attempts - 1):
        try:
            return rules.setup.step()
        except Exception as error:
            memory.said_of_shortage(error)
        memory.free_cached(rules.setup.device)
    return rules.setup.step()
