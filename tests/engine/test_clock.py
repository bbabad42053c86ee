"""The clock by which passes are compared."""

import time

import torch

from wholebatch.engine.fit.clock import now


def test_one_thread_is_not_charged_for_what_others_do(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    start = now(torch.device("cpu"))
    time.sleep(0.2)
    assert now(torch.device("cpu")) - start < 0.15


def test_the_time_of_several_threads_and_of_a_device_is_that_which_passes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for device in (torch.device("cpu"), torch.device("cuda")):
        start = now(device)
        time.sleep(0.02)
        assert now(device) - start >= 0.02
