"""Text: a byte-level transformer learns the paragraphs of a novel, whose lengths vary strongly.

Each row is a paragraph of Pride and Prejudice, cut at 512 bytes; the model predicts every byte from those before it. In
random batches padded to the longest row, only a quarter of the positions would hold a byte.
"""

import lzma
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

NOVEL = Path(__file__).parent / "data" / "pride_and_prejudice.txt.xz"
LONGEST = 512
# The novel holds no zero byte, so that zero can mean: no byte here.
PADDING = 0
VOCABULARY = 256

defaults: dict[str, Any] = {
    "logical_batch": "128 rows",
    "micro_batch": "2048 tokens",
    "epochs": 2,
    "clip_norm": 1.0,
}


@cache
def paragraphs() -> tuple[bytes, ...]:
    """Return the paragraphs of the novel, in order, each on one line and cut at 512 bytes."""
    with lzma.open(NOVEL, "rt", encoding="utf-8") as novel:
        text = novel.read()
    return tuple(
        re.sub(r"\s+", " ", paragraph).strip().encode()[:LONGEST]
        for paragraph in re.split(r"\n\s*\n", text)
        if paragraph.strip()
    )


def data(split: str) -> Sequence[bytes]:
    """Return paragraphs: every tenth is held out for validation."""
    held_out = split == "validation"
    return [row for place, row in enumerate(paragraphs()) if (place % 10 == 9) == held_out]


def length(row: bytes) -> int:
    """Return the bytes of a paragraph, each of which is a token."""
    return len(row)


def collate(rows: list[bytes]) -> Tensor:
    """Return the bytes as a tensor of shape ``[rows, time]``, padded to the longest paragraph."""
    bytes_RT = torch.full((len(rows), max(map(len, rows))), PADDING)  # noqa: N806 - R rows, T bytes
    for place, row in enumerate(rows):
        bytes_RT[place, : len(row)] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    return bytes_RT


def loss(model: nn.Module, micro_batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of all bytes, and how many they are."""
    logits = model(micro_batch)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), micro_batch.flatten(), ignore_index=PADDING, reduction="sum")
    return loss_sum, (micro_batch != PADDING).sum()


def measure(model: nn.Module, rows: Sequence[bytes]) -> dict[str, float]:
    """Return the bits that the model needs for a byte; untrained it is 8."""
    device = next(model.parameters()).device
    by_length = sorted(rows, key=len)
    nats = 0.0
    for start in range(0, len(by_length), 16):
        loss_sum, _ = loss(model, collate(by_length[start : start + 16]).to(device))
        nats += loss_sum.item()
    return {"bits_per_byte": nats / sum(map(len, rows)) / math.log(2)}


def model() -> nn.Module:
    """Return a transformer of two blocks, small enough for a minute on two cores."""
    return ByteTransformer(width=64, heads=2, blocks=2)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, with larger steps for what is looked up than for what is multiplied."""
    looked_up = {"embedding", "position", "head"}
    parameters: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parameters[name.split(".")[0] in looked_up].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters[True], "lr": 5e-2}, {"params": parameters[False], "lr": 8e-3}],
        betas=(0.8, 0.95),
        weight_decay=0.01,
    )


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside the stream (pre-norm).

    Padding stands at the end of a row, where no earlier byte can look, so that causal attention needs no other mask.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_RTF: Tensor) -> Tensor:  # noqa: N803 - R rows, T bytes, F features
        """Return the stream with what this block adds."""
        split = self.attend(self.norm(x_RTF)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_RTF = x_RTF + self.join(attended.transpose(1, 2).flatten(2))  # noqa: N806
        fed: Tensor = self.feed(x_RTF)
        return x_RTF + fed


class ByteTransformer(nn.Module):
    """Predicts each byte of a row from those before it.

    Args:
        width: Features of a byte.
        heads: Attention heads in each block.
        blocks: How many blocks.
    """

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LONGEST, width)
        self.neighbours = nn.Conv1d(width, width, kernel_size=4, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.position.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, bytes_RT: Tensor) -> Tensor:  # noqa: N803 - R rows, T bytes
        """Return the logits of each byte, given the earlier ones; shape ``[rows, time, 256]``."""
        earlier = F.pad(bytes_RT[:, :-1], (1, 0), value=PADDING)
        x_RTF = self.embedding(earlier)  # noqa: N806
        last_four = self.neighbours(F.pad(x_RTF.mT, (3, 0))).mT
        x_RTF = x_RTF + last_four + self.position.weight[: bytes_RT.shape[1]]  # noqa: N806
        for block in self.blocks:
            x_RTF = block(x_RTF)  # noqa: N806
        logits: Tensor = self.head(self.norm(x_RTF))
        return logits
