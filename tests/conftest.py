"""What every test starts from: the same torch seed, and no time limit for an example on a busy machine."""

import os
import tempfile

import pytest
import torch
from hypothesis import settings

# Keras has one backend in a process, and writes down in its folder which.
os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp(prefix="wholebatch-keras-"))

settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
