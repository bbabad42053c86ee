"""What happened? The record of one update."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The record of one window: the update that it became, or why it did not become one.

    Over several ranks it speaks of all of them, but for `micro_batches`, `padding`, `peak_bytes` and `seconds`, which
    are this process's own.

    Attributes:
        number: Which window of its accumulator this was, from 1.
        loss: The declared objective over the logical batch: the sum over its targets divided by their number.
            NaN when the window held no target.
        targets: What the loss was divided by. Unit: targets.
        rows: Rows in the window, or None where a streaming window was not told. Unit: rows.
        micro_batches: Forward and backward passes that entered the gradient.
        padding: Share of the padded positions in all positions, in 0 to 1; None where no lengths are known.
        grad_norm: 2-norm of the gradient of the logical batch, before clipping; None when there was no gradient, or
            an optimizer took its parts in as they came, so that it never was in one place.
        lr: Learning rate of the optimizer's first group at this update; NaN where that has none, as an Adafactor that
            finds its step by itself.
        skipped: Why there was no update, as a sentence; None when the optimizer stepped.
        retries: How often the logical batch was cut anew after running out of memory.
        peak_bytes: Highest memory use between the first forward pass and the end of the update, or None where the
            platform does not tell. On an accelerator what was allocated there; on a CPU the resident size of
            the process. Unit: bytes.
        seconds: Wall-clock time from the opening of the window to the end of the update.
        noise_scale: The gradient noise scale, where it was asked for. Unit: targets.

    Example:
        >>> update = Update(number=1, loss=0.5, targets=32, rows=8, micro_batches=2, lr=0.1)
        >>> update.applied, update.to_dict()["targets"]
        (True, 32)
    """

    number: int
    loss: float
    targets: float
    rows: int | None
    micro_batches: int
    lr: float
    padding: float | None = None
    grad_norm: float | None = None
    skipped: str | None = None
    retries: int = 0
    peak_bytes: int | None = None
    seconds: float = 0.0
    noise_scale: float | None = None

    @property
    def applied(self) -> bool:
        """Whether the optimizer stepped."""
        return self.skipped is None

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the fields by name, in the order above."""
        return asdict(self)
