"""What every test starts from: the same torch seed, and no time limit for an example on a busy machine."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
