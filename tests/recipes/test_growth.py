"""A short run that says how large the logical batch should be, and a run that lets it grow."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import Tiny, without
from torch import nn

import wholebatch as wb
from wholebatch.cli import main
from wholebatch.core.errors import ConfigError, OutOfMemoryError
from wholebatch.core.schedules import ByNoise, Fixed, Geometric, Linear
from wholebatch.core.tuning import Measured, Timed, Tuning
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.growth import schedule_of
from wholebatch.recipes.job import train
from wholebatch.recipes.loader import LogicalBatches
from wholebatch.recipes.protocol import Recipe
from wholebatch.recipes.settings import check_rule, settings_of
from wholebatch.recipes.tuning import tune_recipe

KNOWN = 240.0
"""The noise scale of `Known`, in rows."""


class Known:
    """The gradient of a row is G + sigma z, whatever the weights: the noise scale is sigma^2 d / |G|^2."""

    width = 30

    def data(self, split):
        rows = 4000 if split == "train" else 0
        noise = torch.randn(rows, self.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        direction = torch.full((self.width,), self.width**-0.5, dtype=torch.float64)
        return list(direction + (KNOWN / self.width) ** 0.5 * noise)

    def model(self):
        return nn.Linear(self.width, 1, bias=False).double()

    def collate(self, rows):
        return torch.stack(rows)

    def loss(self, model, micro_batch):
        return model(micro_batch).mean()

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01)


class Drowned(Known):
    """Its gradient is nothing but noise."""

    def data(self, split):
        rows = super().data(split)[:64]
        return [row - mean for mean in [sum(rows) / 64] for row in rows]


def tuned(thing=None, updates=120, **stated):
    options = {"recipe": "known", "logical_batch": "64 rows", "micro_batch": "16 rows", "memory": "1GiB"}
    config = TrainConfig(**options | stated)
    return tune_recipe(Recipe.of(thing or Known(), "known"), config, updates=updates)


def test_the_noise_scale_of_a_recipe_is_found():
    tuning = tuned()
    assert tuning.noise.low < KNOWN < tuning.noise.high
    assert tuning.noise.scale == pytest.approx(KNOWN, rel=0.35)
    assert tuning.noise.windows == 60
    assert [each.rows for each in tuning.timed][-6:] == [8, 16, 32, 64, 128, 256]
    assert tuning.chosen in tuning.timed
    assert [each.micro_batches for each in tuning.timed if each.rows >= 64] == [4, 8, 16]
    assert tuning.micro_batch == "16 rows"
    reasons = " ".join(tuning.reasons)
    assert "Worth it" in reasons
    assert "2507.07101" in reasons


def test_the_rules_are_those_of_the_move_that_is_advised():
    tuning = tuned()
    if tuning.chosen.rows == tuning.present:
        assert tuning.changes == ()
    else:
        assert {change.factor for change in tuning.changes} == {tuning.chosen.rows / tuning.present}
        assert [change.rule for change in tuning.changes] == ["linear", "sqrt"]
        assert tuning.changes[0].before[0]["lr"] == 0.01


def test_pure_noise_is_told_and_nothing_is_named():
    """The gradient of all rows together is nothing."""
    tuning = tuned(Drowned(), updates=4)
    assert (tuning.noise.scale, tuning.chosen, tuning.changes) == (None, None, ())
    assert "Noise drowns the gradient" in tuning.reasons[0]


def test_tokens_are_counted_in_rows():
    tuning = tuned(Tiny(), 4, logical_batch="104 tokens", micro_batch="24 tokens")
    assert tuning.present == 16  # of 6.4 tokens
    assert "tokens" in tuning.micro_batch
    with pytest.raises(ConfigError, match="tokens"):
        tuned(without(Tiny(), "length"), 4, logical_batch="104 tokens", micro_batch="4 rows")


def test_rows_that_meet_have_no_noise_scale():
    class Meets(Known):
        def loss(self, model, micro_batch):
            found = model(micro_batch)
            return (found - wb.gather(found).mean()).square().mean()

    tuning = tuned(Meets(), 4)
    assert tuning.chosen is None
    assert "micro-batches meet" in tuning.reasons[0]
    assert "to be tried, not computed" in tuning.reasons[-1]
    assert not any("rules, not measurements" in reason for reason in tuning.reasons)


def test_what_does_not_fit_is_not_tuned():
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        tuned(memory="1KiB")


def settings(rule, optimizer=None, **stated):
    sizes = (Timed(8, 8.0, 2, 0.1), Timed(64, 64.0, 8, 0.2))
    from wholebatch.core.schedules import Change

    weights = nn.Linear(2, 2)
    optimizer = optimizer or torch.optim.AdamW(weights.parameters(), lr=0.01)
    tuning = Tuning(
        present=64,
        noise=Measured(40.0, 30.0, None, 20),
        timed=sizes,
        chosen=sizes[0],
        micro_batch="4 rows",
        peak_bytes=1,
        changes=tuple(Change.of(optimizer, 1 / 8, each) for each in ("linear", "sqrt")),
        reasons=(),
    )
    config = TrainConfig(**{"recipe": "tiny", "logical_batch": "64 rows"} | stated)
    return settings_of(Recipe.of(Tiny(), "tiny"), config, tuning, rule)


def test_settings_are_what_train_reads():
    said = tomllib.loads(settings("linear"))
    assert said == {"logical_batch": "8 rows", "micro_batch": "auto", "lr": 0.00125}
    assert tomllib.loads(settings("none", micro_batch="4 rows"))["micro_batch"] == "4 rows"
    assert TrainConfig(recipe="tiny", **tomllib.loads(settings("none", memory="2MiB"))).memory == 2**21
    TrainConfig(recipe="tiny", **said)
    assert "lr" not in tomllib.loads(settings("none"))
    assert tomllib.loads(settings("none", logical_batch="416 tokens"))["logical_batch"] == "51 tokens"  # of 6.4 a row


def test_several_learning_rates_are_not_made_one():
    weights = nn.Linear(2, 2)
    groups = [{"params": [weights.weight], "lr": 0.1}, {"params": [weights.bias], "lr": 0.2}]
    text = settings("sqrt", torch.optim.SGD(groups))
    assert "lr" not in tomllib.loads(text)
    assert "#   lr     0.1  -> 0.0353553" in text


def test_a_rule_is_one_of_three():
    assert check_rule("sqrt") == "sqrt"
    with pytest.raises(ConfigError, match="--lr-rule"):
        check_rule("cube")


@pytest.mark.parametrize(
    ("stated", "kind"),
    [
        ({}, Fixed),
        ({"grow_to": "64 rows", "updates": 10}, Geometric),
        ({"grow_to": "64 rows", "epochs": 3, "grow": "linear"}, Linear),
        ({"grow_to": "64 rows", "grow": "noise"}, ByNoise),
    ],
)
def test_growth_is_a_schedule(stated, kind):
    schedule = schedule_of(TrainConfig(recipe="tiny", logical_batch="16 rows", **stated))
    assert isinstance(schedule, kind)
    assert schedule.at(0, 0) == 16
    if kind in (Geometric, Linear):
        assert schedule.at(9, 2) == 64


@pytest.mark.parametrize(
    "stated",
    [
        {"grow_to": "64 tokens", "updates": 10},
        {"grow_to": "8 rows", "updates": 10},
        {"grow_to": "64 rows"},
        {"lr_rule": "sqrt"},
    ],
    ids=str,
)
def test_growth_that_cannot_be_gets_a_hint(stated):
    with pytest.raises(ConfigError, match="hint: "):
        schedule_of(TrainConfig(recipe="tiny", logical_batch="16 rows", **stated))


def grown(monkeypatch, tmp_path, **stated):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wholebatch.recipes.job.write_report", lambda folder: folder / "report.html")
    options = {"recipe": "tiny", "logical_batch": "4 rows", "micro_batch": "2 rows", "compare": False, "out": "run"}
    summary = train(TrainConfig(**options | stated), recipe=Recipe.of(Tiny(), "tiny"))
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    return summary, [line for line in lines if line["event"] == "update"]


def test_a_run_grows_and_its_learning_rate_follows(monkeypatch, tmp_path):
    summary, updates = grown(monkeypatch, tmp_path, grow_to="16 rows", updates=9, lr_rule="sqrt", noise_scale=True)
    assert [update["rows"] for update in updates] == [4, 4, 5, 6, 8, 9, 4, 13, 16]
    assert [update["lr"] for update in updates] == pytest.approx(
        [0.1 * (rows / 4) ** 0.5 for rows in (4, 4, 5, 6, 8, 9, 11, 13, 16)]
    )
    assert "4 to 16 rows" in summary.line
    assert any(update["noise_scale"] is not None for update in updates)


def test_a_run_grows_by_epoch_and_leaves_the_learning_rate(monkeypatch, tmp_path):
    _, updates = grown(monkeypatch, tmp_path, grow_to="16 rows", epochs=3)
    assert [update["rows"] for update in updates] == [4] * 10 + [8] * 5 + [16, 16, 8]
    assert {update["lr"] for update in updates} == {0.1}
    assert {update["noise_scale"] for update in updates} == {None}


def test_a_run_grows_by_noise(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "wholebatch.recipes.growth.ByNoise", lambda first, last: ByNoise(first, last, every=3, share=0.999)
    )
    _, updates = grown(monkeypatch, tmp_path, grow_to="16 rows", grow="noise", epochs=2)
    rows = [update["rows"] for update in updates]
    assert rows[0] == 4
    assert max(rows) > 4
    assert sum(rows) == 80


def test_a_loader_in_tokens_knows_how_much_a_batch_is():
    from wholebatch.recipes.amount import Amount

    batches = LogicalBatches([[0] * k for k in (1, 2, 3, 4)], Amount(5, "tokens"), length=len)
    assert all(batches.amount(batch) <= 5 for batch in batches.epoch(1))
    assert sum(map(batches.amount, batches.epoch(1))) == 10


MY_FILE = """
import torch

