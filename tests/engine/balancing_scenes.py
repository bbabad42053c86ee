"""Rows that move between ranks, scene by scene. Run by `ranks.launch`; judged in test_balancing.py."""

import copy
import pickle
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import wholebatch as wb
from engine.sync_scenes import WRAPS, adamw, raised
from properties import flat, relative_error
from ranks import Place, Scenes
from wholebatch.engine.ranks.wire import Wire
from wholebatch.evidence import reference

SCENES = Scenes()
Row = list[int]


def collate(rows: list[Row]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def num_words(batch: Tensor) -> Tensor:
    return (batch > 0).sum()


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    words = batch[batch > 0]
    return cross_entropy(model(words), (words * 7) % 11)


def documents(seed: int, rows: int = 60) -> list[Row]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 30) for _ in range(draw.choice((2, 5, 9, 30)))] for _ in range(rows)]


def handed(rows: list[Row], place: Place) -> list[Row]:
    """The long rows to the first ranks, the short ones to the last: as bad as a loader can make it."""
    each = len(rows) // place.ranks
    return sorted(rows, key=len, reverse=True)[each * place.rank : each * (place.rank + 1)]


class Trial:
    """The same model twice: trained by all ranks together, and by the plain loop."""

    def __init__(self, wrap: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 11)).double()
        self.judge = copy.deepcopy(self.model)
        self.start = flat(self.judge.parameters()).clone()
        wrapped = WRAPS[wrap](self.model)
        self.tokens = 0
        options = {"micro_batch": wb.Tokens(60, length=len), "collate": collate, "balance": "tokens", **options}
        if wrap == "each":
            options["communication"] = "each"
        self.accumulator = wb.Accumulator(
            wrapped, adamw(self.model.parameters()), self.loss_fn, targets=num_words, check=None, **options
        )
        self.optimizer = adamw(self.judge.parameters())

    def loss_fn(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.tokens += int(num_words(batch))
        return loss_fn(model, batch)

    def reference(self, rows: list[Row]) -> None:
        reference.update(self.judge, self.optimizer, loss_fn, collate(rows), targets=num_words)

    @property
    def off(self) -> float:
        whole = (each.full_tensor() if hasattr(each, "full_tensor") else each for each in self.model.parameters())
        return relative_error(flat(whole) - self.start, flat(self.judge.parameters()) - self.start)


def moved(place: Place, wrap: str, **options: Any) -> dict[str, Any]:
    """Three updates of rows that are shared out badly; the last rank is handed none of the third."""
    trial = Trial(wrap, **options)
    tokens, had = [], []
    for number in range(3):
        rows = documents(number)[: 60 - 60 % place.ranks]
        mine: list[Row] | None = handed(rows, place)
        if number == 2 and place.rank == place.ranks - 1:
            rows, mine = [*rows], None
        if number == 2:
            rows = [row for rank in range(place.ranks - 1) for row in handed(rows, Place(rank, place.ranks))]
        trial.tokens = 0
        update = trial.accumulator.step(mine)
        trial.reference(rows)
        tokens.append(trial.tokens)
        had.append(sum(map(len, mine or [])))
        assert update.rows == len(rows)
        assert update.targets == sum(map(len, rows))
    return {"off": trial.off, "tokens": tokens, "had": had, "reasons": trial.accumulator.reasons}


for _wrap in ("bare", "ddp", "fsdp", "each"):
    SCENES(f"moved [{_wrap}]", (2, 3) if _wrap in ("bare", "each") else (2,))(
        lambda place, wrap=_wrap: moved(place, wrap)
    )
SCENES("left where they are")(lambda place: moved(place, "bare", balance=None))
SCENES("by what rows hold")(lambda place: moved(place, "bare", micro_batch=wb.Rows(5)))


@SCENES("what is sent", (3,))
def sent(place: Place) -> dict[str, Any]:
    """Rows hold 40 kB each, and all that move leave the first rank."""
    trial = Trial("bare", collate=lambda rows: collate([row["words"] for row in rows]), micro_batch=wb.Rows(5))
    rows = [{"words": words, "image": bytes(40_000)} for words in documents(0, 30 if place.rank == 0 else 3)]
    gathered: list[int] = []
    parcels: list[int] = []
    gather, exchange = Wire.gather, Wire.exchange

    def noted(wire: Wire, what: Any) -> list[Any]:
        gathered.append(len(pickle.dumps(what)))
        return gather(wire, what)

    def noted_exchange(wire: Wire, mine: dict[int, bytes], nbytes: dict[int, int], device: torch.device) -> list[bytes]:
        got = exchange(wire, mine, nbytes, device)
        parcels.extend([sum(map(len, mine.values())), sum(map(len, got))])
        return got

    Wire.gather, Wire.exchange = noted, noted_exchange
    try:
        shared = trial.accumulator._balancing.shared(rows)
    finally:
        Wire.gather, Wire.exchange = gather, exchange
    return {"gathered": sum(gathered), "out": parcels[0], "in": parcels[1], "had": len(rows), "has": shared.rows}


@SCENES("rows that cannot be sent")
def unsendable(place: Place) -> dict[str, Any]:
    """A row that cannot be pickled is an error on all ranks, and nobody waits."""
    trial = Trial("bare", collate=lambda rows: collate([row[0] for row in rows]), micro_batch=wb.Rows(5))
    rows = [(words, (lambda: 0) if place.rank == 0 else 0) for words in documents(0, 30 if place.rank == 0 else 3)]
    return {"said": raised(lambda: trial.accumulator.step(rows))}


@SCENES("a rank that cannot read its rows", (2, 3))
def unreadable(place: Place) -> dict[str, Any]:
    """Every rank has an error, nobody waits, and the next logical batch is trained on."""
    broken = [place.rank == 1]

    def length(row: Row) -> int:
        if broken[0]:
            raise LookupError("no length for this row")
        return len(row)

    trial = Trial("bare", micro_batch=wb.Tokens(60, length=length))
    rows = documents(0)
    said = raised(lambda: trial.accumulator.step(handed(rows, place)))
    standing = bool(torch.equal(flat(trial.model.parameters()), trial.start))
    broken[0] = False
    trial.accumulator.step(handed(rows, place))
    trial.reference(rows)
    return {"said": said, "standing": standing, "off": trial.off}
