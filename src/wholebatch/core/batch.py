"""How are rows taken from a logical batch?

A logical batch is a list of rows with a `collate` function, or a pytree (dicts, lists, tuples, dataclasses) whose
leaves are tensors of any framework: whatever has a shape and can be indexed.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wholebatch.core.axes import Axes
from wholebatch.core.errors import ConfigError, SplitError
from wholebatch.core.split import Indices
from wholebatch.core.tree import flatten, is_array, is_column


class LogicalBatch:
    """The rows of one logical batch, ready to be taken a few at a time.

    Args:
        batch: A list of rows, if `collate` is given; else a pytree of tensors. In a pytree, a list or tuple of other
            things than tensors and numbers with one entry a row, such as texts, is cut with the rows, as is a list of
            numbers; every other leaf goes to each micro-batch as it is.
        collate: Turns a list of rows into a micro-batch.
        whole: Paths of tensors that each micro-batch gets as a whole, such as ``"image"`` or ``"inputs.image"``.
        dims: The dimension on which the rows lie: one number for all, or by path. Default 0.

    Raises:
        SplitError: There are no rows, the tensors disagree on how many there are, a path does not exist, or the batch
            is neither a list of rows with `collate` nor made of tensors.

    Example:
        >>> batch = LogicalBatch(["a", "bb", "ccc"], collate="-".join)
        >>> batch.rows, batch.take([2, 0])
        (3, 'ccc-a')
    """

    __slots__ = ("_batch", "_collate", "_leaves", "_rebuild", "kept", "rows")

    def __init__(
        self,
        batch: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        whole: Iterable[str] = (),
        dims: int | Mapping[str, int] | None = None,
    ) -> None:
        self._batch = batch
        self.kept: dict[tuple[int, ...], Any] | None = None
        self._collate = collate
        if collate is not None:
            self.rows = self._count_collated()
        else:
            self._leaves, self._rebuild = flatten(batch, columns=True)
            axes = Axes(whole, dims)
            self.rows = axes.count(batch, self._leaves)
            self._leaves = [
                (path, _rows_of(leaf) if axis is not None else leaf, axis)
                for path, leaf, _ in self._leaves
                for axis in [axes.of(path, leaf, self.rows)]
            ]

    @property
    def given(self) -> Any:
        """The logical batch as it was handed in."""
        return self._batch

    @property
    def collates(self) -> bool:
        """Whether its micro-batches are collated from a list of rows, each when it is taken."""
        return self._collate is not None

    def keep(self) -> None:
        """Keep what is collated until it is taken a second time: to be looked at first, and then trained on."""
        self.kept = {}

    def take(self, rows: Indices) -> Any:
        """Return a micro-batch of these rows: views where they stand side by side, copies elsewhere."""
        if self._collate is not None:
            if self.kept is not None:
                key = tuple(rows)
                if key in self.kept:
                    return self.kept.pop(key)
                self.kept[key] = self._collate([self._batch[row] for row in rows])
                return self.kept[key]
            return self._collate([self._batch[row] for row in rows])
        return self._index(slice(rows.start, rows.stop) if type(rows) is range else list(rows))

    def lengths(self, length: Callable[[Any], int]) -> list[int]:
        """Return the length of each row.

        Args:
            length: Says how long a row is. Unit: tokens.

        Raises:
            SplitError: A length is negative or not a whole number.
        """
        lengths = [length(self._row(row)) for row in range(self.rows)]
        for row, tokens in enumerate(lengths):
            if not _is_whole(tokens):
                raise SplitError(
                    f"Row {row} of the logical batch is said to be {tokens!r} tokens long.",
                    hint="let length(row) return a whole number, such as len(row['input_ids']).",
                )
        return [int(tokens) for tokens in lengths]

    def _row(self, row: int) -> Any:
        return self._batch[row] if self._collate is not None else self._index(row)

    def _index(self, index: slice | list[int] | int) -> Any:
        cut = []
        for _, leaf, axis in self._leaves:
            if axis == 0:
                cut.append(leaf[index])
            else:
                cut.append(leaf if axis is None else leaf[(slice(None),) * axis + (index,)])
        return self._rebuild(iter(cut))

    def _count_collated(self) -> int:
        if (
            isinstance(self._batch, Mapping)
            or not hasattr(self._batch, "__len__")
            or not hasattr(self._batch, "__getitem__")
        ):
            raise SplitError(
                f"With `collate`, a logical batch is a list of rows; this one is a {type(self._batch).__name__}.",
                hint="let the loader yield lists of rows (for a DataLoader: collate_fn=list), or leave `collate` out.",
            )
        return len(self._batch)


def count_rows(
    micro_batch: Any, *, whole: Iterable[str] = (), dims: int | Mapping[str, int] | None = None
) -> int | None:
    """Return the rows of a micro-batch that somebody else has cut, or None where its tensors do not agree on them.

    Args:
        micro_batch: A pytree of tensors.
        whole: Paths of tensors that are the same for every row.
        dims: The dimension on which the rows lie, as for `LogicalBatch`.

    Example:
        >>> count_rows({"text": ["a", "b"]}), count_rows("ab")
        (2, None)
    """
    kind = type(micro_batch)
    if not whole and dims is None and (kind in (dict, tuple, list) or is_array(micro_batch)):
        # The usual kind, in a fraction of the time.
        leaves = micro_batch.values() if kind is dict else micro_batch if kind in (tuple, list) else (micro_batch,)
        rows = {_length(leaf) for leaf in leaves}
        if len(rows) == 1 and None not in rows:
            return rows.pop()
    try:
        return LogicalBatch(micro_batch, whole=whole, dims=dims).rows
    except SplitError:
        return None


def _length(leaf: Any) -> int | None:
    """The first dimension of an array, or None for anything else."""
    try:
        shape = getattr(leaf, "shape", None)
        return shape[0] if shape and hasattr(leaf, "__getitem__") else None
    except (RuntimeError, LookupError):  # as a nested tensor has it, or a dict that answers for any attribute
        return None


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows lie in the batches of one user; see `LogicalBatch` for the three.

    Example:
        >>> layout = Layout(collate="-".join)
        >>> layout.logical(["a", "bb", "ccc"]).take([0, 2])
        'a-ccc'
    """

    collate: Callable[[list[Any]], Any] | None = None
    whole: tuple[str, ...] = ()
    dims: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.collate is not None and not callable(self.collate):
            raise ConfigError(
                f"collate is a {type(self.collate).__name__}, which cannot be called.",
                hint="pass a function of a list of rows, such as torch.utils.data.default_collate.",
            )
        said = self.dims.values() if isinstance(self.dims, Mapping) else [self.dims or 0]
        if not all(isinstance(dim, int) for dim in said):
            raise ConfigError(
                f"dims={self.dims!r} does not say on which dimension rows lie.",
                hint="pass a number for all tensors, as in dims=1, or numbers by path, as in dims={'image': 1}.",
            )

    def logical(self, batch: Any) -> LogicalBatch:
        """Return a logical batch as it comes from the loader."""
        return LogicalBatch(batch, collate=self.collate, whole=self.whole, dims=self.dims)

    def logical_or_nothing(self, batch: Any) -> LogicalBatch:
        """Return one process's part of a logical batch, which may be None or empty where others have rows."""
        if batch is None or (isinstance(batch, list | tuple | dict) and len(batch) == 0):
            return LogicalBatch([], collate=list)
        return self.logical(batch)

    def loaded(self, micro_batch: Any) -> LogicalBatch:
        """Return the rows of a micro-batch that a loader has cut and collated."""
        return LogicalBatch(micro_batch, whole=self.whole, dims=self.dims)

    def count(self, micro_batch: Any) -> int | None:
        """Return the rows of a micro-batch that a loader has cut, or None where its tensors disagree."""
        return count_rows(micro_batch, whole=self.whole, dims=self.dims)


