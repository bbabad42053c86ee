"""How does one rank hold the center for all? A parameter server on `torch.distributed.rpc`."""

import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch.distributed import rpc
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.futures import Future

from wholebatch.core.errors import ConfigError
from wholebatch.engine.ranks.batches import place_among_ranks
from wholebatch.engine.ranks.center import Center, Vectors, another_failed

Answer: TypeAlias = tuple[Vectors, int] | str
"""The center with the number of commits so far, or, in words, which rank has failed, and why."""

_FAREWELL_SECONDS = 30
"""How long a rank that has failed waits for the others to hear of it."""

_GLANCE_SECONDS = 0.01
"""How long the rank that is called waits before it looks again whether the others have left."""


class Held:
    """The center as the rank keeps it that holds it: what is committed is added in order of arrival.

    Args:
        weights: The first center.
        ranks: How many add to it.

    Attributes:
        commits: How often something was added.
    """

    def __init__(self, weights: Vectors, ranks: int) -> None:
        self._center = [each.detach().cpu().clone() for each in weights]
        self._ranks = ranks
        self._lock = threading.Lock()
        self._finished: list[Future[Any]] = []
        self._failure: str | None = None
        self.commits = 0

    def commit(self, found: Vectors | None) -> "Answer":
        """Add to the center, and return it as it is now, with the number of commits so far."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            if found is not None:
                for center, part in zip(self._center, found, strict=True):
                    center.add_(part)
                self.commits += 1
            return [each.clone() for each in self._center], self.commits

    def finish(self) -> "Future[Any]":
        """Return what will be the center when each rank has called this."""
        done: Future[Any] = Future()
        with self._lock:
            self._finished.append(done)
        self._answer()
        return done

    def fail(self, why: str) -> None:
        """Let nobody wait for a rank that has failed."""
        with self._lock:
            self._failure = self._failure or why
        self._answer()

    def _answer(self) -> None:
        with self._lock:
            ready = self._failure is not None or len(self._finished) == self._ranks
            waiting, self._finished = (self._finished, []) if ready else ([], self._finished)
        for each in waiting:
            each.set_result(self.commit(None))


_HELD: dict[int, Future[Held]] = {}
"""The centers that this process holds, by number; also those that somebody has asked for before they are there."""

_HELD_LOCK = threading.Lock()


def _held(number: int) -> "Future[Held]":
    with _HELD_LOCK:
        return _HELD.setdefault(number, Future())


# What follows is called from other ranks. A future keeps none of the few threads waiting that answer them.


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _commit(number: int, found: Vectors | None) -> "Future[Any]":
    return _held(number).then(lambda held: held.value().commit(found))


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _finish(number: int) -> "Future[Any]":
    result: Future[Any] = Future()

    def when_held(held: "Future[Held]") -> None:
        held.value().finish().then(lambda center: result.set_result(center.value()))

    _held(number).then(when_held)
    return result


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _fail(number: int, why: str) -> "Future[None]":
    return _held(number).then(lambda held: held.value().fail(why))


class Served(Center):
    """One rank holds the center, and the others reach it through `torch.distributed.rpc`, each when it is ready.

    Args:
        timeout: How long to wait for an answer. Unit: seconds.

    Raises:
        ConfigError: The ranks do not know where to meet.
    """

    _made = 0

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._number = Served._made  # ranks make their centers in the same order
        Served._made += 1
        self._book = join(timeout)
        self._ranks = len(_workers())
        self._devices: Sequence[torch.device] = ()
        self._seen = 0

    def start(self, weights: Vectors) -> Vectors:
        self._devices = [each.device for each in weights]
        if rpc.get_worker_info().id == 0:
            _held(self._number).set_result(Held(weights, self._ranks))
        return self.commit(None)[0]

    def commit(self, found: Vectors | None) -> tuple[Vectors, int]:
        sent = None if found is None else [each.cpu() for each in found]
        center, commits = _read(rpc.rpc_sync(0, _commit, args=(self._number, sent), timeout=self._timeout))
        others = commits - self._seen - (found is not None)
        self._seen = commits
        return self._to_devices(center), others

    def finish(self) -> Vectors:
        center, self._seen = _read(rpc.rpc_sync(0, _finish, args=(self._number,), timeout=self._timeout))
        return self._to_devices(center)

    def close(self, failure: str | None = None) -> None:
        patience = self._timeout
        if failure is not None:
            patience = min(patience, _FAREWELL_SECONDS)
            said = f"rank {rpc.get_worker_info().id} has failed ({failure})"
            with suppress(RuntimeError):  # that of this rank is on its way already
                rpc.rpc_sync(0, _fail, args=(self._number, said), timeout=patience)
        if self._book is not None:
            self._part(PrefixStore(f"center {self._number}", self._book), patience)
            self._book = None
        with _HELD_LOCK:
            _HELD.pop(self._number, None)

    def _part(self, book: Store, patience: float) -> None:
        """Take down what `join` set up; the rank that is called goes last, when nobody waits for an answer any more.

        The graceful shutdown of `torch.distributed.rpc` now and then waits without end for a rank that has ended.
        """
        if rpc.get_worker_info().id != 0:
            with suppress(RuntimeError):  # that rank may have ended without a word
                book.add("left", 1)
        else:
            until = time.monotonic() + patience
            while book.add("left", 0) < self._ranks - 1 and time.monotonic() < until:
                time.sleep(_GLANCE_SECONDS)
        rpc.shutdown(graceful=False)

    def _to_devices(self, center: Vectors) -> Vectors:
        return [each.to(device) for each, device in zip(center, self._devices, strict=True)]


def _read(answer: Answer) -> tuple[Vectors, int]:
    if isinstance(answer, str):
        raise another_failed(answer)
    return answer


def join(timeout: float) -> Store | None:
    """Join the ranks that call each other, and return where they met; None where that was done before.

    Args:
        timeout: How long to wait for the others. Unit: seconds.

    Raises:
        ConfigError: The ranks do not know where to meet.
    """
    try:
        rpc.get_worker_info()
    except RuntimeError:
        pass
    else:
        return None
    rank, ranks = place_among_ranks()
    try:
        with warnings.catch_warnings():  # PyTorch warns of what it does itself, where there is a process group
            warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
            options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=timeout)
            name = f"wholebatch{rank}"
            rpc.init_rpc(name, rank=rank, world_size=ranks, rpc_backend_options=options)  # type: ignore[no-untyped-call]
        book: Store = next(rendezvous("env://", rank, ranks))[0]
    except ValueError as error:
        raise ConfigError(
            f"The ranks do not know where to meet: {error}",
            hint="start them with torchrun, set MASTER_ADDR and MASTER_PORT, or call torch.distributed.rpc.init_rpc() "
            "before.",
        ) from error
    return book


def _workers() -> Any:
    agent = rpc.api._get_current_rpc_agent()  # type: ignore[attr-defined]  # nothing public says how many there are
    return agent.get_worker_infos()
