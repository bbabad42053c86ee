"""How does a run get onto the disk and back, whole or not at all?"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wholebatch.core.errors import ConfigError, MissingExtraError
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.checkpoint.plain import put_together, taken_apart

_FORMAT = "wholebatch 1"


def save(path: str | os.PathLike[str], accumulator: Accumulator, loader: Any = None, extra: Any = None) -> None:
    """Write everything that the next process needs, also in the middle of a window.

    Model, optimizers, schedules, loss scale, random streams, the number of the next update; and, in a loop of your own,
    the gradient, the losses and the targets of the window that is open. The file is written beside its place and moved
    there when it is on the disk: a process that is killed leaves the last one whole.

    Args:
        path: Of the file, in the format of safetensors.
        accumulator: Whose state is written. It may go on.
        loader: What yields the data and knows its position: anything with `state_dict` and `load_state_dict`, such as
            torchdata's StatefulDataLoader.
        extra: What else is to come back from `load`: dicts, lists, tuples, numbers, strings, tensors and arrays.

    Raises:
        ConfigError: Something in it could only be pickled, the loader does not know its position, or there are several
            ranks; or the file cannot be written. What was there before is as it was.
        WindowError: `accumulator.step` or a backward pass is under way.
        MissingExtraError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import wholebatch as wb
        >>> def run():
        ...     model = torch.nn.Linear(2, 1)
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     return model, wb.Accumulator(model, optimizer)
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> model, accumulator = run()
        >>> window = accumulator.window()
        >>> window.backward(model(torch.ones(3, 2)).mean(), targets=3)
        >>> wb.save(path, accumulator, extra={"rows seen": 3})
        >>> window.rollback()
        >>> model, accumulator = run()  # in another process
        >>> wb.load(path, accumulator)
        {'rows seen': 3}
        >>> with accumulator.window() as window:
        ...     window.backward(model(torch.ones(1, 2)).mean(), targets=1)
        >>> window.update.targets, window.update.micro_batches
        (4, 2)
    """
    _require_accumulator(accumulator)
    state = {"accumulator": accumulator.state_dict(), "loader": _position(loader), "extra": extra}
    text, tensors = taken_apart(state)
    save_file = _safetensors().torch.save_file
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")  # one name: what a killed process left is written over
    try:
        save_file(tensors, beside, metadata={"format": _FORMAT, "state": json.dumps(text)})
        _to_disk(beside)
        beside.replace(target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _to_disk(target.parent)
    except Exception as error:
        raise ConfigError(
            f"{target} cannot be written: {error}",
            hint="look at the folder, its rights and the space on its disk; a file that was there is as it was.",
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], accumulator: Accumulator, loader: Any = None) -> Any:
    """Take over what `save` has written; the next update is the one that the other process would have made.

    On a CPU bit by bit, with the same micro-batches; with others up to rounding. A window that was open goes on with
    the next `accumulator.window()`.

    Args:
        path: Of the file.
        accumulator: Made as the one that was saved, of a model and optimizers of the same kind.
        loader: Takes over the position of the one that was saved.

    Returns:
        `extra`, as it was given to `save`.

    Raises:
        ConfigError: The file is not there or no such file, or model, optimizers, schedules or loader are not those that
            were saved. Nothing has changed.
        WindowError: A window is open.
        MissingExtraError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import wholebatch as wb
        >>> model = torch.nn.Linear(2, 1)
        >>> accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> wb.save(path, accumulator, extra=["epoch", 3])
        >>> wb.load(path, accumulator)
        ['epoch', 3]
    """
    _require_accumulator(accumulator)
    state = _read(Path(path))
    position = state["loader"]
    if position is not None and not hasattr(loader, "load_state_dict"):
        raise ConfigError(
            f"{path} holds the position of a loader, and "
            + ("no loader was given." if loader is None else f"a {type(loader).__name__} cannot take it over."),
            hint="pass the loader: wb.load(path, accumulator, loader), with one that has load_state_dict.",
        )
    if position is None and loader is not None:
        raise ConfigError(
            f"{path} holds no position of a loader.", hint="hand the loader to wb.save too, or leave it out here."
        )
    accumulator.load_state_dict(state["accumulator"])
    if position is not None:
        loader.load_state_dict(position)
    return state["extra"]


def _require_accumulator(accumulator: Any) -> None:
    if not isinstance(accumulator, Accumulator):
        raise ConfigError(
            f"This is a {type(accumulator).__name__}, not a wb.Accumulator.",
            hint="pass the accumulator: wb.save(path, accumulator). It knows its model, optimizers and schedules.",
        )


def _position(loader: Any) -> Any:
    if loader is None:
        return None
    if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
        raise ConfigError(
            f"A {type(loader).__name__} does not know how far it has come: it has no state_dict.",
            hint="use torchdata.stateful_dataloader.StatefulDataLoader in its place, or leave loader out and keep the "
            "position in extra.",
        )
    return loader.state_dict()


def _read(path: Path) -> Mapping[str, Any]:
    safe_open = _safetensors().safe_open
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.", hint="look for the path that wb.save was given.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="it is not a file of wb.save, or damaged.") from error
    if metadata.get("format") != _FORMAT:
        raise ConfigError(
            f"{path} was not written by wb.save, or by another version of it.",
            hint="a file of weights alone is for the model: model.load_state_dict(safetensors.torch.load_file(path)).",
        )
    state: Mapping[str, Any] = put_together(json.loads(metadata["state"]), tensors)
    return state


def _to_disk(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as missing:
        if missing.name != "safetensors":
            raise
        raise MissingExtraError(
            "wb.save and wb.load need safetensors, which is not installed.", hint="pip install 'wholebatch[torch]'"
        ) from None
    return safetensors
