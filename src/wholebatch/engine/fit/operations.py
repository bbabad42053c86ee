"""What is known of an operation: does it make tensors, return views, or take memory that nobody sees?"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of an operation.

    Attributes:
        name: What it is called.
        makes: Whether it returns more than views of what it was given, and what it was given.
        views: Whether what it returns may be memory that it was given: a view, or nobody says so.
        hidden: Whether it is known to take memory within itself.
        product: Whether it does so in 16 bits.
    """

    name: str
    makes: bool
    views: bool
    hidden: bool
    product: bool


DEVICE = torch.ops.prim.device.default
"""Asks a tensor where it is, and takes no memory."""


@cache
def about(func: Any) -> Operation:
    """Return what is known of an operation, by its schema."""
    schema = func._schema
    foreign = not schema.name.startswith("aten::")
    told = [each.alias_info for each in schema.returns]
    makes = foreign or any(each is None for each in told)
    views = foreign or any(each is not None and not each.is_write for each in told)
    return Operation(schema.name, makes, views, _takes_more(schema.name), schema.name in _PRODUCTS)


_HIDDEN = {
    "convolution",
    "mkldnn",
    "cudnn",
    "miopen",
    "rnn",
    "lstm",
    "gru",
    "fft",
    "linalg",
    "bag",
    "sort",
    "argsort",
    "topk",
    "unique",
    "median",
    "quantile",
    "kthvalue",
    "cdist",
    "ctc",
}
"""Parts of the names of operations that are known to take memory within themselves."""


def _takes_more(name: str) -> bool:
    """Whether an operation is known to take memory within itself."""
    space, _, name = name.partition("::")
    return space not in ("aten", "prims", "profiler") or bool(_HIDDEN.intersection(name.split("_")))


_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"}


def is_narrow(args: tuple[Any, ...]) -> bool:
    """Return whether a product is one in 16 bits, which a CPU computes from copies in another order."""
    return any(isinstance(each, Tensor) and each.element_size() == 2 and each.device.type == "cpu" for each in args)
