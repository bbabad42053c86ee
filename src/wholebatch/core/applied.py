"""What has a plan changed? The handle that takes it back."""

from collections.abc import Callable
from types import TracebackType


class Applied:
    """What `Plan.apply` has changed in a model.

    Args:
        blocks: Which blocks recompute their activations because of it.
        offload: Whether what is kept for the backward pass waits in the host's memory.
        take_back: Does.

    Example:
        >>> with Applied(("blocks.0",), False, lambda: print("as before")) as applied:
        ...     print(applied.blocks)
        ('blocks.0',)
        as before
    """

    def __init__(self, blocks: tuple[str, ...], offload: bool, take_back: Callable[[], None]) -> None:
        self.blocks = blocks
        self.offload = offload
        self._take_back: Callable[[], None] | None = take_back

    def undo(self) -> None:
        """Take it back; a second call does nothing."""
        take_back, self._take_back = self._take_back, None
        if take_back is not None:
            take_back()

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Applied(blocks={self.blocks}, offload={self.offload})"
