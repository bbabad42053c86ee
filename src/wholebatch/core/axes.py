"""On which dimension of each tensor do the rows lie, and do all agree on how many there are?"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wholebatch.core.errors import SplitError
from wholebatch.core.tree import Leaf, is_array, is_column


class Axes:
    """Finds the rows in the leaves of a pytree.

    Args:
        whole: Paths of tensors that each micro-batch gets as a whole.
        dims: The dimension on which the rows lie: one number for all, or by path. Default 0.

    Example:
        >>> axes = Axes(["image"], None)
        >>> axes.count({}, [("text", ["a", "b"], None), ("image", "x", None)])
        2
        >>> axes.of("text", ["a", "b"], 2), axes.of("image", "x", 2)
        (0, None)
    """

    def __init__(self, whole: Iterable[str], dims: int | Mapping[str, int] | None) -> None:
        self._whole = frozenset(whole)
        self._dims = dims if dims is not None else 0

    def of(self, path: str, leaf: Any, rows: int) -> int | None:
        """Return the dimension of a leaf on which its rows lie; None where every micro-batch gets all of it."""
        if _named(path, self._whole):
            return None
        if is_array(leaf):
            return self._dim(path) if len(leaf.shape) > 0 else None
        return 0 if is_column(leaf) and len(leaf) == rows else None

    def count(self, batch: Any, leaves: Sequence[Leaf]) -> int:
        """Return how many rows a pytree has.

        Raises:
            SplitError: It is a list of rows, it has none, or its leaves disagree.
        """
        if _looks_like_rows(batch):
            raise SplitError(
                f"The logical batch is a list of {len(batch)} rows, and nothing says how to join them.",
                hint="pass collate=..., such as torch.utils.data.default_collate; tensors go in a dict or a tuple.",
            )
        counts: dict[str, int] = {}
        columns: dict[str, int] = {}
        for path, leaf, _ in leaves:
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
        self._check_paths([path for path, _, _ in leaves])
        found = counts or columns
        if not found and not leaves:
            raise SplitError(
                f"The logical batch is empty: a {type(batch).__name__} with nothing in it.",
                hint="leave empty batches out of the loader.",
            )
        if not found:
            raise SplitError(
                f"The logical batch ({type(batch).__name__}) holds no tensor with rows.",
                hint="yield tensors, or lists of rows together with collate=...",
            )
        if len(set(found.values())) > 1:
            plain_list = type(batch) is list and all(path.isdecimal() for path in found)
            raise _unequal_rows(found) if plain_list else _disagreement(found)
        return next(iter(found.values()))

    def _dim(self, path: str) -> int:
        if isinstance(self._dims, int):
            return self._dims
        return next((dim for name, dim in self._dims.items() if _named(path, [name])), 0)

    def _check_paths(self, paths: Sequence[str]) -> None:
        given = {*self._whole, *(self._dims if isinstance(self._dims, Mapping) else ())}
        for name in sorted(given):
            if not any(_named(path, {name}) for path in paths):
                nearest = difflib.get_close_matches(name, paths, n=1)
                raise SplitError(
                    f"The logical batch has no `{name}`; it has {', '.join(paths)}.",
                    hint=f"did you mean `{nearest[0]}`?" if nearest else "name its parts as they are listed here.",
                )


def _kind_without_rows(leaf: Any) -> str | None:
    """What an array is called that cannot be cut by indexing, or None for the usual kind."""
    if getattr(leaf, "is_nested", False):
        return "nested"
    layout = getattr(leaf, "layout", None)
    if type(layout).__module__ != "torch" or str(layout) == "torch.strided":
        return None
    return str(layout).removeprefix("torch.")


def _disagreement(found: Mapping[str, int]) -> SplitError:
    by_row = _one_entry_a_row(found)
    if by_row is not None:
        return SplitError(
            f"The tensors of one logical batch disagree on how many rows there are, and `{by_row}` seems to hold one "
            "entry a row.",
            hint="hand in the rows as a list (for a DataLoader: collate_fn=list), and what joins them as collate=...",
        )
    usual = max(found.values(), key=list(found.values()).count)
    odd = next(path for path, rows in found.items() if rows != usual)
    counts = ", ".join(f"{path} {rows}" for path, rows in found.items())
    return SplitError(
        f"The tensors of one logical batch disagree on how many rows there are: {counts}.",
        hint=f"if `{odd}` is the same for every row, pass whole=[{odd!r}] and each micro-batch gets all of it; if its "
        f"rows lie on another dimension, say which, as in dims={{{odd!r}: 1}}.",
    )


def _unequal_rows(found: Mapping[str, int]) -> SplitError:
    """The error for a list of tensors, which is most likely one of rows."""
    counts = [str(rows) for rows in found.values()]
    said = ", ".join(counts[:8]) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")
    return SplitError(
        f"The logical batch is a list of {len(counts)} tensors, which disagree on how many rows there are: {said}.",
        hint="if they are its rows, pass collate=..., which makes a micro-batch of some of them; if one is for all "
        "rows, name it, as in whole=['0']; if its rows lie on another dimension, say which, as in dims={'0': 1}.",
    )


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


def _looks_like_rows(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) > 0 and all(isinstance(row, Mapping | list | tuple) for row in batch)


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
