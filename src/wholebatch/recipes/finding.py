"""Where is the recipe? By the name of one that comes with the package, in a file, or on the import path."""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from wholebatch.core.errors import ConfigError, MissingExtraError
from wholebatch.recipes.protocol import Recipe

BUILT_IN: dict[str, str] = {
    "text": "a byte-level transformer on the paragraphs of a novel, whose lengths vary strongly",
    "images": "a small convolutional network on 2,000 pictures of clothes",
    "pairs": "two encoders that find the body of a function by its docstring, among all rows of the logical batch",
}
"""The recipes that come with the package, and what each trains."""

_HOW = "name one that comes with the package ({}), a file (my_file.py:recipe) or a module (package.module:recipe)."


def find_recipe(name: str) -> Recipe:
    """Return the recipe that a name stands for.

    Args:
        name: ``"text"`` or another of `BUILT_IN`; ``"my_file.py:recipe"``, or ``"my_file.py"`` if the functions stand
            in the file itself; ``"package.module:recipe"`` or ``"package.module"``. A class is called without
            arguments.

    Returns:
        The recipe, looked at.

    Raises:
        ConfigError: There is no such recipe, its file cannot be imported, or it lacks one of the four functions.
        MissingExtraError: The recipe needs PyTorch, which is not installed.

    Example:
        >>> find_recipe("text").length(b"seven..")
        7
    """
    if name in BUILT_IN:
        return Recipe.of(_built_in(name), name)
    in_file = re.fullmatch(r"(?P<file>.+\.py)(?::(?P<attribute>[^:/\\]+))?", name)
    if in_file is not None:
        module = _import_file(Path(in_file["file"]))
        attribute = in_file["attribute"]
    else:
        where, _, attribute = name.partition(":")
        is_module = all(part.isidentifier() for part in where.split("."))
        if not is_module or ("." not in where and not attribute) or Path(name).is_file():
            raise _unknown(name)
        module = _import_module(where)
    return Recipe.of(_attribute(module, attribute, name) if attribute else module, name)


def _built_in(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"wholebatch.recipes.{name}")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in ("torch", "numpy"):
            raise
        raise MissingExtraError(
            f"The recipe {name} needs PyTorch, and {missing.name} is not installed.",
            hint="pip install 'wholebatch[torch]'",
        ) from None


def _unknown(name: str) -> ConfigError:
    if Path(name).is_file():
        return ConfigError(
            f"{name} is a file, but not a Python file.", hint="a recipe is Python; a TOML file goes to --config."
        )
    nearest = difflib.get_close_matches(name, BUILT_IN, n=1)
    return ConfigError(
        f"There is no recipe {name!r}.",
        hint=(f"did you mean {nearest[0]!r}? Otherwise " if nearest else "") + _HOW.format(", ".join(BUILT_IN)),
    )


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, siblings, n=1)
        raise ConfigError(
            f"There is no file {path}.",
            hint=f"did you mean {path.with_name(nearest[0])}?"
            if nearest
            else f"paths are taken from the current folder, {Path.cwd()}.",
        )
    name = f"_wholebatch_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None  # a path that ends in .py always has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    _look_in(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(str(path), error, path.resolve()) from error
    return module


def _import_module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"There is no module {error.name!r} to import.",
                hint=f"run from the folder that holds it (this is {Path.cwd()}), install it, or name the file: "
                f"{name.replace('.', '/')}.py:recipe.",
            ) from error
        spec = importlib.util.find_spec(name) if "." not in name or name.rpartition(".")[0] in sys.modules else None
        raise _broken(name, error, Path(spec.origin) if spec is not None and spec.origin else None) from error


def _look_in(folder: Path) -> None:
    """Let a recipe import what lies beside it, as a script may."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _broken(said: str, error: BaseException, file: Path | None) -> ConfigError:
    """Return what went wrong in importing a file, with the line in that file."""
    line = None
    if isinstance(error, SyntaxError) and file is not None and error.filename == str(file):
        line = error.lineno
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = frames[-1].lineno if frames else None
    where = f"{said}, line {line}" if line is not None else said
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    return ConfigError(
        f"{where}: {type(error).__name__}: {what}",
        hint="mend that line; --debug shows the whole traceback."
        if not isinstance(error, SystemExit)
        else 'put what a script does under if __name__ == "__main__":, so that the file can be imported.',
    )


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    if not hasattr(module, attribute):
        there = [each for each in vars(module) if not each.startswith("_")]
        nearest = difflib.get_close_matches(attribute, there, n=1)
        where = name.removesuffix(f":{attribute}")
        raise ConfigError(
            f"{where} has no `{attribute}`.",
            hint=f"did you mean {where}:{nearest[0]}?"
            if nearest
            else f"it has {', '.join(there) or 'nothing'}; without a name ({where}) the file itself is the recipe.",
        )
    thing = getattr(module, attribute)
    if not inspect.isclass(thing):
        return thing
    try:
        return thing()
    except Exception as error:
        raise ConfigError(
            f"The class {name} cannot be called without arguments: {type(error).__name__}: {error}",
            hint=f"give its __init__ defaults, or make an instance in the file: recipe = {attribute}(...).",
        ) from error
