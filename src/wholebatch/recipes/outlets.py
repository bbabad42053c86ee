"""Where in a run folder does each sink write that can be named in a configuration?"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from wholebatch.core.errors import MissingExtraError
from wholebatch.evidence.sinks import MLflow, Sink, TensorBoard, WeightsAndBiases


def require(names: Iterable[str]) -> None:
    """Look whether what sinks write with is installed, before a run begins and an earlier one is replaced.

    Args:
        names: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``: each the name of the sink, of its package and of its extra.

    Raises:
        MissingExtraError: One is not.

    Example:
        >>> require(["no_such_sink"])
        Traceback (most recent call last):
        wholebatch.core.errors.MissingExtraError: The sink no_such_sink needs a package of that name, which is not
        installed.
        <BLANKLINE>
        hint: pip install 'wholebatch[no_such_sink]'
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(
                f"The sink {name} needs a package of that name, which is not installed.",
                hint=f"pip install 'wholebatch[{name}]'",
            )


def open_sink(name: str, folder: Path) -> Sink:
    """Return a sink that writes inside a run folder, and replaces there what would be shown of an earlier run.

    Args:
        name: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.
        folder: Of the run; the run is called like it.

    Raises:
        SinkError: It cannot be opened.
    """
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", from_update=0)
    if name == "wandb":
        return WeightsAndBiases(folder, name=folder.name)
    return MLflow(folder, name=folder.name)
