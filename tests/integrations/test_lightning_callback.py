"""A real `Trainer.fit` with our callback, against updates of undivided batches."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import wholebatch as wb

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torchmetrics import SumMetric

from integrations import lightning_adapter
from wholebatch.evidence.conformance.adapters import lightning as peer
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.integrations.lightning import WholeBatch, windows
from wholebatch.integrations.lightning.support import require_support

# Lightning calls a part of PyTorch that is deprecated, and gives advice by warnings.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", r"ignore:::lightning\..*", "ignore:.*set_vital.*:UserWarning"
)

BY_NAME = {scene.name: scene for scene in SCENES}
IGNORED = -100
COUNTS = (1, 5, 3, 2, 8, 2, 7, 1, 4, 6)
"""Labels in each micro-batch: windows of 4 leave a tail of 2."""


def of(system):
    return [scene for scene in SCENES if scene.task.asks <= system.expresses and getattr(scene.task, "ranks", 1) == 1]


SEEN = {(lightning_adapter.cutting.name, "T10-sums-in-16-bits")}
"""A thousand micro-batches once are enough."""

REFUSED = {
    (lightning_adapter.streaming.name, "T9-balancing-loss"): "MeetingError",  # a window has to be cut to meet
    (lightning_adapter.cutting.name, "T9-divergence"): "VerifyError",  # a mean over positions, weighted by labels
}


@pytest.mark.parametrize(
    ("system", "scene"),
    [
        (system, scene)
        for system in (lightning_adapter.streaming, lightning_adapter.cutting)
        for scene in of(system)
        if hasattr(scene.task, "epochs") and (system.name, scene.name) not in SEEN
    ]
    + [(lightning_adapter.manual, BY_NAME[name]) for name in ("T7-two-optimizers", "T7-gan")],
    ids=lambda each: each.name,
)
def test_every_scene_that_a_trainer_can_express_passes(system, scene):
    verdict = judge(system, scene)
    refusal = REFUSED.get((system.name, scene.name))
    if refusal is not None:
        assert (verdict.outcome, verdict.why.partition(":")[0]) == ("refuses", refusal)
    else:
        assert verdict.outcome == "pass", verdict.why
        assert verdict.confirmed is not False


@pytest.mark.parametrize("name", ["T1-ragged-counts", "T3-tail", "T4-masked-micro-batch", "T4-none", "T6-stopped"])
def test_the_trainer_alone_fails_them(name):
    assert judge(peer.lightning, BY_NAME[name]).outcome == "fail"


def test_manual_optimization_alone_leaks_between_two_players():
    assert judge(lightning_adapter.manual, BY_NAME["T7-gan"]).outcome == "pass"
    assert peer.train_by_hand is not None


def labelled(counts=COUNTS, rows=2, time=5):
    draw = torch.Generator().manual_seed(0)
    batches = []
    for count in counts:
        ids = torch.randint(7, (rows, time), generator=draw)
        labels = torch.full((rows * time,), IGNORED)
        labels[torch.randperm(rows * time, generator=draw)[:count]] = torch.arange(count) % 7
        batches.append({"ids": ids, "labels": labels.view(rows, time)})
    return batches


def count(batch):
    return (batch["labels"] != IGNORED).sum()


class Tagger(LightningModule):
    """As anybody would write it: a mean loss, AdamW-free so that errors of scale show."""

    def __init__(self, lr=0.5, factor=None, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).to(dtype)
        self.lr, self.factor = lr, factor
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.net(batch["ids"]).flatten(0, 1), batch["labels"].flatten())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, weights(self)))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if self.factor is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Quiet(Tagger):
    """It logs nothing, so that no batch size is guessed."""

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


def weights(module):
    return torch.cat([each.detach().flatten() for each in module.parameters()])


def joined(batches):
    there = [each for each in batches if each is not None]
    return {name: torch.cat([each[name] for each in there]) for name in there[0]}


def undivided(module, batches, window=4, epochs=1, clip=None):
    """The plain loop over logical batches, in evaluation of nothing but PyTorch."""
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    for _ in range(epochs):
        for start in range(0, len(batches), window):
            batch = joined(batches[start : start + window])
            optimizer.zero_grad()
            logits = module.net(batch["ids"]).flatten(0, 1)
            functional.cross_entropy(logits, batch["labels"].flatten()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            if isinstance(configured, dict):
                configured["lr_scheduler"]["scheduler"].step()
    return weights(module)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def trainer_of(*callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "max_epochs": 1,
        "accumulate_grad_batches": 4,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    if "plugins" in options:
        del defaults["precision"]
    return Trainer(**{**defaults, **options})


def fitted(module, batches, *callbacks, **options):
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(batches))
    return trainer


def off(module, right):
    start = weights(type(module)())
    return float((weights(module) - right).norm() / (right - start).norm())


def test_updates_are_those_of_undivided_batches_and_the_trainer_alone_is_far_off():
    right = undivided(Tagger(factor=0.7), labelled(), epochs=2)
    module = Tagger(factor=0.7)
    trainer = fitted(module, labelled(), WholeBatch(targets=count), max_epochs=2)
    assert off(module, right) <= 1e-12
    assert trainer.global_step == 6
    alone = Tagger(factor=0.7)
    assert fitted(alone, labelled(), max_epochs=2).global_step == 6
    assert off(alone, right) > 0.1


@pytest.mark.parametrize(
    "micro_batch", [wb.Rows(3), wb.Tokens(15, length=lambda row: len(row["ids"])), "auto"], ids=str
)
def test_a_batch_that_is_cut_makes_the_same_update(micro_batch):
    batches = [joined(labelled()[start : start + 4]) for start in (0, 4, 8)]
    right = undivided(Tagger(), labelled())
    module = Tagger()
    whole = WholeBatch(targets=count, micro_batch=micro_batch)
    fitted(module, batches, whole, accumulate_grad_batches=1)
    assert off(module, right) <= 1e-12


def test_rows_come_as_a_list_and_are_collated_when_their_turn_comes():
    rows = [{"ids": each["ids"][place], "labels": each["labels"][place]} for each in labelled() for place in (0, 1)]
    right = undivided(Tagger(), labelled())
    module = Tagger()
    whole = WholeBatch(targets=count, micro_batch=wb.Rows(3), collate=torch.utils.data.default_collate)
    trainer = trainer_of(whole, accumulate_grad_batches=1)
    trainer.fit(module, DataLoader(rows, batch_size=8, collate_fn=list))
    assert off(module, right) <= 1e-12


def test_a_loss_may_bring_its_own_count_and_stand_in_a_dict():
    class Summed(Quiet):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch["ids"]).flatten(0, 1)
            loss = functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
            return {"loss": (loss, count(batch)), "extra": batch_idx}

    class Outputs(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen = (*self.seen, (outputs["extra"], float(outputs["loss"])))

    module, outputs = Summed(), Outputs()
    fitted(module, labelled(), WholeBatch(), outputs)
    assert off(module, undivided(Quiet(), labelled())) <= 1e-12
    assert [extra for extra, _ in outputs.seen] == list(range(10))
    assert all(0 < loss < 10 for _, loss in outputs.seen)


def test_what_is_logged_is_of_the_passes_of_updates_alone():
    """The first batch is also looked at cut and uncut; the mean over an epoch weighs each micro-batch by its rows."""
    batches = [joined(labelled((4, 4, 4, 4, 4)))]
    module = Tagger(lr=1e-300)
    whole = WholeBatch(targets=count, micro_batch=wb.Rows(4))
    trainer = fitted(module, batches, whole, accumulate_grad_batches=1)
    assert any("compared cut and uncut" in each for each in whole.reasons)
    parts = [{name: each[start : start + 4] for name, each in batches[0].items()} for start in (0, 4, 8)]
    with torch.no_grad():
        losses = [
            functional.cross_entropy(module.net(part["ids"]).flatten(0, 1), part["labels"].flatten()) for part in parts
        ]
    rows = [len(part["ids"]) for part in parts]
    mean = sum(n * float(loss) for n, loss in zip(rows, losses, strict=True)) / sum(rows)
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(mean, rel=1e-6)


def test_the_loss_of_an_update_is_logged_where_it_is_wanted():
    class Watch(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            metrics = trainer.callback_metrics
            if "update/loss" in metrics:
                self.seen = (*self.seen, (batch_idx, float(metrics["update/loss"]), float(metrics["update/grad_norm"])))

    watch, updates = Watch(), []
    whole = WholeBatch(targets=count, on_update=updates.append, log="update/")
    fitted(Tagger(dtype=torch.float64), labelled(), whole, watch)
    told = {update.number: (update.loss, update.grad_norm) for update in updates}
    assert len(told) == 3
    for batch, number in ((3, 1), (4, 1), (7, 2), (9, 3)):
        assert next(each[1:] for each in watch.seen if each[0] == batch) == pytest.approx(told[number], rel=1e-6)


def test_hooks_see_the_gradient_of_the_whole_window_and_the_trainer_clips_it():
    class Looking(Quiet):
        norms = ()

        def on_before_optimizer_step(self, optimizer):
            self.norms = (*self.norms, float(nn.utils.get_total_norm([each.grad for each in self.parameters()])))

    module, updates = Looking(), []
    fitted(module, labelled(), WholeBatch(targets=count, on_update=updates.append), gradient_clip_val=0.05)
    assert off(module, undivided(Quiet(), labelled(), clip=0.05)) <= 1e-12
    assert module.norms == pytest.approx([update.grad_norm for update in updates])
    assert min(module.norms) > 0.05


def test_gradients_are_clipped_by_value_or_as_the_module_says():
    class Own(Quiet):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            for each in self.parameters():
                each.grad.clamp_(-gradient_clip_val, gradient_clip_val)

    by_value, own = Quiet(), Own()
    clip = {"gradient_clip_val": 0.01}
    fitted(by_value, labelled(), WholeBatch(targets=count), gradient_clip_algorithm="value", **clip)
    fitted(own, labelled(), WholeBatch(targets=count), **clip)
    assert torch.equal(weights(by_value), weights(own))
    plain = Quiet()
    fitted(plain, labelled(), WholeBatch(targets=count))
    assert not torch.equal(weights(by_value), weights(plain))


def test_a_window_that_is_not_finite_is_skipped_with_its_step_and_schedule():
    class Spoilt(Quiet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 5 else loss

    module, updates = Spoilt(factor=0.5), []
    trainer = fitted(module, labelled(), WholeBatch(targets=count, on_update=updates.append))
    assert [update.skipped is None for update in updates] == [True, False, True]
    assert trainer.global_step == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**2
    kept = [*labelled()[:4], *labelled()[8:]]
    assert off(module, undivided(Quiet(factor=0.5), kept)) <= 1e-12


def test_a_schedule_counts_updates_in_its_frequency():
    class Seldom(Quiet):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            configured["lr_scheduler"]["frequency"] = 2
            return configured

    module = Seldom(factor=0.5)
    trainer = fitted(module, labelled(), WholeBatch(targets=count), max_epochs=2)
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**3


def test_none_leaves_its_place_in_the_window():
    class Choosy(Quiet):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    batches = labelled()
    batches[3] = batches[8] = batches[9] = None  # the last of a window, and all of the last window
    module, updates = Choosy(), []
    trainer = fitted(module, batches, WholeBatch(targets=count, on_update=updates.append))
    right = Quiet()
    undivided(right, [batches[0], batches[2]], window=2)
    torch.manual_seed(0)
    assert trainer.global_step == 2
    assert [update.micro_batches for update in updates if update.skipped is None] == [2, 4]
    kept = [batches[0], batches[2], None, None, *batches[4:8]]
    assert off(module, undivided(Quiet(), kept)) <= 1e-12


def test_validation_inside_a_window_changes_nothing():
    module = Quiet()
    trainer = trainer_of(WholeBatch(targets=count), val_check_interval=3, num_sanity_val_steps=0)
    trainer.fit(module, loader(labelled()), loader(labelled()[:1]))
    assert [step for step, _ in module.seen] == [0, 1, 2]
    assert off(module, undivided(Quiet(), labelled())) <= 1e-12


def test_an_early_end_makes_an_update_of_what_is_there():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 5

    module = Quiet(factor=0.5)
    trainer = fitted(module, labelled(), WholeBatch(targets=count), Stop())
    assert trainer.global_step == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**2
    assert off(module, undivided(Quiet(factor=0.5), labelled()[:6])) <= 1e-12


def test_an_exception_leaves_nothing_and_the_trainer_as_it_was():
    class Failing(Quiet):
        def training_step(self, batch, batch_idx):
            if batch_idx == 6:
                raise KeyError("no such row")
            return super().training_step(batch, batch_idx)

    module, whole = Failing(), WholeBatch(targets=count)
    trainer = trainer_of(whole)
    with pytest.raises(KeyError, match="no such row"):
        trainer.fit(module, loader(labelled()))
    assert off(module, undivided(Quiet(), labelled()[:4])) <= 1e-12
    assert all(each.grad is None for each in module.parameters())
    epoch_loop = trainer.fit_loop.epoch_loop
    assert "run" not in vars(epoch_loop.automatic_optimization)
    assert "update_lr_schedulers" not in vars(epoch_loop)


def test_a_run_that_broke_off_inside_a_window_leaves_nothing_to_the_next():
    class Failing(Quiet):
        fails = True

        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.fails:
                raise KeyError("no such row")
            return super().training_step(batch, batch_idx)

    whole = WholeBatch(targets=count)
    with pytest.raises(KeyError):
        fitted(Failing(), labelled(), whole)
    assert whole.state_dict()["ranks"][0]["window"]["open"] is not None  # for a checkpoint on the way out
    module = Quiet()
    fitted(module, labelled(), whole)
    assert off(module, undivided(Quiet(), labelled())) <= 1e-12


def test_an_epoch_that_the_module_gives_up_ends_with_an_update_of_what_was_there():
    class Short(Quiet):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 6 else None

    module = Short(factor=0.5)
    trainer = fitted(module, labelled(), WholeBatch(targets=count), max_epochs=2)
    assert trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**4
    assert off(module, undivided(Quiet(factor=0.5), labelled()[:6], epochs=2)) <= 1e-12


def test_metrics_see_each_row_once():
    class Counting(Quiet):
        def __init__(self):
            super().__init__()
            self.rows = SumMetric()

        def training_step(self, batch, batch_idx):
            self.rows.update(len(batch["ids"]))
            self.log("rows", self.rows, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    for whole, options in (
        (WholeBatch(targets=count), {}),
        (WholeBatch(targets=count, micro_batch="auto"), {"accumulate_grad_batches": 1}),
    ):
        trainer = fitted(Counting(), labelled(), whole, **options)
        assert float(trainer.callback_metrics["rows"]) == 20
        assert any("compared cut and uncut" in each or "auto" in each for each in whole.reasons)


def test_a_plateau_and_an_epoch_are_waited_for_as_ever():
    class Waiting(Tagger):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            config = {"scheduler": plateau, "interval": "step", "monitor": "loss_step", "strict": True}
            return {"optimizer": optimizer, "lr_scheduler": config}

    trainer = fitted(Waiting(), labelled(), WholeBatch(targets=count))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**3)  # 3 updates, none good enough

    class ByEpoch(Quiet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    trainer = fitted(ByEpoch(), labelled(), WholeBatch(targets=count), max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**3


def test_a_learning_rate_is_found_in_windows():
    module = Quiet()
    trainer = trainer_of(WholeBatch(targets=count), max_epochs=-1)
    found = Tuner(trainer).lr_find(module, loader(labelled()), num_training=12, update_attr=False)
    assert len(found.results["loss"]) >= 8
    assert all(math.isfinite(each) for each in found.results["loss"])


def test_a_callback_serves_one_fit_after_the_other():
    whole = WholeBatch(targets=count)
    for _ in range(2):
        module = Quiet()
        fitted(module, labelled(), whole)
        assert off(module, undivided(Quiet(), labelled())) <= 1e-12


class SaveAt(Callback):
    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Dropping(Quiet):
    def __init__(self, lr=0.5):
        super().__init__(lr)
        self.net.insert(1, nn.Dropout(0.3))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_run_goes_on_from_a_checkpoint_inside_a_window_bit_by_bit(batch, tmp_path):
    path = tmp_path / "inside.ckpt"
    options = {"max_epochs": 2}
    module = Dropping()
    first = trainer_of(WholeBatch(targets=count), SaveAt(batch, path), **options)
    first.fit(module, StatefulDataLoader(labelled(), batch_size=None))
    state = torch.load(path, weights_only=True)
    kept = next(each for name, each in state["callbacks"].items() if "WholeBatch" in name)
    assert kept["ranks"][0]["window"]["open"] is not None
    torch.manual_seed(99)
    again = Dropping()
    second = trainer_of(WholeBatch(targets=count), **options)
    second.fit(again, StatefulDataLoader(labelled(), batch_size=None), ckpt_path=path)
    assert second.global_step == first.global_step == 6
    assert torch.equal(weights(again), weights(module))


def test_without_the_gradient_of_the_window_it_would_be_far_off(tmp_path):
    path = tmp_path / "inside.ckpt"
    module = Quiet()
    trainer_of(WholeBatch(targets=count), SaveAt(1, path)).fit(module, StatefulDataLoader(labelled(), batch_size=None))
    state = torch.load(path, weights_only=True)
    state["callbacks"] = {}
    torch.save(state, path)
    again = Quiet()
    trainer_of(WholeBatch(targets=count)).fit(again, StatefulDataLoader(labelled(), batch_size=None), ckpt_path=path)
    assert off(again, weights(module)) > 0.01


def test_the_loss_scale_is_the_plugins_and_stands_in_its_checkpoint(tmp_path):
    class Overflowing(Quiet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.tensor(1e37) if batch_idx == 0 else loss

    plugin = MixedPrecision("16-mixed", "cpu")
    module = Overflowing(dtype=torch.float32)
    path, updates = tmp_path / "last.ckpt", []
    trainer = fitted(module, labelled(), WholeBatch(targets=count, on_update=updates.append), plugins=[plugin])
    assert [update.skipped is None for update in updates] == [False, True, True]
    assert trainer.global_step == 2
    trainer.save_checkpoint(path)
    assert plugin.scaler.get_scale() == 2.0**15
    assert torch.load(path, weights_only=True)["MixedPrecision"]["scale"] == 2.0**15


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_each_precision_trains_near_the_undivided_batch(precision):
    """Rounding alone: eps of what forward passes run in, on this network; the trainer alone is far beyond it."""
    dtype = torch.float64 if precision == "64-true" else torch.float32
    eps = torch.finfo({"32-true": torch.float32, "64-true": torch.float64}.get(precision, torch.bfloat16)).eps
    module = Quiet(dtype=dtype)
    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    options = {"plugins": [half]} if precision == "16-mixed" else {"precision": precision}
    fitted(module, labelled(), WholeBatch(targets=count), **options)
    right = undivided(Quiet(), labelled())
    assert float((weights(module) - right).norm() / (right - weights(Quiet())).norm()) <= 32 * eps


def test_micro_batches_that_do_not_fit_are_split():
    class Tight(Quiet):
        retried = 0

        def training_step(self, batch, batch_idx):
            if len(batch["ids"]) > 2:
                self.retried += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return super().training_step(batch, batch_idx)

    batches = [joined(labelled()[start : start + 2]) for start in range(0, 10, 2)]
    module = Tight()
    fitted(module, batches, WholeBatch(targets=count), accumulate_grad_batches=2)
    assert module.retried > 0
    assert off(module, undivided(Quiet(), labelled())) <= 1e-12


def test_other_callbacks_do_what_they_do():
    module = Quiet()
    average = WeightAveraging(avg_fn=lambda _average, weight, _seen: weight)
    fitted(
        module,
        labelled(),
        WholeBatch(targets=count),
        GradientAccumulationScheduler({0: 4, 1: 2}),
        average,
        accumulate_grad_batches=1,
        max_epochs=2,
    )
    right = Quiet()
    optimizer = right.configure_optimizers()
    right.configure_optimizers = lambda: optimizer
    undivided(right, labelled(), window=4)
    assert off(module, undivided(right, labelled(), window=2)) <= 1e-12


def test_stochastic_weight_averaging_runs_its_pass_for_batch_norm():
    class Normed(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = [(torch.randn(4, 3).double(), torch.randn(4, 1).double()) for _ in range(4)]
    steps = []
    for callbacks in ([WholeBatch(batch_norm="per_micro_batch")], []):
        average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
        options = {"max_epochs": 3, "accumulate_grad_batches": 2}
        steps.append(fitted(Normed(), batches, *callbacks, average, **options).global_step)
    assert steps[0] == steps[1]


class ByHand(Quiet):
    """Two networks, of which the second looks at what the first makes."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(7, 7).double()

    def training_step(self, batch, batch_idx):
        of_net, of_other = windows(self)
        labels = batch["labels"].flatten()
        logits = self.net(batch["ids"]).flatten(0, 1)
        of_net.backward(functional.cross_entropy(logits, labels), targets=count(batch))
        of_other.backward(functional.cross_entropy(self.other(logits.detach()), labels), targets=count(batch))

    def configure_optimizers(self):
        both = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (self.net, self.other)]
        return both, [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in both]


