"""`WholeBatchTrainer` on several ranks, scene by scene. Run by `ranks.launch`; judged in test_transformers.py."""

import os

import torch.distributed as dist

from integrations.trainer_system import whole_batch_trainer, whole_batch_trainer_loss_func
from ranks import Scenes
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES as CONFORMANCE
from wholebatch.evidence.conformance.task import Task

SCENES = Scenes()
for name, of_torchrun in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
    os.environ[name] = os.environ[f"LOCAL_{name}"] = str(of_torchrun)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@SCENES("conformance", ranks=(2,))
def conformance(place):
    scenes = [scene for scene in CONFORMANCE if isinstance(scene.task, Task) and scene.task.ranks == place.ranks]
    return {
        f"{system.name} {scene.name}": judge(system, scene).to_dict()
        for system in (whole_batch_trainer, whole_batch_trainer_loss_func)
        for scene in scenes
    }
