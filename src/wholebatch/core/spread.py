"""How is a logical batch planned on several ranks? As the share of one of them, and what they take together."""

import math
from dataclasses import dataclass

from wholebatch.core.communication import Ranks
from wholebatch.core.errors import ConfigError
from wholebatch.core.link import Link, parse_bandwidth, parse_latency
from wholebatch.core.plan import Plan


@dataclass(frozen=True, slots=True)
class Spread:
    """A logical batch on several ranks.

    Attributes:
        rows: Of the logical batch.
        ranks: How many share it; 1: nobody else does.
        link: What connects them, or None where that is not known.
    """

    rows: int
    ranks: int
    link: Link | None

    @classmethod
    def of(cls, rows: int, ranks: object, bandwidth: object, latency: object) -> "Spread":
        """Look at what was asked for.

        Raises:
            ConfigError: `ranks` is no number of ranks, is more than there are rows, or there is a link and nobody to
                connect.

        Example:
            >>> Spread.of(512, 8, "25GB/s", "20us").rows_each
            64
        """
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise ConfigError(f"ranks={ranks!r} is no number of ranks.", hint="pass 1 or more, such as 8.")
        if ranks > rows:
            raise ConfigError(
                f"ranks={ranks} would share a logical batch of {rows} rows: some would have none.",
                hint=f"plan with at most {rows} ranks, or with a larger logical batch.",
            )
        waiting = parse_latency(latency)
        if ranks == 1 and (bandwidth is not None or waiting):
            raise ConfigError(
                "A bandwidth or a latency was given, and there is one rank, which speaks to nobody.",
                hint="say how many ranks there are, as in ranks=8.",
            )
        if bandwidth is None and waiting:
            raise ConfigError(
                "A latency was given without a bandwidth.", hint='give both, as in bandwidth="25GB/s", latency="20us".'
            )
        return cls(rows, ranks, None if bandwidth is None else Link(parse_bandwidth(bandwidth), waiting))

    @property
    def rows_each(self) -> int:
        """The share of a rank, at most. Unit: rows."""
        return math.ceil(self.rows / self.ranks)

    def __call__(self, plan: Plan) -> Plan:
        """Return the plan of all ranks from that of one."""
        if self.ranks == 1:
            return plan
        need = plan.need
        together = Ranks(
            ranks=self.ranks,
            link=self.link,
            rows=self.rows_each,
            micro_batches=plan.micro_batches,
            gradient_bytes=need.gradient_bytes,
            compute_seconds=plan.seconds,
            held={"weights": 0, **need.resident},
        )
        return plan.on(together, self.rows)
