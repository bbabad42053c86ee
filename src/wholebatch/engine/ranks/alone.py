"""What does a window ask of a process that trains alone? Nothing, with the methods that many ranks have."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wholebatch.core.errors import WindowError
from wholebatch.core.split import Indices, Size
from wholebatch.core.weights import Count
from wholebatch.core.window import WindowState
from wholebatch.engine.meetings.reach import Near, Reach
from wholebatch.engine.ranks.message import no_gradient
from wholebatch.engine.ranks.streams import Streams
from wholebatch.engine.ranks.wire import initialised
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.weighing import Reading, Weighing

_NOTHING = nullcontext()


class One:
    """A group of one: this process, which has nobody to speak to.

    Args:
        alone: Whether it was so by choice, and not only because no other process was known of yet.
    """

    ranks = 1
    wire = None
    has_met = False
    in_step, in_pass, rehearses, passes, spare = False, False, False, 0, None
    reference: float | None = None

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self.streams = Streams(several=False)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def at_rest(self) -> AbstractContextManager[object]:
        return _NOTHING

    def together(self, sums: Callable[[], GradientSum]) -> AbstractContextManager[object]:  # noqa: ARG002
        return _NOTHING

    def open(self, sums: Callable[[], GradientSum]) -> None:  # noqa: ARG002
        if not self._alone and initialised() and dist.get_world_size() > 1:
            raise WindowError(
                f"This process is one of {dist.get_world_size()} ranks, and the accumulator was made before it was.",
                hint="call torch.distributed.init_process_group() first, and make the accumulator after it.",
            )

    def end(self) -> None:
        pass

    def expect_last(self, weighing: Weighing) -> None:
        pass

    def keep_from_sending(self) -> bool:
        return True

    def agree_on_passes(self, passes: int, spare: Any, *, learns: bool) -> None:
        pass

    def rehearsing(self) -> AbstractContextManager[object]:
        raise AssertionError

    def settle(self, sums: GradientSum, weighing: Weighing, state: WindowState) -> Reading:
        if state.micro_batches == 0:
            return Reading(loss=math.nan, norm=0.0, factor=0.0, scaled_norm=0.0, targets=0.0, least=0.0)
        if sums.empty:
            raise no_gradient()
        return weighing.read(sums.norms(), state.targets)

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return list(parameters)

    def deliver(self, sums: GradientSum, factor: float) -> None:
        sums.deliver(factor)

    def moving(self) -> AbstractContextManager[object]:
        return _NOTHING

    def apart(self) -> AbstractContextManager[object]:
        return _NOTHING

    def withdraw(self, why: BaseException | None) -> None:
        pass

    def report_shortage(self, said: str, finer: Size) -> list[Size]:  # noqa: ARG002
        return []

    def take_shortages(self) -> list[Size]:
        return []

    def expect_meeting(self, meets: bool) -> None:
        pass

    def reach(
        self,
        cut: Sequence[Indices] | None,
        micro_batches: int,
        model: nn.Module,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        reference: Callable[[], Count],  # noqa: ARG002
    ) -> Reach:
        return Near(cut, micro_batches)

    def report_meeting(self, why: str) -> None:
        pass

    def give_up(self) -> None:
        pass
