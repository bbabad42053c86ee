"""What does an event say to a page of curves? Numbers at an update, words, and settings, by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wholebatch.evidence.sinks.jsonlines import plain

# Where an event stands in the run; everything else in it is something that it says.
_PLACES = {"event", "number", "update", "epoch"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one event says.

    Attributes:
        update: The number of the update at which it is said.
        numbers: What can be drawn as a curve. Of an update by the names of its fields, of other events after their kind
            and a slash. NaN stands for everything that is not finite, since an infinity spoils the axis of a curve.
        words: What cannot, such as the reason of a skipped window.
    """

    update: int
    numbers: dict[str, float]
    words: dict[str, str]


class Reader:
    """Reads the events of one run, in their order.

    Example:
        >>> reader = Reader()
        >>> reader.read({"event": "update", "number": 3, "loss": 2.5, "targets": 900, "seconds": 0.5, "skipped": None})
        Reading(update=3, numbers={'loss': 2.5, 'targets': 900.0, 'seconds': 0.5, 'skipped': 0.0,
        'targets_per_second': 1800.0}, words={})
        >>> reader.read({"event": "validation", "update": 3, "measures": {"accuracy": 0.5}}).numbers
        {'validation/accuracy': 0.5}
    """

    def __init__(self) -> None:
        self.update = 0

    def read(self, event: Mapping[str, Any]) -> Reading:
        """Return what an event says, each number and text of it once."""
        kind = str(event.get("event"))
        place = event.get("number" if kind == "update" else "update")
        if isinstance(place, int):
            self.update = place
        elif kind == "update":
            self.update += 1
        said = {str(key): value for key, value in event.items() if key not in _PLACES}
        if kind == "update":
            return self._of_update(said, event)
        if isinstance(said.get("measures"), Mapping):
            said |= {str(key): value for key, value in said.pop("measures").items()}
        numbers, words = _sorted_out(said)
        return Reading(
            self.update,
            {f"{kind}/{name}": number for name, number in numbers.items()},
            {f"{kind}/{name}": word for name, word in words.items()},
        )

    def _of_update(self, said: dict[str, Any], event: Mapping[str, Any]) -> Reading:
        reason = said.get("skipped")
        numbers, words = _sorted_out(said | ({"skipped": reason is not None} if "skipped" in said else {}))
        if reason is not None:
            words["skipped"] = str(reason)
        if numbers.get("seconds", 0) > 0 and "targets" in numbers:
            numbers["targets_per_second"] = numbers["targets"] / numbers["seconds"]
        epoch = event.get("epoch")
        if isinstance(epoch, int | float):
            numbers["epoch"] = float(epoch)
        return Reading(self.update, numbers, words)


def settings_of(event: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return what a start event states, flat, without what was left open.

    Example:
        >>> settings_of({"event": "start", "seed": 0, "lr": None, "versions": {"torch": "2.13"}, "reasons": ["a", "b"]})
        {'seed': 0, 'versions.torch': '2.13', 'reasons': 'a b'}
    """
    found: dict[str, str | int | float | bool] = {}

    def take(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                take(f"{name}.{key}" if name else str(key), item)
        elif isinstance(value, list | tuple):
            take(name, " ".join(map(str, value)))
        elif value is not None and value != "":
            found[name] = value if isinstance(value, str | int | float) else str(value)

    take("", {key: plain(value) for key, value in event.items() if key != "event"})
    return found


def _sorted_out(said: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}
    for name, value in said.items():
        if value is None:
            continue
        if not isinstance(value, str | bool | int | float | Mapping | list | tuple) and hasattr(value, "item"):
            try:
                value = value.item()
            except (TypeError, ValueError, RuntimeError):
                value = str(value)
        if isinstance(value, bool | int | float):
            numbers[name] = float(value) if math.isfinite(value) else math.nan
        elif isinstance(value, list | tuple):
            words[name] = "\n".join(map(str, value))
        else:
            words[name] = str(value)
    return numbers, {name: word for name, word in words.items() if word}
