"""What does a judge say who computes the right end from the gradients of single rows?"""

from wholebatch.evidence.conformance.judge import Verdict, compare
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.second_reading import second_reading

BY_NAME = {scene.name: scene for scene in SCENES}
FIRST_TRAPS = [scene for scene in SCENES if scene.trap in ("T1", "T2", "T3", "T4")]
"""Counts, divisors, tails and masks: the scenes of which each verdict has to stand this reading."""


def verdict_of(system, scene) -> Verdict:
    """Let a system train a scene, and judge it by the second reading."""
    return compare(system.name, scene, system.train(scene.task), second_reading(scene.task))
