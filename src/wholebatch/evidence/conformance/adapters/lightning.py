"""Lightning: ``Trainer(accumulate_grad_batches=k)``, and its manual optimization.

As in its guides "Effective Training Techniques" (accumulate gradients; gradient clipping) and "Manual Optimization":
each loss is divided by N, the optimizer steps where ``(batch_idx + 1) % N == 0``, and with several optimizers each
works inside ``toggled_optimizer``, which keeps gradients of the others from being left behind. A micro-batch without a
label is skipped as the docstring of ``training_step`` says, by returning None. An evaluation inside a window is that of
``val_check_interval``, cut short by ``limit_val_batches``. A moving average follows where the hook of its own callback
`WeightAveraging` does, when ``global_step`` has gone on.

A run is saved by ``trainer.save_checkpoint`` in a callback and goes on with ``fit(ckpt_path=...)``, over a loader that
knows its position, as it asks for where a run goes on inside an epoch. For a lack of memory it has `BatchSizeFinder`,
which looks before training begins; later, the error ends the run.

What ``self.log`` reports is the value of one micro-batch, or a mean over the epoch: no loss of an update. On a CPU,
``precision="16-mixed"`` becomes bfloat16, with a warning, so float16 is not put to it.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from wholebatch.evidence.conformance.adapters.loaders import Resumable, data_loader, data_loader_of_a_rank
from wholebatch.evidence.conformance.stopping import Process, Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import (
    LOOP,
    TERMS,
    MicroBatch,
    NotExpressible,
    PairTask,
    Task,
    Trained,
    steps_of,
)


def train(task: Task | PairTask) -> Trained:
    """Train with automatic optimization."""
    if isinstance(task, PairTask):
        raise NotExpressible("automatic optimization is for one optimizer")
    return in_processes(task, _train_automatically)


def _train_automatically(task: Task, process: Process) -> Trained:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.make_model()
            self.followed = 0

        def training_step(self, micro_batch: MicroBatch, _place: int) -> Tensor | None:
            if int(task.targets(micro_batch)) == 0 and task.ranks == 1:
                return None  # "skip to the next batch"; "not supported" on several ranks
            return task.loss(self.model, micro_batch)

        def validation_step(self, micro_batch: MicroBatch, _place: int) -> None:
            task.loss_sum(self.model, micro_batch)

        def configure_optimizers(self) -> Any:
            optimizer = _sgd(self, task)
            self.steps = steps_of(optimizer)
            if task.lr_factor is None:
                return optimizer
            scheduler = LambdaLR(optimizer, task.lr_factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_train_batch_end(self, *_batch: Any) -> None:
            if self.trainer.global_step > self.followed:
                self.followed = self.trainer.global_step
                task.after_update(self.model)

    module = Module()
    _fit(module, task, process, accumulate_grad_batches=task.window, gradient_clip_val=task.clip_norm)
    return Trained(module.model, module.steps())


def train_by_hand(task: Task | PairTask) -> Trained:
    """Train with manual optimization."""
    return _train_players(task) if isinstance(task, PairTask) else in_processes(task, _train_one)


def _train_one(task: Task, process: Process) -> Trained:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = task.make_model()

        def training_step(self, loaded: MicroBatch, place: int) -> None:
            optimizer = self.optimizers()
            for slice_, micro_batch in enumerate(task.cut(loaded)):
                if task.zero_first:
                    optimizer.zero_grad()
                assert micro_batch is not None  # the trainer leaves out batches that are None
                self.manual_backward(task.loss(self.model, micro_batch) / task.window)
                if (place * task.slices + slice_ + 1) % task.window == 0:
                    if task.clip_norm is not None:
                        self.clip_gradients(optimizer, gradient_clip_val=task.clip_norm, gradient_clip_algorithm="norm")
                    optimizer.step()
                    optimizer.zero_grad()
                    if task.lr_factor is not None:
                        self.lr_schedulers().step()
                    task.after_update(self.model)

        def validation_step(self, micro_batch: MicroBatch, _place: int) -> None:
            task.loss_sum(self.model, micro_batch)

        def configure_optimizers(self) -> Any:
            optimizer = _sgd(self, task)
            self.steps = steps_of(optimizer)
            return [optimizer], [LambdaLR(optimizer, task.lr_factor)] if task.lr_factor else []

    module = Module()
    _fit(module, task, process)
    return Trained(module.model, module.steps())


def _train_players(task: PairTask) -> Trained:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.players = task.make_model()

        def training_step(self, micro_batch: MicroBatch, place: int) -> None:
            of_discriminator, of_generator = self.optimizers()
            with self.toggled_optimizer(of_discriminator):
                self.manual_backward(task.discriminator_loss(self.players, micro_batch) / task.window)
            with self.toggled_optimizer(of_generator):
                self.manual_backward(task.generator_loss(self.players, micro_batch) / task.generator_window)
            for optimizer, every in ((of_discriminator, task.window), (of_generator, task.generator_window)):
                if (place + 1) % every == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            both = [_sgd(self.players.discriminator, task), _sgd(self.players.generator, task)]
            self.steps = [steps_of(optimizer) for optimizer in both]
            return both

    module = Module()
    _fit(module, task, Process())
    return Trained(module.players, sum(each() for each in module.steps))


def _sgd(module: nn.Module, task: Task | PairTask) -> SGD:
    return SGD((weight for weight in module.parameters() if weight.requires_grad), lr=task.lr)


def _fit(module: Any, task: Task | PairTask, process: Process, **options: Any) -> None:
    """Let a trainer train, and do nothing else: no logs, no checkpoints, no bars, in the dtype of the weights."""
    from lightning.pytorch import Callback, Trainer

    file = process.folder / "run.ckpt"

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, _outputs: Any, _batch: Any, place: int) -> None:
            if place + 1 == process.ends_before:
                trainer.save_checkpoint(file)
                raise Stopped(module.steps())

    asks = task.asks
    if isinstance(task, Task) and task.evaluates_after:
        if len(task.evaluates_after) > 1:
            raise NotExpressible("evaluations come at intervals, not at any places")
        options.update(val_check_interval=max(task.evaluates_after) + 1, limit_val_batches=1, num_sanity_val_steps=0)
    loader: Any = data_loader(task)
    if isinstance(task, Task) and task.stops_before is not None:
        loader = Resumable(task)
        options["callbacks"] = [Saves()]
    if isinstance(task, Task) and task.ranks > 1:  # the sampler that it puts in itself would shuffle
        options.update(devices=task.ranks, strategy="ddp", use_distributed_sampler=False)
        loader = data_loader_of_a_rank(task)
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-true" if "bf16" in asks else "64-true",
        max_epochs=task.epochs if isinstance(task, Task) else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    goes_on = {"ckpt_path": file, "weights_only": False} if process.begins_at else {}  # it holds more than weights
    trainer.fit(module, loader, data_loader(task) if "evaluation" in asks else None, **goes_on)


_LACKS = {"fp16": "float16 needs a GPU: on a CPU, precision='16-mixed' trains in bfloat16"}

lightning = System(
    name="lightning",
    title="Lightning",
    train=train,
    expresses=frozenset(
        {
            "ranks",
            "unsized",
            "None",
            "clipping",
            "schedule",
            *TERMS,
            "follows",
            "evaluation",
            "bf16",
            "stops",
            "runs short",
        }
    ),
    lacks={**_LACKS, "two optimizers": "automatic optimization is for one optimizer"},
    distributions=("lightning", "torch"),
    install="pip install 'wholebatch[lightning]'",
)

lightning_manual = System(
    name="lightning-manual",
    title="Lightning, manual optimization",
    train=train_by_hand,
    expresses=LOOP | {"ranks"},
    lacks=_LACKS,
    distributions=("lightning", "torch"),
    install="pip install 'wholebatch[lightning]'",
)
