"""Bandwidths and latencies as they are written, and how long collectives take."""

import math

import pytest

from wholebatch.core.errors import ConfigError
from wholebatch.core.link import Link, parse_bandwidth, parse_latency, say_bandwidth, say_seconds


@pytest.mark.parametrize(
    ("said", "bandwidth"),
    [
        ("25GB/s", 25e9),
        ("25 gB/s", 25e9),
        ("3GiB/s", 3 * 1024**3),
        ("3 MiB/sec", 3 * 1024**2),
        ("512 bytes/s", 512),
        ("100Gbit/s", 12.5e9),
        ("100 Gb/s", 12.5e9),
        ("1Gbps", 125e6),
        ("1 GBps", 1e9),
        ("800 Mbits/second", 100e6),
        ("1_000kB/s", 1e6),
        (4096, 4096),
        (2.5e9, 2.5e9),
    ],
)
def test_bandwidths(said, bandwidth):
    assert parse_bandwidth(said) == pytest.approx(bandwidth, rel=1e-12)


@pytest.mark.parametrize(
    "said", ["25", "25GB", "fast", "", 0, -1, "0GB/s", "2,5GB/s", True, None, math.inf, math.nan, "1 PB/s"]
)
def test_what_is_no_bandwidth(said):
    with pytest.raises(ConfigError, match=r"is not a bandwidth\.(.|\n)*bytes"):
        parse_bandwidth(said)


@pytest.mark.parametrize(("said", "latency"), [("20us", 2e-5), ("1 ms", 1e-3), ("0.5s", 0.5), (0, 0.0), (1e-6, 1e-6)])
def test_latencies(said, latency):
    assert parse_latency(said) == pytest.approx(latency, rel=1e-12)


@pytest.mark.parametrize("said", ["20", "20 minutes", -1, math.inf, math.nan, False, None])
def test_what_is_no_latency(said):
    with pytest.raises(ConfigError, match=r"is not a latency\.(.|\n)*from rank to rank"):
        parse_latency(said)


def ring(chunks, ranks, bandwidth, latency):
    """Run a ring step by step: in each, every rank sends a chunk to its neighbour, who adds it up, or keeps it."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]
    seconds = 0.0
    for adding in (True, False):
        for step in range(ranks - 1):
            seconds += chunks / ranks / bandwidth + latency
            sent = []
            for rank in range(ranks):
                chunk = (rank - step + (0 if adding else 1)) % ranks
                sent.append(((rank + 1) % ranks, chunk, set(held[rank][chunk])))
            for to, chunk, what in sent:
                held[to][chunk] = held[to][chunk] | what if adding else what
    assert all(what == set(range(ranks)) for each in held for what in each)
    return seconds


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_an_all_reduce_takes_what_a_ring_takes(ranks):
    link = Link(1e6, 1e-3)
    assert link.all_reduce(640_000, ranks) == pytest.approx(ring(640_000, ranks, 1e6, 1e-3), rel=1e-12)
    assert 2 * link.one_way(640_000, ranks) == link.all_reduce(640_000, ranks)


def test_one_rank_waits_for_nobody_and_many_send_twice_their_data_at_most():
    link = Link(1e6)
    assert link.all_reduce(1e6, 1) == 0
    assert link.all_reduce(1e6, 10_000) == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (12, "12 s"), (4000, "4,000 s"), (0.5, "500 ms"), (4e-5, "40 us")]
)
def test_times_in_words(seconds, said):
    assert say_seconds(seconds) == said


def test_bandwidths_in_words():
    assert [say_bandwidth(each) for each in (12, 3e3, 125e6, 25e9)] == ["12 B/s", "3 kB/s", "125 MB/s", "25 GB/s"]
