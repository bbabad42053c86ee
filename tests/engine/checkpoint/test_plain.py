"""What is taken apart is put together again."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wholebatch as wb
from wholebatch.engine.checkpoint.plain import put_together, taken_apart

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.complex_numbers(allow_nan=False),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text())), inner),
    ),
    max_leaves=12,
)


@given(TREES)
def test_any_tree_comes_back(tree):
    assert put_together(*taken_apart(tree)) == tree


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.ones(0, 3),
        torch.tensor([1 + 2j, 3j]),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([True, False]),
        torch.arange(10)[2:5],
        torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 3.0], (4,), check_invariants=True),
        torch.ones(2, requires_grad=True),
    ],
    ids=str,
)
def test_tensors_come_back(tensor):
    back = put_together(*taken_apart({"x": [tensor]}))["x"][0]
    assert back.dtype == tensor.dtype
    assert back.layout == tensor.layout
    assert torch.equal(back.to_dense(), tensor.detach().to_dense())


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.uint32).reshape(2, 3), np.zeros((0, 2)), np.array(["a", "bc"])]
)
def test_arrays_come_back(array):
    back = put_together(*taken_apart(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()


def test_kinds_come_back():
    state = {
        "counter": Counter({3: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "set": {1, 2},
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "number": np.float64(0.1),
        "$tensor": "a name like a mark",
        "nan": float("nan"),
    }
    back = put_together(*taken_apart(state))
    assert str(back) == str({**state, "number": 0.1})
    assert [type(each) for each in back.values()][:3] == [Counter, OrderedDict, set]


def test_sets_of_sets_and_keys_that_are_sets_come_back():
    state = [{frozenset({1, 2}), frozenset({3})}, {frozenset({1}): 2}, {(1, frozenset({2})): 3}, frozenset()]
    back = put_together(*taken_apart(state))
    assert back == state
    assert type(back[3]) is frozenset


def test_a_tensor_that_is_there_twice_is_written_once():
    weight = torch.ones(3)
    text, tensors = taken_apart({"a": weight, "b": weight, "c": weight[1:]})
    assert len(tensors) == 2
    assert torch.equal(put_together(text, tensors)["b"], weight)


def test_tensors_that_are_made_on_the_way_are_not_taken_for_each_other():
    """What is copied to be written is free again at once, and the next copy may lie where it lay."""
    tensors = [torch.randn(40, 30, dtype=torch.complex64).T.conj() for _ in range(6)]
    back = put_together(*taken_apart(tensors))
    assert all(torch.equal(one, other.resolve_conj()) for one, other in zip(back, tensors, strict=True))


def test_views_of_one_tensor_are_written_apart():
    weight = torch.arange(6.0)
    text, tensors = taken_apart({"a": weight, "b": weight.view(2, 3), "c": weight.view(torch.int32)})
    assert len({each.data_ptr() for each in tensors.values()}) == 3
    assert torch.equal(put_together(text, tensors)["b"], weight.view(2, 3))


def test_names_that_look_like_paths_do_not_meet():
    state = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    back = put_together(*taken_apart(state))
    assert back["a/b"] == 1
    assert back["a"]["b"] == 0


@pytest.mark.parametrize(
    "what", [object(), torch.ones(2, 2).to_mkldnn(), np.array([object()]), np.zeros(2, dtype="f4,i4"), print]
)
def test_what_only_pickle_could_keep_is_named(what):
    with pytest.raises(wb.ConfigError, match=r"extra\.it is a "):
        taken_apart({"extra": {"it": what}})
