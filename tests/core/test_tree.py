"""A tree of tensors, taken apart and built again."""

from typing import Any, NamedTuple

from wholebatch.core.tree import map_leaves


class Point(NamedTuple):
    x: Any
    y: Any


def test_leaves_are_mapped_in_place_and_the_tree_stays_as_it_is():
    tree = {"x": -1, "y": (Point(-2, -3), [-4])}
    assert map_leaves(abs, tree) == {"x": 1, "y": (Point(2, 3), [4])}
    assert tree["x"] == -1
