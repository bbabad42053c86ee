"""Which rows go together? By rows, or by a token budget over sorted lengths; and how they are taken from a batch.

A logical batch is a list of rows with a `collate` function, or a pytree (dicts, lists, tuples, dataclasses) whose
leaves are tensors of any framework: whatever has a shape and can be indexed.
"""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from wholebatch.core.errors import SplitError

Indices: TypeAlias = Sequence[int]
"""The rows of one micro-batch, as places in the logical batch; a `range` where they stand side by side."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Micro-batches of equally many rows; the last one holds what is left.

    Args:
        rows: Rows in a micro-batch. Unit: rows.

    Raises:
        SplitError: Fewer than one row.

    Example:
        >>> Rows(4).cut(10)
        [range(0, 4), range(4, 8), range(8, 10)]
    """

    rows: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SplitError(f"A micro-batch of {self.rows} rows holds nothing.", hint="pass wb.Rows(1) or more.")

    def __str__(self) -> str:
        return f"{self.rows} rows"

    def cut(self, num_rows: int) -> list[Indices]:
        """Return the micro-batches of a logical batch of `num_rows` rows, in order."""
        return [range(start, min(start + self.rows, num_rows)) for start in range(0, num_rows, self.rows)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Micro-batches of rows of like length, as many as a budget of padded tokens holds.

    The rows of a logical batch may be reordered without changing its gradient, so they are sorted by length and walked
    from the longest: a new micro-batch opens when one more row, padded to the longest, would pass the budget. The
    largest micro-batch comes first, so that a lack of memory shows at once.

    Args:
        tokens: The budget: rows times the longest row of a micro-batch. Unit: tokens. A row that is longer than the
            budget gets a micro-batch of its own.
        length: Says how long a row is. Unit: tokens. Given a row as it stands in the list, or, where the logical
            batch is made of tensors, the same structure without the row dimension.

    Raises:
        SplitError: The budget is less than one token.

    Example:
        >>> Tokens(12, length=len).cut([3, 6, 2, 5])
        [[1, 3], [0, 2]]
    """

    tokens: int
    length: Callable[[Any], int]

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SplitError(
                f"A micro-batch of {self.tokens} tokens holds nothing.",
                hint="pass wb.Tokens(4096, length=...) or whatever the memory holds.",
            )

    def __str__(self) -> str:
        return f"{self.tokens} tokens"

    def cut(self, lengths: Sequence[int]) -> list[Indices]:
        """Return the micro-batches of rows of these lengths, the longest first."""
        cut: list[list[int]] = []
        longest = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if not cut or (len(cut[-1]) + 1) * longest > self.tokens:
                cut.append([])
                longest = lengths[row]
            cut[-1].append(row)
        return list(cut)


def padding(lengths: Sequence[int], cut: Iterable[Indices]) -> float:
    """Return which share of the padded positions holds no token.

    Args:
        lengths: Tokens in each row of the logical batch; shape ``[rows]``.
        cut: The micro-batches.

    Returns:
        A share in 0 to 1; 0 for a batch without any position.

    Example:
        >>> padding([3, 6, 2, 5], [[1, 3], [0, 2]])
        0.1111111111111111
    """
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in cut)
    return 1 - sum(lengths) / padded if padded else 0.0


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

    __slots__ = ("_batch", "_collate", "_dims", "_whole", "rows")

    def __init__(
        self,
        batch: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        whole: Iterable[str] = (),
        dims: int | Mapping[str, int] | None = None,
    ) -> None:
        self._batch = batch
        self._collate = collate
        self._whole = frozenset(whole)
        self._dims = dims if dims is not None else 0
        self.rows = self._count_collated() if collate is not None else self._count_leaves()
        if self.rows == 0:
            raise SplitError(
                "The logical batch is empty: it holds no rows.", hint="leave empty batches out of the loader."
            )

    def take(self, rows: Indices) -> Any:
        """Return a micro-batch of these rows: views where they stand side by side, copies elsewhere."""
        if self._collate is not None:
            return self._collate([self._batch[row] for row in rows])
        index = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
        return map_leaves(lambda path, leaf: self._index(path, leaf, index), self._batch, is_leaf=_is_column)

    def lengths(self, length: Callable[[Any], int]) -> list[int]:
        """Return the length of each row.

        Args:
            length: Says how long a row is. Unit: tokens.

        Raises:
            SplitError: A length is negative or not a whole number.
        """
        lengths = [length(self._row(row)) for row in range(self.rows)]
        for row, tokens in enumerate(lengths):
            if tokens < 0 or tokens != int(tokens):
                raise SplitError(
                    f"Row {row} of the logical batch is said to be {tokens!r} tokens long.",
                    hint="let length(row) return a whole number, such as len(row['input_ids']).",
                )
        return lengths

    def _row(self, row: int) -> Any:
        if self._collate is not None:
            return self._batch[row]
        return map_leaves(lambda path, leaf: self._index(path, leaf, row), self._batch, is_leaf=_is_column)

    def _index(self, path: str, leaf: Any, index: slice | list[int] | int) -> Any:
        if _named(path, self._whole):
            return leaf
        if _is_array(leaf):
            return leaf[(slice(None),) * self._dim(path) + (index,)]
        if _is_column(leaf) and len(leaf) == self.rows:
            return type(leaf)(leaf[row] for row in index) if isinstance(index, list) else leaf[index]
        return leaf

    def _dim(self, path: str) -> int:
        if isinstance(self._dims, int):
            return self._dims
        return self._dims.get(path, 0)

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
        paths: list[str] = []

        def count(path: str, leaf: Any) -> Any:
            paths.append(path)
            if _named(path, self._whole):
                return leaf
            if _is_array(leaf) and len(leaf.shape) > 0:
                dim = self._dim(path)
                if dim >= len(leaf.shape):
                    raise SplitError(
                        f"{path or 'The batch'} has shape {tuple(leaf.shape)}, and no dimension {dim} for its rows.",
                        hint="dims counts from 0: dims={'image': 1} is the second dimension.",
                    )
                counts[path] = leaf.shape[dim]
            elif _is_column(leaf):
                columns[path] = len(leaf)
            return leaf

        map_leaves(count, self._batch, is_leaf=_is_column)
        self._check_paths(paths)
        found = counts or columns
        if not found:
            raise SplitError(
                f"The logical batch ({type(self._batch).__name__}) holds no tensor with rows.",
                hint="yield tensors, or lists of rows together with collate=...",
            )
        if len(set(found.values())) > 1:
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


def map_leaves(
    function: Callable[[str, Any], Any], tree: Any, *, is_leaf: Callable[[Any], bool] | None = None, path: str = ""
) -> Any:
    """Return a tree of the same structure, each leaf replaced by what `function` makes of it.

    Args:
        function: Takes the path of a leaf, such as ``"inputs.image"`` or ``"0"``, and the leaf.
        tree: Mappings, lists, tuples, named tuples and dataclasses, nested at will; all else is a leaf.
        is_leaf: Says of a list or tuple that it is to be taken as one leaf.
        path: The path of `tree` itself.

    Example:
        >>> map_leaves(lambda path, leaf: (path, leaf * 2), {"x": 1, "y": [2, 3]})
        {'x': ('x', 2), 'y': [('y.0', 4), ('y.1', 6)]}
    """

    def below(name: object, branch: Any) -> Any:
        return map_leaves(function, branch, is_leaf=is_leaf, path=f"{path}.{name}" if path else str(name))

    if _is_array(tree) or (is_leaf is not None and is_leaf(tree)):
        return function(path, tree)
    if type(tree) is dict:
        return {name: below(name, branch) for name, branch in tree.items()}
    if isinstance(tree, MutableMapping):
        mapping = copy.copy(tree)
        for name, branch in tree.items():
            mapping[name] = below(name, branch)
        return mapping
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(below(name, branch) for name, branch in zip(tree._fields, tree, strict=True)))
    if isinstance(tree, list | tuple):
        return type(tree)([below(place, branch) for place, branch in enumerate(tree)])
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(changed, field.name, below(field.name, getattr(tree, field.name)))
        return changed
    return function(path, tree)


def count_rows(micro_batch: Any) -> int | None:
    """Return the rows of a micro-batch that somebody else has cut, or None where its tensors do not agree on them.

    Args:
        micro_batch: A pytree of tensors, rows on their first dimension.

    Example:
        >>> count_rows({"text": ["a", "b"]}) is None
        True
    """
    counts: set[int] = set()

    def count(_path: str, leaf: Any) -> None:
        if _is_array(leaf) and len(leaf.shape) > 0:
            counts.add(leaf.shape[0])

    map_leaves(count, micro_batch)
    return counts.pop() if len(counts) == 1 else None


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")


def _is_column(leaf: Any) -> bool:
    """Whether a list or tuple may be a column, one plain entry a row. Numbers in a tuple are a size, not a column."""
    if not isinstance(leaf, list | tuple) or not leaf or hasattr(leaf, "_fields"):
        return False
    first = leaf[0]
    if _is_array(first) or isinstance(first, Mapping | list | tuple) or dataclasses.is_dataclass(first):
        return False
    return not (isinstance(leaf, tuple) and isinstance(first, Real)) and not any(_is_array(entry) for entry in leaf)


def _looks_like_rows(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) > 0 and all(isinstance(row, Mapping | list | tuple) for row in batch)


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
