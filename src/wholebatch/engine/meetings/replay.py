"""One micro-batch at a time, for meetings that do not feed each other.

Let X be what a meeting made of the values x_k of all micro-batches. With L = sum_k L_k(x_k, X, theta), the gradient is

    dL/dtheta = sum_k ( dL_k/dtheta at fixed X  +  <dx_k/dtheta, c_k> ),     c_k = (dX/dx_k)^T sum_j dL_j/dX.

The first pass runs all micro-batches in lockstep with frozen weights, so that a graph exists only from X on, and sums
dL_j/dX. The second pass runs them one by one, with the random numbers and the buffers of the first, takes X as it is,
and enters c_k at x_k. The last one runs once, with a graph that is kept for this. So it costs one forward pass more,
but for the last micro-batch, and never holds more than one micro-batch's graph. What lies between two meetings and
depends on the first one is kept for all micro-batches until the last meeting.

Source: the idea of GradCache, arXiv 2101.06983, for any meeting and any code around it.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wholebatch.core.errors import MeetingError
from wholebatch.core.split import Indices
from wholebatch.engine.meetings.baton import in_lockstep
from wholebatch.engine.meetings.belongings import Belongings
from wholebatch.engine.meetings.call import Call, known_rows
from wholebatch.engine.meetings.company import Again, among, recomputing_with
from wholebatch.engine.meetings.draws import Passage, Stream
from wholebatch.engine.meetings.kept import Brought, Kept, Weights, leads_to
from wholebatch.engine.meetings.moments import Moments
from wholebatch.engine.meetings.moving import Moving
from wholebatch.engine.meetings.outcome import Meeting
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.meetings.recomputing import Minutes, changed_in_place
from wholebatch.engine.objective import Part, learns, require_graph
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.weighing import Weighing
from wholebatch.engine.window import Window


class Run(Protocol):
    """The forward pass of a micro-batch. With ``graph=False`` its loss need not have one."""

    def __call__(self, *, graph: bool = True) -> Part | None: ...


def run_replayed(
    window: Window,
    runs: Sequence[Run],
    rows: Sequence[int | None],
    reach: Reach,
    *,
    weighing: Weighing,
    model: nn.Module,
    device: torch.device,
    transaction: Transaction,
    before: Callable[[int], None],
    learning: set[tuple[object, ...]],
    moving: Moving,
) -> list[str]:
    """Add micro-batches to a window, each from a replay of what a pass in lockstep has shown.

    Args:
        window: Takes their gradients.
        runs: The forward pass of each micro-batch.
        rows: Of each micro-batch, if known. Unit: rows.
        reach: Those that meet.
        weighing: Weighs losses as the window does, and notes nothing in it.
        model: Whose weights are frozen in the first pass.
        device: Where it is.
        transaction: Has the buffers as they are now.
        before: Called with the number of a micro-batch before it goes on.
        learning: Takes the meetings to which only some micro-batches bring something that learns, as keys of calls.
        moving: Takes what meetings do once.

    Returns:
        Where they met.

    Raises:
        Again: A meeting depends on an earlier one, so that the graphs have to be joined; or one is new in `learning`.
        MeetingError: The second pass did not meet where the first one did.
    """
    moments = Moments(model, device, transaction)
    weights = Weights(model)
    with weights.frozen(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        meetings, kept = _first_pass(
            weighing, runs, reach, moments, weights, Belongings(model), device, before, learning, moving
        )
    window.intake.weighing.divide_like(weighing)
    moments.keep(len(runs), len(meetings))
    after = Transaction(model, device)
    after.begin()
    reach.end()
    for meeting in meetings:
        meeting.settle(reach, unique=sum(each.alike == meeting.alike for each in meetings) == 1)
    reach.close()
    twice = runs
    if kept is not None and kept.is_whole:
        twice = runs[:-1]
        before(kept.number)
        _add_kept(window, kept, meetings, rows[kept.number])
    for number, run in enumerate(twice):
        before(number)
        part, replay = _second_pass(run, meetings, moments, number, reach, learning)
        with recomputing_with(replay.minutes):
            window.intake.add_together([(part, rows[number])], replay.values, replay.gradients)
        del part, replay
    after.roll_back()
    return [str(meeting.calls[0]) for meeting in meetings]


def _first_pass(
    weighing: Weighing,
    runs: Sequence[Run],
    reach: Reach,
    moments: Moments,
    weights: Weights,
    belongings: Belongings,
    device: torch.device,
    before: Callable[[int], None],
    learning: set[tuple[object, ...]],
    moving: Moving,
) -> tuple[list[Meeting], Kept | None]:
    """Run all micro-batches in lockstep, with frozen weights but for the last one.

    Returns:
        Their meetings, with the gradients that enter there; and the last micro-batch, unless other ranks take part.
    """
    meetings: list[Meeting] = []
    stream = Stream(device)
    passages = [Passage(stream)]
    kept: Kept | None = None

    def go(number: int) -> None:
        nonlocal kept
        before(number)
        belongings.go_on(number)
        if kept is None and number == len(runs) - 1 and reach.ranks == 1:
            kept = Kept(number)
        if kept is not None and number == kept.number and kept.is_open:
            weights.thaw()
        else:
            weights.freeze()
        moments.keep(number, len(meetings))
        if meetings:
            meetings[-1].passage.go_on()

    def come(number: int) -> None:
        belongings.come(number)
        passages[-1].come()

    def meet(calls: Sequence[Call]) -> list[Any]:
        for each in meetings:
            each.minutes.require_unchanged()
        if meetings and any(needs_what_met(number, call) for number, call in enumerate(calls)):
            raise Again(
                f"what meets at {calls[0]} needs the gradient of what met before, at {meetings[-1].calls[0]}",
                joined=True,
            )
        # The one whose weights learn tells for all whether they bring something that does.
        tells = kept is not None and kept.is_open and calls[0].key not in learning
        is_constant = tells and not any(map(_takes_gradient, calls))
        meetings.append(Meeting(calls, reach, passages[-1], moving, is_constant=is_constant))
        passages.append(Passage(stream))
        answers = meetings[-1].answers(calls, None if kept is None else kept.number)
        if kept is not None:
            kept.meet(calls[kept.number], meetings[-1].leaf_of(kept.number))
        return answers

    def needs_what_met(number: int, call: Call) -> bool:
        if kept is not None and number == kept.number:
            return kept.needs_what_met(call.value)
        if not isinstance(call.value, Tensor) or not call.value.requires_grad:
            return False
        found = [each.leaf_of(number) for each in meetings]  # what requires a gradient may be something of the user's
        return leads_to(call.value, [leaf for leaf in found if leaf is not None])

    def finish(number: int, part: Part | None) -> None:
        losses, roots = weighing.weigh(part) if learns(part) else ([], [])
        entering = [pair for pair in zip(losses, roots, strict=True) if pair[0].requires_grad]
        leaves: list[tuple[Meeting, Tensor]] = []
        minutes = Minutes(reach.ranks)
        for meeting in meetings:
            leaf = meeting.take_leaf(number)
            again = meeting.replayed if leaf is None else partial(_given, leaf)
            minutes.take(meeting.calls, None, again, meeting.passage.of(number), by=meeting.calls[number : number + 1])
            if leaf is not None:
                leaves.append((meeting, leaf))
        is_kept = kept is not None and number == kept.number and kept.end(part, [loss for loss, _ in entering])
        if not entering or not leaves:
            return
        with recomputing_with(minutes):
            found = torch.autograd.grad(
                [loss for loss, _ in entering],
                [leaf for _, leaf in leaves],
                [root for _, root in entering],
                retain_graph=is_kept,
                allow_unused=True,
            )
        for (meeting, _), gradient in zip(leaves, found, strict=True):
            meeting.add(gradient)

    without_graph = [partial(run, graph=False) for run in runs]
    try:
        in_lockstep(
            without_graph,
            reach.rows,
            ranks=reach.ranks,
            device=device,
            before=go,
            meet=meet,
            finish=finish,
            after=come,
        )
    except RuntimeError as error:
        if meetings and "leaf Variable that requires grad" in str(error):
            raise changed_in_place(f"What a meeting returned, the last of them at {meetings[-1].calls[0]},") from error
        # The user's code asks for a gradient of its own, which frozen weights do not have.
        if not _asks_for_graph(error):
            raise
        again = Again(f"a part of the model asks for a graph of its own ({error})", joined=True)
    else:
        for each in meetings:
            each.minutes.require_unchanged()
        return meetings, kept
    raise again


def _add_kept(window: Window, kept: Kept, meetings: Sequence[Meeting], rows: int | None) -> None:
    """Add the micro-batch that ran once to a window, and let its graph go."""
    minutes = Minutes(1)
    values, gradients = [], []
    for meeting, brought, leaf in zip(meetings, kept.brought, kept.got, strict=True):
        again = meeting.replayed if leaf is None else partial(_given, leaf)
        passage, by = meeting.passage.of(kept.number), meeting.calls[kept.number : kept.number + 1]
        minutes.take(meeting.calls, meeting.result, again, passage, by=by)
        gradient = meeting.entering(kept.number)
        if gradient is not None and brought is not None:
            brought.require_unchanged()
            values.append(brought.value)
            gradients.append(gradient)
    part = kept.part
    if learns(part) and not values:
        require_graph(part.loss)
    with recomputing_with(minutes):
        window.intake.add_together([(part, rows)], values, gradients)
    kept.forget()


def _second_pass(
    run: Run,
    meetings: Sequence[Meeting],
    moments: Moments,
    number: int,
    reach: Reach,
    learning: set[tuple[object, ...]],
) -> tuple[Part | None, "_Replay"]:
    """Run a micro-batch a second time, and return what it adds and where gradients enter besides.

    What a meeting came to is a constant there, so that no gradient is computed that is known already. Code that
    differentiates by it itself, or hangs a hook on it, is run again and gets it with a graph.
    """
    while True:
        replay = _Replay(meetings, moments, number, reach, learning)
        moments.restore(number, 0)
        try:
            with among(replay):
                part = run(graph=False)
        except RuntimeError as error:
            if not _asks_for_graph(error) or all(each.is_tracked for each in meetings):
                raise
        else:
            break
        for each in meetings:
            each.is_tracked = True
    replay.require_end()
    if learns(part) and not replay.values:
        require_graph(part.loss)
    return part, replay


def _asks_for_graph(error: RuntimeError) -> bool:
    """Return whether somebody asks for a gradient by what does not require one, or does not lead to the result."""
    signs = ("require grad", "require gradient", "requires_grad", "not have been used in the graph")
    return any(each in str(error) for each in signs)


class _Replay:
    """The company of a micro-batch in the second pass: everybody has been here before."""

    def __init__(
        self,
        meetings: Sequence[Meeting],
        moments: Moments,
        number: int,
        reach: Reach,
        learning: set[tuple[object, ...]],
    ) -> None:
        self._meetings = meetings
        self._learning = learning
        self._moments = moments
        self._number = number
        self._rows = reach.rows[number]
        self._place = 0
        self.ranks = reach.ranks
        self.minutes = Minutes(reach.ranks)
        self._brought: list[Brought] = []
        self.gradients: list[Tensor] = []

    def meet(self, call: Call) -> Any:
        meeting = self._meetings[self._place] if self._place < len(self._meetings) else None
        if meeting is None or meeting.key != call.key:
            raise self._other(f"meets at {call}", f"at {meeting.calls[0]}" if meeting is not None else "nowhere more")
        if meeting.is_constant and _takes_gradient(call):
            self._learning.add(call.key)
            raise Again(f"Some micro-batches bring something that learns to {call}, and others do not")
        self._place += 1
        self._moments.restore(self._number, self._place)
        gradient = meeting.entering(self._number)
        if gradient is not None and _takes_gradient(call):
            self._brought.append(Brought(call.value))
            self.gradients.append(gradient)
        passage = meeting.passage.of(self._number)
        self.minutes.take(meeting.calls, meeting.result, meeting.replayed, passage, by=[call])
        return meeting.replayed(call)

    @property
    def values(self) -> list[Tensor]:
        """Where gradients enter."""
        return [each.value for each in self._brought]

    def own_rows(self) -> Indices | None:
        return known_rows(self._rows)

    def require_end(self) -> None:
        """Raise an error unless it met as often as in the first pass, and left what it brought and got as it was."""
        if self._place < len(self._meetings):
            raise self._other("ends", f"at {self._meetings[self._place].calls[0]}")
        self.minutes.require_unchanged()
        for each in self._brought:
            each.require_unchanged()

    def _other(self, now: str, before: str) -> MeetingError:
        return MeetingError(
            f"Micro-batch {self._number} {now} in its second pass, and met {before} in its first.",
            hint="a forward pass is run twice, with the same random numbers and buffers; let it depend on nothing else "
            'that changes, or pass lockstep="joined", which runs it once.',
        )


def _takes_gradient(call: Call) -> bool:
    return call.with_graph and isinstance(call.value, Tensor) and call.value.requires_grad


def _given(leaf: Tensor, _call: Call) -> Tensor:
    return leaf
