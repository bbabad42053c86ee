"""Our way of using Lightning, as systems of the conformance suite: batches are micro-batches, or are cut, or go into
windows in manual optimization. Also for ``pytest --wholebatch-adapter=integrations.lightning_adapter:streaming``.
"""

import os

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import wholebatch as wb
from wholebatch.engine.losses import load_balancing
from wholebatch.evidence.conformance.adapters.loaders import Resumable, data_loader, data_loader_of_a_rank, only
from wholebatch.evidence.conformance.adapters.wholebatch import compared, meeting
from wholebatch.evidence.conformance.scenes import BALANCE, ROWS, balance
from wholebatch.evidence.conformance.stopping import Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import TERMS, NotExpressible, PairTask, Trained, join, steps_of
from wholebatch.integrations.lightning import WholeBatch, windows


class Module(LightningModule):
    def __init__(self, task):
        super().__init__()
        self.task = task
        self.model = wb.exact_batch_norm(meeting(task.make_model()))
        self.followed = 0

    def training_step(self, micro_batch, _place):
        task, model = self.task, self.model
        if task.compares is not None:
            return compared(task, model, micro_batch)
        if task.of_rows is balance:
            return self.sums(micro_batch, BALANCE * load_balancing(model.route(micro_batch["input_ids"])))
        if task.has_term:
            return self.sums(micro_batch, task.term(model, micro_batch))
        return {"loss": task.loss(model, micro_batch)}

    def sums(self, micro_batch, once):
        return self.task.loss_sum(self.model, micro_batch), self.task.targets(micro_batch), once

    def validation_step(self, micro_batch, _place):
        self.task.loss_sum(self.model, micro_batch)

    def configure_optimizers(self):
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = SGD(weights, lr=self.task.lr)
        self.steps = steps_of(optimizer)
        if self.task.lr_factor is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.task.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *_):
        if self.trainer.global_step > self.followed:
            self.followed = self.trainer.global_step
            self.task.after_update(self.model)


def callback(task, losses, **options):
    counts = {} if task.has_term or task.compares is not None else {"targets": task.targets}

    def take(update):
        if update.skipped is None:
            losses.append(update.loss)

    return WholeBatch(on_update=take, **counts, **options)


def fit(module, task, loader, *callbacks, ckpt_path=None, **options):
    asks = task.asks
    if "evaluation" in asks:
        options |= {
            "val_check_interval": max(task.evaluates_after) + 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
        }
    if "fp16" in asks:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu")]
    else:
        options["precision"] = "bf16-true" if "bf16" in asks else "64-true"
    if getattr(task, "ranks", 1) > 1:
        options |= {"devices": task.ranks, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=getattr(task, "epochs", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"devices": 1, **options},
    )
    trainer.fit(module, loader, data_loader(task) if "evaluation" in asks else None, ckpt_path=ckpt_path)
    return trainer


class Saves(Callback):
    def __init__(self, process, losses):
        self.process, self.losses = process, losses

    def on_train_batch_end(self, trainer, module, _outputs, _batch, place):
        if place + 1 == self.process.ends_before:
            trainer.save_checkpoint(self.process.folder / "run.ckpt")
            raise Stopped(module.steps(), self.losses)


def train(task):
    """Let each batch of the loader be a micro-batch."""
    if isinstance(task, PairTask):
        raise NotExpressible("automatic optimization is for one optimizer")
    return in_processes(task, train_streaming)


def train_streaming(task, process):
    module, losses = Module(task), []
    loader = data_loader_of_a_rank(task) if task.ranks > 1 else data_loader(task)
    if task.stops_before is not None:
        loader = Resumable(task)
    trainer = fit(
        module,
        task,
        loader,
        callback(task, losses),
        Saves(process, losses),
        ckpt_path=process.folder / "run.ckpt" if process.begins_at else None,
        accumulate_grad_batches=task.window,
        gradient_clip_val=task.clip_norm,
    )
    assert process.begins_at or trainer.global_step == len(losses)
    return Trained(module.model, module.steps(), losses)


def train_cut(task):
    """Let each batch of the loader be a logical batch."""
    if isinstance(task, PairTask):
        raise NotExpressible("automatic optimization is for one optimizer")
    module, losses = Module(task), []
    own = task.epoch[int(os.environ.get("RANK", "0")) :: task.ranks] if task.ranks > 1 else task.epoch
    batches = [join(own[start : start + task.window]) for start in range(0, len(own), task.window)]
    trainer = fit(
        module,
        task,
        DataLoader(batches, batch_size=1, collate_fn=only),
        callback(task, losses, micro_batch=wb.Rows(ROWS)),
        gradient_clip_val=task.clip_norm,
    )
    assert trainer.global_step == len(losses)
    return Trained(module.model, module.steps(), losses)


class Players(LightningModule):
    def __init__(self, task):
        super().__init__()
        self.automatic_optimization = False
        self.task = task
        self.players = task.make_model()

    def training_step(self, micro_batch, _place):
        of_discriminator, of_generator = windows(self)
        rows = len(micro_batch["real"])
        of_discriminator.backward(self.task.discriminator_loss(self.players, micro_batch), targets=rows)
        of_generator.backward(self.task.generator_loss(self.players, micro_batch), targets=rows)

    def configure_optimizers(self):
        both = [
            SGD(each.parameters(), lr=self.task.lr) for each in (self.players.discriminator, self.players.generator)
        ]
        self.steps = [steps_of(optimizer) for optimizer in both]
        return both


def train_players(task):
    """Let each of two optimizers have windows of its own."""
    module = Players(task)
    trainer = fit(module, task, data_loader(task), WholeBatch(windows=(task.window, task.generator_window)))
    updates = sum(each() for each in module.steps)
    assert trainer.global_step == updates
    return Trained(module.players, updates)


INSTALLED = ("lightning", "torch")
BOTH = {"None", "clipping", "schedule", "follows", "bf16", "fp16", "ranks", "runs short"}
streaming = System(
    "lightning-wholebatch",
    "Lightning, with our callback",
    train,
    frozenset((TERMS - {"coupled", "batch norm"}) | BOTH | {"unsized", "evaluation", "stops"}),
    INSTALLED,
)
cutting = System(
    "lightning-wholebatch-cut", "Lightning, with our callback, batches cut", train_cut, TERMS | BOTH, INSTALLED
)
manual = System(
    "lightning-wholebatch-manual",
    "Lightning, manual optimization in our windows",
    train_players,
    frozenset({"two players", "two windows"}),
    INSTALLED,
)
