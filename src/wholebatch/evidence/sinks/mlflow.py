"""How does MLflow get to see a run?"""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wholebatch.core.record import Update
from wholebatch.evidence.sinks.extras import bring
from wholebatch.evidence.sinks.reading import Reader, Reading, settings_of
from wholebatch.evidence.sinks.seam import SinkError, as_event

# What its stores take: measurements and settings in one call, characters of a setting or a tag.
_NUMBERS_AT_ONCE, _SETTINGS_AT_ONCE, _LONGEST = 1000, 100, 5000
_STATUS = {"failed": "FAILED", "interrupted": "KILLED"}


class MLflow:
    """A sink that makes a run of MLflow.

    Each number of an update is a metric of its name (``loss``, ``grad_norm``, ``lr``, ...) at the number of the update;
    those of a validation are ``validation/loss`` and so on. A skipped window is a 1 in ``skipped``; the tag ``skipped``
    has the last reason, and the artifact ``skipped.txt`` all of them. The start event becomes the run's parameters, its
    end the run's status. The global state of MLflow is left alone, so that runs of your own go on beside this one.

    Nothing goes over a network unless you name a server: the run is kept in ``mlflow.db`` in a folder, which
    ``mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`` shows.

    Args:
        folder: Where the database and the artifacts go.
        tracking_uri: A server or another store; None: what the variable MLFLOW_TRACKING_URI says, else the folder.
        experiment: Under which experiment the run is filed; it is made if need be.
        name: What the run is called; None: MLflow finds a name.
        run_id: A run of yours to write to instead. It stays open at the end.
        every_seconds: The longest time for which what was written may be in memory only. Unit: seconds.

    Raises:
        MissingExtraError: MLflow is not installed.
        SinkError: The store cannot be opened, or there is no such run.

    Example:
        >>> sink = MLflow("runs/first")  # doctest: +SKIP
        >>> sink.write({"event": "update", "number": 1, "loss": 2.5})  # doctest: +SKIP
        >>> sink.close()  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path = ".",
        *,
        tracking_uri: str | None = None,
        experiment: str = "wholebatch",
        name: str | None = None,
        run_id: str | None = None,
        every_seconds: float = 5.0,
    ) -> None:
        self.folder = Path(folder)
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or self._database()
        self._reader = Reader()
        self._status = "FINISHED"
        self._reasons: list[str] = []
        self._waiting: list[Any] = []
        self._every_seconds = every_seconds
        self._kept = time.monotonic()
        self._is_ours = run_id is None
        # It counts how it is used, over the network, unless told otherwise before its import.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        with _quiet():
            tracking = bring("mlflow.tracking", what="The MLflow sink", extra="mlflow")
            self._entities = bring("mlflow.entities", what="The MLflow sink", extra="mlflow")
            try:
                self._client: Any = tracking.MlflowClient(tracking_uri=self.uri)
                if run_id is None:
                    run = self._client.create_run(self._experiment(experiment), run_name=name)
                else:
                    run = self._client.get_run(run_id)
            except Exception as error:  # of many kinds, some of them those of a database or of a connection
                raise self._lost("The run of MLflow cannot be opened", error) from error
        self.run_id: str = run.info.run_id

    def write(self, event: Mapping[str, Any] | Update) -> None:
        """Log what an event says.

        Raises:
            SinkError: MLflow does not take it, or the sink is closed.
        """
        if self._client is None:
            raise SinkError("The MLflow sink is closed.", hint="write every event before close().")
        event = as_event(event)
        kind = event.get("event")
        said = self._reader.read(event) if kind != "start" else Reading(self._reader.update, {}, {})
        stamp = int(time.time() * 1000)
        self._waiting += [
            self._entities.Metric(name, number, stamp, said.update) for name, number in said.numbers.items()
        ]
        if "skipped" in said.words:
            self._reasons.append(f"update {said.update}: {said.words['skipped']}")
        if kind == "finish":
            self._status = _STATUS.get(str(event.get("status")), "FINISHED")
        try:
            if kind == "start":
                self._settings(event)
            tags = [self._entities.RunTag(name, word[:_LONGEST]) for name, word in said.words.items()]
            if tags:
                self._client.log_batch(self.run_id, tags=tags)
            if kind != "update" or time.monotonic() - self._kept >= self._every_seconds:
                self._keep()
        except Exception as error:  # of many kinds, some of them those of a database or of a connection
            raise self._lost(f"MLflow did not take a {kind} event", error) from error

    def close(self) -> None:
        """Log what is still in memory, and end the run, unless it is yours."""
        if self._client is None:
            return
        try:
            self._keep()
            if self._reasons:
                self._client.log_text(self.run_id, "\n".join(self._reasons) + "\n", "skipped.txt")
            if self._is_ours:
                self._client.set_terminated(self.run_id, self._status)
        except Exception as error:  # of many kinds, some of them those of a database or of a connection
            raise self._lost("The run of MLflow cannot be ended", error) from error
        finally:
            self._client = None

    def _keep(self) -> None:
        while self._waiting:
            self._client.log_batch(self.run_id, metrics=self._waiting[:_NUMBERS_AT_ONCE])
            del self._waiting[:_NUMBERS_AT_ONCE]
        self._kept = time.monotonic()

    def _settings(self, event: Mapping[str, Any]) -> None:
        settings = [
            self._entities.Param(name, str(value)[:_LONGEST])
            for name, value in settings_of(event).items()
            if str(value).strip()
        ]
        for first in range(0, len(settings), _SETTINGS_AT_ONCE):
            self._client.log_batch(self.run_id, params=settings[first : first + _SETTINGS_AT_ONCE])

    def _database(self) -> str:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._lost(f"The folder {self.folder} for MLflow cannot be made", error) from error
        return f"sqlite:///{self.folder.resolve() / 'mlflow.db'}"

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Beside the database; a server has its own place.
        place = (self.folder / "mlartifacts").resolve().as_uri() if self.uri == self._database() else None
        return str(self._client.create_experiment(name, artifact_location=place))

    def _lost(self, what: str, error: Exception) -> SinkError:
        return SinkError(
            f"{what}: {type(error).__name__}: {error}".rstrip(".") + ".",
            hint="without MLFLOW_TRACKING_URI the run is kept in a folder and needs no server; name one that you may "
            "write to and whose disk has space left.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what MLflow says while it sets up a database: nothing that its user could act on."""
    log = logging.getLogger("mlflow.store.db.utils")
    before = log.level
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        log.setLevel(logging.WARNING)
        try:
            yield
        finally:
            log.setLevel(before)
