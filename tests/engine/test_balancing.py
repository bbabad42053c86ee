"""Rows move between real processes, so that all have equally much to do; the update stays that of the same rows."""

import pytest
import torch

import ranks
import wholebatch as wb

EXACT = 1e-12


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.launch("engine.balancing_scenes", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return ranks.launch("engine.balancing_scenes", 3, tmp_path_factory.mktemp("three"))


def busiest(by_rank, what, number):
    """What the rank with most has to do, against the mean."""
    work = [found[what][number] for found in by_rank]
    return max(work) * len(work) / sum(work)


@pytest.mark.parametrize(
    ("num_ranks", "name"),
    [
        *((2, f"moved [{wrap}]") for wrap in ("bare", "ddp", "fsdp", "each")),
        (2, "by what rows hold"),
        (3, "moved [bare]"),
        (3, "moved [each]"),
    ],
)
def test_ranks_finish_together_and_make_the_same_update(request, num_ranks, name):
    by_rank = ranks.result(request.getfixturevalue({2: "two", 3: "three"}[num_ranks]), name, num_ranks)
    for found in by_rank:
        assert found["off"] <= EXACT
        assert any("rows move between ranks" in reason for reason in found["reasons"])
    if "each" not in name:  # passes of weight zero run rows as well
        for number in range(3):
            assert busiest(by_rank, "had", number) > 1.5
            assert busiest(by_rank, "tokens", number) < 1.02


def test_without_it_each_rank_trains_on_what_it_is_handed(two):
    by_rank = ranks.result(two, "left where they are", 2)
    for found in by_rank:
        assert found["off"] <= EXACT
        assert found["tokens"] == found["had"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_that_cannot_read_its_rows_keeps_nobody_waiting(request, num_ranks):
    by_rank = ranks.result(
        request.getfixturevalue({2: "two", 3: "three"}[num_ranks]), "a rank that cannot read its rows", num_ranks
    )
    for rank, found in enumerate(by_rank):
        assert found["said"][0] == ("LookupError" if rank == 1 else "RankError")
        assert "no length for this row" in found["said"][1]
        assert found["standing"]
        assert found["off"] <= EXACT


def test_rows_are_sent_to_whom_they_go_and_to_nobody_else(three):
    """Of 40 kB each; all that every rank hears are costs and sizes."""
    by_rank = ranks.result(three, "what is sent", 3)
    assert [found["had"] for found in by_rank] == [30, 3, 3]
    assert sum(found["has"] for found in by_rank) == 36
    for found in by_rank:
        assert found["gathered"] < 1_000
        moved = found["has"] - found["had"]
        assert (moved < 0) == (found is by_rank[0])
        assert 40_000 * abs(moved) < found["out" if moved < 0 else "in"] < 40_500 * abs(moved)
        assert found["in" if moved < 0 else "out"] == 0


def test_a_row_that_cannot_be_sent_is_an_error_on_every_rank(two):
    one, other = ranks.result(two, "rows that cannot be sent", 2)
    assert "pickle" in one["said"][1]
    assert other["said"][0] == "RankError"
    assert "rank 0 could not" in other["said"][1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balance": "rows", "collate": torch.stack}, "balance='rows' is no way to share rows out"),
        ({"balance": "tokens"}, "moves rows between ranks, and without `collate`"),
    ],
)
def test_what_rows_cannot_be_shared_out_by_is_refused(options, said):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(wb.ConfigError, match="row") as caught:
        wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), print, **options)
    assert said in caught.value.found


def test_a_process_alone_has_nobody_to_share_with():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = wb.Accumulator(
        model, optimizer, lambda model, x: model(x).square().mean(), collate=torch.stack, balance="tokens"
    )
    assert accumulator.step([torch.ones(1), torch.ones(1)]).rows == 2
