"""What two ranks measure, and how they follow a schedule. Run by `ranks.launch`; judged in test_noise_scale.py."""

import dataclasses
from typing import Any

import torch
from torch.utils.data import DataLoader

import wholebatch as wb
from engine.sync_scenes import WRAPS, Trial, part_of
from menagerie import CALM, mean_square
from properties import sgd
from ranks import Place, Scenes

SCENES = Scenes()
ROWS = 13
MLP = CALM["mlp"]


def measure(place: Place, wrap: str) -> dict[str, Any]:
    """The first has rows 0 to 7 and the second 8 to 12, in micro-batches of two."""
    trial = Trial(MLP, wrap, noise_scale=True)
    batch = MLP.batch(ROWS, torch.float64)
    update = trial.accumulator.step(part_of(MLP, batch, range(8) if place.rank == 0 else range(8, ROWS)))
    assert trial.accumulator.noise is not None
    assert trial.accumulator.noise.last is not None
    return {"last": dataclasses.asdict(trial.accumulator.noise.last), "scale": update.noise_scale}


for each in ("bare", "ddp", "fsdp"):
    SCENES(f"measure [{each}]")(lambda place, wrap=each: measure(place, wrap))


@SCENES("failure")
def failure(place: Place) -> dict[str, Any]:
    """One rank fails in a window, so that both go on as before."""
    fails = [place.rank == 1]

    def loss_fn(model: Any, batch: Any) -> Any:
        if fails[0]:
            raise ValueError("bad sample")
        return mean_square(model, batch)

    model = MLP.model()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(2), check=None, noise_scale=True
    )
    batch = part_of(MLP, MLP.batch(ROWS, torch.float64), place.share(ROWS))
    said = ""
    try:
        accumulator.step(batch)
    except (wb.RankError, ValueError) as error:
        said = str(error)
    fails[0] = False
    return {"said": said, "then": accumulator.step(batch).applied}


@SCENES("disagreement")
def disagreement(place: Place) -> dict[str, Any]:
    model = MLP.model()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(2), noise_scale=place.rank == 0
    )
    try:
        accumulator.step(MLP.batch(4, torch.float64))
    except wb.RankError as error:
        return {"said": str(error)}
    return {"said": ""}


@SCENES("each")
def each_pass(_place: Place) -> dict[str, Any]:
    model = WRAPS["each"](MLP.model())
    try:
        wb.Accumulator(
            model,
            sgd(model.parameters()),
            mean_square,
            micro_batch=wb.Rows(2),
            communication="each",
            noise_scale=True,
        )
    except wb.ConfigError as error:
        return {"said": str(error)}
    return {"said": ""}


ALL = 70


def growing() -> wb.schedules.Schedule:
    return wb.schedules.Stepped(8, {2: 16})


def judged(trial: Trial, sizes: list[int]) -> float:
    batch, start = MLP.batch(ALL, torch.float64), 0
    for size in sizes:
        trial.reference(part_of(MLP, batch, range(start, start + size)))
        start += size
    return trial.off


@SCENES("schedule of rows")
def schedule_of_rows(_place: Place) -> dict[str, Any]:
    trial = Trial(MLP)
    batch = MLP.batch(ALL, torch.float64)
    sampler = wb.LogicalBatches(ALL, growing(), shuffle=False)
    loader = DataLoader(range(ALL), batch_sampler=sampler, collate_fn=lambda rows: part_of(MLP, batch, rows))
    rows = [trial.accumulator.step(each).rows for each in loader]
    return {"rows": rows, "off": judged(trial, rows)}


@SCENES("schedule of micro-batches")
def schedule_of_micro_batches(place: Place) -> dict[str, Any]:
    """Each rank reads micro-batches of a row, and 4 and then 8 of them make a logical batch with those of the other."""
    trial = Trial(MLP)
    batch = MLP.batch(ALL, torch.float64)
    places = range(place.rank, ALL, place.ranks)
    schedule = wb.schedules.Stepped(4, {2: 8})
    loader = (part_of(MLP, batch, [row]) for row in places)
    rows = [update.rows for update in trial.accumulator.updates(loader, micro_batches=schedule)]
    return {"rows": rows, "off": judged(trial, rows)}


@SCENES("schedule by noise")
def schedule_by_noise(place: Place) -> dict[str, Any]:
    """The gradient of a row is G + 3 z, so that the noise scale is 144 rows: 36 micro-batches of four, 18 a rank."""
    model = torch.nn.Linear(16, 1, bias=False, dtype=torch.float64)
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda model, batch: model(batch).mean(), noise_scale=True
    )
    generator = torch.Generator().manual_seed(place.rank)
    # The second has fewer.
    loader = (
        0.25 + 3 * torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(900 - 40 * place.rank)
    )
    schedule = wb.schedules.ByNoise(2, largest=64, every=20)
    updates = list(accumulator.updates(loader, micro_batches=schedule))
    assert accumulator.noise is not None
    return {
        "rows": [update.rows for update in updates],
        "changes": sorted(schedule.changes.items()),
        "scale": accumulator.noise.scale,
    }
