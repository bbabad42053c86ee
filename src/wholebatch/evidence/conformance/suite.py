"""The suite: systems against scenes, and what has changed since it was last recorded."""

import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

from wholebatch.evidence.conformance.judge import Verdict
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.system import System

Results = dict[str, Any]
"""Date, versions and verdicts, as `run` returns them and as ``recorded.json`` holds them."""


def run(systems: Sequence[System], scenes: Sequence[str], *, tell: Callable[[str], object] = lambda _: None) -> Results:
    """Judge systems, each in a process of its own, two at a time.

    Args:
        systems: Those that are not installed are named with their install line.
        scenes: Names of scenes.
        tell: Called with a line whenever a system is done.

    Returns:
        ``date``, ``python``; ``systems``: by name the ``title``, the ``versions`` and, by scene, the ``verdicts``;
        ``not_installed``: by name the command that installs the system.
    """
    installed = {system.name: versions for system in systems if (versions := system.versions()) is not None}
    judged: dict[str, dict[str, Any]] = {}

    def one(system: System) -> None:
        judged[system.name] = _in_a_process(system, scenes)
        outcomes = [verdict["outcome"] for verdict in judged[system.name].values()]
        tell(f"{system.title}: {outcomes.count('pass')} of {len(outcomes)} scenes pass")

    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(one, [system for system in systems if system.name in installed]))
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "python": platform.python_version(),
        "systems": {
            system.name: {
                "title": system.title,
                "versions": installed[system.name],
                "verdicts": judged[system.name],
            }
            for system in systems
            if system.name in installed
        },
        "not_installed": {system.name: system.install for system in systems if system.name not in installed},
    }


def _in_a_process(system: System, scenes: Sequence[str]) -> dict[str, Any]:
    """Return the verdicts by scene. Where the process dies, so do the scenes that it has not told."""
    with tempfile.TemporaryDirectory(prefix="wholebatch-conformance-") as folder:
        file = Path(folder) / "verdicts.jsonl"
        file.touch()
        # One thread: the models are tiny, and two systems run at a time.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **system.environment}
        ended = subprocess.run(
            [sys.executable, "-m", f"{__package__}.worker", str(file), system.name, *scenes],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        told = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    verdicts = {verdict["scene"]: verdict for verdict in told}
    last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    for scene in scenes:
        if scene not in verdicts:
            why = f"the process ended with {ended.returncode}: {last}"
            verdicts[scene] = Verdict(system.name, scene, "fail", why=why).to_dict()
    return {scene: verdicts[scene] for scene in scenes}


def stands(results: Mapping[str, Any]) -> bool:
    """Return whether wholebatch, if it is there, passes every scene, or refuses where that is an honest answer."""
    may_refuse = {scene.name for scene in SCENES if scene.refusal_will_do}
    verdicts = results["systems"].get("wholebatch", {"verdicts": {}})["verdicts"]
    return all(
        verdict["outcome"] == "pass" or (verdict["outcome"] == "refuses" and scene in may_refuse)
        for scene, verdict in verdicts.items()
    )


def disputed(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each verdict with which the second reading of what is right does not agree."""
    return [
        f"{name}, {scene}: two ways to compute what is right disagree"
        for name, system in results["systems"].items()
        for scene, verdict in system["verdicts"].items()
        if verdict["confirmed"] is False
    ]


def recorded() -> Results:
    """Return the results that came with this version of the package."""
    results: Results = json.loads((files("wholebatch.evidence.conformance") / "recorded.json").read_text("utf-8"))
    return results


def changes(results: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each verdict that is another than before; systems and scenes that are new are none.

    Args:
        results: Of a run.
        before: Of an earlier one, such as `recorded`.
    """
    found = []
    for name, system in results["systems"].items():
        earlier = before["systems"].get(name, {"verdicts": {}, "versions": {}})
        for scene, verdict in system["verdicts"].items():
            then = earlier["verdicts"].get(scene)
            if then is not None and then["outcome"] != verdict["outcome"]:
                versions = ", ".join(
                    f"{package} {earlier['versions'].get(package)} -> {version}"
                    for package, version in system["versions"].items()
                    if earlier["versions"].get(package) != version
                )
                found.append(
                    f"{name}, {scene}: {then['outcome']} -> {verdict['outcome']} ({versions or 'same versions'})"
                )
    return found
