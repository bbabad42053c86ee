"""What two real processes make with Lightning and with Accelerate; see test_ranks.py."""

import os
import warnings

from integrations import accelerate_adapter, lightning_adapter
from ranks import Place, Scenes
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES as SUITE
from wholebatch.evidence.conformance.task import Task

SCENES = Scenes()

SYSTEMS = (lightning_adapter.streaming, lightning_adapter.cutting, accelerate_adapter.system)


def as_torchrun(place: Place) -> None:
    """Set what torchrun would tell this process; the processes have found each other already."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "scenes", "GROUP_RANK": "0"}
    numbers = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.ranks, "LOCAL_WORLD_SIZE": place.ranks}
    os.environ.update(together | {name: str(number) for name, number in numbers.items()})
    warnings.simplefilter("ignore")


@SCENES("conformance")
def conformance(place):
    as_torchrun(place)
    found = {}
    for scene in SUITE:
        if isinstance(scene.task, Task) and scene.task.ranks == 2:
            for system in SYSTEMS:
                verdict = judge(system, scene)
                found[f"{system.name} {scene.name}"] = [verdict.outcome, verdict.error, verdict.why]
    return found
