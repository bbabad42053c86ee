"""Which systems and scenes are meant? By name, or all."""

import difflib
from collections.abc import Sequence

from wholebatch.core.errors import ConfigError
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.systems import SYSTEMS


def choose_systems(names: Sequence[str] | None) -> list[System]:
    """Return the systems of these names, or all.

    Raises:
        ConfigError: There is no such system, or one that is asked for by name is not installed.
    """
    if not names:
        return list(SYSTEMS.values())
    chosen = []
    for name in names:
        if name not in SYSTEMS:
            raise _unknown("system", name, list(SYSTEMS))
        if SYSTEMS[name].versions() is None:
            raise ConfigError(f"{SYSTEMS[name].title} is not installed.", hint=SYSTEMS[name].install)
        chosen.append(SYSTEMS[name])
    return chosen


def choose_scenes(names: Sequence[str] | None) -> list[str]:
    """Return the names of the scenes of these names or traps, in the order of the suite, or all.

    Raises:
        ConfigError: There is no such scene and no such trap.

    Example:
        >>> choose_scenes(["T1"])
        ['T1-ragged-counts']
    """
    known, traps = [scene.name for scene in SCENES], list(dict.fromkeys(scene.trap for scene in SCENES))
    for name in names or ():
        if name not in known and name not in traps:
            raise _unknown("scene", name, known, traps)
    return [scene.name for scene in SCENES if not names or scene.name in names or scene.trap in names]


def _unknown(kind: str, name: str, known: Sequence[str], groups: Sequence[str] = ()) -> ConfigError:
    near = nearest(name, [*groups, *known])
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ConfigError(f"There is no {kind} {name!r}.", hint=f"{meant}There are {', '.join(known)}.")


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return what may have been meant: the same in other letters, what begins with it, or what is spelled alike.

    Example:
        >>> nearest("keras", ["keras-torch", "keras-jax", "opacus"])
        ['keras-torch', 'keras-jax']
        >>> nearest("opakus", ["keras-torch", "opacus"])
        ['opacus']
    """
    lower = {each.lower(): each for each in known}
    if name.lower() in lower:
        return [lower[name.lower()]]
    begins = [each for low, each in lower.items() if name and low.startswith(name.lower())]
    return begins or [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)]
