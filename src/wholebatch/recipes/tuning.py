"""Which logical batch is worth it for this recipe? A short run, timed and measured, and what follows from it."""

import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from wholebatch.core.budget import say_bytes, say_rows
from wholebatch.core.errors import OutOfMemoryError
from wholebatch.core.noise import NoiseSample
from wholebatch.core.plan import Plan
from wholebatch.core.schedules.rates import Change
from wholebatch.core.split import Rows, Tokens
from wholebatch.core.tuning import NEAR, Measured, Timed, Tuning, worth_it
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.device import input_device
from wholebatch.engine.memory import release
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.ingredients import model_of, no_length, optimizer_of, rows_of, seed_everything
from wholebatch.recipes.planning import plan_recipe
from wholebatch.recipes.protocol import Recipe

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
"""Which sizes are timed, as parts of the present logical batch."""

PARTS = 8
"""Into how many micro-batches a window is cut at least, to see by how much they differ."""

REPEATS = 3
"""How often each size is timed; the fastest counts, since all that disturbs makes slower."""


def tune_recipe(
    recipe: Recipe, config: TrainConfig, *, updates: int = 40, say: Callable[[str], None] = lambda _said: None
) -> Tuning:
    """Train a recipe for a while, measure noise scale and speed, and say which logical batch is worth it.

    Args:
        recipe: What to look at.
        config: What was asked for: present logical batch, micro-batch, budget, precision.
        updates: How long is trained at the present size; the noise scale is that of the second half, or of its end.
        say: Told what goes on.

    Raises:
        ConfigError: The recipe cannot be used as stated.
        OutOfMemoryError: It does not fit.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> config = TrainConfig(recipe="images", logical_batch="16 rows", micro_batch="8 rows")
        >>> tuning = tune_recipe(find_recipe("images"), config, updates=4)
        >>> tuning.present, [each.rows for each in tuning.timed]
        (16, [2, 4, 8, 16, 32, 64])
    """
    plan = plan_recipe(recipe, config, timed=config.micro_batch == "auto")
    if not plan.fits:
        raise OutOfMemoryError(
            f"The recipe does not fit: {plan.reasons[0]}", hint=f"wholebatch plan {recipe.name} says what would help."
        )
    seed_everything(config.seed)
    rows = rows_of(recipe, "train")
    present = min(_rows(recipe, rows, config.logical_batch), len(rows))
    run = _Run(recipe, config, plan, rows)
    say(f"Training for {updates:,} updates of {present:,} rows to measure the noise scale ...")
    noise, why = run.measure(present, updates)
    sizes = sorted({max(1, min(len(rows), round(present * factor))) for factor in FACTORS})
    say(f"Timing updates of {', '.join(f'{size:,}' for size in sizes)} rows ...")
    timed = [run.time(size) for size in sizes]
    chosen = worth_it(timed, noise.scale) if noise.scale is not None else None
    while noise.scale is not None and chosen is timed[0] and chosen.rows > 1:  # a smaller one may be better still
        timed.insert(0, run.time(chosen.rows // 2))
        chosen = worth_it(timed, noise.scale)
    changes: tuple[Change, ...] = ()
    if chosen is not None and chosen.rows != present:
        changes = tuple(Change.of(run.untouched, chosen.rows / present, rule) for rule in ("linear", "sqrt"))
    return Tuning(
        present=present,
        noise=noise,
        timed=tuple(timed),
        chosen=chosen,
        micro_batch=str(plan.micro_batch),
        peak_bytes=plan.peak_bytes,
        changes=changes,
        reasons=tuple(_reasons(noise, timed, chosen, plan, updates, why)),
    )


class _Run:
    """The model that is trained meanwhile, and the rows that it is trained on."""

    def __init__(self, recipe: Recipe, config: TrainConfig, plan: Plan, rows: Sequence[Any]) -> None:
        self._recipe = recipe
        self._config = config
        self._rows = rows
        self._planned = plan.micro_batch
        # What is left open is cut as in training: there rows are sorted by length, where they have one.
        self._cut: Rows | Tokens | Literal["auto"] = "auto" if config.micro_batch == "auto" else plan.micro_batch
        self._draw = random.Random(config.seed)
        self._model: nn.Module = model_of(recipe, config.batch_norm)
        self._optimizer = optimizer_of(recipe, self._model, config.lr)
        self.untouched: Optimizer = optimizer_of(recipe, self._model, config.lr)

    def measure(self, size: int, updates: int) -> tuple[Measured, str | None]:
        """Train, and return the noise scale of the second half; or why there is none."""
        planned = self._planned
        at_once = planned.rows if isinstance(planned, Rows) else max(1, planned.tokens // self._longest())
        size = max(size, min(PARTS, len(self._rows)))
        accumulator = self._accumulator(Rows(max(1, min(at_once, size // PARTS))), noise_scale=True)
        assert accumulator.noise is not None
        samples: list[NoiseSample] = []
        for number in range(updates):
            accumulator.step(self._batch(size))
            if number >= updates // 2 and accumulator.noise.last is not None:
                samples.append(accumulator.noise.last)
        said = [reason for reason in accumulator.reasons if reason.startswith("noise_scale: ")]
        return Measured.latest(samples), said[0].partition(": ")[2] if said and not samples else None

    def time(self, size: int) -> Timed:
        """Return how fast updates of a size are."""
        accumulator = self._accumulator(self._cut)
        device = input_device(self._model)
        accumulator.step(self._batch(size))
        seconds, targets, most = [], 0.0, 0
        for _ in range(REPEATS):
            batch = self._batch(size)
            release(device)
            began = time.perf_counter()
            update = accumulator.step(batch)
            seconds.append((time.perf_counter() - began) / max(1.0, update.targets))
            targets, most = targets + update.targets / REPEATS, max(most, update.micro_batches)
        return Timed(size, targets, most, min(seconds) * targets)

    def _accumulator(self, cut: Rows | Tokens | Literal["auto"], **options: Any) -> Accumulator:
        recipe, config = self._recipe, self._config
        return Accumulator(
            self._model,
            self._optimizer,
            recipe.loss,
            targets=recipe.targets,
            reduction=recipe.reduction,
            micro_batch=cut,
            memory=config.memory if cut == "auto" else None,
            collate=recipe.collate,
            precision=config.precision,
            accumulate_in=config.accumulate_in,
            clip_norm=config.clip_norm or None,
            batch_norm="per_micro_batch" if config.batch_norm == "per_micro_batch" else "refuse",
            check=None,
            **options,
        )

    def _batch(self, size: int) -> list[Any]:
        return [self._rows[place] for place in self._draw.sample(range(len(self._rows)), size)]

    def _longest(self) -> int:
        assert self._recipe.length is not None
        return max(1, max(self._recipe.length(self._rows[place]) for place in range(len(self._rows))))


def _rows(recipe: Recipe, rows: Sequence[Any], amount: Amount) -> int:
    """How many rows an amount is, on average."""
    if amount.unit == "rows":
        return amount.count
    if recipe.length is None:
        raise no_length(recipe, f"An amount of {amount}")
    tokens = sum(recipe.length(rows[place]) for place in range(len(rows)))
    return max(1, round(amount.count * len(rows) / max(1, tokens)))


def _reasons(
    noise: Measured,
    timed: Sequence[Timed],
    chosen: Timed | None,
    plan: Plan,
    updates: int,
    why: str | None,
) -> list[str]:
    said = []
    rows = noise.scale / timed[-1].targets * timed[-1].rows if noise.scale is not None else 0.0
    if noise.scale is None or chosen is None:
        unknown = "Noise drowns the gradient, so that the noise scale is too large to be given a number"
        said.append(
            f"The noise scale is not known, so no size is named: {why}"
            if why is not None
            else f"{unknown}: measure longer (--updates) or over larger logical batches (--logical-batch)."
        )
    else:
        high = f"{noise.high:,.0f}" if noise.high is not None else "no bound"
        said.append(
            f"The gradient noise scale is about {noise.scale:,.0f} targets, or {rows:,.0f} rows (nine in ten: "
            f"{noise.low or 0.0:,.0f} to {high} targets; {noise.windows} windows): a logical batch of that size "
            "wastes half of its targets, a smaller one less."
        )
        alike = f"{NEAR:.0%} of the best progress"
        said.append(
            f"Worth it: {say_rows(chosen.rows)}, the largest logical batch that makes {alike} or more for the time, "
            "counted in targets a second that are not wasted."
        )
    said.append(
        f"Micro-batch: {plan.micro_batch}, as planned: {say_bytes(plan.peak_bytes)} of {say_bytes(plan.budget_bytes)}."
    )
    slow, fast = timed[0], max(timed, key=lambda each: each.targets_per_second)
    if fast.targets_per_second > 1.1 * slow.targets_per_second:
        said.append(
            f"Speed grows with the logical batch from {slow.targets_per_second:,.0f} to {fast.targets_per_second:,.0f} "
            f"targets a second, and up to {_flat_from(timed).rows:,} rows most of it."
        )
    else:
        said.append("Speed hardly depends on the logical batch here, so a larger one saves no time, only updates.")
    if noise.scale is not None:
        said.append(
            f"The noise scale is that of the last {noise.windows} of {updates} updates{_rise(noise)}. It rises as "
            "training goes on, and with it the size that is worth it: measure longer (--updates) or along the way "
            "(train --noise-scale), or let the logical batch grow with it (train --grow-to ... --grow noise)."
        )
    elif why is not None and "meet" in why:
        return [*said, _COUPLED]
    return [*said, *_ADVICE]


def _rise(noise: Measured) -> str:
    if noise.before is None or noise.after is None:
        return ""
    return f", and rose from {noise.before:,.0f} targets to {noise.after:,.0f} there: this is a young model"


_COUPLED = (
    "Where micro-batches meet, the loss or a layer sees the whole logical batch: its size is a part of what is "
    "trained, as with the negatives of a contrastive loss, and is to be tried, not computed from noise."
)
_ADVICE = (
    (
        "On one device, a small logical batch with Adam's beta2 at the same half-life in targets often does as well or "
        "better for the same compute (arXiv 2507.07101). Accumulate for many replicas, published settings, losses and "
        "layers that see the batch, noisy objectives, and the end of training."
    ),
    "The learning rates are rules, not measurements: try the settings in a short run before a long one.",
)


def _flat_from(timed: Sequence[Timed]) -> Timed:
    """The first size whose next one is hardly faster."""
    for one, other in pairwise(timed):
        if other.targets_per_second < 1.05 * one.targets_per_second:
            return one
    return timed[-1]
