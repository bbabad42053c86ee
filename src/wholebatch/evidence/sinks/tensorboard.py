"""How does TensorBoard get to see a run?"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wholebatch.core.record import Update
from wholebatch.evidence.sinks.extras import bring
from wholebatch.evidence.sinks.reading import Reader, settings_of
from wholebatch.evidence.sinks.seam import SinkError, as_event


class TensorBoard:
    """A sink that writes an event file for TensorBoard.

    Each number of an update is a scalar of its name (``loss``, ``grad_norm``, ``lr``, ...) at the number of the update;
    those of a validation are ``validation/loss`` and so on. A skipped window is a 1 in ``skipped``, with its reason
    among the texts. The configuration and the outcome are texts too. Nothing goes over a network.

    Args:
        folder: Where the file goes; what ``tensorboard --logdir`` is given. It is made if need be.
        from_update: Hides what an earlier run wrote in the same folder from this update on: 0 for all of it, 501 to go
            on after a checkpoint of update 500; None: nothing is hidden.
        every_seconds: The longest time for which what was written may be in memory only. Unit: seconds.

    Raises:
        MissingExtraError: TensorBoard or PyTorch is not installed.
        SinkError: The folder cannot be written to.

    Example:
        >>> board = TensorBoard("runs/board")
        >>> board.write({"event": "update", "number": 1, "loss": 2.5})
        >>> board.close()
        >>> [path.name.split(".")[0] for path in Path("runs/board").iterdir()]
        ['events']
    """

    def __init__(self, folder: str | Path, *, from_update: int | None = None, every_seconds: float = 2.0) -> None:
        self.folder = Path(folder)
        self._reader = Reader()
        self._every_seconds = every_seconds
        self._kept = time.monotonic()
        board = bring("torch.utils.tensorboard", what="The TensorBoard sink", extra="tensorboard")
        try:
            self._writer: Any = board.SummaryWriter(str(self.folder), purge_step=from_update)
        except OSError as error:
            raise self._lost(error) from error

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Add what an event says.

        Raises:
            SinkError: It cannot be written, or the sink is closed.
        """
        if self._writer is None:
            raise SinkError(
                f"The TensorBoard sink in {self.folder} is closed.", hint="write every event before close()."
            )
        event = as_event(event)
        kind = event.get("event")
        try:
            if kind == "start":
                shown = json.dumps(settings_of(event), indent=2)
                # Markdown shows an indented block as it stands.
                self._writer.add_text("configuration", "    " + shown.replace("\n", "\n    "), self._reader.update)
            else:
                reading = self._reader.read(event)
                for name, number in reading.numbers.items():
                    self._writer.add_scalar(name, number, reading.update)
                for name, word in reading.words.items():
                    self._writer.add_text(name, word, reading.update)
            now = time.monotonic()
            if kind != "update" or now - self._kept >= self._every_seconds:
                self._writer.flush()
                self._kept = now
        except OSError as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """Write out what is still in memory, and close the file."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> SinkError:
        return SinkError(
            f"TensorBoard's file in {self.folder} cannot be written: {error.strerror or error}.",
            hint="name a folder that you may write to and whose disk has space left.",
        )
