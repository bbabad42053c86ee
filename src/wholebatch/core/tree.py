"""How is a tree of tensors taken apart, and built again from other leaves?

Trees are mappings, lists, tuples, named tuples and dataclasses, nested at will; a leaf is everything else.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any, TypeAlias


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree of the same structure, each leaf replaced by what `function` makes of it.

    Args:
        function: Takes a leaf.
        tree: Mappings, lists, tuples, named tuples and dataclasses, nested at will; all else is a leaf.

    Example:
        >>> map_leaves(abs, {"x": -1, "y": [2, (-3,)]})
        {'x': 1, 'y': [2, (3,)]}
    """
    leaves, rebuild = flatten(tree)
    return rebuild(iter([function(leaf) for _, leaf, _ in leaves]))


Leaf: TypeAlias = tuple[str, Any, int | None]
"""The path of a leaf, such as ``"inputs.image"`` or ``"0"``, the leaf, and the dimension on which it is cut."""

Rebuild: TypeAlias = Callable[[Iterator[Any]], Any]


def flatten(tree: Any, path: str = "", *, columns: bool = False) -> tuple[list[Leaf], Rebuild]:
    """Return the leaves of a tree, and a function that builds the same tree from other leaves."""
    if is_array(tree) or (columns and is_column(tree)):
        return [(path, tree, None)], next
    make: Callable[[list[Any]], Any]
    if type(tree) is dict:
        names, branches = list(tree), list(tree.values())
        make = partial(_make_dict, names)
    elif isinstance(tree, Mapping):
        names, branches = list(tree), list(tree.values())
        make = partial(_make_mapping, tree if isinstance(tree, dict | UserDict) else {}, names)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        names, branches = list(tree._fields), list(tree)
        make = partial(_make_named, type(tree))
    elif isinstance(tree, list | tuple):
        names, branches = list(range(len(tree))), list(tree)
        make = type(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        branches = [getattr(tree, name) for name in names]
        make = partial(_make_dataclass, tree, names)
    else:
        return [(path, tree, None)], next
    if all(map(is_array, branches)):  # nothing nested, which is the usual kind
        flat: list[Leaf] = [
            (f"{path}.{name}" if path else str(name), branch, None)
            for name, branch in zip(names, branches, strict=True)
        ]
        if type(tree) is dict:
            return flat, lambda replaced: dict(zip(names, replaced, strict=False))
        count = len(flat)
        return flat, lambda replaced: make(list(islice(replaced, count)))
    leaves: list[Leaf] = []
    rebuilds: list[Rebuild] = []
    for name, branch in zip(names, branches, strict=True):
        below, rebuild = flatten(branch, f"{path}.{name}" if path else str(name), columns=columns)
        leaves += below
        rebuilds.append(rebuild)
    return leaves, lambda replaced: make([rebuild(replaced) for rebuild in rebuilds])


def _make_dict(names: list[Any], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(names, values, strict=True))


def _make_mapping(like: Any, names: list[Any], values: list[Any]) -> Any:
    made = copy.copy(like)
    for name, value in zip(names, values, strict=True):
        made[name] = value
    return made


def _make_named(kind: type[Any], values: list[Any]) -> Any:
    return kind(*values)


def _make_dataclass(like: Any, names: list[str], values: list[Any]) -> Any:
    made = copy.copy(like)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def is_array(leaf: Any) -> bool:
    # The class is asked: a dict may answer for any attribute, and a nested tensor raises where its shape is asked for.
    return hasattr(type(leaf), "shape") and hasattr(leaf, "__getitem__")


def is_column(leaf: Any) -> bool:
    """Whether a list or tuple may be a column, one plain entry a row. Numbers in a tuple are a size, not a column."""
    if not isinstance(leaf, list | tuple) or not leaf or hasattr(leaf, "_fields"):
        return False
    first = leaf[0]
    if is_array(first) or isinstance(first, Mapping | list | tuple) or dataclasses.is_dataclass(first):
        return False
    return not (isinstance(leaf, tuple) and isinstance(first, Real)) and not any(is_array(entry) for entry in leaf)
