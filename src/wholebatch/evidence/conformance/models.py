"""What is trained in a scene? Models so small that each system can say them in its own words."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

VOCABULARY, WIDTH, TIME, EXPERTS = 11, 6, 5, 3
IGNORED = -100
"""The label of a position where nothing is to be learned, as PyTorch and Transformers have it."""


class Tagger(nn.Module):
    """Names a class for each token: ``logits = tanh(embedding[input_ids]) @ weight.T + bias``.

    Args:
        dtype: Of the weights.

    Shape:
        Input ``[rows, time]``, output ``[rows, time, classes]``.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(input_ids)))
        return logits


class Averaged(Tagger):
    """A tagger with a moving average of its weights, kept by whoever trains it, once an update."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", self.head.weight.detach().clone())

    def follow(self) -> None:
        """Move the average towards the weights."""
        self.average.lerp_(self.head.weight.detach(), 0.1)


class Routed(Tagger):
    """A tagger whose tokens each go to one of a few experts, as a router has it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64) / WIDTH)

    def route(self, input_ids: Tensor) -> Tensor:
        """Return how much the router leans towards each expert; shape ``[rows, time, experts]``."""
        leanings: Tensor = self.router(self.embedding(input_ids)).softmax(dim=-1)
        return leanings

    def forward(self, input_ids: Tensor) -> Tensor:
        leaning, expert = self.route(input_ids).max(dim=-1)
        hidden = torch.einsum("rti,rtij->rtj", torch.tanh(self.embedding(input_ids)), self.experts[expert])
        logits: Tensor = self.head(hidden * leaning[..., None])
        return logits


class Normed(Tagger):
    """A tagger with batch norm over all positions of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.embedding(input_ids)).flatten(0, 1))
        logits: Tensor = self.head(hidden).unflatten(0, input_ids.shape)
        return logits


class RunsShort(Tagger):
    """A tagger for which memory runs out: once it has seen so many rows, only one at a time fits.

    Args:
        enough_for: Rows that it sees before that.
        backward: Whether the backward pass runs out, half-way, when the head has its gradient and the embedding has
            none; else the forward pass.
    """

    def __init__(self, enough_for: int, *, backward: bool = False) -> None:
        super().__init__()
        self.fits = False
        self._left = enough_for
        self._backward = backward

    def forward(self, input_ids: Tensor) -> Tensor:
        short = self._left <= 0 and len(input_ids) > 1 and not self.fits
        self._left -= len(input_ids)
        if short and not self._backward:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        hidden = torch.tanh(self.embedding(input_ids))
        if short and hidden.requires_grad:
            hidden.register_hook(_run_out)  # type: ignore[no-untyped-call]
        logits: Tensor = self.head(hidden)
        return logits


def with_enough_memory(model: Model) -> Model:
    """Return the model, for which memory does not run out any more."""
    if isinstance(model, RunsShort):
        model.fits = True
    return model


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
"""How PyTorch says it."""


def _run_out(_: Tensor) -> None:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


class Overflowing(Tagger):
    """A tagger in float32 with one token, the last, whose logits are beyond what float16 can hold."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.gain = torch.ones(VOCABULARY, 1)
        self.gain[-1] = 1e6

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(input_ids)) * self.gain[input_ids])
        return logits


class HalfOverflowing(Tagger):
    """A tagger in float32 with one token, the last, through which the gradient of the embedding overflows when the loss
    is scaled, while that of the head does not.
    """

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.pitch = torch.ones(VOCABULARY, 1)
        self.pitch[-1] = 1e37

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.sin(self.embedding(input_ids) * self.pitch[input_ids]))
        return logits


class Players(nn.Module):
    """A generator and a discriminator, or any two models that are trained side by side.

    Shape:
        The generator takes noise ``[rows, 3]`` and returns samples ``[rows, 4]``; the discriminator takes samples and
        returns scores ``[rows, 1]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.discriminator = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
