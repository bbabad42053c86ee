"""Amounts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wholebatch.recipes.amount import Amount


@given(count=st.integers(1, 10**9), unit=st.sampled_from(["rows", "tokens"]))
def test_an_amount_is_read_back_as_it_is_said(count, unit):
    assert Amount.parse(str(Amount(count, unit))) == Amount(count, unit)


@pytest.mark.parametrize(
    ("said", "count", "unit"),
    [
        ("512 rows", 512, "rows"),
        ("1 row", 1, "rows"),
        ("65536tokens", 65536, "tokens"),
        (" 65,536 tokens ", 65536, "tokens"),
        ("65_536 token", 65536, "tokens"),
        (Amount(3, "rows"), 3, "rows"),
    ],
)
def test_what_is_read(said, count, unit):
    assert Amount.parse(said) == Amount(count, unit)


@pytest.mark.parametrize(
    "said",
    [
        "512",
        512,
        "rows",
        "0 rows",
        "-3 rows",
        "1.5 rows",
        "512 samples",
        "3 rows, 5 tokens",
        "1,5 rows",
        "",
        None,
        True,
    ],
)
def test_what_is_no_amount(said):
    with pytest.raises(ValueError, match=r"rows or tokens|at least 1"):
        Amount.parse(said)
