"""How do contenders keep out of each other's way? Each lives in a process of its own, and they take turns.

What a process remembers (compiled kernels, memory that was freed, clocks that warmed up) is then its own, as it is for
whoever trains with one of them alone.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch


class Apart:
    """An object in a process of its own, whose methods are called from here, one at a time.

    Args:
        make: Makes the object there; a function of a module, with the arguments that follow.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method there and return what it returns, or raise what it raises."""
        self._ours.send((method, arguments))
        failed, answer = self._ours.recv()
        if failed:
            raise answer
        return answer

    def __enter__(self) -> "Apart":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.join(10)
        self._process.kill()


def _serve(connection: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    made = make(*arguments)
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, getattr(made, method)(*given)))
        except Exception as error:
            connection.send((True, error))
