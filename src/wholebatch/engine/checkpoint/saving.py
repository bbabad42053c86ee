"""How does a run get onto the disk and back, whole or not at all?"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wholebatch.core.errors import ConfigError, MissingExtraError, WholeBatchError
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.checkpoint.plain import put_together, taken_apart
from wholebatch.engine.checkpoint.state import require
from wholebatch.engine.memory import kind_in_a_line
from wholebatch.engine.randomness import RandomState
from wholebatch.engine.ranks.agreement import agreed
from wholebatch.engine.ranks.wire import Wire

_FORMAT = "wholebatch 1"
_NO_FILE = "look for the path that wb.save was given; over several ranks, as many as have saved take over."


def save(path: str | os.PathLike[str], accumulator: Accumulator, loader: Any = None, extra: Any = None) -> None:
    """Write everything that the next process needs, also in the middle of a window.

    Model, optimizers, schedules, loss scale, random streams, the number of the next update; and, in a loop of your own,
    the gradient, the losses and the targets of the window that is open. The file is written beside its place and moved
    there when it is on the disk: a process that is killed leaves the last one whole. Ranks call it together, and each
    writes a file of its own (``run.rank-0-of-2.safetensors``); these are moved when all of them are on the disk.

    Args:
        path: Of the file, in the format of safetensors.
        accumulator: Whose state is written. It may go on.
        loader: What yields the data and knows its position: anything with `state_dict` and `load_state_dict`, such as
            torchdata's StatefulDataLoader.
        extra: What else is to come back from `load`: dicts, lists, tuples, numbers, strings, tensors and arrays.

    Raises:
        ConfigError: Something in it could only be pickled, or the loader does not know its position; or the file cannot
            be written. What was there before is as it was.
        RankError: Another rank could not.
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
    save_file = _safetensors().torch.save_file
    wire = accumulator._setup.group.wire
    target = _own(_path(path), wire)
    beside = _beside(target)
    with agreed(wire):
        position = _position(loader)  # before the random state: a loader that has not begun may draw to begin
    kept = accumulator.state_dict()
    metadata = {"format": _FORMAT, "made": _name_of_this_save(wire)}
    try:
        with agreed(wire), _writing(target):
            text, tensors = taken_apart({"accumulator": kept, "loader": position, "extra": extra})
            save_file(tensors, beside, metadata={**metadata, "state": json.dumps(text)})
            _to_disk(beside)
    except BaseException:
        with suppress(OSError, ValueError):  # of a name that no file can have
            beside.unlink()
        raise
    with _writing(target):
        beside.replace(target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _to_disk(target.parent)


def load(path: str | os.PathLike[str], accumulator: Accumulator, loader: Any = None) -> Any:
    """Take over what `save` has written; the next update is the one that the other process would have made.

    On a CPU bit by bit, with the same micro-batches; with others up to rounding. A window that was open goes on with
    the next `accumulator.window()`. Ranks call it together, as many as have saved, and each with the same path.

    Args:
        path: Of the file.
        accumulator: Made as the one that was saved, of a model and optimizers of the same kind.
        loader: Takes over the position of the one that was saved.

    Returns:
        `extra`, as it was given to `save`.

    Raises:
        ConfigError: The file is not there or no such file, or model, optimizers, schedules or loader are not those that
            were saved. Nothing has changed.
        RankError: Another rank could not.
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
    wire = accumulator._setup.group.wire
    target = _own(_path(path), wire)
    if wire is not None:
        _settle(target, wire)
    with agreed(wire):
        state = _read(target)
        position = state["loader"]
        _require_a_loader_for(position, loader, target)
        require(accumulator._windows, accumulator._precision, state["accumulator"])
    with agreed(wire):
        if position is not None:
            _take_position(loader, position, accumulator._setup.device)
    accumulator.load_state_dict(state["accumulator"])
    return state["extra"]


def _path(said: str | os.PathLike[str]) -> Path:
    """The path of a file.

    Raises:
        ConfigError: It is none, or that of a folder or a device.
    """
    try:
        path = Path(said)
    except TypeError:
        raise ConfigError(
            f"The path is a {type(said).__name__}, not that of a file.", hint='pass one such as "run.safetensors".'
        ) from None
    if not path.name or path.is_dir():
        raise ConfigError(
            f"{str(said)!r} is a folder, and a run is kept in a file.",
            hint=f'name the file too, such as "{path / "run.safetensors"}".',
        )
    if path.is_block_device() or path.is_char_device() or path.is_fifo() or path.is_socket():
        raise ConfigError(
            f"{path} is no file of a disk, and a file that is moved there would replace it.",
            hint='pass a path such as "run.safetensors".',
        )
    return path


def _own(path: Path, wire: Wire | None) -> Path:
    """The file of this rank."""
    return path if wire is None else path.with_name(f"{path.stem}.rank-{wire.rank}-of-{wire.ranks}{path.suffix}")


def _beside(target: Path) -> Path:
    """Where a file is written: always in one place, so that what a killed process has left is written over."""
    return target.with_name(f".{target.name}.part")


def _name_of_this_save(wire: Wire | None) -> str:
    """A name for what all ranks write together; a later one is greater."""
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    return name if wire is None else str(wire.gather(name)[0])


def _settle(target: Path, wire: Wire) -> None:
    """Let every rank's file be the newest that all of them have: some may have been killed before they moved theirs.

    Raises:
        ConfigError: There is none that all have.
    """
    mine = {_made(file): file for file in (_beside(target), target) if _made(file)}
    common = set.intersection(*map(set, wire.gather(list(mine))))
    if not common:
        with agreed(wire):
            if not mine:
                raise ConfigError(f"There is no file {target}.", hint=_NO_FILE)
        raise ConfigError(
            f"{target} was not written together with those of the other ranks.",
            hint="give all ranks the same path, in a folder where each finds the file that it has written.",
        )
    newest = mine[max(common)]
    if newest != target:
        newest.replace(target)


def _made(file: Path) -> str:
    """When a file was made, as `_name_of_this_save` says it; empty where there is none, or none that is whole."""
    try:
        with _safetensors().safe_open(file, framework="pt") as opened:
            return str((opened.metadata() or {}).get("made", ""))
    except (OSError, _safetensors().SafetensorError):
        return ""


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except WholeBatchError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{target} cannot be written: {error}",
            hint="look at the folder, its rights and the space on its disk; a file that was there is as it was.",
        ) from error


def _require_a_loader_for(position: Any, loader: Any, path: Path) -> None:
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


def _require_accumulator(accumulator: Any) -> None:
    if not isinstance(accumulator, Accumulator):
        raise ConfigError(
            f"This is a {type(accumulator).__name__}, not a wb.Accumulator.",
            hint="pass the accumulator: wb.save(path, accumulator). It knows its model, optimizers and schedules.",
        )


def _take_position(loader: Any, position: Any, device: torch.device) -> None:
    """Let a loader go on from a position, and leave the random state as it is: what it draws to begin was drawn before.

    Asked for its state, a StatefulDataLoader begins at once, and not when the loop asks for the first batch.
    """
    random = RandomState.now(device)
    try:
        loader.load_state_dict(position)
        loader.state_dict()
    except Exception as error:
        raise ConfigError(
            f"The {type(loader).__name__} does not take over the position that was saved ({kind_in_a_line(error)}).",
            hint="make the loader as in the run that was saved, with the same data, sampler and number of workers; the "
            "accumulator is as before.",
        ) from error
    finally:
        random.restore()


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
        raise ConfigError(f"There is no file {path}.", hint=_NO_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = json.loads(metadata.get("state", "")) if metadata.get("format") == _FORMAT else None
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="it is not a file of wb.save, or damaged.") from error
    if metadata.get("format") != _FORMAT:
        raise ConfigError(
            f"{path} was not written by wb.save, or by another version of it.",
            hint="a file of weights alone is for the model: model.load_state_dict(safetensors.torch.load_file(path)).",
        )
    try:
        state: Mapping[str, Any] = put_together(text, tensors)
        return {name: state[name] for name in ("accumulator", "loader", "extra")}
    except Exception as error:
        raise ConfigError(
            f"{path} holds no state of a run ({kind_in_a_line(error)}).", hint="it is damaged: go on from another one."
        ) from error


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
