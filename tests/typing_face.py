"""The public face as users call it. mypy --strict checks this file; nothing runs it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import wholebatch as wb
from wholebatch.integrations.transformers import WholeBatchTrainer

Batch = dict[str, Tensor]


def mean_loss(model: nn.Module, micro_batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(micro_batch["x"]), micro_batch["y"])


def summed_loss(model: nn.Module, micro_batch: Batch) -> tuple[Tensor, Tensor]:
    error = (model(micro_batch["x"]) - micro_batch["y"]) ** 2
    return error.sum(), micro_batch["mask"].sum()


def loss_with_a_penalty(model: nn.Module, micro_batch: Batch) -> tuple[Tensor, int, Tensor]:
    error = (model(micro_batch["x"]) - micro_batch["y"]) ** 2
    penalty = sum((weight.square().sum() for weight in model.parameters()), torch.zeros(()))
    return error.sum(), error.numel(), 1e-4 * penalty


def count_targets(micro_batch: Batch) -> Tensor:
    return micro_batch["mask"].sum()


def length_of_row(row: tuple[Tensor, int]) -> int:
    return len(row[0])


def pad(rows: list[tuple[Tensor, int]]) -> Batch:
    x = nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    return {"x": x, "y": torch.tensor([label for _, label in rows])}


def whole_batches(model: nn.Module, loader: Iterator[Batch]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accumulator = wb.Accumulator(model, optimizer, mean_loss, micro_batch=wb.Rows(8))
    for batch in loader:
        update = accumulator.step(batch)
        assert_type(update, wb.Update)
        assert_type(update.loss, float)
        assert_type(update.grad_norm, float | None)
        assert_type(update.skipped, str | None)
        assert_type(update.peak_bytes, int | None)
    assert_type(accumulator.reasons, list[str])


def a_loop_of_somebody_else(model: nn.Module, loader: Iterator[Batch], scaler: torch.amp.GradScaler) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accumulator = wb.Accumulator(
        model, optimizer, mean_loss, loss_scaler=scaler, before_step=lambda: print(model.training)
    )
    for micro_batch in loader:
        assert_type(accumulator.add(micro_batch, last=False), wb.Window)


def growing_batches(model: nn.Module, loader: Iterator[Batch]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accumulator = wb.Accumulator(model, optimizer, mean_loss, noise_scale=True)
    schedule = wb.schedules.ByNoise(4, largest=64, share=0.5)
    rates = wb.schedules.Rates(optimizer, at=4, rule="sqrt")
    for update in accumulator.updates(loader, micro_batches=schedule):
        assert_type(update.noise_scale, float | None)
        rates.follow(schedule.at(update.number))
    batches = wb.LogicalBatches(1000, wb.schedules.Stepped(8, {2: 16}, by="epoch"))
    assert_type(len(batches), int)
    print(wb.schedules.Change.of(optimizer, 4, "linear"))
    if accumulator.noise is not None:
        assert_type(accumulator.noise.scale, float | None)


def every_option(model: nn.Module, rows: list[tuple[Tensor, int]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    accumulator = wb.Accumulator(
        model,
        optimizer,
        mean_loss,
        targets=count_targets,
        reduction="mean",
        micro_batch=wb.Tokens(4096, length=length_of_row),
        collate=pad,
        whole=("weights",),
        dims={"image": 1},
        precision="bf16",
        accumulate_in="fp32",
        clip_norm=1.0,
        lr_scheduler=scheduler,
        on_nonfinite="raise",
        batch_norm="per_micro_batch",
        check=None,
        reduce_in="bf16",
        communication="once",
        balance="tokens",
    )
    accumulator.step(rows)


def micro_batches_from_a_loader(model: nn.Module, loader: Iterator[Batch]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for update in wb.Accumulator(model, optimizer, summed_loss).updates(loader, micro_batches=8):
        assert_type(update, wb.Update)
    wb.Accumulator(model, optimizer, loss_with_a_penalty)


def a_loop_of_ones_own(generator: nn.Module, critic: nn.Module, source: Iterator[Tensor]) -> None:
    slow = wb.Accumulator(generator, torch.optim.Adam(generator.parameters()))
    fast = wb.Accumulator(critic, torch.optim.Adam(critic.parameters()))
    with slow.window() as slow_window, fast.window() as fast_window:
        for real in source:
            fast_window.backward(critic(real).mean(), targets=len(real))
            slow_window.backward(critic(generator(real)).mean(), targets=len(real))
    assert_type(slow_window.update, wb.Update)

    window = slow.window()
    window.backward(generator(next(source)).mean(), targets=1)
    assert_type(window.close(), wb.Update)
    window = slow.window()
    window.rollback()


def layers_that_see_the_cut(model: nn.Module) -> None:
    assert_type(wb.convert_batch_norm(model, to="group"), nn.Module)
    assert_type(wb.freeze_batch_norm(model), nn.Module)
    assert_type(wb.exact_batch_norm(nn.Sequential(model)), nn.Sequential)
    with wb.offload_to_file(), wb.mask_batch_norm(torch.ones(2, dtype=torch.bool)):
        model(torch.ones(2, 3))


def rows_that_meet(model: nn.Module, batch: Batch) -> Tensor:
    queries, keys = model(batch["x"]), model(batch["y"])
    assert_type(wb.gather(batch["x"]), Tensor)
    assert_type(wb.own_rows(batch["x"]), Tensor)
    assert_type(wb.sum_over_batch(batch["x"]), Tensor)
    assert_type(wb.sum_over_batch(len(batch["x"])), int)
    wb.Accumulator(model, torch.optim.SGD(model.parameters()), rows_that_meet, lockstep="replay")
    loss = wb.losses.info_nce(queries, keys, temperature=torch.tensor(0.1), symmetric=True, negatives=keys)
    loss = loss + wb.losses.batch_hard_triplet(queries, batch["label"], margin="soft")
    return loss + wb.losses.load_balancing(queries.softmax(-1), mask=batch["mask"])


def ranks_that_speak_seldom(model: nn.Module, loader: Iterator[Batch]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with wb.AccumulatedGradientNormalization(
        model, optimizer, mean_loss, local_steps=10, synchronous=False
    ) as exploring:
        for batch in loader:
            step = exploring.step(batch)
            assert_type(step.loss, Tensor | None)
            assert_type(step.merged, bool)
            assert_type(step.stale, int)
        exploring.finish()


def rows_of_a_rank(rows: list[tuple[Tensor, int]]) -> None:
    batches = wb.LogicalBatches([length_of_row(row) for row in rows], rows=512, balance="tokens", shuffle=True, seed=0)
    batches.set_epoch(1)
    assert_type(next(iter(batches)), list[int])
    assert_type(batches.collate(pad)(rows), Any)
    wb.LogicalBatches(len(rows), 512, rank=0, ranks=2)


def will_it_fit(model: nn.Module, rows: list[tuple[Tensor, int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    plan = wb.plan(
        model, optimizer, mean_loss, rows, logical_batch=512, memory="8GiB", collate=pad, length=length_of_row
    )
    assert_type(plan, wb.Plan)
    assert_type(plan.fits, bool)
    assert_type(plan.micro_batch, wb.Rows | wb.Tokens)
    assert_type(plan.peak_bytes, int)
    assert_type(plan.epoch_seconds(10_000), float | None)
    with plan.apply(model) as applied:
        assert_type(applied.blocks, tuple[str, ...])
    applied.undo()
    assert_type(wb.checkpoint_blocks(model, plan.checkpointing), tuple[str, ...])
    wb.uncheckpoint_blocks(model)
    wb.Accumulator(model, optimizer, mean_loss, micro_batch=plan.micro_batch, collate=pad)
    wb.Accumulator(model, optimizer, mean_loss, memory="2GiB")


def evidence(model: nn.Module, batch: Batch) -> None:
    found = wb.verify(model, mean_loss, batch, targets=count_targets, micro_batch=wb.Rows(2))
    print(found)


class Quiet:
    """A sink of one's own needs two methods and no base class."""

    def write(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def sinks(folder: Path, update: wb.Update) -> None:
    sink: wb.sinks.Sink = Quiet()
    sink.write({"event": "update", "epoch": 1, **update.to_dict()})
    sink.close()


def folded(model: nn.Module, batch: Batch) -> float | None:
    optimizer = wb.AdamA(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    return wb.Accumulator(model, optimizer, mean_loss, micro_batch=wb.Rows(8)).step(batch).grad_norm


def trained(model: nn.Module, args: Any, rows: list[Any]) -> wb.Update | None:
    trainer = WholeBatchTrainer(model, args, train_dataset=rows, micro_batch=wb.Rows(8), targets="labels", check=None)
    trainer.train(resume_from_checkpoint=True)
    assert_type(trainer.accumulator, wb.Accumulator | None)
    return trainer.last_update


def stopped(accumulator: wb.Accumulator, path: Path) -> Any:
    wb.save(path, accumulator, loader=None, extra={"epoch": 3})
    accumulator.load_state_dict(accumulator.state_dict())
    return wb.load(str(path), accumulator)
