"""What the suite finds in Composer, checked against gradients of single rows.

Its releases until 0.32 ask for a torch older than the one that wholebatch asks for, so the two meet only where somebody
puts them beside each other by hand.
"""

import math

import pytest

from wholebatch.evidence.conformance.adapters import composer as page
from wholebatch.evidence.conformance.judge import compare, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.second_reading import second_reading

data_spec = pytest.importorskip("composer.core.data_spec")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Composer, about older and newer versions of what it stands on

OFF = {
    "composer": {
        "T1-ragged-counts": (0.67, 1),
        "T4-masked-micro-batch": (math.inf, 1),
        "T4-masked-window": (math.inf, 3),
    },
    "composer-tokens": {"T4-masked-micro-batch": (math.inf, 1)},
}
"""How far off they are, and their updates: a mean of means, and a mean over no label."""

SYSTEMS = [page.composer, page.composer_tokens]
BY_NAME = {scene.name: scene for scene in SCENES}
REFUSED = {"composer": set(), "composer-tokens": {"T4-masked-window"}}
FIRST_TRAPS = [scene for scene in SCENES if scene.trap in ("T1", "T2", "T3", "T4") and scene.name != "T4-none"]


def verdict_of(system, scene):
    """Return what the second judge says."""
    return compare(system.name, scene, system.train(scene.task), second_reading(scene.task))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_verdicts_stand_a_second_reading(system):
    refused = REFUSED[system.name]
    found = {scene.name: verdict_of(system, scene) for scene in FIRST_TRAPS if scene.name not in refused}
    off = OFF[system.name]
    assert {name for name, verdict in found.items() if verdict.outcome == "fail"} == set(off)
    for scene, (error, updates) in off.items():
        assert found[scene].error == pytest.approx(error, rel=0.05), scene
        assert found[scene].updates == updates, scene
    assert {name for name in refused if judge(system, BY_NAME[name]).outcome != "refuses"} == set()


def test_a_planted_mistake_is_found(monkeypatch):
    """A count of all tokens in the place of those that generate loss, where Composer as it is passes."""
    right = data_spec.DataSpec.get_num_tokens_in_batch

    def all_tokens(self, batch, token_type="total"):
        assert token_type in ("total", "loss_generating")
        return right(self, batch)

    monkeypatch.setattr(data_spec.DataSpec, "get_num_tokens_in_batch", all_tokens)
    verdict = verdict_of(page.composer_tokens, BY_NAME["T1-ragged-counts"])
    assert verdict.outcome == "fail"
    assert verdict.error == pytest.approx(0.67, rel=0.05)
    assert "a mean of means" in verdict.why
