"""How does Weights & Biases get to see a run?"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from wholebatch.core.record import Update
from wholebatch.evidence.sinks.extras import bring
from wholebatch.evidence.sinks.jsonlines import plain
from wholebatch.evidence.sinks.reading import Reader
from wholebatch.evidence.sinks.seam import SinkError, as_event

Mode = Literal["online", "offline", "disabled"]


class WeightsAndBiases:
    """A sink that makes a run of Weights & Biases.

    Each number of an update goes by its name (``loss``, ``grad_norm``, ``lr``, ...) over ``update``, the number of the
    update, so that runs that are resumed go on where they were. A skipped window is a 1 in ``skipped`` and its reason
    in ``skipped_reason``. The start event becomes the run's configuration, the finish event its summary; a run that
    fails or is interrupted is marked as failed.

    Nothing goes over a network unless you say so: the run is kept in a folder, and ``wandb sync`` uploads it.

    Args:
        folder: In which the folder ``wandb`` is made.
        project: Under which project the run is filed.
        name: What the run is called; None: Weights & Biases finds a name.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``; None: what the variable WANDB_MODE says, else offline.
        run: A run of yours, from ``wandb.init``, to write to instead. It stays open at the end.

    Raises:
        MissingExtraError: wandb is not installed.
        SinkError: The run cannot be made.

    Example:
        >>> sink = WeightsAndBiases("runs/first", mode="disabled")
        >>> sink.write({"event": "update", "number": 1, "loss": 2.5})
        >>> sink.close()
    """

    def __init__(
        self,
        folder: str | Path = ".",
        *,
        project: str = "wholebatch",
        name: str | None = None,
        mode: Mode | None = None,
        run: Any = None,
    ) -> None:
        self.folder = Path(folder)
        self._reader = Reader()
        self._failed = False
        self._is_ours = run is None
        self._run: Any = run if run is not None else self._init(project, name, mode)
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def _init(self, project: str, name: str | None, mode: Mode | None) -> Any:
        wandb = bring("wandb", what="The Weights & Biases sink", extra="wandb")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return wandb.init(
                project=project,
                name=name,
                dir=str(self.folder),
                mode=mode or os.environ.get("WANDB_MODE", "offline"),
                # A run of the user's own may be open in this process.
                reinit="create_new",
                # The terminal belongs to the user; what the machine does meanwhile is not ours to collect.
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, save_code=False),
            )
        except Exception as error:  # of many kinds, some of them not public
            raise self._lost("The run of Weights & Biases cannot be made", error) from error

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Log what an event says.

        Raises:
            SinkError: wandb does not take it, or the sink is closed.
        """
        if self._run is None:
            raise SinkError("The Weights & Biases sink is closed.", hint="write every event before close().")
        event = as_event(event)
        kind = event.get("event")
        said = self._reader.read(event)
        words = {f"{name}_reason" if name == "skipped" else name: word for name, word in said.words.items()}
        try:
            if kind == "start":
                settings = {key: plain(value) for key, value in event.items() if key != "event"}
                self._run.config.update(settings, allow_val_change=True)
            elif kind == "finish":
                self._failed = event.get("status") in ("failed", "interrupted")
                self._run.summary.update(said.numbers | words)
            else:
                self._run.log({"update": said.update, **said.numbers, **words})
        except Exception as error:  # of many kinds, some of them not public
            raise self._lost(f"Weights & Biases did not take a {kind} event", error) from error

    def close(self) -> None:
        """Finish the run, unless it is yours."""
        run, self._run = self._run, None
        if run is None or not self._is_ours:
            return
        try:
            run.finish(exit_code=int(self._failed))
        except Exception as error:  # of many kinds, some of them not public
            raise self._lost("The run of Weights & Biases cannot be finished", error) from error

    def _lost(self, what: str, error: Exception) -> SinkError:
        return SinkError(
            f"{what}: {type(error).__name__}: {error}.",
            hint="WANDB_MODE=offline needs no network; offline runs are uploaded later, with `wandb sync`.",
        )
