"""Random streams come back to where they stood."""

import random
import sys
import types

import numpy as np
import pytest
import torch

from wholebatch.engine.randomness import RandomState


@pytest.mark.parametrize("draw", [np.random.rand, np.random.standard_normal], ids=["uniform", "normal"])
def test_the_stream_of_numpy_is_put_back_between_draws_of_every_kind(draw):
    """A normal number may lie in reserve, of which the generator's own state does not tell."""
    np.random.seed(0)
    for _ in range(3):
        state = RandomState.now()
        first = draw()
        state.restore()
        assert draw() == first


@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64])
@pytest.mark.parametrize(
    "draw",
    [torch.rand, lambda _: random.random(), np.random.rand, np.random.standard_normal, None],
    ids=["torch", "Python", "NumPy", "NumPy's normal", "nobody"],
)
def test_a_state_stands_until_somebody_draws(draw, generator):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(generator(3))
    try:
        state = RandomState.now()
        assert state.stands()
        if draw is not None:
            draw(1)
        assert state.stands() is (draw is None)
    finally:
        np.random.set_bit_generator(before)


def test_a_state_does_not_stand_once_numpy_is_loaded(monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "numpy")
        state = RandomState.now()
    assert not state.stands()


def test_a_stream_of_numpy_with_another_generator_is_put_back_too():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RandomState.now()
        first = np.random.rand()
        state.restore()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize(("device", "places"), [("cuda:1", 1), ("mps", 0)])
def test_the_stream_of_an_accelerator_is_kept_as_well(device, places, monkeypatch):
    """Metal has one stream; everybody else names it by device."""
    calls = []
    stream = types.SimpleNamespace(
        get_rng_state=lambda *device: calls.append(device) or torch.tensor(7),
        set_rng_state=lambda state, *device: calls.append((int(state), *device)),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: stream)
    RandomState.now(torch.device(device)).restore()
    assert calls == [(torch.device(device),) * places, (7, *[torch.device(device)] * places)]


def test_without_numpy_the_other_streams_are_kept(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    state = RandomState.now()
    first = torch.rand(2), random.random()
    state.restore()
    assert torch.equal(torch.rand(2), first[0])
    assert random.random() == first[1]


def test_a_state_of_an_accelerator_is_left_out_where_there_is_none():
    state = {**RandomState.now().state_dict(), "on device": torch.tensor(7)}
    assert RandomState.of(state, torch.device("cpu")).on_device is None