def by_hand(module, path=None, **options):
    whole = WholeBatch(windows=(4, 3), step_schedules=True, clip_norm=0.05)
    callbacks = [whole] if path is None else [whole, SaveAt(4, path)]
    trainer = trainer_of(*callbacks, accumulate_grad_batches=1)
    trainer.fit(module, StatefulDataLoader(labelled(), batch_size=None), **options)
    return trainer


def test_windows_by_hand_are_clipped_scheduled_and_resumed_each_for_itself(tmp_path):
    path, module, again = tmp_path / "inside.ckpt", ByHand(), ByHand()
    trainer = by_hand(module, path)
    assert trainer.global_step == 3 + 4
    assert [each.param_groups[0]["lr"] for each in trainer.optimizers] == [0.5 * 0.5**3, 0.5 * 0.5**4]
    right = Quiet()
    optimizer = torch.optim.SGD(right.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    right.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}
    expected = undivided(right, labelled(), clip=0.05)
    assert float((weights(module.net) - expected).norm()) <= 1e-12 * float(expected.norm())
    assert by_hand(again, ckpt_path=path).global_step == 7
    assert torch.equal(weights(again), weights(module))


def test_an_early_end_by_hand_makes_updates_of_what_is_there():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 4

    trainer = fitted(ByHand(), labelled(), WholeBatch(windows=(4, 5)), Stop(), accumulate_grad_batches=1)
    assert trainer.global_step == 3  # 4 and 1 batches of the first, 5 of the second


