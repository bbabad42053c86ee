"""What the suite finds in the Hugging Face Trainer, checked against gradients of single rows."""

import math
import sys
import warnings

import pytest
import torch
from readings import BY_NAME, FIRST_TRAPS, verdict_of
from torch.optim import SGD

from wholebatch.evidence.conformance.adapters import transformers as page
from wholebatch.evidence.conformance.judge import change_error, judge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say about themselves when they are loaded
    assert pytest.importorskip("transformers").Trainer  # loading it puts another module in the place of the first
    peer = sys.modules["transformers"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer, about what it does besides training

OFF = {
    "transformers": {
        "T1-ragged-counts": (0.67, 1),
        "T2-keywords": (3.0, 1),
        "T3-tail-unsized": (0.31, 6),
        "T4-masked-micro-batch": (math.inf, 1),
        "T4-masked-window": (math.inf, 3),
    },
    "transformers-loss-func": {
        "T3-tail-unsized": (0.31, 6),
        "T4-masked-window": (math.inf, 3),
    },
}
"""How far off they are, and their updates: means of means, divided by nothing, a tail that is carried, 0 / 0."""

SYSTEMS = [page.transformers, page.transformers_loss_func]
EXPRESSED = [scene for scene in FIRST_TRAPS if scene.name != "T4-none"]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system):
    found = {scene.name: verdict_of(system, scene) for scene in EXPRESSED}
    off = OFF[system.name]
    assert {name for name, verdict in found.items() if verdict.outcome == "fail"} == set(off)
    assert {verdict.outcome for name, verdict in found.items() if name not in off} == {"pass"}
    for scene, (error, updates) in off.items():
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_without_a_length_the_tail_joins_the_next_epoch(system):
    """Why T3-tail-unsized fails: two updates an epoch, and what is left over is there when the next one begins."""
    task = BY_NAME["T3-tail-unsized"].task
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for _ in range(3):  # so many epochs until there are 6 updates
        for part, divisor in ((slice(0, 4), 4), (slice(4, 8), 4), (slice(8, 10), 2)):
            for micro_batch in task.epoch[part]:
                torch.autograd.backward(task.loss(model, micro_batch) / divisor)
            if divisor == 4:
                optimizer.step()
                optimizer.zero_grad()
    assert change_error(task.make_model(), system.train(task).model, model) < 1e-12
    assert "the tail of an epoch is carried into the next" in verdict_of(system, BY_NAME["T3-tail-unsized"]).why


@pytest.mark.parametrize(
    ("system", "scene", "says", "outcome"),
    [(page.transformers, "T2-keywords", False, "pass"), (page.transformers_loss_func, "T2-mean", None, "fail")],
    ids=["keywords", "mean"],
)
def test_an_attribute_of_the_trainer_says_who_divides(system, scene, says, outcome, monkeypatch):
    """So that the one fails without it, and the other passes with it, is about who divides, and about nothing else."""

    class Says(peer.Trainer):
        def __setattr__(self, name, value):
            super().__setattr__(name, says if name == "loss_is_scaled_for_ga" else value)

    monkeypatch.setattr(peer, "Trainer", Says)
    verdict = verdict_of(system, BY_NAME[scene])
    assert verdict.outcome == outcome
    assert outcome == "pass" or verdict.error == pytest.approx(3.0, rel=1e-6)


def test_float16_on_a_cpu_is_float32(tmp_path):
    """So nothing can overflow there, and T10-overflow asks for what this machine cannot do."""
    arguments = peer.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fp16=True, report_to="none")
    accelerator = peer.Trainer(model=torch.nn.Linear(1, 1), args=arguments).accelerator
    assert (accelerator.native_amp, accelerator.scaler) == (False, None)
    for system in SYSTEMS:
        assert judge(system, BY_NAME["T10-overflow"]).outcome == "not expressible"


def test_a_planted_loss_is_found(monkeypatch):
    """A loss that is twice as large, where the Trainer as it is passes."""
    right = page.cross_entropy
    monkeypatch.setattr(page, "cross_entropy", lambda logits, labels: 2 * right(logits, labels))
    verdict = verdict_of(page.transformers_loss_func, BY_NAME["T2-sum-over-count"])
    assert verdict.outcome == "fail"
    assert verdict.error == pytest.approx(1.0, rel=1e-6)


def test_a_planted_order_is_found(monkeypatch):
    """Micro-batches that are shuffled, as they would be if the page did not ask for their order."""
    right = peer.TrainingArguments

    def shuffles(**options):
        return right(**{**options, "train_sampling_strategy": "random"})

    monkeypatch.setattr(peer, "TrainingArguments", shuffles)
    verdict = verdict_of(page.transformers, BY_NAME["T3-tail"])
    assert verdict.outcome == "fail"
    assert verdict.error > 0.01
