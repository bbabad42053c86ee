"""What the suite finds in Opacus, checked against gradients of single rows."""

import warnings

import pytest
import torch
from torch.optim import SGD

from wholebatch.evidence.conformance.adapters import opacus as page
from wholebatch.evidence.conformance.judge import change_error, compare, judge
from wholebatch.evidence.conformance.scenes import ROWS, SCENES
from wholebatch.evidence.conformance.second_reading import second_reading
from wholebatch.evidence.conformance.task import join

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say about themselves when they are loaded
    peer = pytest.importorskip("opacus")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus, about a privacy that is not asked for

RIGHT = {"T2-keywords", "T2-mean", "T2-sum-over-count", "T3-shorter-than-a-window", "T7-zero-first", "T7-evaluation"}
OFF = {"T3-tail": (0.30, 6), "T7-evaluation-in-the-tail": (0.30, 3)}
"""How far off it is where an epoch has a tail, and its updates."""

BY_NAME = {scene.name: scene for scene in SCENES}


def verdict_of(scene):
    """Return what the second judge says."""
    return compare("opacus", scene, page.opacus.train(scene.task), second_reading(scene.task))


def test_the_verdicts_stand_a_second_reading():
    assert {name for name in RIGHT if verdict_of(BY_NAME[name]).outcome != "pass"} == set()
    for name, (error, updates) in OFF.items():
        verdict = verdict_of(BY_NAME[name])
        assert verdict.outcome == "fail", name
        assert verdict.error == pytest.approx(error, rel=0.05), name
        assert verdict.updates == updates, name
        assert "each window is divided by the same number of rows" in verdict.why


def test_what_it_has_no_way_to_say():
    outcomes = {scene.name: judge(page.opacus, scene).outcome for scene in SCENES if scene.name not in RIGHT | set(OFF)}
    short = {"T5-forward", "T5-backward"}  # has no means against it, so that the error ends the run
    assert {name for name, outcome in outcomes.items() if outcome == "refuses"} == short
    assert {outcome for name, outcome in outcomes.items() if name not in short} == {"not expressible"}


def test_with_a_tail_each_update_is_divided_by_the_same_number():
    """Why T3-tail fails: 20 rows in 3 logical batches are 6 rows each, where two have 8 and one has 4."""
    task = BY_NAME["T3-tail"].task
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    for _, micro_batches in task.windows():
        batch = join(micro_batches)
        labels_in_a_row = int(task.targets(batch)) // len(batch["labels"])
        torch.autograd.backward(task.loss_sum(model, batch) / labels_in_a_row / 6)
        optimizer.step()
        optimizer.zero_grad()
    assert len(task.epoch) * ROWS // 3 == 6
    assert change_error(task.make_model(), page.opacus.train(task).model, model) < 1e-12


def test_a_planted_mistake_is_found(monkeypatch):
    """A mean that is said to be a sum, where Opacus as it is passes."""

    class Sums(peer.PrivacyEngine):
        def make_private(self, **options):
            return super().make_private(**options, loss_reduction="sum")

    monkeypatch.setattr(peer, "PrivacyEngine", Sums)
    verdict = verdict_of(BY_NAME["T2-mean"])
    assert verdict.outcome == "fail"
    assert verdict.error == pytest.approx(3.0, rel=1e-6)  # 4 physical batches