def test_a_loss_scale_over_several_windows_is_refused():
    with pytest.raises(wb.ConfigError, match="with a loss scale"):
        fitted(
            ByHand(),
            labelled(),
            WholeBatch(windows=(1, 1)),
            accumulate_grad_batches=1,
            plugins=[MixedPrecision("16-mixed", "cpu")],
        )


def test_batch_norm_is_refused_where_it_would_see_a_part():
    class Normed(Quiet):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(self.net[0], nn.BatchNorm1d(5).double(), self.net[1])

    with pytest.raises(wb.BatchNormError):
        fitted(Normed(), labelled(), WholeBatch(targets=count))
    module = Normed()
    wb.exact_batch_norm(module)
    with pytest.raises(wb.MeetingError, match=r"micro_batch=wb\.Rows"):
        fitted(module, labelled(), WholeBatch(targets=count))


class Hooked(Quiet):
    """With one more method."""


def with_hook(name, function):
    return type("Hooked", (Quiet,), {name: function})()


def nothing(self, *arguments, **options):
    """Do nothing."""


def takes_an_iterator(self, dataloader_iter):
    """Read batches itself."""


def without_a_loss(self, batch, batch_idx):
    return {"los": 1.0}


def counting(self, batch, batch_idx):
    return self.net(batch["ids"]).sum(), 1


