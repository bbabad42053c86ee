"""How do the micro-batches of a window meet? One by one after a first pass, or in one graph; and why."""

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import nn

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.fit.cutting import Place
from wholebatch.engine.meetings.company import Again, recomputing_with
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.meetings.far import RankFailedError
from wholebatch.engine.meetings.inner import Inner
from wholebatch.engine.meetings.joined import run_joined
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.meetings.replay import Run, run_replayed
from wholebatch.engine.meetings.taps import Taps
from wholebatch.engine.ranks.group import Group
from wholebatch.engine.reasons import Say
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.weighing import Weighing
from wholebatch.engine.window import Window

Execution: TypeAlias = Literal["auto", "replay", "joined"]
"""How micro-batches meet: one by one after a first pass without graphs, or in one graph through all."""


class Lockstep:
    """What is known of the meetings of an accumulator's micro-batches, and the way in which they run.

    A model that never meets pays nothing: its windows run as ever, until a micro-batch comes to a meeting. Then that
    window is made again, and those that follow know.

    Args:
        execution: As for `wb.Accumulator`.
        model: The module.
        device: Where it is.
        group: The ranks that make an update together.
    """

    def __init__(self, execution: Execution, model: nn.Module, device: torch.device, group: Group) -> None:
        self._execution = execution
        self._model = model
        self._device = device
        self._group = group
        self._found = False
        self._joined: str | None = None
        self._learning: set[tuple[object, ...]] = set()

    @property
    def meets(self) -> bool:
        """Whether it is known that the micro-batches of a window meet."""
        return self._found or self._group.has_met or bool(exact_layers(self._model))

    def learn(self, again: Again) -> None:
        """Take note of what ended an attempt at a window.

        Raises:
            MeetingError: The graphs have to be joined, and the user wants a replay.
        """
        if not again.joined:
            self._found = True
            return
        if self._execution == "replay":
            raise MeetingError(
                f'lockstep="replay" is not possible here: {again.why}.',
                hint='pass lockstep="auto" or "joined", which holds the graphs of all micro-batches at once.',
            ) from None
        self._joined = again.why

    def run(
        self,
        window: Window,
        transaction: Transaction,
        runs: Sequence[Run],
        rows: Sequence[int | None],
        cut: Sequence[Indices] | None,
        place: Place,
        say: Say,
    ) -> None:
        """Add the micro-batches of a window to it.

        Args:
            window: Open and empty.
            transaction: Has the buffers as they are now.
            runs: The forward pass of each micro-batch.
            rows: Of each micro-batch, if known. Unit: rows.
            cut: Where they stand in the logical batch, if known.
            place: Told which micro-batch runs.
            say: Takes the reason of the choice.

        Raises:
            Again: The graphs have to be joined after all.
            MeetingError: They do not meet at the same places, or not in the second pass as in the first.
            RankError: Another rank failed.
            Exception: What the user's code raised.
        """

        weighing = window.intake.rehearsal()
        joined = self._why_joined()
        reach = self._group.reach(
            cut,
            len(runs),
            self._model,
            self._device,
            lambda: (weighing if joined is None else window.intake.weighing).reference,
        )
        failed = False
        try:
            moving = Moving(self._model)
            self._run(window, transaction, runs, rows, reach, weighing, place, joined, moving, say)
            moving.end()
        except RankFailedError:
            failed = True
        if failed:
            self._group.give_up()

    def _run(
        self,
        window: Window,
        transaction: Transaction,
        runs: Sequence[Run],
        rows: Sequence[int | None],
        reach: Reach,
        weighing: Weighing,
        place: Place,
        joined: str | None,
        moving: Moving,
        say: Say,
    ) -> None:
        def before(number: int) -> None:
            place.rows = rows[number]

        try:
            reach.open()
            if not runs:
                return
            if joined is None:
                met = run_replayed(
                    window,
                    runs,
                    rows,
                    reach,
                    weighing=weighing,
                    model=self._model,
                    device=self._device,
                    transaction=transaction,
                    before=before,
                    learning=self._learning,
                    moving=moving,
                )
                if met and self._execution == "auto":
                    say(f'The micro-batches meet at {met[0]}. lockstep="auto" replays: {_REPLAY}.', logging.INFO)
                return
            self._join(window, runs, rows, reach, place, moving)
            if self._execution == "auto":
                say(f'lockstep="auto" joins the graphs of all micro-batches: {joined}.', logging.INFO)
        except Again as again:
            reach.say_again(again.why)
            raise

    def _join(
        self,
        window: Window,
        runs: Sequence[Run],
        rows: Sequence[int | None],
        reach: Reach,
        place: Place,
        moving: Moving,
    ) -> None:
        taps = Taps(self._model, window.sums.narrow, window.sums.receive)

        def take_turn(number: int) -> None:
            place.rows = rows[number]
            taps.take_turn(number)

        try:
            parts, minutes = run_joined(
                runs,
                reach,
                model=self._model,
                device=self._device,
                moving=moving,
                before=take_turn,
                inner=Inner(reach.ranks),
            )
        finally:
            taps.put_back()
        place.rows = None  # the backward pass is that of all micro-batches
        with recomputing_with(minutes):
            window.intake.add_together(list(zip(parts, rows, strict=True)), *reach.roots())
        reach.close()

    def _why_joined(self) -> str | None:
        if self._execution == "replay":
            return None
        if self._execution == "joined":
            return 'lockstep="joined"'
        layers = exact_layers(self._model)
        if layers:
            more = f" and {len(layers) - 3} layers more" if len(layers) > 3 else ""
            return f"batch norm is exact in {', '.join(layers[:3])}{more}, and each layer depends on those before it"
        return self._joined


_REPLAY = (
    "no meeting needs the gradient of an earlier one, so a pass without graphs comes first, and then one micro-batch "
    "at a time"
)
