"""Models as people bring them: wb.verify accuses none of them, and each with a mistake is."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import wholebatch as wb

DTYPES = [torch.float64, torch.float32]
ROWS = 10


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def lengths(most: int, rows: int = ROWS) -> Tensor:
    return chosen(most, rows, seed=5) + 1


@dataclass(frozen=True)
class Case:
    """A model, its loss, a batch, and what else verify is told."""

    model: nn.Module
    loss_fn: Any
    batch: Any
    options: dict[str, Any]


def gpt2(dtype: torch.dtype) -> Case:
    """Of Transformers, whose labels of padding are -100; it shifts them, so the first of each row is none."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=37,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    input_ids, real = chosen(37, ROWS, 12), torch.arange(12) < (lengths(9) + 2)[:, None]
    batch = {"input_ids": input_ids, "attention_mask": real.long(), "labels": input_ids.masked_fill(~real, -100)}

    def targets(each: Any) -> Tensor:
        return (each["labels"][:, 1:] != -100).sum()

    return Case(transformers.GPT2LMHeadModel(config).to(dtype), lambda m, b: m(**b).loss, batch, {"targets": targets})


class Packed(nn.Module):
    """An LSTM over packed sequences, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.layer, self.head = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(10, 13)

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), length.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(hidden)


def lstm(dtype: torch.dtype) -> Case:
    length = lengths(7)
    labels = chosen(13, ROWS, 7, seed=2).masked_fill(torch.arange(7) >= length[:, None], -100)
    batch = {"tokens": chosen(13, ROWS, 7), "length": length, "labels": labels}

    def loss_fn(model: nn.Module, each: Any) -> Tensor:
        return cross_entropy(model(each["tokens"], each["length"]).flatten(0, 1), each["labels"].flatten())

    return Case(Packed().to(dtype), loss_fn, batch, {"targets": lambda each: (each["labels"] != -100).sum()})


class Patches(nn.Module):
    """A vision transformer: patches, a learned token for the class, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.body(x)[:, 0]))


def vit(dtype: torch.dtype) -> Case:
    batch = drawn(ROWS, 3, 16, 16, dtype=dtype), chosen(5, ROWS)
    return Case(Patches().to(dtype), lambda m, b: cross_entropy(m(b[0]), b[1], label_smoothing=0.1), batch, {})


class Graphs(nn.Module):
    """Two rounds of messages along edges of a dense adjacency, and a sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.relu(self.first(edges @ nodes))
        hidden = torch.relu(self.second(hidden + edges @ hidden))
        return self.head(hidden.sum(dim=1))[:, 0]


class ScatteredGraphs(nn.Module):
    """The same where graphs of different size lie one after the other, and nodes are summed by their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, graphs: dict[str, Tensor]) -> Tensor:
        hidden = torch.relu(self.first(graphs["nodes"]))
        source, target = graphs["edges"]
        hidden = hidden + torch.zeros_like(hidden).index_add(0, target, hidden[source])
        pooled = hidden.new_zeros(len(graphs["y"]), 8).index_add(0, graphs["of"], hidden)
        return self.head(pooled)[:, 0]


def graph_network(dtype: torch.dtype) -> Case:
    edges = (drawn(ROWS, 6, 6, seed=3) > 0.5).to(dtype)
    batch = {"nodes": drawn(ROWS, 6, 4, dtype=dtype), "edges": edges, "y": drawn(ROWS, seed=1, dtype=dtype)}
    return Case(Graphs().to(dtype), lambda m, b: mse_loss(m(b["nodes"], b["edges"]), b["y"]), batch, {})


