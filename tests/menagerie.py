"""Small models that are awkward, each for a reason of its own, with the batch and the loss that they are trained on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

IGNORED = -100
VOCABULARY = 11


@dataclass(frozen=True)
class Animal:
    """A model with what it is trained on: `batch(rows, dtype)` and `loss_fn(model, batch)`."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.dtype], Any]
    loss_fn: Callable[[nn.Module, Any], Any]
    targets: Callable[[Any], Any] | None = None
    reduction: str = "mean"
    trained: Callable[[nn.Module], Iterable[nn.Parameter]] = nn.Module.parameters
    cut: dict[str, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The same weights whenever it is called."""
        torch.manual_seed(7)
        model = self.build()
        complex_dtype = dtype.to_complex() if dtype != torch.bfloat16 else torch.complex64
        return model._apply(
            lambda x: x.to(complex_dtype) if x.is_complex() else x.to(dtype) if x.is_floating_point() else x
        )

    @property
    def objective(self) -> dict[str, Any]:
        """The keywords that tell `wb.Accumulator` and `wb.verify` what is to be trained, and how to cut it."""
        return {"targets": self.targets, "reduction": self.reduction, **self.cut}


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same whenever they are asked for."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_numbers(below: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def regression(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": numbers(rows, 5, dtype=dtype), "y": numbers(rows, 3, dtype=dtype, seed=1)}


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(batch["x"]), batch["y"])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def texts(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of six tokens, of which row k keeps ``k % 7`` labels, so that some rows have none."""
    tokens = whole_numbers(VOCABULARY, rows, 6)
    kept = torch.arange(6)[None, :] < (torch.arange(rows) % 7)[:, None]
    return {"tokens": tokens, "labels": tokens.roll(1, 1).masked_fill(~kept, IGNORED)}


def num_labels(batch: Any) -> Tensor:
    return (batch["labels"] != IGNORED).sum()


def mean_over_labels(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def sum_over_labels(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(
        model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def counted_sum(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return sum_over_labels(model, batch), num_labels(batch)


def regularised_sum(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *counted_sum(model, batch), 0.1 * sum(weight.square().sum() for weight in model.parameters())


class TiedHead(nn.Module):
    """The embedding is the head as well: one parameter, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embedding(tokens))) @ self.embedding.weight.T


class SparseEmbedding(nn.Sequential):
    """Gradients of the embedding are sparse tensors."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(VOCABULARY, 6, sparse=True), nn.Linear(6, VOCABULARY))


class TwoHeads(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.idle = nn.Parameter(torch.ones(3))
        self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(first) + self.body(second)) * self.fixed
        return {"left": self.left(hidden), "right": self.right(hidden)}


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class TwoTasks:
    """A dataclass that holds a named tuple, a dict of a list, texts and a setting."""

    inputs: Pair
    labels: dict[str, list[Tensor]]
    names: list[str]
    temperature: float = 0.5


def two_tasks(rows: int, dtype: torch.dtype) -> TwoTasks:
    inputs = Pair(numbers(rows, 5, dtype=dtype), numbers(rows, 5, dtype=dtype, seed=1))
    labels = [numbers(rows, 3, dtype=dtype, seed=2), numbers(rows, 2, dtype=dtype, seed=3)]
    return TwoTasks(inputs, {"both": labels}, [f"row {row}" for row in range(rows)])


def both_heads(model: nn.Module, batch: TwoTasks) -> Tensor:
    assert len(batch.names) == len(batch.inputs.first)
    outputs, (left, right) = model(*batch.inputs), batch.labels["both"]
    return mse_loss(outputs["left"], left) + batch.temperature * mse_loss(outputs["right"], right)


def left_head(model: nn.Module, batch: TwoTasks) -> Tensor:
    return mse_loss(model(*batch.inputs)["left"], batch.labels["both"][0])


class Complex(nn.Module):
    """A complex weight under a real loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


class CountsRows(nn.Module):
    """A buffer that every forward pass changes, and another that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.layer(x * self.mask)


class Recomputes(nn.Module):
    """Activation checkpointing of either kind."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


class HalfInBfloat16(nn.Module):
    """Weights of two dtypes: 16 bits in the body, 32 or 64 in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(change, recurse)
        self.body.bfloat16()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.bfloat16())).to(x.dtype))


class TimeFirst(nn.Module):
    """Rows lie on the second dimension of the input, as recurrent layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][0]


def recordings(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": numbers(4, rows, 5, dtype=dtype), "y": numbers(rows, 3, dtype=dtype, seed=1)}


def with_an_anchor(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**regression(rows, dtype), "anchor": numbers(2, 5, dtype=dtype, seed=2)}


def square_from_the_anchor(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(batch["x"] - batch["anchor"].mean(0)), batch["y"])


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))


def images(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": numbers(rows, 1, 5, 5, dtype=dtype), "y": whole_numbers(3, rows)}


def classify(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def frozen_body() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


CALM = {
    "mlp": Animal(mlp, regression, mean_square),
    "convolution": Animal(conv_net, images, classify),
    "shared weights": Animal(TiedHead, texts, mean_over_labels, num_labels),
    "summed loss": Animal(TiedHead, texts, sum_over_labels, num_labels, "sum"),
    "counted loss": Animal(TiedHead, texts, counted_sum),
    "regulariser": Animal(TiedHead, texts, regularised_sum),
    "sparse gradients": Animal(SparseEmbedding, texts, mean_over_labels, num_labels),
    "several inputs and outputs": Animal(TwoHeads, two_tasks, both_heads),
    "unused output": Animal(TwoHeads, two_tasks, left_head),
    "frozen part": Animal(frozen_body, regression, mean_square),
    "bystanders": Animal(mlp, regression, mean_square, trained=lambda model: model[2].parameters()),
    "complex weights": Animal(Complex, regression, mean_square),
    "changing buffer": Animal(CountsRows, regression, mean_square),
    "reentrant checkpointing": Animal(lambda: Recomputes(use_reentrant=True), regression, mean_square),
    "checkpointing": Animal(lambda: Recomputes(use_reentrant=False), regression, mean_square),
    "rows on another dimension": Animal(TimeFirst, recordings, mean_square, cut={"dims": {"x": 1}}),
    "a tensor for all rows": Animal(mlp, with_an_anchor, square_from_the_anchor, cut={"whole": ["anchor"]}),
}
"""Models whose update does not depend on the cut, so that exact means exact."""


def in_batch_negatives(model: nn.Module, batch: Any) -> Tensor:
    similarities = model(batch["x"]) @ batch["y"].T
    return cross_entropy(similarities, torch.arange(len(similarities)))


def noisy_mean_square(model: nn.Module, batch: Any) -> Tensor:
    """Noise in the loss itself, as in diffusion or a variational autoencoder: evaluation mode does not silence it."""
    return mse_loss(model(batch["x"] + 0.1 * torch.randn_like(batch["x"])), batch["y"])


DROPOUT = Animal(
    lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 3)), regression, mean_square
)
"""Two layers: a single one may draw row after row, and so the same masks however the rows are cut."""
BATCH_NORM = Animal(
    lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)), regression, mean_square
)
CONTRASTIVE = Animal(mlp, regression, in_batch_negatives)
NOISY = Animal(mlp, regression, noisy_mean_square)
MIXED = Animal(HalfInBfloat16, regression, mean_square)
