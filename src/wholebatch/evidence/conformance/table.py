"""How are results shown? As a table of systems and traps, and a line for each verdict that is not a pass."""

from collections.abc import Iterable, Mapping
from typing import Any

from wholebatch.evidence.conformance.judge import NO_WAY, OTHER_PURPOSE

_WORST_FIRST = ("fail", "refuses", "not expressible", "pass")
_SHORT = {"refuses": "refuses", "not expressible": "-", "pass": "pass"}


def as_text(results: Mapping[str, Any]) -> str:
    """Return a table for a terminal or a page: a row for each system, a column for each trap, the worst of its scenes.

    Args:
        results: From `suite.run`.

    Returns:
        A table in Markdown. ``pass``; where it fails, the relative error of the change of the weights; ``refuses``;
        ``-`` where no scene of the trap can be said.
    """
    traps = list(dict.fromkeys(scene.partition("-")[0] for scene in _scenes(results)))
    rows = [["system", *traps]]
    for name, system in results["systems"].items():
        by_trap = [
            _worst(verdict for scene, verdict in system["verdicts"].items() if scene.partition("-")[0] == trap)
            for trap in traps
        ]
        rows.append([name, *by_trap])
    return _aligned(rows)


def details(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each failure and refusal, with what is wrong, and for each reason why scenes cannot be said.

    What a system is not for is not told.
    """
    lines = []
    for name, system in results["systems"].items():
        wrong, unsaid = _apart(system["verdicts"])
        lines += [f"{name}, {scene}: {verdict['outcome']}; {verdict['why']}" for scene, verdict in wrong.items()]
        lines += [f"{name}, {', '.join(scenes)}: not expressible; {why}" for why, scenes in unsaid.items()]
    return lines


def as_page(results: Mapping[str, Any]) -> str:
    """Return the results as part of a page: date, table, what each system is and lacks, and what else there is."""
    lines = [f"Recorded on {results['date']} with Python {results['python']}, on a CPU.", "", as_text(results), ""]
    for name, system in results["systems"].items():
        versions = ", ".join(f"{package} {version}" for package, version in system["versions"].items())
        passed = [scene for scene, verdict in system["verdicts"].items() if verdict["outcome"] == "pass"]
        wrong, unsaid = _apart(system["verdicts"])
        asked = len(passed) + len(wrong)
        lines += [
            f'??? note "{name}: {system["title"]}, passes {len(passed)} of the {asked} scenes that it can say"',
            "",
        ]
        lines += [f"    {versions}", ""]
        lines += [f"    - {scene}: {verdict['outcome']}; {verdict['why']}" for scene, verdict in wrong.items()]
        lines += [f"    - not expressible: {', '.join(scenes)}; {why}" for why, scenes in unsaid.items()]
        lines += [""]
    lines += [f"Not installed beside the others: {name} (`{line}`)." for name, line in results["not_installed"].items()]
    return "\n".join(lines).strip()


def _apart(verdicts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The failures and refusals by scene, and the scenes that cannot be said by the reason why."""
    wrong = {scene: each for scene, each in verdicts.items() if each["outcome"] in ("fail", "refuses")}
    whys = {scene: each["why"] for scene, each in verdicts.items() if each["outcome"] == "not expressible"}
    words = sorted({word for why in whys.values() if why.startswith(NO_WAY) for word in why[len(NO_WAY) :].split(", ")})
    unsaid: dict[str, list[str]] = {}
    for scene, why in whys.items():
        if not why.startswith(OTHER_PURPOSE):
            unsaid.setdefault(NO_WAY + ", ".join(words) if why.startswith(NO_WAY) else why, []).append(scene)
    return wrong, unsaid


def _scenes(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(scene for system in results["systems"].values() for scene in system["verdicts"]))


def _worst(verdicts: Iterable[Mapping[str, Any]]) -> str:
    ranked = sorted(verdicts, key=lambda each: (_WORST_FIRST.index(each["outcome"]), -_size(each)))
    judged = [verdict for verdict in ranked if verdict["outcome"] != "not expressible"]
    return _cell((judged or ranked)[0]) if ranked else "-"


def _size(verdict: Mapping[str, Any]) -> float:
    error = verdict["error"]
    return float("inf") if error == "not finite" else float(error or 0.0)


def _cell(verdict: Mapping[str, Any]) -> str:
    if verdict["outcome"] != "fail":
        return _SHORT[verdict["outcome"]]
    error = verdict["error"]
    if error == "not finite":
        return "NaN"
    if error is None or error < 0.01:  # the weights are right, and something else is not
        return "FAIL"
    return f"{error:.2f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in [rows[0], rule, *rows[1:]]
    )
