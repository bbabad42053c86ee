"""What every test starts from: the same torch seed, and no time limit for an example on a busy machine."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from wholebatch.engine.meetings import company

# Keras has one backend in a process, and writes down in its folder which.
os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp(prefix="wholebatch-keras-"))

# Tests that run in the background of a shell are not told of Ctrl-C, nor are their children; some send it themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_window_stays_open() -> Iterator[None]:
    """What a test leaves in an open window is gone before the next one, wherever `wb.gather` would look for company."""
    yield
    if company.here() is not None:
        gc.collect()
        company._here.seats.clear()
