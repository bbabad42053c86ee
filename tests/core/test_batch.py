"""How rows are taken from a logical batch."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import MutableMapping
from typing import NamedTuple

import numpy as np
import pytest
import torch

import wholebatch as wb
from wholebatch.core.batch import LogicalBatch, count_rows


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    label: str


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor


class Custom(MutableMapping):
    """A mapping of somebody else, that keeps its items where `copy.copy` does not look."""

    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, name):
        return self._items[name]

    def __setitem__(self, name, value):
        self._items[name] = value

    def __delitem__(self, name):
        del self._items[name]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


X = torch.arange(12).reshape(6, 2)
KEPT = [4, 1]


@pytest.mark.parametrize(
    ("batch", "micro_batch"),
    [
        (X, X[KEPT]),
        ({"x": X, "y": [X, (X,)]}, {"x": X[KEPT], "y": [X[KEPT], (X[KEPT],)]}),
        ([X, X], [X[KEPT], X[KEPT]]),
        (Point(X, X), Point(X[KEPT], X[KEPT])),
        (Frozen(X, "left"), Frozen(X[KEPT], "left")),
        (Slotted(X), Slotted(X[KEPT])),
        (OrderedDict(x=X), OrderedDict(x=X[KEPT])),
        (UserDict(x=X), UserDict(x=X[KEPT])),
        (defaultdict(list, x=X), defaultdict(list, x=X[KEPT])),
        (Custom({"x": X}), {"x": X[KEPT]}),
        ({"x": X.numpy()}, {"x": X.numpy()[KEPT]}),
        ({"x": X, "text": list("abcdef")}, {"x": X[KEPT], "text": ["e", "b"]}),
        ({"x": X, "text": tuple("abcdef")}, {"x": X[KEPT], "text": ("e", "b")}),
        ({"x": X, "size": [3, 1, 4, 1, 5, 9]}, {"x": X[KEPT], "size": [5, 1]}),
        ({"x": X, "shape": (1, 2, 3, 4, 5, 6)}, {"x": X[KEPT], "shape": (1, 2, 3, 4, 5, 6)}),
        ({"x": X, "name": "abcdef", "n": 6, "no": None}, {"x": X[KEPT], "name": "abcdef", "n": 6, "no": None}),
        ({"x": X, "few": ["a", "b"]}, {"x": X[KEPT], "few": ["a", "b"]}),
        ({"x": X, "scale": torch.tensor(0.5), "none": []}, {"x": X[KEPT], "scale": torch.tensor(0.5), "none": []}),
        (list("abcdef"), ["e", "b"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_micro_batch_has_the_structure_of_its_batch(batch, micro_batch):
    taken = LogicalBatch(batch).take(KEPT)
    assert type(taken) is type(micro_batch)
    assert _plain(taken) == _plain(micro_batch)


def _plain(tree):
    """The same as lists, dicts and plain values, which can be compared."""
    if isinstance(tree, torch.Tensor | np.ndarray):
        return tree.tolist()
    if dataclasses.is_dataclass(tree):
        return {field.name: _plain(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    if hasattr(tree, "items"):
        return {name: _plain(branch) for name, branch in tree.items()}
    return [_plain(branch) for branch in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize(
    "batch", [{"x": X}, UserDict(x=X), Custom({"x": X}), Slotted(X)], ids=lambda b: type(b).__name__
)
def test_taking_rows_leaves_the_batch_as_it_was(batch):
    before = _plain(batch)
    LogicalBatch(batch).take(KEPT)
    assert _plain(batch) == before


def test_rows_that_stand_side_by_side_are_views_and_not_copies():
    taken = LogicalBatch({"x": X, "text": list("abcdef")}).take(range(2, 5))
    assert taken["x"].data_ptr() == X[2:].data_ptr()
    assert taken["text"] == ["c", "d", "e"]


def test_whole_tensors_go_to_each_micro_batch_and_rows_may_lie_on_another_dimension():
    batch = {"in": {"image": torch.arange(8).reshape(2, 4), "anchor": torch.ones(3)}, "y": torch.arange(4)}
    logical = LogicalBatch(batch, whole=["in.anchor"], dims={"in.image": 1})
    taken = logical.take([3, 0])
    assert logical.rows == 4
    assert taken["in"]["image"].tolist() == [[3, 0], [7, 4]]
    assert taken["in"]["anchor"].shape == (3,)


def test_a_branch_of_the_batch_may_be_named_for_all_below_it():
    batch = {"side": {"a": torch.ones(3), "b": torch.ones(5)}, "time": {"x": torch.arange(8).reshape(2, 4)}}
    taken = LogicalBatch(batch, whole=["side"], dims={"time": 1}).take(range(1, 3))
    assert taken["side"] is not None
    assert [len(taken["side"][name]) for name in "ab"] == [3, 5]
    assert taken["time"]["x"].tolist() == [[1, 2], [5, 6]]


def test_one_dimension_may_be_said_for_all_tensors():
    taken = LogicalBatch((torch.arange(8).reshape(2, 4), torch.zeros(1, 4)), dims=1).take([2])
    assert [part.shape[1] for part in taken] == [1, 1]


def test_a_list_of_rows_is_collated_a_micro_batch_at_a_time():
    collated = []
    logical = LogicalBatch(["a", "bb", "ccc"], collate=lambda rows: collated.append(rows) or "-".join(rows))
    assert logical.take([2, 0]) == "ccc-a"
    assert collated == [["ccc", "a"]]


def test_lengths_are_those_of_single_rows():
    batch = {"x": torch.tensor([[1, 1, 0], [1, 0, 0]]), "text": ["abc", "d"]}
    assert LogicalBatch(batch).lengths(lambda row: int(row["x"].sum()) + len(row["text"])) == [5, 2]
    assert LogicalBatch(["a", "bb"], collate=list).lengths(len) == [1, 2]


@pytest.mark.parametrize("length", [-1, 1.5, float("nan"), float("inf"), None, "3"], ids=repr)
def test_a_length_that_is_no_number_of_tokens_is_refused(length):
    with pytest.raises(wb.SplitError, match="Row 0 of the logical batch") as error:
        LogicalBatch(["a"], collate=list).lengths(lambda _: length)
    assert repr(length) in error.value.found
    assert "length(row)" in error.value.hint


def test_a_list_of_texts_without_collate_is_taken_for_rows_and_told_so():
    texts = [torch.ones(length) for length in (4, 9, 3, 5, 6, 7, 8, 2, 1, 1)]
    with pytest.raises(wb.SplitError, match=r"list of 10 tensors, .*: 4, 9, 3, 5, 6, 7, 8, 2 and 2 more") as error:
        LogicalBatch(texts)
    assert "collate=..." in error.value.hint
    assert LogicalBatch(texts, collate=len).rows == 10


def test_tensors_that_disagree_on_rows_are_named_with_both_ways_out():
    batch = {"input_ids": torch.ones(32, 4), "labels": torch.ones(32), "image": torch.ones(8, 3)}
    with pytest.raises(wb.SplitError, match="input_ids 32, labels 32, image 8") as error:
        LogicalBatch(batch)
    assert "whole=['image']" in error.value.hint
    assert "dims={'image': 1}" in error.value.hint
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("batch", "options", "found", "hint"),
    [
        ([{"x": X}, {"x": X}], {}, "list of 2 rows", "collate="),
        ([(X, 1), (X, 2)], {}, "list of 2 rows", "collate="),
        ({"x": X}, {"collate": list}, "this one is a dict", "collate_fn=list"),
        (iter([X]), {"collate": list}, "this one is a list_iterator", "collate_fn=list"),
        ({"x": 3}, {}, "no tensor with rows", "collate="),
        (None, {}, "no tensor with rows", "collate="),
        ({}, {}, "is empty: a dict with nothing in it", "out of the loader"),
        ([], {}, "is empty: a list with nothing in it", "out of the loader"),
        ({"inputs": X}, {"whole": ["input"]}, "has no `input`; it has inputs", "did you mean `inputs`"),
        ({"inputs": X}, {"dims": {"qqq": 1}}, "has no `qqq`", "as they are listed"),
        ({"x": torch.ones(4)}, {"dims": {"x": 1}}, "shape \\(4,\\), and no dimension 1", "counts from 0"),
        ({"x": torch.ones(2, 4)}, {"dims": {"x": -1}}, "dimension -1", "counts from 0"),
        ({"x": torch.ones(2, 4)}, {"dims": -1}, "dimension -1", "counts from 0"),
        ({"x": torch.ones(2, 4).to_sparse()}, {}, "x is a sparse_coo tensor", "collate="),
        (
            {"image": X, "boxes": [torch.ones(n, 4) for n in (1, 2, 3, 1, 2, 1)]},
            {},
            "`boxes` seems to hold one entry a row",
            "collate_fn=list",
        ),
        ((X, [{"boxes": torch.ones(n, 4)} for n in (1, 2, 3, 1, 2, 1)]), {}, "`1` seems to hold", "collate="),
    ],
)
def test_a_batch_that_cannot_be_cut_says_what_was_found_and_what_to_do(batch, options, found, hint):
    with pytest.raises(wb.SplitError, match=found) as error:
        LogicalBatch(batch, **options)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("micro_batch", "rows"),
    [
        (X, 6),
        ({"x": X, "y": torch.ones(6), "scale": torch.tensor(1.0)}, 6),
        ({"x": X, "y": torch.ones(5)}, None),
        ({"text": ["a", "b"]}, 2),
        ("text", None),
        ([{"x": X}, {"x": X}], None),
    ],
)
def test_rows_of_a_micro_batch_are_counted_where_its_tensors_agree(micro_batch, rows):
    assert count_rows(micro_batch) == rows


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("layout", "rows"), [(torch.strided, None), (torch.jagged, 2)], ids=str)
def test_a_nested_tensor_cannot_be_cut_and_its_rows_are_counted_where_it_tells_them(layout, rows):
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    with pytest.raises(wb.SplitError, match="x is a nested tensor"):
        LogicalBatch({"x": nested})
    assert count_rows({"x": nested}) == rows


class AnswersForEverything(dict):
    """A dict whose entries are attributes too, and which raises another error for those that it has not."""

    __getattr__ = dict.__getitem__


def test_a_dict_that_answers_for_any_attribute_is_a_dict():
    taken = LogicalBatch(AnswersForEverything(x=X, inner=AnswersForEverything(y=X))).take([1, 2])
    assert type(taken) is AnswersForEverything
    assert torch.equal(taken.inner.y, X[[1, 2]])
    assert count_rows({"x": X, "inner": AnswersForEverything(y=X)}) == len(X)


class Frame:
    """A table as pandas has it: indexing by a list takes columns."""

    def __init__(self, rows):
        self.rows, self.shape = rows, (len(rows), len(rows[0]))
        self.iloc = self

    shape = ()

    def __getitem__(self, index):
        rows = self.rows[index] if isinstance(index, slice) else [self.rows[row] for row in index]
        return Frame(rows)


def test_a_table_is_cut_by_its_rows():
    class ByColumn(Frame):
        def __getitem__(self, index):
            raise KeyError(index)

    table = ByColumn([[row, -row] for row in range(6)])
    table.iloc = Frame(table.rows)
    batch = LogicalBatch({"x": X, "table": table})
    assert batch.take([4, 1])["table"].rows == [[4, -4], [1, -1]]
    assert batch.take(range(2))["table"].rows == [[0, 0], [1, -1]]


def test_rows_of_a_micro_batch_are_counted_as_they_are_cut():
    batch = {"time": torch.ones(5, 3), "anchor": torch.ones(9), "y": torch.ones(3)}
    assert count_rows(batch, whole=["anchor"], dims={"time": 1}) == 3


@pytest.mark.parametrize(("batch", "collate"), [({"x": torch.ones(0, 3)}, None), ([], list)], ids=["tensors", "rows"])
def test_an_empty_batch_has_no_rows(batch, collate):
    assert LogicalBatch(batch, collate=collate).rows == 0
