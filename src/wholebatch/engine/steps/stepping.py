"""How does an update happen once or not at all, also when memory runs out inside an optimizer's step?

What a step is about to move is copied first. A step that fails is undone, and the window with it, so that the logical
batch can be cut finer. Copying everything would cost as much memory as weights and optimizer state take. So where it is
known that a step moves each parameter on its own, as with the optimizers of PyTorch, parameters are stepped in pieces,
and only the piece under way has a copy. A piece for which memory runs out is undone and tried again in smaller ones;
once a piece has moved for good, the rest follow: the gradients of what has moved make room, and where that is taken
away as well, a reserve suffices for the rest in slices (`slicing.py`). What cannot be sliced moves first.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from wholebatch.core.errors import OutOfMemoryError
from wholebatch.engine import memory
from wholebatch.engine.steps.consuming import takers
from wholebatch.engine.steps.known import Proof, kind_of, moves_one_by_one
from wholebatch.engine.steps.pieces import Piece, cut, lacks_state, moved_bytes, sorted_out, stepped
from wholebatch.engine.steps.slicing import FEWER, NUMBERS, RESERVE, Reserve, Slices
from wholebatch.engine.steps.undo import SMALL, Away, Beside, Undo, nbytes_of

WHOLE = 4 << 20
"""Bytes of weights and state up to which all are one piece."""

PIECES = 16
"""How many pieces larger ones make, if no parameter is larger than that."""

BESIDE = 64 << 20
"""Bytes of weights and state up to which a copy of everything stays on the device."""

WAITS = (0.0, 0.1, 1.0, 4.0)
"""Seconds before each further attempt at the slices of a parameter, after other pieces have moved."""


class Stepping:
    """Steps some optimizers, once or not at all.

    Args:
        optimizers: What steps.
        device: Where memory may run out.

    Attributes:
        budgeted: Whether memory is counted, so that a copy of everything is kept away from the device.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._takers = takers(optimizers)  # a window undoes them itself, in whole, so they go first
        self._optimizers = [each for each in optimizers if not any(each is taker for taker in self._takers)]
        self._device = device
        self._beside = Beside()
        self._away = Away()
        self._reserve = Reserve(device)
        self.budgeted = False
        self._tight = False
        self._proven: list[Proof] = []

    def step(self) -> BaseException | None:
        """Step every optimizer once.

        Returns:
            An exception that is not of the step, such as that of a signal handler, and came when there was no way back.
            The step is complete; the exception is still to be raised.

        Raises:
            OutOfMemoryError: Memory ran out, and stayed so, after a part of the weights had moved for good.
            Exception: What a step raised. Weights and state are as before.
        """
        try:
            for each in self._takers:
                each.step()
            return self._step()
        finally:
            self._beside.give_back(above=WHOLE)
            self._reserve.give_back()

    def _step(self) -> BaseException | None:
        if not all(map(moves_one_by_one, self._optimizers)):
            self._step_or_undo(self._undo_of_all(), None)
            return None
        whole = [Piece(each, stepped(each)) for each in self._optimizers]
        if not any(piece.parameters for piece in whole):  # as where `before_step` has taken the gradients
            for each in self._optimizers:
                each.step()
            return None
        nbytes = sum(piece.nbytes for piece in whole)
        if nbytes <= WHOLE:
            near, far = self._rooms(nbytes <= WHOLE)
            self._step_or_undo(_undo_of(whole, near, far), cut(whole, nbytes // PIECES) if self._tight else None)
            return None
        pieces = cut(whole, nbytes // PIECES)
        proof = [Proof(each.param_groups, kind_of(each)) for each in self._optimizers]
        known = len(self._proven) == len(proof) and all(
            new.is_that_of(old) for new, old in zip(proof, self._proven, strict=True)
        )
        if known and not any(map(lacks_state, whole)):
            return self._step_in_pieces(*sorted_out(whole, nbytes // PIECES))
        # What a step cannot digest, such as a sparse gradient or a state of the wrong shape, shows the first time.
        self._step_or_undo(_undo_of(whole, self._away, self._beside), pieces if self._tight else None)
        self._proven = proof
        return None

    def _undo_of_all(self) -> Undo:
        """Copy all that optimizers of which nothing is known may move."""
        nbytes = sum(moved_bytes(each, p) for each in self._optimizers for g in each.param_groups for p in g["params"])
        near, far = self._rooms(nbytes <= BESIDE)
        return Undo(self._optimizers, near, other=far)

    def _rooms(self, small: bool) -> tuple[Beside | Away, Beside | Away]:
        """Where a copy of everything goes, and where if that is full."""
        return (self._beside, self._away) if small and not self.budgeted else (self._away, self._beside)

    def _step_or_undo(self, undo: Undo, pieces: list[Piece] | None) -> None:
        """Step as the optimizers are, or in pieces, with a copy of everything."""
        try:
            if pieces is None:
                for each in self._optimizers:
                    each.step()
            else:
                for piece in pieces:
                    self._move(piece, undo)
        except BaseException as error:
            undo.put_back()
            self._tight = self._tight or memory.is_out_of_memory(error)
            raise

    def _step_in_pieces(self, first: list[Piece], pieces: list[Piece]) -> BaseException | None:
        """Step what cannot be sliced as one piece, and then the rest, each with a copy. Once one has moved, all do."""
        self._reserve.take()
        done = list[Piece]()
        if first:
            near, far = self._rooms(not self.budgeted)
            self._step_or_undo(_undo_of(first, near, far), first)
            done += first
        ahead = deque(pieces)
        late: BaseException | None = None
        while ahead:
            piece = ahead.popleft()
            undo = self._undo_of_piece(piece) if len(piece.parameters) > 1 else None
            if undo is None and len(piece.parameters) > 1:
                ahead.extendleft(reversed(piece.halves()))
                continue
            try:
                self._move(piece, undo or _undo_of([piece], self._beside))
            except BaseException as error:
                if not done:
                    raise
                said = str(error) if memory.is_out_of_memory(error) else None
                if said is None and late is not None:
                    error.add_note("It was raised by optimizer.step(), after a part of the weights had moved for good.")
                    raise
                if said is None:
                    late = error.with_traceback(None)
            else:
                done.append(piece)
                continue
            del undo
            self._make_room(done)
            if said is None:
                ahead.appendleft(piece)
            else:
                self._finish(piece)
                done.append(piece)
        return late

    def _make_room(self, done: list[Piece]) -> None:
        """Free what is used up."""
        for piece in done:
            for parameter in piece.parameters:
                parameter.grad = None
        memory.free_cached(self._device)

    def _finish(self, piece: Piece) -> None:
        """Step a piece out of the reserve, where memory has run out and others have moved."""
        for parameter in piece.parameters:
            slices = Slices(piece.optimizer, parameter, self._reserve)
            said: str | None = None
            for place, seconds in enumerate(WAITS):
                time.sleep(seconds)
                said = self._finishes(slices, FEWER if place else NUMBERS)
                if said is None:
                    break
            if said is not None:
                raise OutOfMemoryError(
                    f"Memory ran out inside optimizer.step(), to the last {RESERVE >> 10} KiB that were kept for it, "
                    f"and did not come back, after a part of the weights had moved ({said}).",
                    hint="start again from the last checkpoint, with less in memory: a smaller model, or an optimizer "
                    "with less state.",
                )

    def _finishes(self, slices: Slices, numbers: int) -> str | None:
        """Step what is left of a parameter, and return what was said where memory ran out."""
        self._reserve.open()
        try:
            slices.step(numbers)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                error.add_note("It was raised by optimizer.step(), after a part of the weights had moved for good.")
                raise
            return str(error) or type(error).__name__
        return None

    def _undo_of_piece(self, piece: Piece) -> Undo | None:
        """Copy what a piece moves; None if there is no memory for that."""
        try:
            return _undo_of([piece], self._beside)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        return None

    def _move(self, piece: Piece, undo: Undo) -> None:
        """Step a piece wholly or not at all; in smaller pieces where memory runs out."""
        ahead = deque([piece])
        while ahead:
            part = ahead.popleft()
            if not self._moves_at_once(part, piece, undo):
                memory.free_cached(self._device)
                ahead.extendleft(reversed(part.halves()))

    def _moves_at_once(self, part: Piece, piece: Piece, undo: Undo) -> bool:
        """Step a part of a piece; undo it where smaller ones may help, undo the piece and raise elsewhere."""
        try:
            part.step()
        except BaseException as error:
            final = len(part.parameters) == 1 or not memory.is_out_of_memory(error)
            undo.put_back_state(part.optimizer.state, (piece if final else part).parameters)
            if final:
                raise
        else:
            return True
        return False  # only here is the error, and with it the tensors of its traceback, gone


def copy_bytes(optimizers: Sequence[Optimizer], state_bytes: int) -> tuple[int, int]:
    """Return what copies take at most where memory is counted: all through a window, and in its step. Unit: bytes.

    Args:
        optimizers: What steps. Those that take gradients in are undone from copies that a window makes as it begins.
        state_bytes: What they will keep.
    """
    taking = takers(optimizers)
    consumed, weights = _weights(taking), _weights([each for each in optimizers if each not in taking])
    a_state = state_bytes / max(1, sum(consumed) + sum(weights))
    through = _small(consumed) * (1 + a_state)
    a_weight = 1 + a_state + any(map(_writes_gradients, optimizers))
    one_by_one = all(moves_one_by_one(each) for each in optimizers if each not in taking)
    if sum(weights) * (1 + a_state) > WHOLE and one_by_one:
        return int(through), int(max(max(weights), sum(weights) / PIECES) * a_weight) + RESERVE
    return int(through), int(_small(weights) * a_weight)


def _weights(optimizers: Sequence[Optimizer]) -> list[int]:
    """The sizes of the weights that learn. Unit: bytes."""
    parameters = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    return [nbytes_of(parameter) for parameter in parameters if parameter.requires_grad]


def _small(weights: Sequence[int]) -> int:
    """What those take that are copied beside themselves. Unit: bytes."""
    return sum(each for each in weights if each <= SMALL)


def _undo_of(pieces: Sequence[Piece], room: Beside | Away, other: Beside | Away | None = None) -> Undo:
    """Copy what a step on some pieces moves."""
    roots: list[Any] = []
    forgetting: list[tuple[Any, Any]] = []
    for piece in pieces:
        state = piece.optimizer.state
        roots += piece.parameters
        roots += [state[each] for each in piece.parameters if each in state]
        if _writes_gradients(piece.optimizer):
            roots += [parameter.grad for parameter in piece.parameters]
        forgetting += [(state, parameter) for parameter in piece.parameters]
    return Undo(roots, room, forgetting=forgetting, other=other)


def _writes_gradients(optimizer: Optimizer) -> bool:
    """Whether a step may change ``.grad``, which a second attempt at it needs as it was: Nesterov's momentum does."""
    return any(group.get("nesterov", False) for group in optimizer.param_groups)
