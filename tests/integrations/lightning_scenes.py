"""What two real processes make with Lightning and with Accelerate; see test_two_ranks.py."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import wholebatch as wb
from integrations import accelerate_adapter, lightning_adapter
from integrations.accelerate_adapter import fresh
from ranks import Place, Scenes
from wholebatch.evidence.conformance.adapters.loaders import Resumable
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES as SUITE
from wholebatch.evidence.conformance.task import Task
from wholebatch.integrations.accelerate import accumulator, each_row_once
from wholebatch.integrations.lightning import WholeBatch, windows

SCENES = Scenes()
SYSTEMS = (lightning_adapter.streaming, lightning_adapter.cutting, accelerate_adapter.system)


def as_torchrun(place: Place) -> None:
    """Set what torchrun would tell this process; the processes have found each other already."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "scenes", "GROUP_RANK": "0"}
    numbers = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.ranks, "LOCAL_WORLD_SIZE": place.ranks}
    os.environ.update(together | {name: str(number) for name, number in numbers.items()})
    warnings.simplefilter("ignore")


@SCENES("conformance")
def conformance(place):
    as_torchrun(place)
    found = {}
    for scene in SUITE:
        if isinstance(scene.task, Task) and scene.task.ranks == 2:
            for system in SYSTEMS:
                if system is lightning_adapter.cutting and scene.trap == "T2x2":
                    continue  # who divides is one question, however batches are cut
                verdict = judge(system, scene)
                found[f"{system.name} {scene.name}"] = [verdict.outcome, verdict.why]
    return found


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def rows(count):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [{"x": each, "y": each.sum().reshape(1).sin()} for each in x]


def loss_of(model, batch):
    return functional.mse_loss(model(batch["x"]), batch["y"])


def off(model, count, lr=0.5):
    """How far a model is from one update with all rows."""
    right = make()
    loss_of(right, torch.utils.data.default_collate(rows(count))).backward()
    torch.optim.SGD(right.parameters(), lr=lr).step()
    change = [
        torch.cat([(now - then).detach().flatten() for now, then in zip(one, make().parameters(), strict=True)])
        for one in (model.parameters(), right.parameters())
    ]
    return float((change[0] - change[1]).norm() / change[1].norm())


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make()

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(module, loader, *callbacks, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)


@SCENES("rows that the trainer's sampler gives twice")
def repeated(place):
    """7 rows of 2 in a batch: one rank's last batch has a row of its own and one of the first; 5: it has none."""
    as_torchrun(place)
    found = {}
    for count in (7, 5):
        for name, whole in (("streamed", WholeBatch()), ("cut", WholeBatch(micro_batch=wb.Rows(1)))):
            module = Regression()
            batch_size, windows = (2, 4) if name == "streamed" else (8, 1)
            fit(module, DataLoader(rows(count), batch_size=batch_size), whole, accumulate_grad_batches=windows)
            found[f"{name} {count}"] = off(module.net, count)
            found[f"{name} {count} said"] = [each for each in whole.reasons if "twice" in each]
    module = Regression()
    fit(module, DataLoader(rows(7), batch_size=8))
    found["Lightning alone"] = off(module.net, 7)
    return found


@SCENES("ranks with unequally many batches")
def unequal(place):
    as_torchrun(place)
    module = Regression()
    own = DataLoader(rows(4 + place.rank), batch_size=1)
    try:
        fit(module, own, WholeBatch(), use_distributed_sampler=False, accumulate_grad_batches=8)
    except wb.ConfigError as error:
        return {"said": error.found}
    return {"said": "nothing"}