class _Table:
    """A data frame, whose rows are not found by plain indexing."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __getitem__(self, index: slice | list[int] | int) -> Any:
        return self._frame.iloc[index]


class _Column:
    """A list or tuple with one entry a row, cut as a tensor is."""

    def __init__(self, entries: list[Any] | tuple[Any, ...]) -> None:
        self._entries = entries

    def __getitem__(self, index: slice | list[int] | int) -> Any:
        if isinstance(index, list):
            return type(self._entries)([self._entries[row] for row in index])
        return self._entries[index]


def _rows_of(leaf: Any) -> Any:
    """Return what gives rows of a leaf when it is indexed."""
    if is_column(leaf):
        return _Column(leaf)
    return _Table(leaf) if hasattr(leaf, "iloc") else leaf


def paths(whole: str | Iterable[str]) -> tuple[str, ...]:
    """Return the paths that were given as one or several.

    Raises:
        ConfigError: They are no paths.

    Example:
        >>> paths("image"), paths(["image", "mask"])
        (('image',), ('image', 'mask'))
    """
    try:
        found = (whole,) if isinstance(whole, str) else tuple(whole)
    except TypeError:
        raise _no_paths(whole) from None
    if set(map(type, found)) - {str}:
        raise _no_paths(whole)
    return found


def _no_paths(whole: object) -> ConfigError:
    return ConfigError(
        f"whole={whole!r} names no tensors.", hint="pass their paths, as in whole=['image'] or whole=['extra.mask']."
    )


def _is_whole(tokens: Any) -> bool:
    return hasattr(tokens, "__float__") and 0 <= float(tokens) < math.inf and float(tokens) % 1 == 0
