"""How long does a window take on many ranks? From measured parts and a link, as arithmetic.

The model. Each rank runs its micro-batches, which takes what was measured. Gradients are added up once a window, in a
ring, bucket by bucket, and the buckets of a window's last backward pass are sent while it still runs; gradients are
taken to arrive evenly over it. What is not hidden behind it is exposed: the ranks wait for it. The message of 64 bytes
that says over how many targets the gradient is to be divided travels beside the last bucket and is there before it.
The optimizer's step is not in it, as in every plan, and neither is waiting for the slowest rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wholebatch.core.budget import say_bytes
from wholebatch.core.link import Link, say_bandwidth, say_seconds

BUCKET_BYTES = 25 << 20
"""About how much of a gradient is sent at once. Unit: bytes."""

BACKWARD = 2 / 3
"""The share of the backward pass in a micro-batch's time."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What one way to share a model among ranks takes.

    Attributes:
        name: The way.
        held_bytes: Weights, gradients and optimizer state on each rank, between micro-batches. Unit: bytes.
        sent_bytes: What each rank sends a window. Unit: bytes.
        seconds: How long that takes, if nothing is hidden; None: the bandwidth is not known. Unit: seconds.
    """

    name: str
    held_bytes: int
    sent_bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A window on several ranks, predicted.

    Attributes:
        ranks: How many there are.
        link: What connects them; None: not known, and with it no time of a reduction.
        rows: Of the logical batch that each rank has, at most. Unit: rows.
        micro_batches: Of each rank, in a window.
        gradient_bytes: What each rank adds to the sum. Unit: bytes.
        compute_seconds: Time of a rank's own passes; None: not timed. Unit: seconds.
        held: What stays on a rank: ``weights``, ``optimizer state``. Unit: bytes.

    Example:
        >>> window = Ranks(
        ...     ranks=2, link=Link(1e9), rows=256, micro_batches=8, gradient_bytes=100_000_000, compute_seconds=2.0
        ... )
        >>> round(window.reduction_seconds, 3), round(window.exposed_seconds, 3), round(window.each_seconds, 2)
        (0.1, 0.021, 2.17)
    """

    ranks: int
    link: Link | None
    rows: int
    micro_batches: int
    gradient_bytes: int
    compute_seconds: float | None = None
    held: Mapping[str, int] | None = None

    @property
    def sent_bytes(self) -> int:
        """What each rank sends a window. Unit: bytes."""
        return round(2 * (self.ranks - 1) / self.ranks * self.gradient_bytes)

    @property
    def reduction_seconds(self) -> float | None:
        """How long the network works for a window. Unit: seconds."""
        if self.link is None:
            return None
        return sum(self.link.all_reduce(size, self.ranks) for size in self._buckets())

    @property
    def exposed_seconds(self) -> float | None:
        """How long the ranks wait for the network in a window; without a time of passes, all of it. Unit: seconds."""
        return None if self.link is None else self._exposed(self.link)

    @property
    def window_seconds(self) -> float | None:
        """The time of a window, compute and what is exposed, where both are known. Unit: seconds."""
        return self._with(self.exposed_seconds, 1)

    @property
    def each_seconds(self) -> float | None:
        """The time of a window if gradients were added up after each micro-batch. Unit: seconds."""
        return self._with(self.exposed_seconds, self.micro_batches)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as one rank that runs all micro-batches."""
        window, compute = self.window_seconds, self.compute_seconds
        return self.ranks * compute / window if window and compute is not None else None

    @property
    def sharings(self) -> tuple[Sharing, ...]:
        """What each way to share the model takes: memory against communication.

        Held is what stays from one micro-batch to the next: all of it where ranks gather once a window, and between
        windows only the share of a rank.
        """
        if self.held is None:
            return ()
        n, parts = self.ranks, self.micro_batches
        weights, states, gradients = self.held["weights"], self.held.get("optimizer state", 0), self.gradient_bytes
        part = (n - 1) / n

        def way(name: str, held: float, gathered: float, scattered: float, doubled: float = 0) -> Sharing:
            sent = part * (gathered + scattered + 2 * doubled)
            seconds = None if self.link is None else sent / self.link.bandwidth
            return Sharing(name, round(held), round(sent), seconds)

        return (
            way("whole on every rank (no wrapper, DDP)", weights + gradients + states, 0, 0, gradients),
            way('FSDP2, communication="once"', weights + gradients + states / n, weights, gradients),
            way(
                'FSDP2, communication="each"',
                (weights + gradients + states) / n,
                2 * parts * weights,
                parts * gradients,
            ),
        )

    def _buckets(self) -> list[int]:
        whole, rest = divmod(self.gradient_bytes, BUCKET_BYTES)
        return [BUCKET_BYTES] * whole + [rest] * (rest > 0)

    def _exposed(self, link: Link) -> float:
        """Return how long the last bucket comes after the end of the backward pass that makes them."""
        backward = BACKWARD * (self.compute_seconds or 0.0) / self.micro_batches
        done, free = 0, 0.0
        for size in self._buckets():
            done += size
            free = max(free, backward * done / self.gradient_bytes) + link.all_reduce(size, self.ranks)
        return max(0.0, free - backward)

    def _with(self, exposed: float | None, times: int) -> float | None:
        if exposed is None or self.compute_seconds is None:
            return None
        return self.compute_seconds + times * exposed

    def reasons(self) -> list[str]:
        """Return how it is known, one sentence each."""
        sent = (
            f"Each of {self.ranks} ranks sends {say_bytes(self.sent_bytes)} a window, 2 (n - 1) / n of its "
            f"{say_bytes(self.gradient_bytes)} of gradients, however many micro-batches the window has."
        )
        said = [sent]
        if self.link is None:
            return [*said, "No bandwidth was given, so that nobody knows how long that takes: time is that of passes."]
        if self.compute_seconds is None:
            return [*said, "No pass was timed, so that all of the reduction counts as exposed."]
        exposed, whole, each = self.exposed_seconds, self.reduction_seconds, self.each_seconds
        assert exposed is not None
        assert whole is not None
        assert each is not None
        buckets = len(self._buckets())
        if buckets > 1:
            said.append(
                f"Of the reduction {say_seconds(whole - exposed)} are hidden behind the last backward pass, taken as "
                f"two thirds of a micro-batch: the gradient leaves in {buckets} buckets, as they are done."
            )
        else:
            said.append(
                f"The gradient leaves in one piece (less than {say_bytes(BUCKET_BYTES)}), so that all of the reduction "
                "is exposed."
            )
        if self.micro_batches > 1:
            window = self.window_seconds
            assert window is not None
            said.append(
                f"Adding up after each of {self.micro_batches} micro-batches would take {say_seconds(each)} a window, "
                f"{each / window:.3g} times as long."
            )
        if exposed > self.compute_seconds / 10:
            said.append(
                f"The ranks wait {100 * exposed / (exposed + self.compute_seconds):.0f} % of their time: a larger "
                "logical batch, a faster link or fewer ranks would change that."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Return everything that JSON can hold."""
        return {
            "ranks": self.ranks,
            "link": None if self.link is None else {"bandwidth": self.link.bandwidth, "latency": self.link.latency},
            "rows": self.rows,
            "micro_batches": self.micro_batches,
            "gradient_bytes": self.gradient_bytes,
            "sent_bytes": self.sent_bytes,
            "compute_seconds": self.compute_seconds,
            "reduction_seconds": self.reduction_seconds,
            "exposed_seconds": self.exposed_seconds,
            "window_seconds": self.window_seconds,
            "each_seconds": self.each_seconds,
            "speedup": self.speedup,
            "sharings": [
                {
                    "name": each.name,
                    "held_bytes": each.held_bytes,
                    "sent_bytes": each.sent_bytes,
                    "seconds": each.seconds,
                }
                for each in self.sharings
            ],
        }

    def table(self) -> list[tuple[str, str, str]]:
        """Return the parts of a window's time: name, time, and what it is made of."""
        parts = [
            (
                "compute",
                self.compute_seconds,
                f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)} a rank",
            ),
            ("reduction", self.reduction_seconds, f"{say_bytes(self.sent_bytes)} sent by each rank"),
            ("exposed", self.exposed_seconds, "the part of it for which ranks wait"),
            (
                "window",
                self.window_seconds,
                f"{self.speedup:.3g} times as fast as one rank" if self.speedup is not None else "",
            ),
        ]
        return [(name, say_seconds(time), what) for name, time, what in parts if time is not None]

    def sharing_table(self) -> list[tuple[str, str, str]]:
        """Return the ways to share the model: name, what a rank holds, what it sends."""
        return [
            (
                each.name,
                say_bytes(each.held_bytes),
                f"sends {say_bytes(each.sent_bytes)} a window"
                + (f", {say_seconds(each.seconds)}" if each.seconds is not None else ""),
            )
            for each in self.sharings
        ]

    @property
    def heading(self) -> str:
        """What the table is of."""
        if self.link is None:
            return f"A window on {self.ranks} ranks, {self.rows:,} rows each"
        latency = f" and {say_seconds(self.link.latency)}" if self.link.latency else ""
        return (
            f"A window on {self.ranks} ranks, {self.rows:,} rows each, over a link of "
            f"{say_bandwidth(self.link.bandwidth)}{latency}"
        )
