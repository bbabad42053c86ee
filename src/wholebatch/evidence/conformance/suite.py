"""The suite: systems against scenes, and what has changed since it was last recorded."""

import datetime as dt
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

from wholebatch.evidence.conformance.judge import Verdict, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import Task

Results = dict[str, Any]
"""Date, versions and verdicts, as `run` returns them and as ``recorded.json`` holds them."""


def run(systems: Sequence[System], scenes: Sequence[str], *, tell: Callable[[str], object] = lambda _: None) -> Results:
    """Judge systems, each in a process of its own, or in one for each rank, two at a time.

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
        judged[system.name] = _judge(system, scenes)
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


def _judge(system: System, scenes: Sequence[str]) -> dict[str, Any]:
    """Return the verdicts by scene, in the order of the scenes."""
    ranks = {scene.name: scene.task.ranks if isinstance(scene.task, Task) else 1 for scene in SCENES}
    verdicts = {}
    for number in sorted({ranks[scene] for scene in scenes}):
        group = [scene for scene in scenes if ranks[scene] == number]
        if number == 1 or "ranks" in system.expresses:
            verdicts.update(_in_processes(system, group, number))
        else:
            verdicts.update({scene.name: judge(system, scene).to_dict() for scene in SCENES if scene.name in group})
    return {scene: verdicts[scene] for scene in scenes}


def _in_processes(system: System, scenes: Sequence[str], ranks: int) -> dict[str, Any]:
    """Return the verdicts by scene: of each the worst that a rank tells. Where a process dies, so do the others, and
    the scenes that it has not told.
    """
    with tempfile.TemporaryDirectory(prefix="wholebatch-conformance-") as folder:
        files = [Path(folder) / f"verdicts-{rank}.jsonl" for rank in range(ranks)]
        complaints = [Path(folder) / f"complaint-{rank}" for rank in range(ranks)]
        running = []
        # One thread: the models are tiny, and two systems run at a time.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **system.environment}
        for rank, (file, variables) in enumerate(zip(files, _as_torchrun(ranks), strict=True)):
            file.touch()
            with complaints[rank].open("wb") as stderr:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", f"{__package__}.worker", str(file), system.name, *scenes],
                        env={**environment, **variables},
                        cwd=folder,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                )
        ended = _wait(running)
        told: list[dict[str, Any]] = []
        for rank, (code, file) in enumerate(zip(ended, files, strict=True)):
            verdicts = {each["scene"]: each for each in map(json.loads, file.read_text("utf-8").splitlines())}
            last = (complaints[rank].read_text("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
            where = "the process" if ranks == 1 else f"rank {rank}"
            why = f"{where} ended with {code}: {last}"
            told.append({scene: verdicts.get(scene) or _failed(system, scene, why) for scene in scenes})
    return {scene: max((each[scene] for each in told), key=_badness) for scene in scenes}


def _failed(system: System, scene: str, why: str) -> dict[str, Any]:
    return Verdict(system.name, scene, "fail", why=why).to_dict()


def _badness(verdict: Mapping[str, Any]) -> int:
    outcomes = ["pass", "not expressible", "refuses", "fail"]
    return outcomes.index(verdict["outcome"])


_PATIENCE = 120.0
"""How long a system may take for its scenes over several ranks. Unit: seconds."""


def _wait(running: Sequence["subprocess.Popen[bytes]"]) -> list[int]:
    """Return how the processes ended. The others of one that failed are waiting for it, and are ended."""
    end = time.monotonic() + _PATIENCE
    while any(each.poll() is None for each in running):
        failed = any(each.poll() not in (None, 0) for each in running)
        if len(running) > 1 and (failed or time.monotonic() > end):
            for each in running:
                each.kill()
        time.sleep(0.02)
    return [each.wait() for each in running]


def _as_torchrun(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of its processes."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "conformance", "GROUP_RANK": 0}
    together |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return [
        {name: str(value) for name, value in {**together, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(ranks)
    ]


def stands(results: Mapping[str, Any]) -> bool:
    """Return whether wholebatch, if it is there, passes every scene, or refuses where that is an honest answer.

    A way of using it that is for several ranks has nothing to say alone.
    """
    may_refuse = {scene.name for scene in SCENES if scene.refusal_will_do}
    return all(
        verdict["outcome"] == "pass"
        or (verdict["outcome"] == "refuses" and scene in may_refuse)
        or (verdict["outcome"] == "not expressible" and name != "wholebatch")
        for name, system in results["systems"].items()
        if name.partition("-")[0] == "wholebatch"
        for scene, verdict in system["verdicts"].items()
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
