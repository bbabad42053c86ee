"""How noisy is the gradient? From norms to a noise scale, unbiased for equal and unequal micro-batches."""

import math
import random

import pytest

import wholebatch as wb
from wholebatch.core.noise import NoiseSample, NoiseScale, wasted_share

SIGNAL, VARIANCE = 0.25, 8.0
NUMBERS = 20  # of a gradient


def window(draw, counts):
    """Norms of a window whose per-target gradients are normal around a known mean, with a known variance."""
    mean, spread = math.sqrt(SIGNAL / NUMBERS), math.sqrt(VARIANCE / NUMBERS)
    sums = [[n * mean + math.sqrt(n) * spread * draw.gauss(0, 1) for _ in range(NUMBERS)] for n in counts]
    whole = [sum(column) for column in zip(*sums, strict=True)]
    squares = [sum(x * x for x in each) for each in sums]
    norm = math.sqrt(sum(x * x for x in whole)) / sum(counts)
    return squares, norm


def sample(squares, norm, counts):
    spread = sum(square / n for square, n in zip(squares, counts, strict=True))
    return NoiseSample.of(spread=spread, norm=norm, targets=sum(counts), parts=len(counts))


@pytest.mark.parametrize("counts", [(4,) * 8, (1, 1, 2, 28), (5, 3), (16, 1)], ids=str)
def test_numerator_and_denominator_are_right_on_average(counts):
    """Of 1,000 windows; five standard errors, which are measured along."""
    draw = random.Random(0)
    samples = [sample(*window(draw, counts), counts) for _ in range(1000)]
    for found, right in (([s.variance for s in samples], VARIANCE), ([s.signal for s in samples], SIGNAL)):
        mean = sum(found) / len(found)
        error = math.sqrt(sum((x - mean) ** 2 for x in found) / len(found) / (len(found) - 1))
        assert abs(mean - right) < 5 * error
        assert error < 0.2 * right


def test_the_bound_sees_micro_batches_that_are_taken_for_equal():
    draw, counts = random.Random(0), (1, 1, 2, 28)
    samples = [sample(*window(draw, counts), (8,) * 4) for _ in range(1000)]
    assert sum(s.variance for s in samples) / len(samples) > 1.5 * VARIANCE


def test_for_equal_micro_batches_it_is_what_the_paper_says():
    """|G|^2 = (B c - b a) / (B - b) and tr S = (a - c) / (1 / b - 1 / B), arXiv 1812.06162, appendix A.1."""
    squares, norm = window(random.Random(1), (4,) * 8)
    a, c, b, big = sum(squares) / 8 / 4**2, norm**2, 4, 32
    found = sample(squares, norm, (4,) * 8)
    assert found.signal == pytest.approx((big * c - b * a) / (big - b), rel=1e-12)
    assert found.variance == pytest.approx((a - c) / (1 / b - 1 / big), rel=1e-12)


def test_for_unequal_ones_it_is_a_line_through_the_window_by_least_squares():
    """Weighed by n / (1/n - 1/N), solved here by hand: the slope that makes the weighted residuals smallest."""
    counts = (1, 3, 9, 20)
    squares, norm = window(random.Random(2), counts)
    total = sum(counts)
    found = sample(squares, norm, counts)
    x = [1 / n - 1 / total for n in counts]
    y = [square / n**2 - norm**2 for square, n in zip(squares, counts, strict=True)]

    def residual(slope):
        return sum(n / xi * (yi - slope * xi) ** 2 for n, xi, yi in zip(counts, x, y, strict=True))

    best = residual(found.variance)
    assert best < min(residual(found.variance * 1.001), residual(found.variance * 0.999))
    assert found.signal == pytest.approx(norm**2 - found.variance / total, rel=1e-12)


def test_ratios_are_not_averaged():
    """Where noise is strong a mean of ratios is far off; the averages are divided at the end."""
    draw, counts = random.Random(3), (4,) * 8
    noise, ratios = NoiseScale(10_000), []
    for _ in range(1000):
        each = sample(*window(draw, counts), counts)
        noise.add(each)
        ratios.append(each.variance / each.signal)
    right = VARIANCE / SIGNAL
    assert noise.scale == pytest.approx(right, rel=0.15)
    assert abs(sum(ratios) / len(ratios) / right - 1) > 0.2


def test_windows_weigh_what_they_say():
    noise = NoiseScale(10)
    noise.add(NoiseSample(variance=10.0, signal=1.0, degrees=1, targets=10))
    noise.add(NoiseSample(variance=20.0, signal=2.0, degrees=3, targets=40))
    assert noise.variance == pytest.approx(70 / 4)
    assert noise.signal == pytest.approx(90 / 50)


def test_windows_that_are_too_old_do_not_count():
    """At the beginning gradients are larger by far, and would rule any average that forgets little by little."""
    noise = NoiseScale(windows=20)
    for window in range(200):
        signal = 1000.0 if window < 180 else 1.0
        noise.add(NoiseSample(variance=100.0, signal=signal, degrees=1, targets=1))
    assert noise.scale == pytest.approx(100)


@pytest.mark.parametrize(
    "norms",
    [
        {"spread": 1.0, "norm": 1.0, "targets": 4, "parts": 1},
        {"spread": math.inf, "norm": 1.0, "targets": 4, "parts": 2},
        {"spread": math.nan, "norm": 1.0, "targets": 4, "parts": 2},
        {"spread": 1.0, "norm": math.nan, "targets": 4, "parts": 2},
        {"spread": 1.0, "norm": 1.0, "targets": 0, "parts": 2},
    ],
)
def test_a_window_that_says_nothing_is_left_out(norms):
    noise = NoiseScale()
    noise.add(NoiseSample.of(**norms))
    assert (noise.last, noise.scale, noise.variance, noise.signal, noise.wasted(10)) == (None,) * 5


def test_no_number_is_given_while_noise_drowns_the_gradient():
    noise = NoiseScale()
    noise.add(NoiseSample(variance=5.0, signal=-0.1, degrees=7, targets=64))
    assert noise.scale is None
    assert noise.wasted(64) is None


def test_the_variance_of_equal_gradients_is_not_below_zero():
    assert NoiseSample.of(spread=3 * (1 - 1e-15), norm=math.sqrt(3 / 4), targets=4, parts=2).variance == 0.0


def test_averages_go_on_in_another_process():
    one, other = NoiseScale(50), NoiseScale(50)
    one.add(NoiseSample(variance=5.0, signal=0.1, degrees=7, targets=64))
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.add(NoiseSample(variance=6.0, signal=0.2, degrees=7, targets=64))
    assert one.scale == other.scale


@pytest.mark.parametrize("windows", [0, -1, 2.5, "ten", True])
def test_a_number_of_windows_is_a_whole_number(windows):
    with pytest.raises(wb.ConfigError, match="no number of windows"):
        NoiseScale(windows)


def test_half_of_a_batch_of_the_noise_scale_is_wasted():
    assert wasted_share(300, 300) == 0.5
    noise = NoiseScale()
    noise.add(NoiseSample(variance=300.0, signal=1.0, degrees=1, targets=64))
    assert noise.wasted(900) == pytest.approx(0.75)
