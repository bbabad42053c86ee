"""How are rows taken from a logical batch?

A logical batch is a list of rows with a `collate` function, or a pytree (dicts, lists, tuples, dataclasses) whose
leaves are tensors of any framework: whatever has a shape and can be indexed.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    __slots__ = ("_batch", "_collate", "_dims", "_leaves", "_rebuild", "_whole", "kept", "rows")

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
        self._whole = frozenset(whole)
        self._dims = dims if dims is not None else 0
        if collate is not None:
            self.rows = self._count_collated()
        else:
            self._leaves, self._rebuild = flatten(batch, columns=True)
            self.rows = self._count_leaves()
            self._leaves = [
                (path, _rows_of(leaf) if axis is not None else leaf, axis)
                for path, leaf, _ in self._leaves
                for axis in [self._axis(path, leaf)]
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

    def _axis(self, path: str, leaf: Any) -> int | None:
        """The dimension of a leaf on which its rows lie; None where every micro-batch gets all of it."""
        if _named(path, self._whole):
            return None
        if is_array(leaf):
            return self._dim(path) if len(leaf.shape) > 0 else None
        return 0 if is_column(leaf) and len(leaf) == self.rows else None

    def _dim(self, path: str) -> int:
        if isinstance(self._dims, int):
            return self._dims
        return next((dim for name, dim in self._dims.items() if _named(path, [name])), 0)

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

    def _count_leaves(self) -> int:
        if _looks_like_rows(self._batch):
            raise SplitError(
                f"The logical batch is a list of {len(self._batch)} rows, and nothing says how to join them.",
                hint="pass collate=..., such as torch.utils.data.default_collate; tensors go in a dict or a tuple.",
            )
        counts: dict[str, int] = {}
        columns: dict[str, int] = {}
        for path, leaf, _ in self._leaves:
            if _named(path, self._whole):
                continue
            kind = _kind_without_rows(leaf) if is_array(leaf) else None
            if kind is not None:
                raise SplitError(
                    f"{path or 'The batch'} is a {kind} tensor, whose rows cannot be taken a few at a time.",
                    hint="hand in a list of rows with collate=..., and make the tensor there; or a dense one.",
                )
            if is_array(leaf) and len(leaf.shape) > 0:
                dim = self._dim(path)
                if not 0 <= dim < len(leaf.shape):
                    raise SplitError(
                        f"{path or 'The batch'} has shape {tuple(leaf.shape)}, and no dimension {dim} for its rows.",
                        hint="dims counts from 0, not from the end: dims={'image': 1} is the second dimension.",
                    )
                counts[path] = leaf.shape[dim]
            elif is_column(leaf):
                columns[path] = len(leaf)
        self._check_paths([path for path, _, _ in self._leaves])
        found = counts or columns
        if not found and not self._leaves:
            raise SplitError(
                f"The logical batch is empty: a {type(self._batch).__name__} with nothing in it.",
                hint="leave empty batches out of the loader.",
            )
        if not found:
            raise SplitError(
                f"The logical batch ({type(self._batch).__name__}) holds no tensor with rows.",
                hint="yield tensors, or lists of rows together with collate=...",
            )
        if len(set(found.values())) > 1:
            by_row = _one_entry_a_row(found)
            if by_row is not None:
                raise SplitError(
                    "The tensors of one logical batch disagree on how many rows there are, "
                    f"and `{by_row}` seems to hold one entry a row.",
                    hint="hand in the rows as a list (for a DataLoader: collate_fn=list), and what joins them as "
                    "collate=...",
                )
            usual = max(found.values(), key=list(found.values()).count)
            odd = next(path for path, rows in found.items() if rows != usual)
            raise SplitError(
                "The tensors of one logical batch disagree on how many rows there are: "
                + ", ".join(f"{path} {rows}" for path, rows in found.items())
                + ".",
                hint=f"if `{odd}` is the same for every row, pass whole=[{odd!r}] and each micro-batch gets all of it; "
                f"if its rows lie on another dimension, say which, as in dims={{{odd!r}: 1}}.",
            )
        return next(iter(found.values()))

    def _check_paths(self, paths: Sequence[str]) -> None:
        given = {*self._whole, *(self._dims if isinstance(self._dims, Mapping) else ())}
        for name in sorted(given):
            if not any(_named(path, {name}) for path in paths):
                nearest = difflib.get_close_matches(name, paths, n=1)
                raise SplitError(
                    f"The logical batch has no `{name}`; it has {', '.join(paths)}.",
                    hint=f"did you mean `{nearest[0]}`?" if nearest else "name its parts as they are listed here.",
                )


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


def _kind_without_rows(leaf: Any) -> str | None:
    """What an array is called that cannot be cut by indexing, or None for the usual kind."""
    if getattr(leaf, "is_nested", False):
        return "nested"
    layout = getattr(leaf, "layout", None)
    if type(layout).__module__ != "torch" or str(layout) == "torch.strided":
        return None
    return str(layout).removeprefix("torch.")


def _one_entry_a_row(found: Mapping[str, int]) -> str | None:
    """Return the path of a list that has as many entries as another part of the batch has rows, if there is one."""
    entries: dict[str, set[str]] = {}
    for path in found:
        steps = path.split(".")
        for place, step in enumerate(steps[1:], 1):
            if step.isdecimal():
                entries.setdefault(".".join(steps[:place]), set()).add(step)
    for name, numbers in entries.items():
        others = {rows for path, rows in found.items() if not path.startswith(f"{name}.")}
        if len(numbers) > 1 and len(numbers) in others:
            return name
    return None


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


def _looks_like_rows(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) > 0 and all(isinstance(row, Mapping | list | tuple) for row in batch)


def _is_whole(tokens: Any) -> bool:
    return hasattr(tokens, "__float__") and 0 <= float(tokens) < math.inf and float(tokens) % 1 == 0


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
