"""Has somebody written into a micro-batch? Then it is no longer what the loader has given, and cannot run again."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from wholebatch.core.errors import LossError
from wholebatch.core.tree import flatten


class Versions:
    """The tensors of a batch as they are now. Views of them count as they do.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> versions = Versions({"x": x})
        >>> x[:1].div_(255)
        tensor([0.0039])
        >>> versions.are_those_of_now
        False
    """

    __slots__ = ("_tensors",)

    def __init__(self, batch: Any) -> None:
        kind = type(batch)
        leaves = batch.values() if kind is dict else batch if kind in (tuple, list) else (batch,)
        try:
            self._tensors = [(leaf, leaf._version) for leaf in leaves]
        except (AttributeError, RuntimeError):  # not the usual kind, or tensors of inference, which count nothing
            every = [leaf for _, leaf, _ in flatten(batch)[0] if isinstance(leaf, Tensor)]
            self._tensors = [(leaf, leaf._version) for leaf in every if not leaf.is_inference()]

    @property
    def are_those_of_now(self) -> bool:
        """Whether nobody has written into one of them since."""
        return all(tensor._version == version for tensor, version in self._tensors)

    def require(self) -> None:
        """Refuse to run a batch again that a loss has written into.

        Raises:
            LossError: Somebody has.
        """
        if not self.are_those_of_now:
            raise LossError(
                "The loss writes into its micro-batch, which has to run a second time here: it meets others, memory "
                "ran out, or two runs are compared.",
                hint="let it make new tensors, as in x = batch['x'] / 255 in place of batch['x'].div_(255). Weights "
                "are as before.",
            )

    def guarded(self, take: Callable[[], Any]) -> Callable[[], Any]:
        """Return what takes a micro-batch, and from the second time on looks whether it is still the same."""
        return partial(self._take, take, [])

    def _take(self, take: Callable[[], Any], taken: list[bool]) -> Any:
        if taken:
            self.require()
        taken.append(True)
        return take()