@SCENES("manual optimization")
def manual(place):
    as_torchrun(place)

    class Two(LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.one, self.other = make(), make()

        def training_step(self, batch, batch_idx):
            of_one, of_other = windows(self)
            of_one.backward(loss_of(self.one, batch) + 0 * self.other[0].weight.sum(), targets=len(batch["x"]))
            through = {"x": batch["x"], "y": batch["y"] + self.one(batch["x"]).detach()}
            of_other.backward(loss_of(self.other, through) + self.one[0].weight.sum(), targets=len(batch["x"]))

        def configure_optimizers(self):
            return [torch.optim.SGD(each.parameters(), lr=0.5) for each in (self.one, self.other)]

    module = Two()
    own = rows(12)[place.rank :: 2]
    batches = [torch.utils.data.default_collate(own[start:end]) for start, end in ((0, 2), (2, 3), (3, 6))]
    if place.rank == 1:
        batches[0] = None
    updates = []
    loader = DataLoader(batches, batch_size=None)
    fit(module, loader, WholeBatch(windows=(3, 1), on_update=updates.append), use_distributed_sampler=False)
    right = make()
    seen = [row for place, row in enumerate(rows(12)) if place not in (1, 3)]  # those of the batch that is None
    loss_of(right, torch.utils.data.default_collate(seen)).backward()
    torch.optim.SGD(right.parameters(), lr=0.5).step()
    error = max(float((a - b).abs().max()) for a, b in zip(module.one.parameters(), right.parameters(), strict=True))
    same = [None, None]
    dist.all_gather_object(same, [each.detach() for each in module.other.parameters()])
    return {
        "off": error,
        "targets": [update.targets for update in updates],
        "same": all(map(torch.equal, *same)),
    }


@SCENES("each row once")
def once(place):
    """Every row comes once, whatever the numbers of rows, for each way in which Accelerate shares them out."""
    as_torchrun(place)
    found = {}
    for split in (False, True):
        for dispatch in (False, True):
            options = DataLoaderConfiguration(split_batches=split, dispatch_batches=dispatch)
            accelerator = fresh(1, dataloader_config=options)
            wrong, alone = [], 0
            for count in (1, 3, 4, 5, 7, 8, 9, 13):
                loader = accelerator.prepare(DataLoader(range(count), batch_size=4))
                for keep in (True, False):
                    batches = list(each_row_once(accelerator, loader)) if keep else list(loader)
                    own = [row for each in batches if each is not None for row in each.tolist()]
                    everybody = [None, None]
                    dist.all_gather_object(everybody, (own, len(batches)))
                    (mine, some), (others, more) = everybody
                    right = sorted(mine + others) == list(range(count)) and some == more
                    if keep and not right:
                        wrong.append([count, mine, others, some, more])
                    alone += not keep and not right
            found[f"split {split}, dispatched {dispatch}"] = [wrong, alone]
    return found


@SCENES("accelerate")
def accelerated(place):
    """One update with 7 rows, 2 in a batch; its schedule is stepped once, by Accelerate twice."""
    as_torchrun(place)
    found = {}
    for name in ("ours", "ours, rows twice", "Accelerate's"):
        accelerator = fresh(2)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        loader = DataLoader(rows(7), batch_size=2)
        ready, stepper, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
        if name == "Accelerate's":
            for batch in loader:
                with accelerator.accumulate(ready):
                    accelerator.backward(loss_of(ready, batch))
                    stepper.step()
                    schedule.step()
                    stepper.zero_grad()
        else:
            exact = accumulator(accelerator, ready, stepper, loss_of, lr_scheduler=schedule)
            batches = each_row_once(accelerator, loader) if name == "ours" else loader
            updates = list(exact.updates(batches, micro_batches=accelerator.gradient_accumulation_steps))
            found[f"{name}, rows"] = [update.rows for update in updates]
            found[f"{name}, said"] = [each for each in exact.reasons if "twice" in each]
        found[name] = off(model, 7)
        found[f"{name}, rate"] = optimizer.param_groups[0]["lr"]
    return found


@SCENES("accumulate beside")
def beside(place):
    as_torchrun(place)
    accelerator = fresh(2)
    model = make()
    ready, stepper = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    exact = accumulator(accelerator, ready, stepper, loss_of)
    batch = torch.utils.data.default_collate(rows(4))
    try:
        with accelerator.accumulate(ready):
            exact.step(batch)
    except wb.WindowError as error:
        said = error.found
    exact.step(batch)
    return {"said": said, "off": off(model, 4)}


@SCENES("sharded by FSDP2")
def sharded(place):
    """Accelerate takes FSDP for accelerators alone; told so on a CPU, it does there what it does elsewhere."""
    as_torchrun(place)
    accelerator = fresh(4)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator.state.__dict__.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(7), batch_size=2))
    exact = accumulator(accelerator, model, optimizer, loss_of)
    steps = accelerator.gradient_accumulation_steps
    updates = list(exact.updates(each_row_once(accelerator, loader), micro_batches=steps))
    whole = make()
    whole.load_state_dict({name: each.full_tensor() for name, each in model.state_dict().items()})
    return {"off": off(whole, 7), "rows": [update.rows for update in updates]}


class SaveAt(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1 and self.path is not None:
            trainer.save_checkpoint(self.path)


@SCENES("a checkpoint inside a window")
def stopped(place):
    as_torchrun(place)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    path = Path(folder[0], "inside.ckpt")
    own = rows(12)[place.rank :: 2]
    batches = [torch.utils.data.default_collate(own[start:end]) for start, end in ((0, 2), (2, 3), (3, 6))]
    trained = []
    for saves, goes_on in ((path, None), (None, path)):
        module = Regression()
        loader = Resumable(Task(make, batches))
        options = {"accumulate_grad_batches": 3, "use_distributed_sampler": False, "ckpt_path": goes_on}
        fit(module, loader, WholeBatch(), SaveAt(saves), **options)
        trained.append(torch.cat([each.detach().flatten() for each in module.parameters()]))
    state = torch.load(path, weights_only=True)
    kept = next(each for name, each in state["callbacks"].items() if "WholeBatch" in name)
    return {
        "off": off(module.net, 12),
        "same": torch.equal(*trained),
        "open": [each["window"]["open"] is not None for each in kept["ranks"]],
    }