def asking_for_windows(self, batch, batch_idx):
    return windows(self)


@pytest.mark.parametrize(
    ("module", "callback", "options", "said"),
    [
        (with_hook("optimizer_step", nothing), {}, {}, "optimizer_step of its own"),
        (with_hook("backward", nothing), {}, {}, "backward of its own"),
        (with_hook("optimizer_zero_grad", nothing), {}, {}, "optimizer_zero_grad of its own"),
        (with_hook("training_step", takes_an_iterator), {}, {}, "dataloader_iter"),
        (with_hook("configure_optimizers", nothing), {}, {}, "configure_optimizers returned None"),
        (
            with_hook("on_after_backward", nothing),
            {"micro_batch": wb.Rows(1)},
            {"accumulate_grad_batches": 1},
            "on_after_backward",
        ),
        (Quiet(), {"micro_batch": wb.Rows(1)}, {}, "accumulate_grad_batches=4"),
        (Quiet(), {"windows": 2}, {}, "is for manual optimization"),
        (Quiet(), {"on_update": 3}, {}, "on_update is a int"),
        (Quiet(), {"log": True}, {}, "log is a bool"),
        (with_hook("automatic_optimization", False), {}, {"accumulate_grad_batches": 1}, "windows=None"),
        (
            with_hook("automatic_optimization", False),
            {"windows": (1, 2)},
            {"accumulate_grad_batches": 1},
            r"windows=\(1, 2\)",
        ),
    ],
)
def test_what_a_window_cannot_follow_is_refused_with_a_hint(module, callback, options, said):
    with pytest.raises(wb.WholeBatchError, match=said) as refused:
        fitted(module, labelled(), WholeBatch(**callback), **options)
    assert refused.value.hint


