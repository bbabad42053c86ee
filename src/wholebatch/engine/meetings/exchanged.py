"""What has a micro-batch put in place of a model's weights? It is there while that micro-batch runs, and no longer.

`torch.func.functional_call` runs a model with other weights, which stand in its modules until it returns. If it meets
the others on the way, they would find these weights, and the last one to return would leave them behind.
"""

from typing import Any

from torch import nn

from wholebatch.engine.device import modules


class Exchanged:
    """The weights of a model as each micro-batch has them in place.

    Whether some are exchanged at a meeting is looked up in micro-batch 0, since all run the same code.

    Args:
        model: Whose modules hold the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[dict[str, Any]] = [
            each._parameters for each in modules(model) if type(each._parameters) is dict and each._parameters
        ]
        self._usual: list[dict[str, Any]] = []
        self._are_exchanged = False
        self._held: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}

    def go_on(self, number: int) -> None:
        """Put in place what a micro-batch had there when it came to its last meeting."""
        if number == 0 or self._are_exchanged:
            self._usual = [dict(place) for place in self._places]
        for place, name, weight in self._held.pop(number, ()):
            place[name] = weight

    def come(self, number: int) -> None:
        """Put back what was there before a micro-batch went on that has come to a meeting."""
        if number and not self._are_exchanged:
            return
        held = []
        for place, usual in zip(self._places, self._usual, strict=True):
            for name, weight in usual.items():
                if place.get(name, weight) is not weight:
                    held.append((place, name, place[name]))
                    place[name] = weight
        if number == 0:
            self._are_exchanged = bool(held)
        if held:
            self._held[number] = held
