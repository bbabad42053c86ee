"""How noisy is the gradient? From the norms of parts and wholes to the batch at which half of it is noise.

A gradient over n targets is G plus noise whose squared norm is tr S / n on average, so that

    E |gradient over n targets|^2 = |G|^2 + tr S / n:

a line in 1 / n. Micro-batches and their window are points on it; its slope and intercept give the gradient noise scale
tr S / |G|^2 (An Empirical Model of Large-Batch Training, arXiv 1812.06162).
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wholebatch.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """What one window says about the noise in its gradient: hardly anything by itself, but right on average.

    Attributes:
        variance: An unbiased estimate of tr S, the trace of the covariance of a single target's gradient.
        signal: An unbiased estimate of ``|G|^2``; below 0 where noise outweighs it.
        degrees: Micro-batches but one, of which `variance` is the average.
        targets: Of the window. Unit: targets.

    Example:
        Two micro-batches of 1 and 3 targets whose mean gradients are 0 and 4, so that the window's is 3:

        >>> NoiseSample.of(spread=0 / 1 + 12**2 / 3, norm=3.0, targets=4, parts=2)
        NoiseSample(variance=12.0, signal=6.0, degrees=1, targets=4)
    """

    variance: float
    signal: float
    degrees: int
    targets: float

    @classmethod
    def of(cls, *, spread: float, norm: float, targets: float, parts: float) -> "NoiseSample | None":
        """Return what the norms of a window say, or None where they say nothing.

        The line goes through the window's point, and its slope is that of least squares over the micro-batches, each
        weighed by the inverse of its variance (nearly n^2). With g_i the sum over the n_i targets of micro-batch i, and
        g that over all N,

            tr S = (sum_i |g_i|^2 / n_i - |g|^2 / N) / (K - 1),   |G|^2 = |g|^2 / N^2 - tr S / N.

        For K equal micro-batches these are the two formulas of the paper.

        Args:
            spread: The sum over micro-batches of ``|g_i|^2 / n_i``.
            norm: ``|g| / N``, the norm of the gradient of the mean.
            targets: N. Unit: targets.
            parts: K, the micro-batches that hold a target.

        Returns:
            None for fewer than two micro-batches, and where a norm is not finite.
        """
        if parts < 2 or not (math.isfinite(spread) and math.isfinite(norm)) or targets <= 0:
            return None
        degrees = int(parts) - 1
        # No less than 0 but for rounding, by the inequality of Cauchy and Schwarz.
        variance = max(0.0, spread - norm**2 * targets) / degrees
        return cls(variance, norm**2 - variance / targets, degrees, targets)


class NoiseScale:
    """The gradient noise scale, from averages over the last windows.

    Numerator and denominator are averaged apart, since a mean of ratios would be biased, and divided at the end. What
    is too old does not count at all: gradients are so much larger at the beginning of training that an average that
    forgets little by little would be that of the beginning for hundreds of windows.

    Args:
        windows: Over how many windows they are taken.

    Attributes:
        windows: As given.
        last: What the last window said, or None if it said nothing.

    Raises:
        ConfigError: `windows` is no number of at least 1.

    Example:
        >>> noise = NoiseScale(windows=50)
        >>> for window in range(3):
        ...     noise.add(NoiseSample(variance=30.0 + window, signal=0.1, degrees=7, targets=64))
        >>> print(f"{noise.scale:.1f} targets, {noise.wasted(620):.2f} wasted at 620")
        310.0 targets, 0.67 wasted at 620
    """

    def __init__(self, windows: int = 30) -> None:
        if isinstance(windows, bool) or not hasattr(windows, "__index__") or windows < 1:
            raise ConfigError(
                f"noise_scale={windows!r} is no number of windows to average over.",
                hint="pass True, which averages over the last 30 windows, or how many, such as noise_scale=100.",
            )
        self.windows = windows
        self.last: NoiseSample | None = None
        self._samples: deque[NoiseSample] = deque(maxlen=int(windows))

    def add(self, sample: NoiseSample | None) -> None:
        """Take in what a window said; None changes nothing."""
        self.last = sample
        if sample is not None:
            self._samples.append(sample)

    @property
    def variance(self) -> float | None:
        """The average of tr S, in which a window weighs as many as it has degrees of freedom; None before the first."""
        return weighed_mean([(each.variance, each.degrees) for each in self._samples])

    @property
    def signal(self) -> float | None:
        """The average of ``|G|^2``, in which a window weighs as many as it has targets; None before the first."""
        return weighed_mean([(each.signal, each.targets) for each in self._samples])

    @property
    def scale(self) -> float | None:
        """The gradient noise scale; None while noise drowns the gradient, so that no number can be given.

        Unit: targets.
        """
        return scale_of(self._samples)

    def wasted(self, targets: float) -> float | None:
        """Return the share of a logical batch that a smaller one would not have needed: ``1 / (1 + scale / targets)``.

        Args:
            targets: Of the logical batch. Unit: targets.

        Returns:
            In 0 to 1; None where the scale is not known.
        """
        return None if self.scale is None else wasted_share(targets, self.scale)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Return what the last windows said, for a run that goes on in another process."""
        return {"samples": [[each.variance, each.signal, each.degrees, each.targets] for each in self._samples]}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Go on from what `state_dict` has returned."""
        self.last = None
        self._samples.clear()
        for variance, signal, degrees, targets in state["samples"]:
            self._samples.append(NoiseSample(variance, signal, int(degrees), targets))


def scale_of(samples: Iterable[NoiseSample]) -> float | None:
    """Return the noise scale that several windows say together; None where noise drowns the gradient.

    Args:
        samples: What each of them says.
    """
    samples = list(samples)
    variance = weighed_mean([(each.variance, each.degrees) for each in samples])
    signal = weighed_mean([(each.signal, each.targets) for each in samples])
    return variance / signal if variance is not None and signal is not None and signal > 0 else None


def weighed_mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the mean of values with weights; None of none."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def wasted_share(targets: float, noise_scale: float) -> float:
    """Return the share of a logical batch's targets that bring no progress.

    To reach the same loss, a batch of B targets takes ``1 + noise scale / B`` updates for each that an endless batch
    would take, and ``1 + B / noise scale`` targets for each that the smallest would take. So of all its targets
    ``1 / (1 + noise scale / B)`` are spent on the difference.

    Args:
        targets: B. Unit: targets.
        noise_scale: Unit: targets.

    Example:
        >>> wasted_share(100, 300), wasted_share(900, 300)
        (0.25, 0.75)
    """
    return targets / (targets + noise_scale)