def test_strategies_and_plugins_that_own_gradients_are_refused():
    class Sharded(SingleDeviceStrategy):
        pass

    class Quantised(Precision):
        pass

    with pytest.raises(wb.ConfigError, match="The strategy is Sharded"):
        fitted(Quiet(), labelled(), WholeBatch(), strategy=Sharded(torch.device("cpu")))
    with pytest.raises(wb.ConfigError, match="The precision plugin is Quantised"):
        fitted(Quiet(), labelled(), WholeBatch(), plugins=[Quantised()])


def test_another_version_of_lightning_is_refused_rather_than_trusted():
    trainer = trainer_of(WholeBatch())
    trainer.fit_loop.epoch_loop.automatic_optimization = SimpleNamespace(optim_progress=None)
    with pytest.raises(wb.ConfigError, match="it has no run"):
        require_support(trainer, Quiet(), cuts=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "bf16"}, "no precision="),
        ({"lr_scheduler": None}, "no lr_scheduler="),
        ({"before_step": None}, "no before_step="),
        ({"loss_scaler": None}, "no loss_scaler="),
        ({"acumulate_in": "fp32"}, "no acumulate_in"),
        ({"clip_norm": 1.0}, "manual optimization"),
        ({"step_schedules": True}, "manual optimization"),
        ({"windows": 2, "targets": len}, "says of each loss"),
    ],
)
def test_options_of_the_trainer_are_refused(options, said):
    with pytest.raises(wb.ConfigError, match=said):
        WholeBatch(**options)


@pytest.mark.parametrize(
    ("step", "callbacks", "error", "said"),
    [
        (without_a_loss, [WholeBatch()], wb.LossError, "no 'loss'"),
        (counting, [WholeBatch(targets=count)], wb.WeightError, "as well"),
        (asking_for_windows, [], wb.ConfigError, "no WholeBatch callback"),
        (asking_for_windows, [WholeBatch()], wb.ConfigError, "is for manual optimization"),
    ],
)
def test_misuse_is_told(step, callbacks, error, said):
    with pytest.raises(error, match=said):
        fitted(with_hook("training_step", step), labelled(), *callbacks)
