"""How do ranks go on only if all of them can?"""

from collections.abc import Iterator
from contextlib import contextmanager

from wholebatch.core.errors import RankError, WholeBatchError
from wholebatch.engine.ranks.message import words
from wholebatch.engine.ranks.wire import Wire


@contextmanager
def agreed(wire: Wire | None) -> Iterator[None]:
    """The context of what every rank has to be able to do, before any of them goes on.

    Args:
        wire: Speaks to the other ranks, which all enter it too; None in a process that has none.

    Raises:
        RankError: Another rank could not, and this one could. One that could not raises its own error.
    """
    failed: WholeBatchError | None = None
    try:
        yield
    except RankError:
        raise
    except WholeBatchError as error:
        if wire is None:
            raise
        failed = error
    if wire is None:
        return
    said = wire.gather(None if failed is None else words(failed))
    if failed is not None:
        raise failed
    others = "; ".join(f"rank {rank} could not: {why}" for rank, why in enumerate(said) if why is not None)
    if others:
        raise RankError(
            f"Rank {wire.rank} does not go on alone: {others}.",
            hint="the log of that rank says more; nothing was done.",
        )
