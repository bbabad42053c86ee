"""When was memory taken and given back? As PyTorch's profiler sees it, which looks at nothing else here."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

BETWEEN, AFTER = "wholebatch: between", "wholebatch: after"
"""The names of marks that are seen beside the changes."""


class Profile:
    """What PyTorch's profiler has seen: each time that memory was taken or given back.

    Attributes:
        events: Filled in at the end.
    """

    events: Sequence[Any] = ()


@contextmanager
def profiled() -> Iterator[Profile]:
    """Let the profiler see memory and marks, and no operations, which makes it quick; all of them where it must."""
    found = Profile()
    with _unheard():
        stop = _started()
    try:
        yield found
    finally:
        with _unheard():
            found.events = stop()


def _started() -> Callable[[], Sequence[Any]]:
    """Start the profiler and return what stops it. Its public face takes a second for its first start."""
    try:
        from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
        from torch._C._profiler import (
            ProfilerActivity,
            ProfilerConfig,
            ProfilerState,
            RecordScope,
            _ExperimentalConfig,
        )

        settings = ProfilerConfig(
            ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig(), "memory"
        )
        activities = {ProfilerActivity.CPU}
        _prepare_profiler(settings, activities)
        _enable_profiler(settings, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
    except (ImportError, AttributeError, TypeError):  # another version of PyTorch
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        profile.start()

        def stopped() -> Sequence[Any]:
            profile.stop()
            found: Any = profile.profiler
            events: Sequence[Any] = found.kineto_results.events()
            return events

        return stopped
    return lambda: _disable_profiler().events()


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep what C code writes to stderr from being seen: the profiler announces each start and stop there."""
    try:
        sys.stderr.flush()
        heard = os.dup(2)
    except (AttributeError, OSError, ValueError):  # there is no stderr that C code could write to
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(heard, 2)
        os.close(nowhere)
        os.close(heard)


def changes_of(found: Profile) -> list[tuple[int, int, str]]:
    """Return when memory was taken or given back, how much of it, and the marks between, in order."""
    seen = ((event.name(), event) for event in found.events)
    return sorted(
        ((event.start_ns(), event.nbytes(), name) for name, event in seen if name in ("[memory]", BETWEEN, AFTER)),
        key=lambda each: each[0],
    )
