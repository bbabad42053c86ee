"""How does a job run? From a configuration to a trained model, a log, a report and the line that sums it up."""

import logging
import os
import platform
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import wholebatch
from wholebatch.core.errors import WholeBatchError, WindowError
from wholebatch.core.record import Update
from wholebatch.core.schedules import ByNoise, Rates
from wholebatch.core.split import Rows, Tokens
from wholebatch.engine import memory
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.device import input_device
from wholebatch.engine.reasons import Reasons
from wholebatch.engine.rehearsal import is_rehearsal
from wholebatch.evidence.comparison import compare
from wholebatch.evidence.report import REPORT_NAME, write_report
from wholebatch.evidence.runlog import LOG_NAME
from wholebatch.evidence.sinks import JsonLines, Sink, SinkError, Sinks
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.finding import find_recipe
from wholebatch.recipes.growth import schedule_of
from wholebatch.recipes.ingredients import cut_of, model_of, optimizer_of, rows_of, seed_everything
from wholebatch.recipes.loader import LogicalBatches
from wholebatch.recipes.outlets import open_sink, require
from wholebatch.recipes.protocol import Recipe
from wholebatch.recipes.ranks import Place, joined
from wholebatch.recipes.summary import Summary
from wholebatch.recipes.validation import validate
from wholebatch.recipes.wrapping import Wrapped

_log = logging.getLogger("wholebatch")


def train(config: TrainConfig, sinks: Iterable[Sink] = (), *, recipe: Recipe | None = None) -> Summary:
    """Train what a configuration says.

    The run folder gets ``log.jsonl``, one event a line, and at the end ``report.html``, whichever way the run ends.
    Ctrl-C ends it as an outcome, not as an exception: the open window leaves no trace.

    Started by torchrun it is one of several ranks, which share the rows of each logical batch; the first rank alone
    writes log, report and sinks.

    Args:
        config: What was asked for.
        sinks: Where events go besides the log and what `config.sink` names. They are closed at the end. One that fails
            is closed with a warning, and the run goes on.
        recipe: What to train, if it was found already; else `config` names it.

    Returns:
        What was achieved; its `line` says it.

    Raises:
        ConfigError: The recipe cannot be used as stated, or the log cannot be written where it is wanted.
        SinkError: The log could not be written any more.
        Exception: Whatever stopped the run, once log and report say so.

    Example:
        >>> config = TrainConfig(recipe="text", logical_batch="8 rows", updates=1, compare=False, out="first")
        >>> summary = train(config)
        >>> summary.status, summary.updates, summary.report.name
        ('done', 1, 'report.html')
    """
    recipe = recipe if recipe is not None else find_recipe(config.recipe)
    with joined() as place:
        return _train(_Run(config, recipe, place), list(sinks) if place.first else [])


def _train(run: "_Run", sinks: list[Sink]) -> Summary:
    config, place = run.config, run.place
    began = time.monotonic()
    if place.first:
        folder = Path(config.out) if config.out is not None else _new_folder(config.recipe)
        require(config.sink)
        run.log = JsonLines(folder / LOG_NAME)
        (folder / REPORT_NAME).unlink(missing_ok=True)  # of an earlier run in the same place
        run.others = Sinks(*sinks)
        run.summary.folder = folder
    failure = "the run was ended from outside"
    try:
        if config.sink and place.first:
            run.others = Sinks(*sinks, *(open_sink(name, folder) for name in config.sink))
        with place.at_work():
            run.go()
        run.summary.status = "done"
    except KeyboardInterrupt:
        if place.stopped == signal.SIGTERM:
            place.await_report()
            raise place.why_stopped() from None
        run.summary.status = "interrupted"
    except Exception as error:
        if place.stopped != signal.SIGINT:  # else it is what becomes of a message to a rank that has stopped too
            found = error.found if isinstance(error, WholeBatchError) else str(error)
            failure = f"{type(error).__name__}: {found}"
            error.add_note(f"What the run did until then is in {run.summary.folder}.")
            place.await_report()
            raise
        run.summary.status = "interrupted"
    finally:
        run.summary.seconds = time.monotonic() - began
        if place.first:
            run.finish(f"Failed: {failure}" if run.summary.status == "failed" else run.summary.line)
            place.written()
    return run.summary


