"""Which micro-batch of a replay need not run twice? The last one: its graph is kept from the first pass.

While it runs its weights are not frozen. When all have met and every loss is known, what enters at what it brought
enters there at once, before the others run again. So there is never a graph of more than one micro-batch, and of k
forward passes k - 1 are made a second time.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import parametrize

from wholebatch.core.errors import MeetingError
from wholebatch.engine.meetings.call import Call
from wholebatch.engine.objective import Part


class _Node(Protocol):
    """A step of a graph, as autograd shows it."""

    @property
    def next_functions(self) -> tuple[tuple["_Node | None", int], ...]: ...
    def name(self) -> str: ...


class Weights:
    """The weights of a model, frozen while micro-batches run whose graphs are to begin at meetings.

    Args:
        model: Whose weights; those that are frozen anyway stay so.
    """

    def __init__(self, model: nn.Module) -> None:
        self._learning = [each for each in model.parameters() if each.requires_grad and each.is_leaf]
        self._are_frozen = False

    def freeze(self) -> None:
        """Let none of them require a gradient."""
        self._set(are_frozen=True)

    def thaw(self) -> None:
        """Let those learn that did."""
        self._set(are_frozen=False)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let them learn again at the end of a block, whatever was done in it."""
        try:
            self.freeze()
            yield
        finally:
            self.thaw()

    def _set(self, *, are_frozen: bool) -> None:
        if are_frozen != self._are_frozen:
            self._are_frozen = are_frozen
            for each in self._learning:
                each.requires_grad_(not are_frozen)


class Kept:
    """A micro-batch that runs once, with a graph.

    Args:
        number: Which it is.

    Attributes:
        brought: What it brought to each meeting, or None where no gradient enters.
        got: What it got there, if a gradient is wanted by that.
        part: What it adds to the objective, or None.
        is_open: Whether its weights may learn while it runs.
        is_whole: Whether it has come to its end, with a graph that is good for it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.brought: list[Brought | None] = []
        self.got: list[Tensor | None] = []
        self.part: Part | None = None
        # Inside parametrize.cached() it would find what the others have computed from frozen weights.
        self.is_open = not getattr(parametrize, "_cache_enabled", 0)
        self.is_whole = False

    def meet(self, call: Call, leaf: Tensor | None) -> None:
        """Note a meeting.

        Args:
            call: What it brings.
            leaf: What it gets, if a gradient is wanted by that.
        """
        takes_gradient = isinstance(call.value, Tensor) and call.value.requires_grad and call.with_graph
        self.brought.append(Brought(call.value) if takes_gradient else None)
        self.got.append(leaf)

    def needs_what_met(self, value: Any) -> bool:
        """Return whether something was made of what it got from a meeting."""
        return leads_to(value, self._leaves)

    def end(self, part: Part | None, losses: Iterable[Tensor]) -> bool:
        """Note what it adds, and return whether its graph is kept.

        Two backward passes go through what lies between its losses and what it got. PyTorch's own operations bear
        that; those of others may use up what they saved.
        """
        self.is_whole = self.is_open and not any(map(_is_of_others, _on_the_way(losses, self._leaves)))
        if self.is_whole:
            self.part = part
        else:
            self.forget()
        return self.is_whole

    def forget(self) -> None:
        """Let the graph go."""
        self.part = None
        self.brought.clear()
        self.got.clear()

    @property
    def _leaves(self) -> list[Tensor]:
        return [leaf for leaf in self.got if leaf is not None]


class Brought:
    """What a micro-batch brought to a meeting, where a gradient enters later."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._version = value._version

    def require_unchanged(self) -> None:
        """Raise an error unless it is as it was.

        Raises:
            MeetingError: It is not.
        """
        if self.value._version != self._version:
            raise MeetingError(
                "A tensor was changed after it had been brought to a meeting, and the gradient that is for it "
                "would enter at another one.",
                hint='bring a copy, wb.gather(x.clone()), or pass lockstep="joined".',
            )


def leads_to(value: Any, leaves: Collection[Tensor]) -> bool:
    """Return whether something is, or was made of, one of some leaves of a graph."""
    return any(value is leaf for leaf in leaves) or (isinstance(value, Tensor) and bool(_on_the_way([value], leaves)))


def _on_the_way(tensors: Iterable[Tensor], leaves: Collection[Tensor]) -> list[_Node]:
    """Return the steps of the graphs of some tensors that lie between these and some leaves."""
    ends = {id(leaf) for leaf in leaves}
    leads: dict[Any, bool] = {}
    waiting: list[Any] = [each.grad_fn for each in tensors if each.grad_fn is not None] if ends else []
    while waiting:
        node = waiting[-1]
        after = [each for each, _ in node.next_functions if each is not None]
        unknown = [each for each in after if each not in leads]
        if unknown and node not in leads:
            waiting += unknown
            continue
        waiting.pop()
        leads[node] = id(getattr(node, "variable", None)) in ends or any(leads[each] for each in after)
    return [node for node, is_on_the_way in leads.items() if is_on_the_way]


def _is_of_others(node: _Node) -> bool:
    return isinstance(node, BackwardCFunction) or "CppNode" in node.name()
