"""The line that says what was achieved: nothing that was not measured, and nothing hidden."""

import math

import pytest

from wholebatch.recipes.summary import Summary


def line(**known):
    return Summary(
        **{"logical_batch": "512 rows", "status": "done", "updates": 43, "cut": True, "rows_at_once": 41} | known
    ).line


def test_all_that_was_measured_is_said():
    said = line(
        measures={"loss": 1.6, "bits_per_byte": 2.3149},
        evidence={
            "gradient_error": 1.13e-7,
            "gradient_ok": True,
            "cut_peak_bytes": 412 * 2**20,
            "undivided_peak_bytes": 3.1 * 2**30,
            "speedup": 2.31,
        },
    )
    assert said == (
        "43 updates of 512 rows, never more than 41 rows in memory at once; validation bits per byte 2.31; "
        "gradient equal to the undivided batch's to 1.1e-07; peak memory 412 MiB instead of 3.1 GiB; "
        "2.3 times as fast as the plain loop."
    )


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "43 updates of 512 rows, never more than 41 rows in memory at once."),
        ({"tokens_at_once": 2048}, "never more than 2,048 tokens (41 rows) in memory at once."),
        ({"joined": True}, "never more than 41 rows run at once, with the activations of all held."),
        ({"cut": False}, "43 updates of 512 rows, each in memory as a whole."),
        ({"updates": 1, "skipped": 2}, "1 update of 512 rows (2 skipped), never"),
        ({"updates": 0}, "0 updates of 512 rows."),
        ({"status": "interrupted"}, "Interrupted after 43 updates of 512 rows"),
        ({"measures": {"loss": 1.25}}, "; validation loss 1.25."),
        ({"evidence": {"speedup": 1.02}}, "; as fast as the plain loop."),
        ({"evidence": {"speedup": 0.81}}, "; 0.81 times as fast as the plain loop."),
        (
            {"evidence": {"gradient_error": 0.5, "gradient_ok": False}},
            "; gradient NOT that of the undivided batch: it is 0.5 away.",
        ),
    ],
)
def test_the_words_fit_what_happened(known, said):
    assert said in line(**known)


@pytest.mark.parametrize(
    "known",
    [
        {"measures": {"loss": math.nan}},
        {"evidence": {"gradient_error": None, "speedup": None, "cut_peak_bytes": None, "undivided_peak_bytes": None}},
        {"evidence": {"cut_peak_bytes": 5}},
    ],
)
def test_what_was_not_measured_is_left_out(known):
    assert line(**known) == line()