class _Run:
    """One run: what it was told, and how far it is."""

    def __init__(self, config: TrainConfig, recipe: Recipe, place: Place) -> None:
        self.config = config
        self.recipe = recipe
        self.place = place
        self.whole = cut_of(recipe, config.logical_batch)
        self.cut: Rows | Tokens | Literal["auto"] = (
            "auto" if config.micro_batch == "auto" else cut_of(recipe, config.micro_batch)
        )
        self.log: Sink = Sinks()
        self.others = Sinks()
        self.device = torch.device("cpu")
        self.summary = Summary(logical_batch=str(config.logical_batch), rank=place.rank, ranks=place.ranks)
        self.reasons: list[str] = []
        self.said = config.logical_batch.count  # the last size that was spoken of

    def go(self) -> None:
        """Train, validate and compare."""
        if self.recipe.length is not None:
            # oneDNN keeps what it compiled for each shape, and where lengths vary every micro-batch has a shape of its
            # own: the process would grow from update to update.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
        seed_everything(self.config.seed)
        rows, held_out = rows_of(self.recipe, "train"), rows_of(self.recipe, "validation")
        model = model_of(self.recipe, self.config.batch_norm)
        self.device = input_device(model)
        wrapped = Wrapped(model, self.recipe, self.config.wrapper, self.config.communication, self.place.ranks)
        schedule = schedule_of(self.config)
        optimizer = optimizer_of(self.recipe, model, self.config.lr)
        accumulator = Accumulator(
            wrapped.trained,
            optimizer,
            wrapped.loss,
            targets=self.recipe.targets,
            reduction=self.recipe.reduction,
            micro_batch=self.cut,
            memory=self.config.memory,
            collate=self._collate,
            precision=self.config.precision,
            accumulate_in=self.config.accumulate_in,
            clip_norm=self.config.clip_norm or None,
            communication=self.config.communication,
            noise_scale=self.config.noise_scale or isinstance(schedule, ByNoise),
            batch_norm="per_micro_batch" if self.config.batch_norm == "per_micro_batch" else "refuse",
        )
        self.reasons = accumulator.reasons
        if not self.place.first:
            seed_everything((self.config.seed + self.place.rank) % 2**32)  # equal weights, and other dropout
        batches = LogicalBatches(
            rows, self.config.logical_batch, length=self.recipe.length, seed=self.config.seed, schedule=schedule
        )
        if self.config.grow_to is None:
            self._say_if_all(batches.whole)
        rates = Rates(optimizer, at=schedule.at(0, 0), rule=self.config.lr_rule) if self.config.grow_to else None
        planned = self.config.updates or _planned(batches, self.config.epochs or 1)
        self._start(model, num_rows=len(rows), planned=planned)
        done = 0
        for epoch in count(1):
            for batch in batches.epoch(epoch, done):
                if rates is not None:
                    self._follow(rates, schedule.at(done, epoch - 1))
                update = self._update(epoch, accumulator, batch)
                schedule.note(update, batches.amount(batch))
                done += 1
                if done == self.config.updates:
                    break
            if held_out:
                with wrapped.whole():
                    self._validate(epoch, done, model, accumulator, held_out)
            if done == self.config.updates or (self.config.updates is None and epoch == (self.config.epochs or 1)):
                break
        if not self.summary.updates:
            raise WindowError(
                f"None of {self.summary.skipped} windows became an update: {update.skipped}.",
                hint="the log tells of each; look at the rows, what the loss returns for them, and the learning rate.",
            )
        held = self.place.largest([self.summary.rows_at_once, self.summary.tokens_at_once or -1])
        self.summary.rows_at_once, tokens = held
        self.summary.tokens_at_once = tokens if tokens >= 0 else None
        apart = wrapped.apart(lambda: model_of(self.recipe, self.config.batch_norm)) if self.config.compare else None
        self.place.leave()
        if apart is not None and self.place.first:
            self._compare(apart, next(batches.epoch(1)))

    def finish(self, summary: str) -> None:
        """Write the last event and the report, as far as that is still possible."""
        event = {
            "event": "finish",
            "status": self.summary.status,
            "updates": self.summary.updates,
            "skipped": self.summary.skipped,
            "seconds": self.summary.seconds,
            "summary": summary,
            "reasons": list(self.reasons),
        }
        try:
            self.log.write(event)
        except SinkError as error:  # the disk is still full; what stands in the log is reported all the same
            _log.warning(error.found)
        finally:
            self.log.close()
            try:
                self.others.write(event)
            finally:
                self.others.close()
        try:
            self.summary.report = write_report(self.summary.folder)
        except WholeBatchError as error:
            self.summary.why_no_report = f"{error.found} hint: {error.hint}"

    def _write(self, event: Mapping[str, Any]) -> None:
        self.log.write(event)
        self.others.write(event)

    def _start(self, model: nn.Module, *, num_rows: int, planned: int) -> None:
        self._write(
            {
                "event": "start",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "recipe": self.config.recipe,
                "logical_batch": self.summary.logical_batch,
                "micro_batch": str(self.config.micro_batch),
                "batch_norm": self.config.batch_norm if self.config.batch_norm != "refuse" else None,
                "precision": self.config.precision,
                "seed": self.config.seed,
                "device": str(self.device),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "rows": num_rows,
                "ranks": self.place.ranks,
                "updates_planned": planned,
                "budget_bytes": None,
                "config": {key: str(value) if isinstance(value, Amount) else value for key, value in self.config},
                "reasons": list(self.reasons),
                "versions": {
                    "wholebatch": wholebatch.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            }
        )

    def _say_if_all(self, held: int) -> None:
        """Say so where all rows together are less than a logical batch was to be."""
        stated = self.config.logical_batch
        if held < stated.count:
            self.summary.logical_batch = str(replace(stated, count=held))
            say = Reasons(self.reasons)
            say(f"The data hold {self.summary.logical_batch}, so that no logical batch has {stated}.")

    def _follow(self, rates: Rates, size: int) -> None:
        """Let the learning rate follow the logical batch, and say so."""
        first, unit = self.config.logical_batch.count, self.config.logical_batch.unit
        rates.follow(size)
        self.summary.logical_batch = (
            str(self.config.logical_batch) if size == first else f"{first:,} to {size:,} {unit}"
        )
        if size >= 1.25 * self.said and self.place.first:
            _log.info(
                f"Logical batches have grown from {self.said:,} to {size:,} {unit}, learning rate {rates.lr:.3g}."
            )
            self.said = size

    def _update(self, epoch: int, accumulator: Accumulator, batch: list[Any]) -> Update:
        update = accumulator.step(self.place.share(batch, self.recipe.length))
        memory.release(self.device)  # so that each update's peak is its own
        self.summary.updates += update.applied
        self.summary.skipped += not update.applied
        self.summary.cut |= update.micro_batches > 1
        self.summary.joined = any(said.startswith(_JOINS) for said in accumulator.reasons)
        self._write({"event": "update", "epoch": epoch, **update.to_dict()})
        return update

    def _validate(self, epoch: int, done: int, model: nn.Module, accumulator: Accumulator, rows: Sequence[Any]) -> None:
        cut = self.cut if self.cut != "auto" else self.whole
        self.summary.measures = validate(model, self.recipe, rows, micro_batch=cut, autocast=accumulator.autocast)
        self._write({"event": "validation", "epoch": epoch, "update": done, "measures": self.summary.measures})

    def _compare(self, model: nn.Module, batch: list[Any]) -> None:
        """Measure what the cut saved. The run has succeeded already, so that nothing found here makes it fail."""
        why = "the logical batch was not cut" if not self.summary.cut else "one row cannot be cut"
        why = why if self.place.alone else "other ranks are still joined"
        found: dict[str, Any] = {}
        if self.place.alone and self.cut != "auto" and self.summary.cut and len(batch) > 1:
            memory.release(self.device)
            _log.info("Comparing one logical batch cut, as a whole, and in the plain loop ...")
            try:
                found = compare(
                    model,
                    self.recipe.loss,
                    batch,
                    micro_batch=self.cut,
                    collate=self.recipe.collate,
                    targets=self.recipe.targets,
                    reduction=self.recipe.reduction,
                    seed=self.config.seed,
                ).to_dict()
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
        self.summary.evidence = found
        self._write({"event": "evidence", **(found or {**dict.fromkeys(_EVIDENCE), "why": why})})

    def _collate(self, rows: list[Any]) -> Any:
        """Collate, and keep count of the most that a micro-batch held."""
        if is_rehearsal():
            return self.recipe.collate(rows)
        self.summary.rows_at_once = max(self.summary.rows_at_once, len(rows))
        if self.recipe.length is not None:
            tokens = len(rows) * max(map(self.recipe.length, rows))
            self.summary.tokens_at_once = max(self.summary.tokens_at_once or 0, tokens)
        return self.recipe.collate(rows)


def _planned(batches: LogicalBatches, epochs: int) -> int:
    """How many updates some epochs have, as far as is known: one by noise may grow, and there are fewer then."""
    done = 0
    for epoch in range(1, epochs + 1):
        done += batches.count(epoch, done)
    return done


_JOINS = 'lockstep="auto" joins the graphs of all micro-batches'
_EVIDENCE = (
    "gradient_error",
    "gradient_ok",
    "undivided_peak_bytes",
    "cut_peak_bytes",
    "targets_per_second",
    "plain_targets_per_second",
    "speedup",
)


def _new_folder(recipe: str) -> Path:
    """Return a folder in ``runs`` that no earlier run has used."""
    name = Path(recipe.partition(":")[0]).stem if ".py" in recipe else recipe.partition(":")[0]
    folder = Path("runs") / name
    for place in count(2):
        if not folder.exists():
            break
        folder = Path("runs") / f"{name}-{place}"
    return folder
