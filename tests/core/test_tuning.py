"""Which logical batch is worth it? The one that makes the most progress, and how sure that is."""

import json
import random

import pytest

from wholebatch.core.noise import NoiseSample
from wholebatch.core.schedules import Change
from wholebatch.core.tuning import Measured, Timed, Tuning, worth_it


class Optimizer:
    param_groups = ({"lr": 0.1},)


def samples(windows, spread=0.0, signal=1.0):
    draw = random.Random(0)
    return [NoiseSample(300.0, signal + spread * draw.gauss(0, 1), 7, 64) for _ in range(windows)]


def test_more_windows_make_it_surer():
    few, many = Measured.of(samples(10, 0.5)), Measured.of(samples(1000, 0.5))
    assert few.low < 300 < few.high
    assert many.low < 300 < many.high
    assert many.high - many.low < 0.2 * (few.high - few.low)


def test_where_noise_drowns_the_gradient_there_is_no_number():
    assert Measured.of(samples(10, signal=-0.1)).scale is None
    unsure = Measured.of(samples(10, 3.0, 0.9))
    assert unsure.high is None
    assert Measured.of([]) == Measured(None, None, None, 0)


def test_of_a_young_model_the_latest_counts():
    young = [NoiseSample(300.0, 10.0 / window, 7, 64) for window in range(1, 21)]
    found = Measured.latest(young)
    assert found.windows == 10
    assert found.scale == found.after > 3 * found.before
    assert Measured.latest(samples(20)) == Measured.of(samples(20))
    assert Measured.latest([]) == Measured.of([])


def test_at_equal_speed_the_small_ones_are_worth_it():
    sizes = [Timed(rows, 10.0 * rows, 1, 0.01 * rows) for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert worth_it(sizes, 800.0).rows == 4  # of 80 rows' worth: 5 % are wasted
    assert worth_it(sizes, 80_000.0).rows == 64


def test_at_equal_time_the_large_ones_are():
    """As many devices as rows: an update takes as long, whatever its size."""
    sizes = [Timed(rows, 10.0 * rows, 1, 1.0) for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert worth_it(sizes, 80.0).rows == 64


def tuning(**changed):
    sizes = (Timed(8, 80.0, 2, 0.1), Timed(32, 320.0, 8, 0.2))
    known = {
        "present": 32,
        "noise": Measured(320.0, 300.0, None, 20),
        "timed": sizes,
        "chosen": sizes[0],
        "micro_batch": "4 rows",
        "peak_bytes": 2**20,
        "changes": (Change.of(Optimizer(), 0.25, "sqrt"),),
        "reasons": ("Because.",),
    }
    return Tuning(**known | changed)


def test_it_is_printed_as_a_table_with_its_reasons():
    assert str(tuning()).splitlines() == [
        "logical batch  targets  micro-batches  targets/s  wasted  progress/s",
        "       8 rows       80              2        800     20%         640  worth it",
        "      32 rows      320              8      1,600     50%         800  present",
        "",
        "logical batch x 0.25, rule sqrt",
        "  lr     0.1  -> 0.05",
        "",
        "- Because.",
    ]


def test_what_is_not_known_is_not_made_up():
    unknown = tuning(noise=Measured(None, None, None, 20), chosen=None, changes=())
    assert str(unknown).splitlines()[1] == "       8 rows       80              2        800       ?           ?"
    assert unknown.to_dict()["chosen_rows"] is None
    assert unknown.to_dict()["sizes"][0]["wasted"] is None


def test_it_is_plain_values_too():
    plain = tuning().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["sizes"][1]["wasted"] == pytest.approx(0.5)
    assert plain["rules"] == {"sqrt": [{"before": {"lr": 0.1}, "after": {"lr": 0.05}}]}
