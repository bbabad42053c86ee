"""A run from its configuration to its report, whichever way it ends."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROWS, Tiny, without

from wholebatch.core.errors import ConfigError, MissingExtraError, WindowError
from wholebatch.evidence.comparison import Comparison
from wholebatch.evidence.sinks import SinkError
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.job import train
from wholebatch.recipes.protocol import Recipe


@pytest.fixture
def with_report():
    """Asked for by the tests that look at the report."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    if "with_report" not in request.fixturenames:  # drawing its plots takes most of the time of a small run
        monkeypatch.setattr("wholebatch.recipes.job.write_report", lambda folder: folder / "report.html")


def run(thing=None, sinks=(), **stated):
    options = {"recipe": "tiny", "logical_batch": "16 rows", "micro_batch": "4 rows", "compare": False, "out": "run"}
    config = TrainConfig(**options | stated)
    return train(config, sinks, recipe=Recipe.of(thing or Tiny(), "tiny"))


def events(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def of_kind(kind, folder="run"):
    return [event for event in events(folder) if event["event"] == kind]


def losses(**stated):
    run(**stated)
    return [event["loss"] for event in of_kind("update")]


def test_a_run_tells_its_story_in_order():
    summary = run(epochs=2, compare=True)
    windows = ["update"] * 3 + ["validation"]
    assert [event["event"] for event in events()] == ["start", *windows, *windows, "evidence", "finish"]
    start, finish = events()[0], events()[-1]
    assert start["rows"] == ROWS
    assert start["updates_planned"] == 6
    assert start["parameters"] == 13
    assert (start["recipe"], start["logical_batch"], start["micro_batch"]) == ("tiny", "16 rows", "4 rows")
    assert (start["precision"], start["seed"], start["device"], start["budget_bytes"]) == ("fp32", 0, "cpu", None)
    assert set(start["versions"]) == {"wholebatch", "torch", "python"}
    assert [event["epoch"] for event in of_kind("update")] == [1, 1, 1, 2, 2, 2]
    assert [event["number"] for event in of_kind("update")] == [1, 2, 3, 4, 5, 6]
    assert [event["rows"] for event in of_kind("update")] == [16, 16, 8] * 2
    assert [(event["epoch"], event["update"]) for event in of_kind("validation")] == [(1, 3), (2, 6)]
    assert list(of_kind("validation")[0]["measures"]) == ["loss", "rows_seen", "training"]
    assert (finish["status"], finish["updates"], finish["skipped"]) == ("done", 6, 0)
    assert finish["summary"] == summary.line
    assert any("compared cut and uncut" in reason for reason in finish["reasons"])


def test_the_outcome_is_what_happened(with_report):
    summary = run(epochs=2, compare=True)
    assert (summary.status, summary.updates, summary.skipped, summary.cut) == ("done", 6, 0, True)
    assert summary.rows_at_once == 4
    assert summary.tokens_at_once is not None
    assert summary.tokens_at_once <= 4 * 12
    assert summary.measures == of_kind("validation")[-1]["measures"]
    assert summary.evidence["gradient_error"] <= 1e-12
    assert summary.evidence["gradient_ok"] is True
    assert summary.report == Path("run/report.html")
    assert summary.line in summary.report.read_text().replace("&#x27;", "'").replace("&nbsp;", " ")


def test_rows_that_a_plan_looks_at_are_in_no_micro_batch():
    assert run(micro_batch="2 rows", memory=100_000).rows_at_once == 2


@pytest.mark.parametrize(
    "micro_batch", ["1 row", "5 rows", "16 rows", "1 token", "30 tokens", "auto"], ids=lambda said: said
)
def test_training_is_the_same_however_it_is_cut(micro_batch):
    """In float64 the losses of all updates agree to rounding, which six updates let grow a little."""
    assert losses(micro_batch=micro_batch, epochs=2) == pytest.approx(losses(micro_batch="4 rows", epochs=2), rel=1e-12)


def test_the_bound_sees_another_logical_batch():
    assert losses(logical_batch="15 rows", updates=6) != pytest.approx(losses(updates=6), rel=1e-3)


def test_one_seed_is_one_run_and_another_is_another():
    assert losses(seed=1) == losses(seed=1) != losses(seed=2)


def test_the_order_of_rows_does_not_depend_on_the_model():
    class Greedy(Tiny):
        def model(self):
            torch.rand(100)
            return super().model()

    def order(thing):
        seen = []
        collate = thing.collate
        thing.collate = lambda rows: seen.append([tuple(row.tolist()) for row in rows]) or collate(rows)
        run(thing, updates=4)
        return seen

    assert order(Greedy()) == order(Tiny())


def test_the_last_epoch_may_be_broken_off_and_is_validated():
    run(updates=4)
    assert len(of_kind("update")) == of_kind("start")[0]["updates_planned"] == 4
    assert [(event["epoch"], event["update"]) for event in of_kind("validation")] == [(1, 3), (2, 4)]


def test_a_logical_batch_may_be_stated_in_tokens():
    run(logical_batch="60 tokens", micro_batch="20 tokens")
    targets = [event["targets"] for event in of_kind("update")]
    assert max(targets) <= 60
    assert sum(targets) == sum(map(len, Tiny().data("train")))
    assert of_kind("start")[0]["updates_planned"] == len(targets) > 1


@pytest.mark.parametrize("key", ["logical_batch", "micro_batch"])
def test_tokens_without_a_length_are_refused_before_anything_is_written(key):
    with pytest.raises(ConfigError, match="8 tokens"):
        run(without(Tiny(), "length"), **{key: "8 tokens"})
    assert not Path("run").exists()


def test_the_model_trains_in_training_mode_and_is_validated_in_the_other():
    class StartsInEvaluation(Tiny):
        def model(self):
            return super().model().eval()

    tiny = StartsInEvaluation()
    run(tiny, updates=3)
    assert tiny.modes.count((False, False)) == 3  # ten rows, four at a time
    assert set(tiny.modes) == {(True, True), (False, False)}


def test_without_rows_to_validate_nothing_is_validated():
    class NothingHeldOut(Tiny):
        def data(self, split):
            return super().data(split) if split == "train" else []

    assert run(NothingHeldOut(), updates=2).measures == {}
    assert of_kind("validation") == []


def test_every_sink_gets_every_event_and_is_closed():
    class Keep:
        def __init__(self):
            self.seen, self.closed = [], 0

        def write(self, event):
            assert not self.closed
            self.seen.append(event["event"])

        def close(self):
            self.closed += 1

    sinks = [Keep(), Keep()]
    run(sinks=sinks, updates=2)
    for sink in sinks:
        assert sink.seen == [event["event"] for event in events()]
        assert sink.closed


def test_a_sink_that_is_named_writes_in_the_run_folder():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(sink=("tensorboard",), updates=2)
    board = EventAccumulator("run/tensorboard")
    board.Reload()
    assert [each.step for each in board.Scalars("loss")] == [1, 2]
    assert [each.value for each in board.Scalars("loss")] == pytest.approx(
        [event["loss"] for event in of_kind("update")], rel=1e-6
    )
    assert of_kind("start")[0]["config"]["logical_batch"] == "16 rows"


def test_a_sink_that_is_not_installed_is_refused_before_an_earlier_run_is_replaced(monkeypatch):
    monkeypatch.setattr("wholebatch.recipes.outlets.find_spec", {}.get)
    with pytest.raises(MissingExtraError, match=r"pip install 'wholebatch\[wandb\]'"):
        run(sink=("wandb",))
    assert not Path("run").exists()


def test_a_stated_rate_is_trained_with():
    run(updates=1, lr=0.03)
    assert of_kind("update")[0]["lr"] == 0.03


def test_a_skipped_window_is_counted_apart():
    class OnceInfinite(Tiny):
        def loss(self, model, micro_batch):
            loss_sum, targets = super().loss(model, micro_batch)
            return (loss_sum * (torch.inf if model.training and self.losses == 12 else 1)), targets

    summary = run(OnceInfinite(), epochs=2)
    assert (summary.updates, summary.skipped) == (5, 1)
    assert "5 updates of 16 rows (1 skipped)" in summary.line
    assert of_kind("finish")[0]["skipped"] == 1


@pytest.mark.parametrize(
    ("stated", "held"), [({"logical_batch": "512 rows"}, "40 rows"), ({"logical_batch": "999 tokens"}, "256 tokens")]
)
def test_a_logical_batch_that_the_data_do_not_fill_is_not_claimed(stated, held):
    summary = run(updates=2, **stated)
    assert f"2 updates of {held}" in summary.line
    assert of_kind("start")[0]["logical_batch"] == held
    assert any(
        f"The data hold {held}, so that no logical batch has" in said for said in of_kind("finish")[0]["reasons"]
    )
    assert {event["rows"] for event in of_kind("update")} == {40}


def test_a_run_without_an_update_has_failed():
    class Undefined(Tiny):
        def loss(self, model, micro_batch):
            loss_sum, targets = super().loss(model, micro_batch)
            return loss_sum * torch.nan, targets

    with pytest.raises(WindowError, match="None of 2 windows became an update: the loss is nan"):
        run(Undefined(), updates=2)
    assert of_kind("finish")[0]["status"] == "failed"


def stop_at(number, error):
    def stop(loss):
        if loss == number:
            raise error

    return stop


def test_ctrl_c_is_an_outcome(with_report):
    summary = run(Tiny(on_loss=stop_at(24, KeyboardInterrupt())), epochs=50)
    (finish,) = of_kind("finish")
    assert (summary.status, finish["status"]) == ("interrupted", "interrupted")
    assert 0 < summary.updates == len(of_kind("update")) == finish["updates"] < 150
    assert summary.line.startswith("Interrupted after ")
    assert summary.report is not None
    assert "interrupted" in summary.report.read_text()


def test_a_failure_is_told_in_the_log_the_report_and_the_exception(with_report):
    with pytest.raises(ZeroDivisionError) as caught:
        run(Tiny(on_loss=stop_at(24, ZeroDivisionError("nothing to divide by"))), epochs=50)
    assert caught.value.__notes__ == ["What the run did until then is in run."]
    (finish,) = of_kind("finish")
    assert (finish["status"], finish["updates"]) == ("failed", len(of_kind("update")))
    assert finish["summary"] == "Failed: ZeroDivisionError: nothing to divide by"
    assert "nothing to divide by" in Path("run/report.html").read_text()


def test_a_mistake_in_the_recipe_is_told_in_the_log_too():
    class NoModel(Tiny):
        def model(self):
            return "a model"

    with pytest.raises(ConfigError, match="returned a str"):
        run(NoModel())
    assert [event["event"] for event in events()] == ["finish"]
    assert "returned a str" in of_kind("finish")[0]["summary"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_ends_the_run_with_a_sentence(with_report):
    Path("run").mkdir()
    Path("run/log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SinkError, match="No space left on device"):
        run()


def test_an_unwritable_place_is_refused_before_the_data_is_loaded():
    class Untouched(Tiny):
        def data(self, split):
            raise AssertionError

    Path("run").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"run/log\.jsonl cannot be opened"):
        run(Untouched())


def test_new_runs_get_new_folders():
    folders = [run(out=None, updates=1).folder for _ in range(3)]
    assert folders == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]


@pytest.mark.parametrize(
    ("recipe", "folder"), [("jobs/mine.py:recipe", "runs/mine"), ("package.mine:recipe", "runs/package.mine")]
)
def test_a_folder_is_named_after_its_recipe(recipe, folder):
    assert run(recipe=recipe, out=None, updates=1).folder == Path(folder)


def test_a_stated_folder_holds_the_last_run_only(with_report):
    run(epochs=2)
    Path("run/report.html").write_text("of an earlier run")
    with pytest.raises(ZeroDivisionError):
        run(Tiny(on_loss=lambda _: 1 / 0))
    assert len(of_kind("start")) == 1
    assert of_kind("update") == []
    assert "of an earlier run" not in Path("run/report.html").read_text()


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ({"micro_batch": "auto"}, "the logical batch was not cut"),
        ({"micro_batch": "16 rows"}, "the logical batch was not cut"),
    ],
)
def test_a_batch_that_was_not_cut_is_not_compared(stated, why):
    summary = run(compare=True, updates=1, **stated)
    (evidence,) = of_kind("evidence")
    measured = Comparison.__dataclass_fields__
    assert evidence == {"event": "evidence", **dict.fromkeys(measured), "why": why}
    assert "each in memory as a whole" in summary.line
    assert "equal" not in summary.line


def test_a_comparison_that_fails_does_not_fail_the_run():
    class NoRoom(Tiny):
        def loss(self, model, micro_batch):
            if len(micro_batch) > 8:
                raise RuntimeError("not enough memory: you tried to allocate 7 bytes")
            return super().loss(model, micro_batch)

    summary = run(NoRoom(), compare=True, updates=1)
    assert summary.status == "done"
    assert "not enough memory" in of_kind("evidence")[0]["why"]
    assert "equal" not in summary.line


def test_without_plots_the_run_is_done_and_says_why_there_is_no_report(with_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    summary = run(updates=1)
    assert (summary.status, summary.report) == ("done", None)
    assert summary.why_no_report is not None
    assert "pip install" in summary.why_no_report
