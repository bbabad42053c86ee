"""How does a rank talk to the others, and what does it say when one of them does not answer?"""

import atexit
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wholebatch.core.errors import RankError
from wholebatch.engine import memory


def initialised() -> bool:
    """Return whether this process knows of others."""
    return dist.is_available() and dist.is_initialized()


class Wire:
    """The process group of a run. Every rank makes the same calls in the same order.

    Args:
        process_group: The ranks that train together.

    Attributes:
        ranks: How many there are.
        rank: Which of them this is.
        lost: Why nothing more can be said over it, or None.
    """

    def __init__(self, process_group: Any) -> None:
        # Who still holds the group of all ranks at the end of the process aborts it now and then.
        self._process_group = None if process_group is dist.group.WORLD else process_group
        self.ranks = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        self.lost: str | None = None
        _let_go_at_the_end()

    def require(self) -> None:
        """Refuse to go on after a rank was lost.

        Raises:
            RankError: One was.
        """
        if self.lost is not None:
            raise RankError(
                f"Rank {self.rank} cannot go on with the others: {self.lost}",
                hint="start all ranks again, from the last checkpoint.",
            )

    def add_up(self, tensor: Tensor, *, largest: bool = False) -> Any:
        """Add up a tensor over all ranks, in place, while this rank goes on; `wait` says when it is there."""
        with self._speaking():
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            return dist.all_reduce(tensor, op=operation, group=self._process_group, async_op=True)

    def wait(self, work: Any) -> None:
        """Wait for what was started; on an accelerator its stream waits, and the host goes on."""
        with self._speaking():
            work.wait()

    def gather(self, what: Any) -> list[Any]:
        """Return what each rank says, by rank."""
        said: list[Any] = [None] * self.ranks
        with self._speaking():
            dist.all_gather_object(said, what, group=self._process_group)
        return said

    def exchange(self, parcels: Mapping[int, bytes], nbytes: Mapping[int, int], device: torch.device) -> list[bytes]:
        """Send each rank its own parcel, and return those for this one, by the rank that sent them.

        Args:
            parcels: By the rank that gets them.
            nbytes: How large the parcels for this rank are, by the rank that sends them.
            device: Where tensors can be sent from that cannot be sent from memory of the host.
        """
        if "cpu" in str(dist.get_backend_config(self._process_group)):
            device = torch.device("cpu")
        sent = [torch.frombuffer(bytearray(parcel), dtype=torch.uint8).to(device) for parcel in parcels.values()]
        got = [torch.empty(nbytes[rank], dtype=torch.uint8, device=device) for rank in sorted(nbytes)]
        group = self._process_group
        calls = [
            *(dist.P2POp(dist.isend, each, group=group, group_peer=to) for to, each in zip(parcels, sent, strict=True)),
            *(
                dist.P2POp(dist.irecv, each, group=group, group_peer=rank)
                for rank, each in zip(sorted(nbytes), got, strict=True)
            ),
        ]
        with self._speaking():
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
        return [each.cpu().numpy().tobytes() for each in got]

    def side_by_side(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, of one shape and dtype, by rank."""
        found = [torch.empty_like(tensor) for _ in range(self.ranks)]
        with self._speaking():
            dist.all_gather(found, tensor, group=self._process_group)
        return found

    def take_first(self, tensor: Tensor) -> None:
        """Make a contiguous tensor on all ranks that of the first."""
        self.take_from(0, tensor)

    def take_from(self, rank: int, tensor: Tensor) -> None:
        """Make a contiguous tensor on all ranks that of one of them."""
        as_bytes = tensor.reshape(-1).view(torch.uint8)  # no network knows every dtype
        with self._speaking():
            dist.broadcast(as_bytes, group=self._process_group, group_src=rank)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        self.require()
        try:
            yield
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
                raise
            raise self.unanswered(error) from error

    def is_down(self, error: Exception) -> bool:
        """Whether an error says that a rank is gone: from a collective that a wrapper made in the middle of a pass."""
        if not isinstance(error, RuntimeError) or isinstance(error, RankError) or memory.is_out_of_memory(error):
            return False
        return isinstance(error, dist.DistError) or "gloo" in str(error)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context of what a wrapper says over the network by itself.

        Raises:
            RankError: A rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.is_down(error):
                raise self.unanswered(error) from error
            raise

    def unanswered(self, error: Exception) -> RankError:
        """Return the error that a rank is gone, and remember it."""
        said = re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
        self.lost = f"a rank is gone, or did not answer within the time-out of the process group ({said})."
        return RankError(
            f"Rank {self.rank} waited for the others, and {self.lost}",
            hint="look at the end of each rank's log: the first to stop says why. No weight has moved here. How "
            "long ranks wait for each other is said by init_process_group(timeout=...).",
        )


def let_go() -> None:
    """Give the threads of Gloo the time to let go of the tensors of their last message.

    It takes the interpreter's lock where Python knows of the tensor. A thread that still waits for the lock aborts the
    process while Python takes itself apart, and may hang it while the group is destroyed.

    Source:
        https://github.com/pytorch/pytorch/issues/190489
    """
    time.sleep(_MOMENT)


@cache
def _let_go_at_the_end() -> None:
    atexit.register(let_go)


_MOMENT = 0.05
"""What such a thread needs a hundred times over, and no run notices. Unit: seconds."""
