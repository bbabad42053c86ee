"""Ranks that are stopped inside a window, and others that go on in it. Run by `ranks.launch`; see test_ranks.py."""

import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import wholebatch as wb
from engine.sync_scenes import ON, WRAPS
from properties import flat
from ranks import Place, Scenes

SCENES = Scenes()
WINDOWS = 3


def micro_batches(place: Place, wrap: str, window: int) -> list[torch.Tensor]:
    """Those of a rank in a window: unevenly many, where ranks do not make their passes together."""
    generator = torch.Generator().manual_seed(100 * window + place.rank)
    number = 4 if wrap.endswith("each") else 3 + place.rank
    return [torch.randn(2 + (i + place.rank) % 3, 5, generator=generator) for i in range(number)]


class Run:
    """A model on all ranks with dropout, buffers and an optimizer that has states, and what trains it."""

    def __init__(self, wrap: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).to(dtype)
        self.plain, self.model, self.dtype = plain, WRAPS[wrap](plain), dtype
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options: dict[str, Any] = {"communication": "each", "micro_batch": wb.Rows(8)} if wrap.endswith("each") else {}
        self.accumulator = wb.Accumulator(
            self.model,
            optimizer,
            clip_norm=0.1,
            lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            **options,
        )

    def train(self, place: Place, wrap: str, done: tuple[int, int] = (0, 0), *, until: Path | None = None) -> bool:
        """Train to the end, or to the middle of the second window, where it is saved; return whether it ended."""
        for window in range(done[0], WINDOWS):
            with self.accumulator.window() as open_window:
                first = done[1] if window == done[0] else 0
                for number, x in enumerate(micro_batches(place, wrap, window)[first:], first):
                    if until is not None and (window, number) == (1, 2):
                        wb.save(until, self.accumulator, extra=(window, number))
                        return False  # which rolls the window back: nothing of it is left in this run
                    with self.accumulator.autocast():
                        loss = self.model(x.to(self.dtype)).square().mean() * (1 + random.random())
                    open_window.backward(loss, targets=len(x))
            self.update = open_window.update
        return True

    @property
    def weights(self) -> torch.Tensor:
        whole = (each.full_tensor() if hasattr(each, "full_tensor") else each for each in self.plain.parameters())
        return flat(whole)


def seed(place: Place) -> None:
    torch.manual_seed(place.rank + 7)
    random.seed(place.rank + 7)


def common_folder() -> Path:
    """A folder that all ranks know."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def draw() -> tuple[float, float]:
    return float(torch.rand(())), random.random()


def goes_on(place: Place, wrap: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    straight = Run(wrap, dtype)
    seed(place)
    assert straight.train(place, wrap)
    straight_draws = draw()

    path = common_folder() / "run.safetensors"
    stopped = Run(wrap, dtype)
    seed(place)
    assert not stopped.train(place, wrap, until=path)
    resumed = Run(wrap, dtype)
    assert resumed.train(place, wrap, wb.load(path, resumed.accumulator))
    draws = draw()

    forgetful = Run(wrap, dtype)
    wb.load(path, forgetful.accumulator)
    forgetful.accumulator.window().rollback()
    assert forgetful.train(place, wrap, (1, 2))  # as if the first half of the window had been lost
    last = [(each.number, each.loss, each.targets, each.rows) for each in (straight.update, resumed.update)]
    return {
        "same": torch.equal(straight.weights, resumed.weights) and straight_draws == draws and last[0] == last[1],
        "forgetful": torch.equal(straight.weights, forgetful.weights),
        "files": sorted(each.name for each in path.parent.iterdir()),
    }


for name in ("bare", "ddp", "fsdp", "each", "hsdp", "hsdp each"):
    SCENES(name, tuple(each for each in (2, 4) if name in ON[each]))(partial(goes_on, wrap=name))
SCENES("bf16 fsdp")(partial(goes_on, wrap="fsdp", dtype=torch.bfloat16))
SCENES("bf16 each")(partial(goes_on, wrap="each", dtype=torch.bfloat16))


def refusal(act: Any) -> list[str]:
    try:
        act()
    except wb.WholeBatchError as error:
        return [type(error).__name__, str(error)]
    return []


@SCENES("what one rank cannot do none does")
def one_cannot(place: Place) -> dict[str, Any]:
    folder = common_folder()
    run = Run("ddp")
    wb.save(folder / "run", run.accumulator)
    dist.barrier()
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    unsaid = object() if place.rank == 1 else None  # which only pickle could keep
    not_saved = refusal(lambda: wb.save(folder / "run", run.accumulator, extra=unsaid))
    dist.barrier()
    left = {each.name: each.read_bytes() for each in folder.iterdir()}
    loader = torch.utils.data.DataLoader([]) if place.rank == 1 else None  # of which no position was saved
    not_loaded = refusal(lambda: wb.load(folder / "run", run.accumulator, loader))
    nowhere = refusal(lambda: wb.load(folder / "nothing", run.accumulator))
    return {"not saved": not_saved, "left": left == before, "not loaded": not_loaded, "nowhere": nowhere}


@SCENES("a rank was killed before it moved its file")
def killed_before_it_moved(place: Place) -> dict[str, Any]:
    path = common_folder() / "run.safetensors"
    run = Run("bare")
    wb.save(path, run.accumulator, extra="old")
    file = path.with_name(f"run.rank-{place.rank}-of-2.safetensors")
    old = file.read_bytes()
    wb.save(path, run.accumulator, extra="new")
    if place.rank == 1:  # has written its file, and not moved it
        file.rename(file.with_name(f".{file.name}.part"))
        file.write_bytes(old)
    new = wb.load(path, run.accumulator)
    if place.rank == 1:  # has not come to the end of writing
        file.with_name(f".{file.name}.part").write_bytes(file.read_bytes()[:-100])
    again = wb.load(path, run.accumulator)
    file.write_bytes(old) if place.rank == 1 else None
    apart = refusal(lambda: wb.load(path, run.accumulator))
    return {"loaded": [new, again], "apart": apart}
