"""What is sent in the passes of a window, so that a rank which fails in one can let the others out of it?

With each pass `fully_shard` gathers one layer after the other and adds up their gradients. Every rank takes part in all
of it, or the others wait for good. So what a pass sends is noted in one that counts for nothing and reaches nobody. A
rank that fails in the middle of a later pass sends zeros from there on, for all that is left of the window; then all of
them have come to its end, and nobody keeps what came of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wholebatch.engine.ranks.sharding import groups_of


@dataclass(frozen=True, slots=True)
class Message:
    """One collective of a pass.

    Attributes:
        how: What `fully_shard` calls for it.
        put, got: How many numbers this rank hands in, and gets.
        dtype, device: Of both.
        group: Over which ranks.
        options: What else is said.
        replicas: Over which ranks the result is added up as well, if any.
    """

    how: Any
    put: int
    got: int
    dtype: torch.dtype
    device: torch.device
    group: Any
    options: dict[str, Any]
    replicas: Any

    def send_nothing(self) -> None:
        """Take part with zeros."""
        got = self.how.allocate((self.got,), dtype=self.dtype, device=self.device).zero_()
        if self.got > self.put:  # gathered in place
            put = got.narrow(0, self.group.rank() * self.put, self.put)
        else:
            put = self.how.allocate((self.put,), dtype=self.dtype, device=self.device).zero_()
        work = self.how(output_tensor=got, input_tensor=put, group=self.group, **self.options)
        if work is not None:
            work.wait()
        if self.replicas is not None:
            dist.all_reduce(got, group=self.replicas)


class Traffic:
    """What the passes of a window send, and what is left of it.

    Args:
        sharded: The modules that `fully_shard` has taken, the root first.

    Attributes:
        can_go_back: Whether this PyTorch can leave a pass in the middle.
    """

    def __init__(self, sharded: Sequence[Any]) -> None:
        self._sharded = sharded
        self.can_go_back = all(hasattr(each, "reset_iter_state") for each in sharded)
        self._pass: list[Message] = []
        self._silent = False
        self._sent = 0
        for module in sharded if self.can_go_back else ():
            for group in groups_of(module):
                # Whoever holds the same share; not asked of the mesh, which may name an equal group in its stead.
                replicas = getattr(group.mesh_info, "replicate_process_group", None)
                group._all_gather_comm = _Noting(group._all_gather_comm, self, None)
                group._reduce_scatter_comm = _Noting(group._reduce_scatter_comm, self, replicas)

    @property
    def known(self) -> bool:
        """Whether it is known what a pass sends."""
        return bool(self._pass)

    @property
    def in_pass(self) -> bool | None:
        """Whether a pass has sent something, and will send more; None where it is not known what one sends."""
        return self._sent % len(self._pass) > 0 if self.can_go_back and self._pass else None

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """The context of a pass that reaches nobody, and in which this rank's shares stand in for those of others."""
        self._silent, self._pass = True, []
        for each in self._sharded:
            each.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        except BaseException:
            self._pass = []
            raise
        finally:
            self._silent = False
            for each in self._sharded:
                each.set_requires_all_reduce(True, recurse=False)
            self._break_off()

    def begin(self) -> None:
        """Begin to count: a window has sent nothing yet."""
        self._sent = 0

    def sends(self, message: Message) -> bool:
        """Note what `fully_shard` is about to send, and return whether it is sent."""
        if self._silent:
            self._pass.append(message)
        else:
            self._sent += 1
        return not self._silent

    def confirm(self, passes: int) -> None:
        """Look whether so many passes have sent what was expected of them; if not, nobody knows what the next will."""
        self.can_go_back = self.can_go_back and self._sent == passes * len(self._pass)

    def leave(self, passes: int) -> bool:
        """Take part in what is left of a window without a pass, and return whether that was possible.

        Args:
            passes: That all ranks make in it.
        """
        total = passes * len(self._pass)
        if not (self.can_go_back and self.known) or self._sent > total:
            return False
        self._break_off()
        for number in range(self._sent, total):
            self._pass[number % len(self._pass)].send_nothing()
        return True

    def _break_off(self) -> None:
        """Forget a pass, wherever it is."""
        for each in self._sharded:
            if each._get_fsdp_state()._is_root:  # None before its first pass, False inside another
                each.reset_iter_state()
            for group in groups_of(each):
                for parameter in group.fsdp_params:  # or the next pass would add to what this one has left
                    if getattr(parameter, "_unsharded_param", None) is not None:
                        parameter._unsharded_param.grad = None


class _Noting:
    """Does what was done before, unless its traffic keeps silent."""

    def __init__(self, how: Any, traffic: Traffic, replicas: Any) -> None:
        self._how = how
        self._traffic = traffic
        self._replicas = replicas
        self.allocate = how.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **options: Any) -> Any:
        put, got = input_tensor.numel(), output_tensor.numel()
        said = {name: value for name, value in options.items() if name != "async_op"}
        message = Message(self._how, put, got, output_tensor.dtype, output_tensor.device, group, said, self._replicas)
        if self._traffic.sends(message):
            return self._how(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **options)
        if got > put:
            output_tensor.view(-1, put).copy_(input_tensor.clone())
        else:
            output_tensor.zero_()
        return None
