"""How do ranks train weights that no rank can hold? In step: all make equally many passes, and send with each of them.

Each pass gathers the weights of one layer after the other and adds up its gradient over all ranks, so that no rank ever
has all of either. A rank with fewer micro-batches makes passes of weight zero. One that fails in the middle of a pass
sends zeros for the rest of the window (see `wholebatch.engine.ranks.traffic`), and says so at its end; then no rank
moves, and only then are the reasons exchanged.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wholebatch.core.errors import LossError, MeetingError, OutOfMemoryError, RankError
from wholebatch.core.split import Size
from wholebatch.core.weights import gradient_factor
from wholebatch.core.window import WindowState
from wholebatch.engine import memory
from wholebatch.engine.meetings.reach import Reach
from wholebatch.engine.ranks.message import Heard, anywhere, common_of, no_gradient, say_failed, told, words
from wholebatch.engine.ranks.outcomes import Outcome, Outcomes
from wholebatch.engine.ranks.sharding import require_shards, square_of
from wholebatch.engine.ranks.streams import Streams
from wholebatch.engine.ranks.traffic import Traffic
from wholebatch.engine.ranks.wire import Wire
from wholebatch.engine.sums import GradientSum
from wholebatch.engine.weighing import Reading, Weighing


class InStep:
    """A group of several ranks that make every pass together.

    Args:
        sharded: The modules that `fully_shard` has taken, the root first.
        wire: Speaks to the others.
        introduce: Compares notes with all ranks, before the first window.
    """

    in_step = True
    has_met = False

    def __init__(self, sharded: Sequence[Any], wire: Wire, introduce: Callable[[], None]) -> None:
        self.ranks = wire.ranks
        self.streams = Streams(several=True)
        self.reference: float | None = 1.0
        self.passes = 0
        self.spare: Any = None
        self._learns = False  # whether the spare micro-batch has targets
        self._present: set[Tensor] = set()
        self._awaited = False  # whether the others wait to hear of this rank's passes
        self._passing = False  # whether they wait for those passes, and for what came of them
        self._supervised = False
        self._traffic = Traffic(sharded)
        self._outcomes = Outcomes(wire)
        self._sharded = list(sharded)
        self.wire = wire
        self._introduce: Callable[[], None] | None = introduce

    def state_dict(self) -> dict[str, Any]:
        """Return what another process of this rank has to know of the windows until now."""
        present = [name for name, each in self._sharded[0].named_parameters() if each in self._present]
        return {"reference": self.reference, "present": present}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.reference = state["reference"]
        self._present = {each for name, each in self._sharded[0].named_parameters() if name in state["present"]}

    def at_rest(self) -> AbstractContextManager[object]:
        """The context in which weights are where they are between windows; between passes they are."""
        return nullcontext()

    @contextmanager
    def together(self, sums: Callable[[], GradientSum]) -> Iterator[None]:
        """The context of a logical batch: an exception in it is told to the other ranks."""
        self.open(sums)
        self._supervised = True
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_THE_NETWORK):
                raise self.wire.unanswered(error) from error
            if not memory.is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
                self._tell(error)
                raise
            said = memory.in_a_line(error)  # only words leave this block: the traceback holds the tensors of the pass
        except BaseException as stop:  # such as Ctrl-C, which waits for nobody
            self.wire.lost = f"it was stopped inside a window ({words(stop)})."
            raise
        else:
            return
        finally:
            self._supervised = False
        short = OutOfMemoryError(
            f'Memory ran out ({said}), and with communication="each" a micro-batch of a loader cannot be taken back.',
            hint="let the loader make smaller ones, or hand accumulator.step a logical batch; weights are as before.",
        )
        self._tell(short)
        raise short

    def open(self, sums: Callable[[], GradientSum]) -> None:
        """Begin a window."""
        self.wire.require()
        if self._introduce is not None:
            self._introduce()
            self._introduce = None
            require_shards(sums())
            self._watch()
            for each in self._sharded:
                each.set_gradient_divide_factor(1.0)
                for option in ("set_force_sum_reduction_for_comms", "set_reduce_scatter_unused_params"):
                    if hasattr(each, option):
                        getattr(each, option)(True)
        self.passes = 0
        self._present.clear()
        self._awaited, self._passing = True, False
        self._traffic.begin()

    def end(self) -> None:
        pass

    def expect_last(self, weighing: Weighing) -> None:
        pass

    def keep_from_sending(self) -> bool:
        """Return that there is no keeping from it: every pass sends."""
        return False

    def agree_on_passes(self, passes: int, spare: Any, *, learns: bool) -> None:
        """Let all ranks make as many passes as the one with most.

        Args:
            passes: Of this rank.
            spare: A small micro-batch for passes of weight zero; None where this rank has no rows.
            learns: Whether it has targets.
        """
        if learns or not self._learns:
            self.spare, self._learns = (spare if spare is not None else self.spare), learns
        self.passes, any_lacking = self._exchange(passes, lacking=not self._learns)
        if any_lacking and self.passes:
            given = self.wire.gather((self.spare, self._learns))
            if not self._learns:
                known = sorted((each for each in given if each[0] is not None), key=lambda each: not each[1])
                self.spare, self._learns = known[0]
        self._passing = True

    @property
    def rehearses(self) -> bool:
        """Whether this rank has yet to find out what a pass sends."""
        return self._traffic.can_go_back and not self._traffic.known

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """The context of a pass of weight zero in which it does; nobody else takes part."""
        with self._traffic.rehearsing():
            yield
        self._present.clear()

    @property
    def in_pass(self) -> bool | None:
        """Whether a pass has begun in which other ranks wait for this one; None where that is not known."""
        return self._traffic.in_pass

    def _exchange(self, passes: int, *, lacking: bool, failed: str | None = None) -> tuple[int, bool]:
        """Say how many passes this rank has to make, or why it makes none; return what holds for all.

        Raises:
            RankError: Another rank failed before its first pass.
        """
        self._awaited = False
        asked = torch.tensor([passes, lacking, failed is not None], dtype=torch.float64, device=self._device)
        self.wire.wait(self.wire.add_up(asked, largest=True))
        most, any_lacking, any_failed = asked.tolist()
        if any_failed:
            said = self.wire.gather(failed)
            if failed is None:
                raise told([(rank, why) for rank, why in enumerate(said) if why is not None])
        return int(most), bool(any_lacking)

    def settle(self, sums: GradientSum, weighing: Weighing, state: WindowState) -> Reading:
        """Return what the window came to, over all ranks; the gradient is there already."""
        assert self.reference is not None
        common = self.reference
        presence = [parameter in self._present for parameter in sums.parameters]
        ending = self.streams.ending
        square = square_of(sums)
        heard = Heard.of(self.wire, weighing, state, presence, ending, extra=square, device=self._device)
        self._passing = False
        self.streams.hear(heard)
        if heard.failed:
            return self._outcomes.hear_why(weighing, state)
        if self.passes:
            self._traffic.confirm(self.passes)
        if heard.differ:
            presence = anywhere(self.wire, presence, self._device)
        if heard.targets and not any(presence):
            raise no_gradient()
        for parameter, present in zip(sums.parameters, presence, strict=True):
            if not present:  # what nobody has used was sent as zeros, and is not to be moved
                sums.forget(parameter)
        state.rows = heard.rows
        targets = heard.targets
        self.reference = common_of(targets, common)
        norm = math.sqrt(heard.extra) if heard.extra >= 0 else math.nan
        factor = gradient_factor(common, targets) / heard.scale if targets else 0.0
        return Reading(
            loss=heard.loss_sum / targets if targets else math.nan,
            norm=norm * factor,
            factor=factor,
            scaled_norm=norm,
            targets=targets,
            least=0.0,
        )

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters whose gradients arrive in a backward pass: shards, as `fully_shard` reduces them."""
        return list(parameters)

    def deliver(self, sums: GradientSum, factor: float) -> None:
        """Put the sum times `factor` where the optimizer looks for it."""
        sums.deliver(factor)

    def moving(self) -> AbstractContextManager[object]:
        """The context in which all ranks have agreed to move."""
        return self._outcomes.moving()

    def apart(self) -> AbstractContextManager[object]:
        """Return a context like any other: nobody hears of a failure in a window of one's own anyway."""
        return nullcontext()

    def withdraw(self, why: BaseException | None) -> None:
        """Note that this rank has left a window of its own in the middle; nobody hears of it."""
        if why is not None and not self._supervised and not self._awaited and not isinstance(why, RankError):
            self.wire.lost = f"it left a window in the middle ({words(why)})."

    def report_shortage(self, said: str, finer: Size) -> list[Size]:
        """Tell the others that memory ran out, and return to which sizes ranks have to go."""
        if not self._passing or not self._leave(said):
            raise _no_way_back(said, finer)
        self._outcomes.judge(self._outcomes.exchange(Outcome("short", said, finer)))
        return self.take_shortages()

    def take_shortages(self) -> list[Size]:
        """Return to which sizes ranks had to go, when that alone has undone the last window."""
        shortages = self._outcomes.take_shortages()
        self._awaited = self._awaited or bool(shortages)
        return shortages

    def expect_meeting(self, meets: bool) -> None:
        """Refuse micro-batches that meet: they run in another order than that in which ranks make their passes."""
        if meets:
            self.report_meeting("The micro-batches of this model meet")

    def reach(self, *_: object) -> Reach:
        raise AssertionError

    def report_meeting(self, why: str) -> None:
        """Refuse micro-batches that meet."""
        raise MeetingError(
            f'{why}, and with communication="each" the passes of all ranks go one by one.',
            hint='pass communication="once", or a loss that needs no other rows than those of its micro-batch.',
        )

    def give_up(self) -> None:
        raise AssertionError

    def _tell(self, error: Exception) -> None:
        """Tell the others why this rank has failed."""
        try:
            if self._awaited:
                self._exchange(0, lacking=False, failed=words(error))
            elif self._passing and self._leave(words(error)):
                self._outcomes.exchange(Outcome("failed", words(error)))
        except RankError as lost:
            error.add_note(f"The other ranks could not be told: {lost.found}")

    def _leave(self, said: str) -> bool:
        """Take part in what is left of a window, without a gradient; return whether that was possible."""
        self._passing = False
        try:
            with self.wire.watching():
                left = self._traffic.leave(self.passes)
        except BaseException as error:
            self.wire.lost = f"it left a window in the middle ({said}; then {words(error)})."
            raise
        if left:
            say_failed(self.wire, self._device)
        else:
            self.wire.lost = f"it left a window in the middle ({said})."
        return left

    def _watch(self) -> None:
        """Note from now on which weights receive a gradient on this rank. Gathers one layer after the other.

        One that comes to a share past the layer is refused: no other rank would get its part of it.
        """
        names = {shard: name for name, shard in self._sharded[0].named_parameters()}
        for module in self._sharded:
            shards = dict(module.named_parameters())
            module.unshard()
            for name, leaf in dict(module.named_parameters()).items():
                if leaf is not shards[name] and leaf.requires_grad:
                    shards[name].register_hook(lambda _, name=names[shards[name]]: _refuse_gradient(name))
                    leaf.register_post_accumulate_grad_hook(lambda _, shard=shards[name]: self._present.add(shard))
            module.reshard()

    @property
    def _device(self) -> torch.device:
        parameter: Any = next(self._sharded[0].parameters())
        return torch.device(parameter.device)


_OF_THE_NETWORK = ("gloo", "NCCL", "Connection", "connection", "Timed out", "timed out")


def _refuse_gradient(name: str) -> None:
    raise LossError(
        f"The loss uses {name} outside of the layer that holds it, where a rank has no more than its share of it.",
        hint="leave weight decay to the optimizer, add such terms up inside the layer's forward(), or pass "
        'communication="once".',
    )


def _no_way_back(said: str, finer: Size) -> OutOfMemoryError:
    return OutOfMemoryError(
        f'Memory ran out ({said}), and with communication="each" ranks cannot go back together here.',
        hint=f"start all ranks again with smaller micro-batches, such as {finer[1]} {finer[0]}. To go back takes a "
        "PyTorch whose FSDPModule has reset_iter_state, and passes that all send the same.",
    )
