"""Which parameters of an optimizer are stepped together?"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from wholebatch.engine.steps.slicing import can_be_sliced
from wholebatch.engine.steps.undo import nbytes_of


class Piece:
    """Parameters of one optimizer that are stepped together."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.nbytes = sum(moved_bytes(optimizer, parameter) for parameter in parameters)

    def halves(self) -> "list[Piece]":
        middle = len(self.parameters) // 2
        return [Piece(self.optimizer, part) for part in (self.parameters[:middle], self.parameters[middle:])]

    def step(self) -> None:
        """Call ``optimizer.step()`` on these parameters alone."""
        optimizer, chosen = self.optimizer, set(map(id, self.parameters))
        groups, held = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
        try:
            for group, parameters in zip(groups, held, strict=True):
                group["params"] = [parameter for parameter in parameters if id(parameter) in chosen]
            optimizer.param_groups = [group for group in groups if group["params"]]
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            for group, parameters in zip(groups, held, strict=True):
                group["params"] = parameters


def lacks_state(piece: Piece) -> bool:
    """Whether an optimizer keeps a state for some parameters and not yet for others, as where an expert slept."""
    return len({bool(piece.optimizer.state.get(each)) for each in piece.parameters}) > 1


def stepped(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that a step moves: those with a gradient."""
    return [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]


def moved_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Return what a parameter and its state take. Unit: bytes."""
    state = optimizer.state.get(parameter)
    if not state:
        return nbytes_of(parameter)
    return nbytes_of(parameter) + sum(nbytes_of(value) for value in state.values() if isinstance(value, Tensor))


def sorted_out(whole: Sequence[Piece], nbytes: int) -> tuple[list[Piece], list[Piece]]:
    """Return what cannot be sliced, a piece an optimizer, and pieces of the rest as `cut` makes them."""
    first, rest = list[Piece](), list[Piece]()
    for piece in whole:
        apart = [each for each in piece.parameters if not can_be_sliced(piece.optimizer, each)]
        if not apart:
            rest.append(piece)
            continue
        first.append(Piece(piece.optimizer, apart))
        known = set(map(id, apart))
        rest.append(Piece(piece.optimizer, [each for each in piece.parameters if id(each) not in known]))
    return first, cut(rest, nbytes)


def cut(whole: Sequence[Piece], nbytes: int) -> list[Piece]:
    """Cut pieces into some of at most so many bytes, or of one parameter; the largest first, as it needs most."""
    pieces: list[Piece] = []
    for large in whole:
        part: list[nn.Parameter] = []
        room = nbytes
        for parameter in sorted(large.parameters, key=lambda each: moved_bytes(large.optimizer, each), reverse=True):
            needs = moved_bytes(large.optimizer, parameter)
            if part and needs > room:
                pieces.append(Piece(large.optimizer, part))
                part, room = [], nbytes
            part.append(parameter)
            room -= needs
        if part:
            pieces.append(Piece(large.optimizer, part))
    return sorted(pieces, key=lambda piece: piece.nbytes, reverse=True)