def graphs_of_rows(dtype: torch.dtype) -> Case:
    """A list of graphs, which `collate` lays one after the other."""
    rows = [
        {
            "nodes": drawn(size, 4, seed=row, dtype=dtype),
            "edges": chosen(size, 2, 2 * size, seed=row),
            "y": drawn(1, seed=row)[0].to(dtype),
        }
        for row, size in enumerate(lengths(6).tolist())
    ]

    def collate(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sizes = [len(row["nodes"]) for row in some]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        return {
            "nodes": torch.cat([row["nodes"] for row in some]),
            "edges": torch.cat([row["edges"] + start for row, start in zip(some, starts, strict=True)], dim=1),
            "of": torch.repeat_interleave(torch.arange(len(some)), torch.tensor(sizes)),
            "y": torch.stack([row["y"] for row in some]),
        }

    return Case(ScatteredGraphs().to(dtype), lambda m, b: mse_loss(m(b), b["y"]), rows, {"collate": collate})


class Variational(nn.Module):
    """A variational autoencoder that takes its noise with its rows, as a dataset with a seed gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(12, 8), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 12))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, dim=-1)
        return self.decode(mean + noise * (log_variance / 2).exp()), mean, log_variance


class VariationalByRow(Variational):
    """The same that draws the noise of a row from a seed of the row."""

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = [torch.randn(4, generator=torch.Generator().manual_seed(int(seed)), dtype=x.dtype) for seed in noise]
        return super().forward(x, torch.stack(own))


def elbo(model: nn.Module, each: Any) -> Tensor:
    logits, mean, log_variance = model(each["x"], each["noise"])
    reconstruction = binary_cross_entropy_with_logits(logits, each["x"], reduction="none").sum(-1)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)
    return (reconstruction + divergence).mean()


def vae(dtype: torch.dtype) -> Case:
    batch = {"x": drawn(ROWS, 12, dtype=dtype).sigmoid(), "noise": drawn(ROWS, 4, seed=1, dtype=dtype)}
    return Case(Variational().to(dtype), elbo, batch, {})


def vae_by_row(dtype: torch.dtype) -> Case:
    batch = {"x": drawn(ROWS, 12, dtype=dtype).sigmoid(), "noise": torch.arange(ROWS)}
    return Case(VariationalByRow().to(dtype), elbo, batch, {})


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU())
        self.classes, self.value = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.classes(hidden), self.value(hidden)[:, 0]


def two_tasks(dtype: torch.dtype) -> Case:
    """Two losses over the same rows, summed, with their number."""
    batch = {"x": drawn(ROWS, 6, dtype=dtype), "kind": chosen(4, ROWS), "y": drawn(ROWS, seed=1, dtype=dtype)}

    def loss_fn(model: nn.Module, each: Any) -> tuple[Tensor, int]:
        logits, value = model(each["x"])
        loss = cross_entropy(logits, each["kind"], reduction="sum") + 0.3 * mse_loss(value, each["y"], reduction="sum")
        return loss, len(each["x"])

    return Case(TwoHeads().to(dtype), loss_fn, batch, {})


CASES = {each.__name__: each for each in (gpt2, lstm, vit, graph_network, graphs_of_rows, vae, vae_by_row, two_tasks)}


def made(name: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Transformers says when it is loaded
        return CASES[name](dtype)


def rows_in(each: Any) -> int:
    return len(each[-1] if isinstance(each, tuple) else each["y" if "y" in each else "x"])


def by_targets(case: Case) -> Any:
    """The right window of one's own: sums, divided once by what the window holds."""

    def counted(model: nn.Module, each: Any) -> tuple[Tensor, Any]:
        result = case.loss_fn(model, each)
        if isinstance(result, tuple):
            return result
        count = case.options.get("targets", rows_in)(each)
        return result * count, count

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Any]) -> None:
        optimizer.zero_grad()
        held = 0
        for each in micro_batches:
            loss_sum, count = counted(model, each)
            loss_sum.backward()
            held += int(count)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad /= held
        optimizer.step()

    return step


@pytest.mark.parametrize("own", [False, True], ids=["accumulator", "own step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_clean_model_is_not_accused(name, dtype, own):
    case = made(name, dtype)
    found = wb.verify(case.model, case.loss_fn, case.batch, step=by_targets(case) if own else None, **case.options)
    assert found.ok, str(found)
    assert found.causes == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_same_model_in_a_loop_that_averages_means_is_accused(name, dtype):
    case = made(name, dtype)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Any]) -> None:
        optimizer.zero_grad()
        for each in micro_batches:
            result = case.loss_fn(model, each)
            loss = result[0] / result[1] if isinstance(result, tuple) else result
            (loss / len(micro_batches)).backward()
        optimizer.step()

    found = wb.verify(case.model, case.loss_fn, case.batch, step=step, **case.options)
    assert [cause.name for cause in found.causes] == ["mean of means"], str(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_from_one_seed_for_each_call_is_named(dtype):
    """Then the rows of the second micro-batch have the noise of the first, and the cut shows in what is learned."""
    case = made("vae", dtype)

    def loss_fn(model: nn.Module, each: Any) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(len(each["x"]), 4, generator=draw, dtype=torch.float64).to(dtype)
        return elbo(model, {"x": each["x"], "noise": noise})

    found = wb.verify(case.model, loss_fn, case.batch)
    assert [cause.name for cause in found.causes] == ["not a sum over rows"], str(found)
