"""Which ways are there to train, and which blocks of a model are worth computing twice?"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wholebatch.core.need import Need


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train: what it needs, and what it is called.

    Attributes:
        name: Such as ``"as it is"``, ``"bf16"`` or ``"checkpointing"``.
        need: What it takes.
        blocks: Which blocks are recomputed.
        slower: By what a pass takes longer, about, as a factor.
        offload: Whether what is kept for the backward pass waits in the host's memory.
        why: What speaks for these blocks, for a reason.
        notes: How the need is known.
    """

    name: str
    need: Need
    blocks: tuple[str, ...] = ()
    slower: float = 1.0
    offload: bool = False
    why: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a model that could be computed twice instead of keeping what it has computed.

    Attributes:
        name: Of the submodule.
        kind: What it is; blocks that are of one kind and keep as much are alike.
        kept_bytes: What a row keeps in it until the backward pass, beside what goes in and out. Unit: bytes.
        seconds: How long its forward pass takes for a row. Unit: seconds.
    """

    name: str
    kind: str
    kept_bytes: float
    seconds: float


def by_worth(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks in the order in which they should be recomputed: most bytes for a second first.

    Among those that are alike the earlier comes first. The backward pass begins when most is kept, and it begins with
    the last block, which must then be there anyway. A clock tells alike blocks apart by chance, so they share a time.

    Args:
        blocks: In the order of the forward pass.

    Example:
        >>> blocks = [Block("0", "A", 10, 2.0), Block("1", "B", 40, 4.0), Block("2", "A", 10, 1.0)]
        >>> [(each.name, each.seconds) for each in by_worth(blocks)]
        [('1', 4.0), ('0', 1.5), ('2', 1.5)]
    """
    times: dict[tuple[str, float], list[float]] = {}
    for each in blocks:
        times.setdefault((each.kind, each.kept_bytes), []).append(each.seconds)
    alike = [
        Block(each.name, each.kind, each.kept_bytes, statistics.median(times[each.kind, each.kept_bytes]))
        for each in blocks
    ]
    return sorted(alike, key=_dearness)


def _dearness(block: Block) -> float:
    """Seconds for a byte: small is good."""
    return block.seconds / block.kept_bytes if block.kept_bytes > 0 else float("inf")


class Ladder:
    """Ways that recompute one block, two, and so on, of which each is made when it is asked for.

    Args:
        most: How many blocks there are.
        make: Makes the way in which so many recompute, as it is for the longest rows; None: it cannot be followed.
        fully: Makes of such a way that for rows of any length; None: it cannot be followed.
        guess: Tells without making a way what so many blocks free of a row at most, in bytes, and by what factor a pass
            takes longer.
    """

    def __init__(
        self,
        most: int,
        make: Callable[[int], Way | None],
        fully: Callable[[Way], Way | None] = lambda way: way,
        guess: Callable[[int], tuple[float, float]] = lambda _: (float("inf"), 1.0),
    ) -> None:
        self._most = most
        self._make = make
        self._fully = fully
        self._guess = guess
        self._made: dict[int, Way | None] = {}

    def slower(self, freed: float) -> float:
        """Return by what factor at least a pass takes longer where a row frees so much; infinity: no blocks free that.

        Args:
            freed: Unit: bytes.
        """
        guesses = (self._guess(count) for count in range(1, self._most + 1))
        return next((slower for most, slower in guesses if most >= freed), float("inf"))

    def fewest(self, enough: Callable[[Way], bool], *, any_length: bool = False) -> Way | None:
        """Return the way with the fewest blocks that is enough; None: not even all of them are.

        Args:
            enough: Judges a way; more blocks are enough where fewer are.
            any_length: Whether it judges by other rows than the longest.
        """

        def does(count: int) -> bool:
            way = self._at(count)
            way = self._fully(way) if way is not None and any_length else way
            return way is not None and enough(way)

        if not self._most or not does(self._most):
            return None
        low, high = 1, self._most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if does(middle) else (middle + 1, high)
        way = self._at(high)
        return None if way is None else self._fully(way)

    def _at(self, count: int) -> Way | None:
        if count not in self._made:
            self._made[count] = self._make(count)
        return self._made[count]
