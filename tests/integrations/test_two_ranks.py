"""Lightning and Accelerate over two real processes."""

import pytest

import ranks

pytest.importorskip("lightning")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.launch("integrations.lightning_scenes", 2, tmp_path_factory.mktemp("two"), seconds=480)


def test_every_scene_over_ranks_passes(found):
    for verdicts in ranks.result(found, "conformance", 2):
        meet = {"lightning-wholebatch T8x2-in-batch-negatives", "lightning-wholebatch T8x2-standardised"}
        wrong = {name: why for name, (outcome, why) in verdicts.items() if outcome != "pass"}
        assert wrong.keys() == meet, wrong  # batches that come one by one cannot meet: its adapter says so
        assert len(verdicts) > 20


def test_rows_that_a_sampler_gives_twice_count_once(found):
    by_rank = ranks.result(found, "rows that the trainer's sampler gives twice", 2)
    for each in by_rank:
        assert max(each[name] for name in ("streamed 7", "streamed 5", "cut 7", "cut 5")) <= 1e-12, each
        assert each["Lightning alone"] > 1e-3
    assert [len(each["streamed 7 said"]) for each in by_rank] == [0, 1]


def test_ranks_that_would_wait_for_each_other_are_refused(found):
    for each in ranks.result(found, "ranks with unequally many batches", 2):
        assert each["said"].startswith("The ranks have 4, 5 batches")


def test_each_optimizer_of_manual_optimization_has_windows_over_all_ranks(found):
    for each in ranks.result(found, "manual optimization", 2):
        assert each["off"] <= 1e-14
        assert each["same"]
        assert each["targets"] == [2, 2, 10, 6]  # one rank's first batch is None; the last window of both


def test_each_row_of_a_prepared_loader_comes_once(found):
    for each in ranks.result(found, "each row once", 2):
        assert len(each) == 4
        for name, (wrong, alone) in each.items():
            assert wrong == [], name
            assert alone > 0, name  # the loader alone does give rows twice


def test_an_update_of_accelerate_is_that_of_all_rows_and_its_schedule_counts_it_once(found):
    for each in ranks.result(found, "accelerate", 2):
        assert each["ours"] <= 1e-12
        assert each["ours, rows"] == [7]
        assert each["ours, rate"] == 0.5 * 0.5
        assert each["Accelerate's"] > 1e-3
        assert each["Accelerate's, rate"] == 0.5 * 0.5**2
        assert each["ours, rows twice, rows"] == [8]
        assert each["ours, rows twice, said"] != []


def test_a_second_way_to_accumulate_is_told_on_all_ranks_and_nobody_waits(found):
    for each in ranks.result(found, "accumulate beside", 2):
        assert each["said"].startswith("accelerator.accumulate() is used")
        assert each["off"] <= 1e-12


def test_weights_that_accelerate_shards_make_the_update_of_all_rows(found):
    for each in ranks.result(found, "sharded by FSDP2", 2):
        assert each["off"] <= 1e-12
        assert each["rows"] == [7]


def test_a_checkpoint_inside_a_window_holds_the_gradient_of_each_rank(found):
    for each in ranks.result(found, "a checkpoint inside a window", 2):
        assert each["open"] == [True, True]
        assert each["same"]
        assert each["off"] <= 1e-12
