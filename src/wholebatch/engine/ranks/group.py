"""What does a window ask of the ranks that make it together? The same methods for one and for many."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from wholebatch.core.split import Indices, Size
from wholebatch.core.weights import Count
from wholebatch.core.window import WindowState
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.ranks.streams import Streams
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.weighing import Reading, Weighing


class Group(Protocol):
    """The ranks that make an update together.

    Attributes:
        ranks: How many they are.
        wire: Speaks to the others, if there are any.
        has_met: Whether one of several has found out that micro-batches meet.
        passes: How many all ranks make in this window at least.
        spare: A small micro-batch, for those of weight zero.
        rehearses: Whether this rank has yet to find out what a pass sends.
        in_step: Whether all ranks have to make equally many passes.
        in_pass: Whether a pass has begun in which other ranks wait for this one; None where that is not known.
        reference: What losses are divided by in the next window, where that has to be the same on all ranks. Unit:
            targets.
        streams: Where the micro-batches that ranks read side by side come to their end.
    """

    ranks: int

    @property
    def wire(self) -> Wire | None: ...

    in_step: bool

    @property
    def in_pass(self) -> bool | None: ...

    passes: int
    spare: Any
    reference: float | None
    streams: Streams

    @property
    def has_met(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what another process of this rank has to know of the windows until now."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...

    def at_rest(self) -> AbstractContextManager[object]:
        """Return the context in which weights are where they are between windows, also inside of one."""
        ...

    def together(self, sums: Callable[[], GradientSum]) -> AbstractContextManager[object]:
        """Return the context of a logical batch: an exception in it is told to the other ranks."""
        ...

    def open(self, sums: Callable[[], GradientSum]) -> None:
        """Begin a window.

        Args:
            sums: Returns the running sum, now that weights are where they are in a window.
        """
        ...

    def end(self) -> None:
        """End a window, whatever has become of it."""
        ...

    def expect_last(self, weighing: Weighing) -> None:
        """Say that the next backward pass of this rank is its last in the window."""
        ...

    def keep_from_sending(self) -> bool:
        """Send nothing before the close of the window, and return whether nothing has been sent."""
        ...

    def agree_on_passes(self, passes: int, spare: Any, *, learns: bool) -> None:
        """Let all ranks make as many passes as the one with most, where they have to.

        Args:
            passes: Of this rank.
            spare: A small micro-batch for passes of weight zero; None where this rank has no rows.
            learns: Whether it has targets.
        """
        ...

    @property
    def rehearses(self) -> bool: ...

    def rehearsing(self) -> AbstractContextManager[object]:
        """Return the context of a pass of weight zero in which it does; nobody else takes part."""
        ...

    def settle(self, sums: GradientSum, weighing: Weighing, state: WindowState) -> Reading:
        """Return what the window came to, over all ranks, and let `sums` hold the sum over all of them.

        Raises:
            LossError: No rank has a gradient.
            RankError: A rank failed or is gone.
        """
        ...

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients arrive in a backward pass, for those that an optimizer steps."""
        ...

    def deliver(self, sums: GradientSum, factor: float) -> None:
        """Put the sum times `factor` where the optimizer looks for it."""
        ...

    def moving(self) -> AbstractContextManager[object]:
        """Return the context in which the update happens, on all ranks."""
        ...

    def apart(self) -> AbstractContextManager[object]:
        """Return the context of what is done while other ranks may be speaking of something else.

        Whoever rolls a window back in it waits for nobody, and does not go on with the others.
        """
        ...

    def withdraw(self, why: BaseException | None) -> None:
        """Tell the others that this rank's window was rolled back."""
        ...

    def report_shortage(self, said: str, finer: Size) -> list[Size]:
        """Tell the others that memory ran out, and return to which sizes ranks have to go.

        Raises:
            RankError: Another rank failed otherwise.
        """
        ...

    def expect_meeting(self, meets: bool) -> None:
        """Say whether the micro-batches of the next window meet, as all ranks know."""
        ...

    def reach(
        self,
        cut: Sequence[Indices] | None,
        micro_batches: int,
        model: nn.Module,
        device: torch.device,
        reference: Callable[[], Count],
    ) -> Reach:
        """Return those that meet in a window; the arguments are those of `Far`."""
        ...

    def report_meeting(self, why: str) -> None:
        """Tell the others that micro-batches meet, where nobody knew, so that all make the window again.

        Raises:
            RankError: Another rank failed.
        """
        ...

    def give_up(self) -> None:
        """Take part in the end of a window in which another rank has failed.

        Raises:
            RankError: Why it has.
        """
        ...

    def take_shortages(self) -> list[Size]:
        """Return to which sizes other ranks had to go, when that alone has undone the last window."""
        ...
