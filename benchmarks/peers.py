"""How are other systems driven? As their documentation says, with everything off that is not training.

Each function trains a model for some updates, and returns when its training loop began and when it made each update, in
CPU seconds of this process. So what a system does before and after its loop is nobody's time. Lightning runs as it
advises for measuring its overhead (``barebones=True``). The Trainer runs without logs, checkpoints, bars, clipping and
its search for losses that are not numbers. One model, one optimizer and one loss for all: what they add is theirs.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import transformers
from accelerate import Accelerator
from lightning import pytorch as lightning
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

PACKAGES = ["accelerate", "lightning", "transformers"]
"""Whose versions belong on a result page."""

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a micro-batch, as a mean."""


class Loader:
    """Micro-batches that are ready: a list, which Lightning would take for several loaders."""

    def __init__(self, micro_batches: Sequence[Any]) -> None:
        self._micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._micro_batches)


class Clock:
    """The time at the begin of a training loop, and at each update after it."""

    def __init__(self, optimizer: Optimizer, now: Callable[[], float] = time.process_time) -> None:
        self.times: list[float] = []
        self._now = now
        self._hook = optimizer.register_step_post_hook(lambda *_: self.tick())

    def tick(self) -> None:
        self.times.append(self._now())

    def stop(self, updates: int) -> list[float]:
        """Return the times, and make sure that there were as many updates as the others make."""
        self._hook.remove()
        if len(self.times) != updates + 1:
            raise RuntimeError(f"{len(self.times) - 1} updates instead of {updates}")
        return self.times


def with_accelerate(
    model: nn.Module, optimizer: Optimizer, loss: Loss, micro_batches: Sequence[Any]
) -> Callable[[], None]:
    """Return a loop over one window as its guide "Performing gradient accumulation" has it.

    Its wrapped loader is left out, in its favour.
    """
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    def window() -> None:
        # All accelerators of a process share this, that of the Trainer too.
        accelerator.gradient_accumulation_steps = len(micro_batches)
        for micro_batch in micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, micro_batch))
                optimizer.step()
                optimizer.zero_grad()

    return window


def with_lightning(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    loader: Iterable[Any],
    *,
    window: int,
    updates: int,
    epochs: int = 1,
    now: Callable[[], float] = time.process_time,
    trainer: Mapping[str, Any] = MappingProxyType({}),
) -> list[float]:
    """Train with ``Trainer(accumulate_grad_batches=window)``.

    Args:
        model: Trained in place.
        optimizer: Its steps are timed.
        loss: A mean; Lightning divides it by the window.
        loader: Yields micro-batches.
        window: Micro-batches in a window.
        updates: How many updates there will be in all.
        epochs: How often the loader is run through.
        now: Tells the time.
        trainer: What else the ``Trainer`` is told.

    Returns:
        Seconds, of the CPU unless `now` tells others: when the loop began, and when each update was made.
    """

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def on_train_epoch_start(self) -> None:
            if not clock.times:
                clock.tick()

        def training_step(self, micro_batch: Any, _place: int) -> Tensor:
            return loss(self.model, micro_batch)

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        fitting = lightning.Trainer(
            accelerator="cpu", devices=1, barebones=True, accumulate_grad_batches=window, max_epochs=epochs, **trainer
        )
        clock = Clock(optimizer, now)
        fitting.fit(Module(), loader)
    return clock.stop(updates)


def with_trainer(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss | None,
    dataset: Sequence[Any],
    *,
    window: int,
    updates: int,
    collate: Callable[[list[Any]], Any] | None = None,
    rows: int = 1,
    loss_of_outputs: Callable[..., Tensor] | None = None,
    sampling: str = "sequential",
) -> list[float]:
    """Train with the Hugging Face Trainer.

    Args:
        model: Trained in place.
        optimizer: Its steps are timed.
        loss: A mean, which the Trainer divides by the window, as a subclass with ``compute_loss``; or None.
        dataset: Rows, or, without `collate`, micro-batches as they are: then its wrapped loader is left out as well.
        window: Micro-batches in a window (``gradient_accumulation_steps``).
        updates: How many updates there will be, of one run through the dataset each, if it has no more rows.
        collate: Makes a micro-batch of some rows (``data_collator``).
        rows: Rows in a micro-batch (``per_device_train_batch_size``).
        loss_of_outputs: ``compute_loss_func(outputs, labels, num_items_in_batch)`` in place of `loss`.
        sampling: ``train_sampling_strategy``.

    Returns:
        CPU seconds: when the loop began, and when each update was made.
    """

    class Trainer(transformers.Trainer):
        if loss is not None:
            loss_is_scaled_for_ga = False

            def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
                return loss(model, inputs)

        if collate is None:

            def get_train_dataloader(self) -> Any:
                return dataset

    class Begin(transformers.TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            if not clock.times:
                clock.tick()

    with tempfile.TemporaryDirectory(prefix="wholebatch-trainer-") as folder:
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=window,
                max_steps=updates,
                max_grad_norm=0.0,
                train_sampling_strategy=sampling,
                remove_unused_columns=False,
                logging_strategy="no",
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset,
            data_collator=collate,
            compute_loss_func=loss_of_outputs,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[Begin()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        clock = Clock(optimizer)
        trainer.train()
    return clock.stop(updates)
