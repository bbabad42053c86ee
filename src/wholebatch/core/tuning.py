"""Which logical batch is worth it? From the noise scale and the speed at several sizes to one of them, with reasons."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wholebatch.core.budget import say_rows
from wholebatch.core.noise import NoiseSample, scale_of, wasted_share
from wholebatch.core.schedules.rates import Change

RESAMPLED = 1000
"""How often windows are drawn again to say how far the noise scale can be trusted."""

RISING = 1.3
"""By what factor the noise scale has to rise from the first half of the windows to the second to be said to rise."""

NEAR = 0.95
"""What share of the best progress is as good as the best; among these the largest logical batch is taken."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How sure the noise scale is.

    Attributes:
        scale: The noise scale; None where noise drowns the gradient. Unit: targets.
        low, high: Between these lie nine tenths of what windows that are drawn again say; `high` is None where some of
            them give no number. Unit: targets.
        windows: How many were measured.
        before, after: What the first and the second half said, where the second said clearly more: then it alone
            counts, and the model is young. Unit: targets.

    Example:
        >>> windows = [NoiseSample(300.0, 1.0 + 0.1 * (k % 3), 7, 64) for k in range(30)]
        >>> found = Measured.of(windows)
        >>> f"{found.scale:.0f}, {found.low:.0f} to {found.high:.0f}"
        '273, 267 to 279'
    """

    scale: float | None
    low: float | None
    high: float | None
    windows: int
    before: float | None = None
    after: float | None = None

    @classmethod
    def of(cls, samples: Sequence[NoiseSample]) -> "Measured":
        """Return what windows say together, and how far others might differ.

        Args:
            samples: What each window said.
        """
        draw = random.Random(0)
        again = sorted(
            math.inf if scale is None else scale
            for scale in (scale_of(draw.choices(samples, k=len(samples))) for _ in range(RESAMPLED if samples else 0))
        )
        low, high = (again[len(again) // 20], again[-1 - len(again) // 20]) if again else (math.inf, math.inf)
        return cls(scale_of(samples), _finite(low), _finite(high), len(samples))

    @classmethod
    def latest(cls, samples: Sequence[NoiseSample]) -> "Measured":
        """Return what the second half of some windows says where that is clearly more than the first half, else all."""
        half = len(samples) // 2
        before, after = scale_of(samples[:half]), scale_of(samples[half:])
        if before is None or after is None or after < RISING * before:
            return cls.of(samples)
        return replace(cls.of(samples[half:]), before=before, after=after)


def _finite(number: float) -> float | None:
    return number if number < math.inf else None


@dataclass(frozen=True, slots=True)
class Timed:
    """How fast updates of one size are.

    Attributes:
        rows: Of the logical batch. Unit: rows.
        targets: Of the logical batch, on average. Unit: targets.
        micro_batches: How many it was cut into, at most.
        seconds: Of an update.
    """

    rows: int
    targets: float
    micro_batches: int
    seconds: float

    @property
    def targets_per_second(self) -> float:
        """Unit: targets per second."""
        return self.targets / self.seconds

    def progress(self, noise_scale: float) -> float:
        """Targets a second that are not wasted. Unit: targets per second."""
        return self.targets_per_second * (1 - wasted_share(self.targets, noise_scale))


def worth_it(timed: Sequence[Timed], noise_scale: float) -> Timed:
    """Return the largest logical batch that makes nearly as much progress in a second as the best does.

    Args:
        timed: Sizes, with their speed.
        noise_scale: Unit: targets.

    Example:
        Twice the speed for four times the rows is worth it, as long as the noise scale is far away:

        >>> sizes = [Timed(8, 8.0, 1, 0.1), Timed(32, 32.0, 1, 0.2)]
        >>> worth_it(sizes, 1000.0).rows, worth_it(sizes, 4.0).rows
        (32, 8)
    """
    best = max(each.progress(noise_scale) for each in timed)
    return max((each for each in timed if each.progress(noise_scale) >= NEAR * best), key=lambda each: each.rows)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found out about the logical batch of a recipe.

    Attributes:
        present: The logical batch as it is stated now. Unit: rows.
        noise: The gradient noise scale.
        timed: Speed by size, the smallest first.
        chosen: The size that is worth it; None where the noise scale is not known.
        micro_batch: What is in memory at once, such as ``"8 rows"``.
        peak_bytes: What training takes at most, as planned. Unit: bytes.
        changes: What each rule asks for the move from the present size to the chosen one.
        reasons: Why, and what to be careful about; one sentence each.
    """

    present: int
    noise: Measured
    timed: tuple[Timed, ...]
    chosen: Timed | None
    micro_batch: str
    peak_bytes: int
    changes: tuple[Change, ...]
    reasons: tuple[str, ...]

    def to_dict(self) -> Mapping[str, Any]:
        """Return everything as numbers, texts, lists and dicts."""
        scale = self.noise.scale
        return {
            "present_rows": self.present,
            "noise_scale": scale,
            "noise_scale_low": self.noise.low,
            "noise_scale_high": self.noise.high,
            "windows": self.noise.windows,
            "noise_scale_rose_from": self.noise.before,
            "sizes": [
                {
                    "rows": each.rows,
                    "targets": each.targets,
                    "micro_batches": each.micro_batches,
                    "seconds": each.seconds,
                    "targets_per_second": each.targets_per_second,
                    "wasted": None if scale is None else wasted_share(each.targets, scale),
                    "progress": None if scale is None else each.progress(scale),
                }
                for each in self.timed
            ],
            "chosen_rows": None if self.chosen is None else self.chosen.rows,
            "micro_batch": self.micro_batch,
            "peak_bytes": self.peak_bytes,
            "rules": {
                change.rule: [{"before": before, "after": after} for before, after in change.pairs]
                for change in self.changes
            },
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._rules(), *(f"- {reason}" for reason in self.reasons)])

    def _table(self) -> list[str]:
        scale = self.noise.scale
        head = ("logical batch", "targets", "micro-batches", "targets/s", "wasted", "progress/s")
        lines = [head]
        for each in self.timed:
            known = scale is not None
            lines.append(
                (
                    say_rows(each.rows),
                    f"{each.targets:,.0f}",
                    f"{each.micro_batches}",
                    f"{each.targets_per_second:,.0f}",
                    f"{wasted_share(each.targets, scale):.0%}" if scale is not None else "?",
                    f"{each.progress(scale):,.0f}" if known and scale is not None else "?",
                )
            )
        wide = [max(len(line[place]) for line in lines) for place in range(len(head))]
        notes = ["", *("  " + ", ".join(self._note(each)) if self._note(each) else "" for each in self.timed)]
        return [
            ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, wide, strict=True)) + note).rstrip()
            for line, note in zip(lines, notes, strict=True)
        ]

    def _note(self, each: Timed) -> list[str]:
        return ["worth it"] * (each is self.chosen) + ["present"] * (each.rows == self.present)

    def _rules(self) -> list[str]:
        return [line for change in self.changes for line in (str(change), "")]
