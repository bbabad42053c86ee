"""How is one micro-batch taken out of a window again? What is undone is what has come since a mark.

A parameter's gradient arrives in one piece, and what it was added to is gone. Where it was the first one, it is
forgotten. Where it met others, the micro-batch is run once more, and what comes is subtracted.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wholebatch.core.errors import OutOfMemoryError
from wholebatch.engine.arrivals import remove, when_added
from wholebatch.engine.objective import Part
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.transaction import Transaction
from wholebatch.engine.weighing import Weighing


class Retraction:
    """Takes a micro-batch of one window back.

    Args:
        sums: What its gradients were added to.
        transaction: Keeps what its forward pass changes.
        weighing: Weighs its losses.
    """

    def __init__(self, sums: GradientSum, transaction: Transaction, weighing: Weighing) -> None:
        self._sums = sums
        self._transaction = transaction
        self._weighing = weighing
        self._mark: _Mark | None = None

    @property
    def possible(self) -> bool:
        """Whether there is a mark to go back to."""
        return self._mark is not None

    def mark(self) -> None:
        """Let memory run out in the next micro-batch without the end of the window."""
        self._transaction.mark()
        last = self._mark
        if last is not None and last.stays:
            self._mark = _Mark(last.sums, [each._version for each in last.sums], True)  # type: ignore[union-attr]
            return
        sums = list(map(self._sums.held, self._sums.parameters))
        stays = not self._sums.narrow and all(each is not None and each.layout == torch.strided for each in sums)
        self._mark = _Mark(sums, [-1 if each is None else each._version for each in sums], stays)

    def forget(self) -> None:
        """Give up the mark: what it knows of the sums would hold them."""
        self._mark = None

    def take_back(self) -> list[nn.Parameter]:
        """Undo what happened since the mark, but for gradients that were added to those of earlier micro-batches.

        Returns:
            The parameters whose gradients were: what they have too much is to be subtracted.

        Raises:
            OutOfMemoryError: Random state or buffers cannot go back, since nobody knew that they would move.
        """
        assert self._mark is not None
        mark, self._mark = self._mark, None
        if not self._transaction.roll_back_to_mark():
            raise OutOfMemoryError(
                "Memory ran out in a micro-batch that cannot be taken back: the model draws random numbers or writes "
                "buffers, which it did not in the window before.",
                hint="make the same window again, or smaller micro-batches; weights are as before.",
            )
        self._sums.lose_track()
        met: list[nn.Parameter] = []
        for parameter, before, version in zip(self._sums.parameters, mark.sums, mark.versions, strict=True):
            if parameter in self._sums.narrow:
                parameter.grad = None  # what had not been added yet
            now = self._sums.held(parameter)
            if now is before and (now is None or now._version == version):
                continue
            if before is None:
                self._sums.forget(parameter)
            else:
                met.append(parameter)
        return met

    def subtract(self, part: Part, parameters: Collection[nn.Parameter]) -> None:
        """Take a micro-batch's part out of the gradients of some parameters again, as after `take_back`.

        Args:
            part: What came of the same micro-batch, run once more as it was run before.
            parameters: Which; every other one is left as it is.
        """
        losses, roots = self._weighing.weigh(part)
        left = set(parameters)

        def arrived(parameter: nn.Parameter) -> None:
            left.discard(parameter)
            if not left:
                raise _Enough

        others = [each for each in self._sums.parameters if each.requires_grad and each not in left]
        hooks = [when_added(parameter, arrived) for parameter in parameters]
        try:
            with self._sums.leaving_out(others):
                self._sums.open_backward()
                torch.autograd.backward(losses, [-root for root in roots])
        except _Enough:
            pass
        finally:
            remove(hooks)
            self._sums.lose_track()
            self._transaction.roll_back_to_mark()


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far the sums of all parameters had come at one moment.

    Attributes:
        sums: Each of them, or None where there was none yet.
        versions: How often each had been written.
        stays: Whether the next gradients are added to the same tensors.
    """

    sums: list[Tensor | None]
    versions: list[int]
    stays: bool


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a backward pass that has brought all that is wanted."""
