"""Real processes that make updates together: one launch runs many scenes, and says by rank what came of each."""

import datetime as dt
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent
SECONDS = 60
"""How long ranks wait for each other in a scene."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many processes this is."""

    rank: int
    ranks: int

    def share(self, rows: int, weights: Sequence[int] = (5, 2, 3, 1)) -> range:
        """This rank's rows of a logical batch, unevenly many."""
        ends = [0]
        for rank in range(self.ranks):
            ends.append(
                rows if rank == self.ranks - 1 else ends[-1] + rows * weights[rank] // sum(weights[: self.ranks])
            )
        return range(ends[self.rank], ends[self.rank + 1])


Scene = Callable[[Place], dict[str, Any]]


@dataclass
class Scenes:
    """Scenes by name, in the order in which they run."""

    by_name: dict[str, Scene] = field(default_factory=dict)
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, name: str, ranks: tuple[int, ...] = (2,)) -> Callable[[Scene], Scene]:
        """Keep a scene for so many ranks."""

        def keep(scene: Scene) -> Scene:
            self.by_name[name] = scene
            self.ranks[name] = ranks
            return scene

        return keep


def launch(module: str, ranks: int, folder: Path, *, seconds: float = 480) -> dict[str, list[dict[str, Any]]]:
    """Run all scenes of a module in so many processes; return for each what each rank found."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *measured(), __file__, module, str(ranks), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(ranks)
    ]
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=seconds)[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            said.append(process.communicate()[0])
    found: dict[str, list[dict[str, Any]]] = {}
    for rank in range(ranks):
        file = folder / f"{rank}.json"
        for line in file.read_text().splitlines() if file.exists() else []:
            name, result = json.loads(line)
            found.setdefault(name, []).append(result)
    found["said"] = [{"text": each.decode()[-4000:]} for each in said]
    found["exit"] = [{"code": process.returncode} for process in processes]
    return found


def measured() -> list[str]:
    """What runs a program under coverage, where these tests do."""
    if "coverage" not in sys.modules:
        return []
    from coverage import Coverage

    root = TESTS.parent
    options = ["--parallel-mode", f"--rcfile={root / 'pyproject.toml'}", f"--data-file={root / '.coverage'}"]
    return ["-m", "coverage", "run", *options] if Coverage.current() else []


def result(found: dict[str, list[dict[str, Any]]], name: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank found in a scene; fails with the error of a rank that found none."""
    by_rank = found.get(name, [])
    for each in by_rank:
        assert "error" not in each, each["error"]
    assert len(by_rank) == ranks, found["said"]
    return by_rank


def run(module: str, ranks: int, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=dt.timedelta(seconds=SECONDS),
    )
    with Path(folder, f"{rank}.json").open("w") as file:
        scenes = importlib.import_module(module).SCENES
        for name, scene in scenes.by_name.items():
            if ranks not in scenes.ranks[name]:
                continue
            try:
                found = scene(Place(rank, ranks))
            except Exception:
                found = {"error": traceback.format_exc()}
            print(json.dumps([name, found]), file=file, flush=True)
            if "error" in found:
                break  # the ranks are out of step
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
