"""How do the micro-batches of a window meet? One by one after a first pass, or in one graph; and why."""

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import nn

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.company import Again, Order, not_over_ranks, recomputing_with
from wholebatch.engine.cutting import Place
from wholebatch.engine.exactnorm import exact_layers
from wholebatch.engine.joined import run_joined
from wholebatch.engine.reasons import Say
from wholebatch.engine.replay import Run, run_replayed
from wholebatch.engine.taps import Taps
from wholebatch.engine.transaction import Transaction
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
    """

    def __init__(self, execution: Execution, model: nn.Module, device: torch.device) -> None:
        self._execution = execution
        self._model = model
        self._device = device
        self._found = False
        self._joined: str | None = None

    @property
    def meets(self) -> bool:
        """Whether it is known that the micro-batches of a window meet."""
        return self._found or bool(exact_layers(self._model))

    def require_reach(self, ranks: int) -> None:
        """Refuse to let micro-batches meet that are on several ranks.

        Raises:
            MeetingError: They would have to.
        """
        if ranks > 1 and self.meets:
            raise not_over_ranks("The micro-batches of this model meet", ranks)

    def learn(self, again: Again, ranks: int = 1) -> None:
        """Take note of what ended an attempt at a window.

        Raises:
            MeetingError: The graphs have to be joined, and the user wants a replay; or there are several ranks.
        """
        if ranks > 1:
            raise not_over_ranks(again.why, ranks) from None
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
            Exception: What the user's code raised.
        """

        def before(number: int) -> None:
            place.rows = rows[number]

        order = Order(cut)
        reason = self._why_joined()
        if reason is None:
            met = run_replayed(
                window,
                runs,
                rows,
                order,
                model=self._model,
                device=self._device,
                transaction=transaction,
                before=before,
            )
            if met and self._execution == "auto":
                say(f'The micro-batches meet at {met[0]}. lockstep="auto" replays: {_REPLAY}.', logging.INFO)
            return
        taps = Taps(self._model, window.narrow, window.receive)

        def take_turn(number: int) -> None:
            before(number)
            taps.take_turn(number)

        try:
            parts, minutes = run_joined(
                runs, order, device=self._device, before=take_turn, kept=list(self._model.parameters())
            )
        finally:
            taps.put_back()
        place.rows = None
        with recomputing_with(minutes):
            window.add_together(list(zip(parts, rows, strict=True)))
        if self._execution == "auto":
            say(f'lockstep="auto" joins the graphs of all micro-batches: {reason}.', logging.INFO)

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
