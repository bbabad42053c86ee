"""What tests of the engine may ask for."""

import threading

import pytest


@pytest.fixture
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before