class Known:
    def data(self, split):
        noise = torch.randn(600, 30, generator=torch.Generator().manual_seed(0))
        return list(0.5 + noise) if split == "train" else []
    def model(self):
        return torch.nn.Linear(30, 1, bias=False)
    def collate(self, rows):
        return torch.stack(rows)
    def loss(self, model, micro_batch):
        return model(micro_batch).mean()

class Drowned(Known):
    def data(self, split):
        rows = torch.randn(64, 30, generator=torch.Generator().manual_seed(0))
        return list(rows - rows.mean(0)) if split == "train" else []

recipe, drowned = Known(), Drowned()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_file.py").write_text(MY_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code or 0


FEW = ("--logical-batch", "16 rows", "--micro-batch", "8 rows", "--memory", "1GiB", "--updates", "8")


def test_the_command_prints_a_table_and_writes_what_train_reads(folder, capsys):
    assert run("tune", "my_file.py:recipe", *FEW, "--out", "settings.toml", "--lr-rule", "linear") == 0
    out, err = capsys.readouterr()
    assert "worth it" in out
    assert "Timing updates" in err
    said = tomllib.loads((folder / "settings.toml").read_text())
    assert said["micro_batch"] == "8 rows"
    assert run("train", "my_file.py:recipe", "--config", "settings.toml", "--updates", "1", "--no-compare") == 0


def test_the_command_prints_json_and_writes_nothing(folder, capsys):
    assert run("tune", "my_file.py:recipe", *FEW, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["present_rows"] == 16
    assert found["noise_scale"] == pytest.approx(4, rel=0.5)  # 30 / (30 / 4)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["my_file.py"]


def test_the_command_fails_where_nothing_can_be_said(folder, capsys):
    arguments = ("--logical-batch", "64 rows", "--micro-batch", "8 rows", "--memory", "1GiB", "--updates", "4")
    assert run("tune", "my_file.py:drowned", *arguments, "--out", "settings.toml") == 1
    assert "Noise drowns the gradient" in capsys.readouterr().out
    assert not (folder / "settings.toml").exists()


@pytest.mark.parametrize(
    "wrong",
    [("--logical-batch", "many"), ("--lr-rule", "cube"), ("--out", "nowhere/settings.toml"), ("--updates", "1")],
)
def test_wrong_input_ends_with_2(folder, capsys, wrong):
    assert run("tune", "my_file.py:recipe", *wrong) == 2
