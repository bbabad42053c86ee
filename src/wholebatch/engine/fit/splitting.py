"""What becomes of a loader's micro-batch that does not fit? It alone is taken back, split by rows, and tried again.

The micro-batches before it are gone, and what they added to the gradient is in one sum with what this one did. A
parameter's gradient arrives in one piece, so after a failure it is known which parameters have theirs. For these the
micro-batch is run once more as it was, up to where it failed, and what comes is subtracted. The halves, which draw
random numbers and take batch statistics of their own, then start from what was there before, up to rounding.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from wholebatch.core.batch import Layout, LogicalBatch
from wholebatch.core.errors import BatchNormError, OutOfMemoryError, SplitError
from wholebatch.core.split import Indices, Rows, Size
from wholebatch.engine import memory
from wholebatch.engine.batchnorm import require_row_by_row
from wholebatch.engine.fit.share import Share, no_finer
from wholebatch.engine.forward import Forward
from wholebatch.engine.opening import Windows
from wholebatch.engine.reasons import Say
from wholebatch.engine.versions import Versions
from wholebatch.engine.window import Window


class Splitting:
    """Runs a loader's micro-batches, in parts where they do not fit.

    Args:
        windows: Where windows are opened.
        forward: Runs the micro-batches.
        layout: How rows lie in them.
        say: Takes the reason of an automatic choice.
    """

    def __init__(self, windows: Windows, forward: Forward, layout: Layout, say: Say) -> None:
        self._windows = windows
        self._forward = forward
        self._layout = layout
        self._say = say
        self._share: Share | None = None

    def into(self, window: Window, micro_batch: Any) -> int:
        """Run a micro-batch through the model and add its gradient to a window's.

        Args:
            window: Open.
            micro_batch: As the loader made it.

        Returns:
            How often memory ran out on the way.

        Raises:
            OutOfMemoryError: A single row does not fit, or the micro-batch cannot be cut.
            Exception: What the loss function raised.
        """
        rows = self._layout.count(micro_batch)
        rules = self._windows.rules
        # What is taken in as it arrives cannot be taken back by parts.
        if rules.sums.consumes or rules.setup.group.in_step:
            self._forward.into(window, micro_batch, rows, None)
            return 0
        if self._share is not None and self.splits([rows]):
            whole = self._layout.loaded(micro_batch)
            return self._into_in_parts(window, whole, deque(self.parts(whole)))
        said = self._tried(window, micro_batch, rows)
        if said is None:
            return 0
        whole = self.rows_of(micro_batch, said)
        self.take_finer(whole, whole.rows, said)
        return 1 + self._into_in_parts(window, whole, deque(Rows(-(-whole.rows // 2)).cut(whole.rows)))

    def _into_in_parts(self, window: Window, whole: LogicalBatch, ahead: deque[Indices]) -> int:
        """Run the parts of a micro-batch, and halves of those that do not fit; return how often memory ran out."""
        retries = 0
        with _all_or_nothing(window):
            while ahead:
                part = ahead.popleft()
                said = self._tried(window, whole.take(part), len(part))
                if said is not None:
                    retries += 1
                    self.take_finer(whole, len(part), said)
                    middle = -(-len(part) // 2)
                    ahead.extendleft([part[middle:], part[:middle]])
        return retries

    def splits(self, rows: Sequence[int | None]) -> bool:
        """Return whether a micro-batch of one of these sizes is known not to fit."""
        return self._share is not None and any(each is not None and each > self._share.rows for each in rows)

    def parts(self, rows: LogicalBatch) -> list[Indices]:
        """Return how the rows of a micro-batch are cut, as far as is known."""
        return Rows(min(self._share.rows, rows.rows) if self._share is not None else rows.rows).cut(rows.rows)

    @property
    def size(self) -> Size:
        """How large parts are, now that memory has run out."""
        assert self._share is not None
        return self._share.unit, self._share.rows

    def rows_of(self, micro_batch: Any, said: str) -> LogicalBatch:
        """Return the rows of a micro-batch that did not fit.

        Raises:
            OutOfMemoryError: It cannot be cut.
        """
        try:
            if self._windows.rules.batch_norm == "refuse":
                require_row_by_row(self._forward.setup.model)
            return self._layout.loaded(micro_batch)
        except (SplitError, BatchNormError) as error:
            why = str(error).partition("\n")[0]
            hint = f"{error.hint} Or let the loader make smaller micro-batches; weights are as before."
        raise OutOfMemoryError(f"Memory ran out in a micro-batch that cannot be cut finer ({said}). {why}", hint=hint)

    def take_finer(self, rows: LogicalBatch, at_once: int, said: str) -> None:
        """Remember that so many rows did not fit together.

        Raises:
            OutOfMemoryError: It was one.
        """
        if at_once == 1:
            raise no_finer("in a micro-batch of one row", said)
        finer = -(-at_once // 2)
        if self._share is None:
            self._share = Share(rows.rows, None, 0, rows.rows)
        self._share.asked = max(self._share.asked, rows.rows)
        self._share.shrink(at_once, min(finer, self._share.rows))
        self._say(
            f"Memory ran out with {at_once} rows at once ({said}): this micro-batch and those that follow are cut into "
            f"{self._share.rows} rows.",
            logging.WARNING,
        )

    def closed(self) -> None:
        """Take more rows again, when enough windows went by without a shortage."""
        if self._share is not None and self._share.grow():
            self._say(self._share.tried_again, logging.INFO)

    def _tried(self, window: Window, micro_batch: Any, rows: int | None) -> str | None:
        """Run a part, and return what was said where memory ran out; then nothing has happened.

        Raises:
            LossError: It has been written into, and cannot run again.
            OutOfMemoryError: Not even what had fitted did a second time.
        """
        window.retraction.mark()
        versions = Versions(micro_batch)
        try:
            self._forward.into(window, micro_batch, rows, None)
        except Exception as error:
            said = memory.said_of_shortage(error)
        else:
            return None
        with _all_or_nothing(window):
            versions.require()
            if not self._windows.rules.setup.group.keep_from_sending():
                raise OutOfMemoryError(
                    f"Memory ran out ({said}) in the last backward pass of a window, after other ranks had been sent "
                    "gradients.",
                    hint="let the loader make smaller micro-batches, or hand accumulator.step a logical batch; weights "
                    "are as before.",
                )
            arrived = window.retraction.take_back()
            memory.free_cached(self._forward.setup.device)
            if arrived:
                self._subtract(window, micro_batch, rows, arrived)
        return said

    def _subtract(self, window: Window, micro_batch: Any, rows: int | None, arrived: Sequence[nn.Parameter]) -> None:
        """Run a micro-batch once more as it was, as far as it came, and take out what it had brought."""
        try:
            part = self._forward.meeting(lambda: micro_batch, rows, None)
            if part is not None:
                window.retraction.subtract(part, arrived)
        except Exception as error:
            said = memory.said_of_shortage(error)
        else:
            return
        raise OutOfMemoryError(
            f"Memory ran out in the backward pass of a micro-batch, and again when that was taken back ({said}).",
            hint="let the loader make smaller micro-batches, or hand accumulator.step a logical batch; weights are as "
            "before.",
        )


@contextmanager
def _all_or_nothing(window: Window) -> Iterator[None]:
    """Leave no window open that holds a part of a micro-batch."""
    try:
        yield
    except BaseException:
        if window.is_open:
            window.rollback()
        raise
