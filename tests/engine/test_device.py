"""Where a model takes its input, and how a micro-batch gets there."""

from typing import ClassVar

import torch
from torch import nn

from menagerie import CALM, Pair
from wholebatch.engine.device import input_device, modules, move

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_device_is_that_of_the_first_parameter():
    assert input_device(nn.Linear(2, 2, device="meta")) == META
    assert input_device(nn.ReLU()) == CPU


def test_a_micro_batch_for_the_cpu_is_left_as_it_is():
    batch = {"x": torch.ones(2)}
    assert move(batch, CPU) is batch


def test_tensors_are_moved_and_everything_else_stays():
    there = torch.ones(3, device=META)
    batch = {"pair": Pair(torch.ones(2), there), "text": ["a", "b"], "n": 3}
    moved = move(batch, META)
    assert moved["pair"].first.device == META
    assert moved["pair"].second is there
    assert (moved["text"], moved["n"]) == (["a", "b"], 3)
    assert batch["pair"].first.device == CPU


class Pinned(torch.Tensor):
    """A tensor that writes down what is done to it, as no accelerator is at hand."""

    done: ClassVar[list[str]] = []

    def pin_memory(self):
        self.done.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.done.append(f"to {device}, {'queued' if non_blocking else 'waited for'}")
        return self


def test_copies_to_cuda_are_pinned_and_queued():
    Pinned.done.clear()
    move([torch.ones(2).as_subclass(Pinned)], torch.device("cuda"))
    assert Pinned.done == ["pinned", "to cuda, queued"]


def test_modules_are_those_of_the_model_each_once():
    model = CALM["several inputs and outputs"].model()
    model.again = model.left
    model.register_module("none", None)
    assert set(modules(model)) == set(model.modules())
    assert len(modules(model)) == len(list(model.modules()))
