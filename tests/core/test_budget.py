"""Sizes as people write them."""

import numpy as np
import pytest

import wholebatch as wb
from wholebatch.core.budget import parse_bytes, say_bytes


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("0.5 GiB", 1 << 29),
        (" 1,024 kib ", 1 << 20),
        ("1,000,000.5 kB", 1_000_000_500),
        ("1_000 bytes", 1000),
        ("12b", 12),
        (".5 TB", 500_000_000_000),
        (4096, 4096),
        (np.int64(4096), 4096),
    ],
)
def test_a_size_is_what_it_says(said, size):
    assert parse_bytes(said) == size


@pytest.mark.parametrize(
    "said",
    ["8", "8 Gi", "eight", "8GiBs", "", "-1GiB", "1.5.2MB", "1,5GiB", "1,50GiB", "1,0000B", None, 1.5, True, [8]],
)
def test_what_is_no_size_is_refused_with_a_hint(said):
    with pytest.raises(wb.ConfigError, match="memory=") as error:
        parse_bytes(said)
    assert "8GiB" in error.value.hint


def test_a_number_without_a_unit_says_so():
    with pytest.raises(wb.ConfigError, match="has no unit"):
        parse_bytes("512")


@pytest.mark.parametrize("said", [0, -5, "0GiB", "0.1 B"])
def test_nothing_is_no_budget(said):
    with pytest.raises(wb.ConfigError, match="holds nothing"):
        parse_bytes(said)


def test_what_is_said_can_be_read_back():
    for size in (12, 4096, 1 << 22, 3 << 30):
        assert parse_bytes(say_bytes(size)) == size
    assert say_bytes(1 << 55).endswith("TiB")
