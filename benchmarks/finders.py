"""How do other systems find a batch size, and what does it cost them? On a device that holds so many rows and no more.

Nothing is timed here: it is counted how often training began anew, over how many rows it had moved the weights by then
(they are moved by these rows once more), how many rows passed through the model in trials whose result was thrown away,
and how many rows an update sees in the end.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import find_executable_batch_size
from lightning import pytorch as lightning
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn

import wholebatch as wb

ROWS = 96
"""Rows of the data, and of the update that is asked for."""

EPOCHS = 4


@dataclass
class Device:
    """Holds some rows; fewer once the weights have moved over so many.

    Attributes:
        holds: Rows of a micro-batch.
        later: The same, later.
        after: How many rows the weights move over before that.
        seen: Rows that passed through the model.
        moved: Rows over which the weights moved, an entry an update.
    """

    holds: int
    later: int
    after: int
    seen: int = 0

    def __post_init__(self) -> None:
        self.moved: list[int] = []
        self._waiting = 0

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        """Run a micro-batch, or run out of memory."""
        if len(x) > (self.holds if sum(self.moved) < self.after else self.later):
            self._waiting = 0
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.seen += len(x)
        self._waiting += len(x)
        return (model(x) - x).square().mean()

    def stepped(self, *_: Any) -> None:
        """Count an update."""
        self.moved.append(self._waiting)
        self._waiting = 0


@dataclass(frozen=True)
class Finding:
    """What a system did.

    Attributes:
        began: How often training began.
        twice: Rows over which the weights moved in runs that were broken off.
        thrown_away: Rows that passed through the model for nothing: in trials and in what was broken off or undone.
        batch: Rows of the last update.
        ended: Whether training came to its end.
    """

    began: int
    twice: int
    thrown_away: int
    batch: int
    ended: bool = True

    def row(self, who: str) -> list[str]:
        """Return a row of the table."""
        kept = "yes" if self.batch == ROWS else f"no, {self.batch} of {ROWS}"
        return [
            who,
            str(self.began - 1),
            str(self.twice),
            str(self.thrown_away),
            kept if self.batch else "-",
            "yes" if self.ended else "no: the error of memory ended it",
        ]


def fresh(device: Device) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(device.stepped)
    return model, optimizer, torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))


def accelerate(device: Device) -> Finding:
    """``find_executable_batch_size``, as its documentation has it."""
    model, optimizer, rows = fresh(device)
    began: list[int] = []

    @find_executable_batch_size(starting_batch_size=ROWS)
    def train(batch_size: int) -> int:
        began.append(len(device.moved))
        for _ in range(EPOCHS):
            for part in rows.split(batch_size):
                optimizer.zero_grad()
                device.loss(model, part).backward()
                optimizer.step()
        return batch_size

    return _told(device, began, train())


def trainer(device: Device) -> Finding:
    """``TrainingArguments(auto_find_batch_size=True)``."""
    model, optimizer, rows = fresh(device)
    began: list[int] = []

    class Trainer(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return device.loss(model, inputs["x"])

    class Begin(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            began.append(len(device.moved))

    with tempfile.TemporaryDirectory(prefix="wholebatch-trainer-") as folder:
        made = Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                auto_find_batch_size=True,
                per_device_train_batch_size=ROWS,
                num_train_epochs=EPOCHS,
                max_grad_norm=0.0,
                remove_unused_columns=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"x": row} for row in rows],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[Begin()],
        )
        made.remove_callback(transformers.PrinterCallback)
        made.train()
    return _told(device, began, device.moved[-1])


def lightning_finder(device: Device) -> Finding:
    """``BatchSizeFinder``, doubling from its first size."""
    model, optimizer, rows = fresh(device)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = model, 2

        def training_step(self, x: Tensor, _place: int) -> Tensor:
            return device.loss(self.model, x)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def on_train_epoch_start(self) -> None:
            if not began and not finder.under_way:
                began.append(len(device.moved))

    class Finder(BatchSizeFinder):
        under_way = False

        def scale_batch_size(self, *given: Any) -> None:
            self.under_way = True
            super().scale_batch_size(*given)
            self.under_way = False

    began: list[int] = []
    finder = Finder()
    with tempfile.TemporaryDirectory(prefix="wholebatch-lightning-") as folder, quiet():
        made = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=EPOCHS,
            callbacks=[finder],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        try:
            made.fit(Module())
            ended = True
        except torch.OutOfMemoryError:
            ended = False
    trials = sum(device.moved[: began[0]])
    useful = sum(device.moved[began[0] :])
    return Finding(1, 0, device.seen - useful if trials else 0, device.moved[-1], ended)


def wholebatch(device: Device) -> Finding:
    """``wb.Accumulator(micro_batch="auto")``, which plans, and cuts finer where that was wrong."""
    model, optimizer, rows = fresh(device)
    accumulator = wb.Accumulator(model, optimizer, device.loss, micro_batch="auto", check=None)
    updates = [accumulator.step(rows) for _ in range(EPOCHS)]
    trained = sum(update.rows or 0 for update in updates)
    return Finding(1, 0, device.seen - trained, updates[-1].rows or 0)


FINDERS: dict[str, Callable[[Device], Finding]] = {
    "accelerate, find_executable_batch_size": accelerate,
    "Lightning, BatchSizeFinder": lightning_finder,
    "Trainer, auto_find_batch_size": trainer,
    "wholebatch, auto": wholebatch,
}


def _told(device: Device, began: list[int], batch: int) -> Finding:
    """What was done by one that begins anew."""
    useful = sum(device.moved[began[-1] :])
    return Finding(len(began), sum(device.moved[: began[-1]]), device.seen - useful, batch)


@contextmanager
def quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
