"""`WholeBatchTrainer` on several ranks, scene by scene. Run by `ranks.launch`; see test_whole_batch_trainer.py."""

import copy
import os
import tempfile

import torch
import torch.distributed as dist

import wholebatch as wb
from integrations.trainer_models import (
    Pooled,
    Stream,
    Tagger,
    WholeBatchTrainer,
    change_error,
    documents,
    pad,
    plainly,
    train,
    trainer_of,
    without_mask,
)
from integrations.trainer_system import whole_batch_trainer, whole_batch_trainer_loss_func
from ranks import Scenes
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES as CONFORMANCE

SCENES = Scenes()
for name, of_torchrun in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
    os.environ[name] = os.environ[f"LOCAL_{name}"] = str(of_torchrun)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@SCENES("conformance", ranks=(2,))
def conformance(place):
    """Every scene of two ranks, and those in which it matters who divides once more, with ``compute_loss_func``."""
    scenes = [
        scene
        for scene in CONFORMANCE
        if scene.task.asks <= whole_batch_trainer.expresses and "ranks" in scene.task.asks
    ]
    wanted = [(whole_batch_trainer, scene) for scene in scenes]
    wanted += [(whole_batch_trainer_loss_func, scene) for scene in scenes if scene.trap in ("T1x2", "T4x2")]
    return {f"{system.name} {scene.name}": judge(system, scene).to_dict() for system, scene in wanted}


def judged(rows, right=None, *, kind=WholeBatchTrainer, due=None, **arguments):
    """What a run of two ranks comes to, against the plain loop over 8 rows an update."""
    torch.manual_seed(dist.get_rank())  # their weights differ, and those of the first count
    model = Tagger()
    trained = copy.deepcopy(model)
    options = {"options": {"eval_dataset": documents(5)}, "eval_strategy": "epoch"}
    options["include_num_input_tokens_seen"] = "non_padding"
    trainer = train(trained, rows, kind=kind, gradient_accumulation_steps=2, **options, **arguments)
    for weight in model.parameters():
        dist.broadcast(weight.data, 0)
    right = documents(21) if right is None else right
    words = trainer.state.num_input_tokens_seen
    return {**compared(trainer, model, trained, right), "words": words, "words due": 2 * sum(map(words_of, right))}


def words_of(row):
    return len(row["input_ids"])


def compared(trainer, model, trained, rows):
    right, losses = plainly(model, rows)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "off": change_error(model, trained, right),
        "steps": trainer.state.global_step,
        "due": len(losses),
        "loss error": max(abs(found / loss - 1) for found, loss in zip(logged, losses[-len(logged) :], strict=True)),
    }


@SCENES("tail", ranks=(2,))
def tail(place):
    """21 rows: a last window of 5, of which one rank has 3 and the other 2."""
    return judged(documents(21))


@SCENES("stream", ranks=(2,))
def stream(place):
    return judged(Stream(documents(21)), max_steps=6)


class Ours(Stream):
    """A stream that is shared out to ranks already, unevenly."""

    def __iter__(self):
        own = dist.get_rank()
        for start in range(0, len(self.rows), 8):
            window = self.rows[start : start + 8]
            yield from window[:4] if own == 0 else window[4:]


class OwnLoader(WholeBatchTrainer):
    """A user's loader, that nobody shares out."""

    collates = False

    def get_train_dataloader(self):
        collate = pad if self.collates else None
        from wholebatch.integrations.transformers.rows import Held

        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=collate or Held)


class OwnCollatingLoader(OwnLoader):
    collates = True


@SCENES("uneven streams", ranks=(2,))
def uneven_streams(place):
    """17 rows: the first rank has 9 of them, and the other is at its end a window earlier."""
    return judged(Ours(documents(17)), documents(17), kind=OwnLoader, max_steps=6)


@SCENES("collated", ranks=(2,))
def collated(place):
    return judged(Ours(documents(17)), documents(17), kind=OwnCollatingLoader, max_steps=6)


@SCENES("resumed", ranks=(2,))
def resumed(place):
    folder = [tempfile.mkdtemp(prefix="wholebatch-trainer-")]
    dist.broadcast_object_list(folder, 0)
    rows, model = documents(21), Tagger()
    for weight in model.parameters():
        dist.broadcast(weight.data, 0)
    setting = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_of(copy.deepcopy(model), rows, folder[0], max_steps=4, **setting).train()
    trained = copy.deepcopy(model)
    again = trainer_of(trained, rows, folder[0], **setting)
    again.train(resume_from_checkpoint=f"{folder[0]}/checkpoint-2")
    return compared(again, model, trained, rows)


@SCENES("padding", ranks=(2,))
def padding(place):
    try:
        train(Pooled(), documents(21), options={"data_collator": lambda rows: without_mask(pad(rows))})
    except (wb.VerifyError, wb.RankError) as error:
        return {"said": str(error)}
    return {"said": "nothing"}


@SCENES("refusal", ranks=(2,))
def refusal(place):
    seen = []

    class Seen(WholeBatchTrainer):
        def training_step(self, model, *rest):
            seen.append(type(model).__name__)
            return super().training_step(model, *rest)

    try:
        train(Tagger("sum"), documents(21), kind=Seen)
    except wb.WeightError as error:
        return {"wrapper": seen[-1], "said": str(error)}
    return {"wrapper": "none", "said": "nothing"}
