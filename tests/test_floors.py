"""Imports point down only: cli and recipes, then integrations and evidence, then engine, then core."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "wholebatch"

# Who may import which room. `face` is the package's own `__init__`, which says where each public name lives.
MAY_IMPORT: dict[str, set[str]] = {
    "core": {"core"},
    "engine": {"engine", "core"},
    "evidence": {"evidence", "engine", "core"},
    "integrations": {"integrations", "engine", "core"},
    "recipes": {"recipes", "integrations", "evidence", "engine", "core", "face"},
    "cli": {"cli", "recipes", "integrations", "evidence", "engine", "core", "face"},
    "__main__": {"cli"},
    "face": {"integrations", "evidence", "engine", "core"},
}
# What a room may import from outside the standard library, where that is limited.
THIRD_PARTY: dict[str, set[str]] = {"core": set(), "engine": {"torch", "safetensors"}, "face": set(), "__main__": set()}
# Modules with a narrower rule than their room.
SELF_CONTAINED = {"evidence/reference.py"}
# Names that say nothing about the question that a file answers.
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the absolute dotted name of each import of a module, wherever in the file it stands."""
    here = ["wholebatch", *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = here[: len(here) - level + 1] if level else []
                origin = ".".join([*above, *([module] if module else [])])
                if origin == "wholebatch":
                    yield from ((node.lineno, f"wholebatch.{alias.name}") for alias in names)
                else:
                    yield node.lineno, origin
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in {"import_module", "__import__"}:
                    yield node.lineno, target


def violations(package: Path) -> list[str]:
    """Return a sentence for each import that points up or sideways, and for each file whose name says nothing."""
    rooms = {path.name for path in package.iterdir() if path.is_dir()} | {"cli"}
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        room = "face" if file == "__init__.py" else Path(file).parts[0].removesuffix(".py")
        if room not in MAY_IMPORT:
            found.append(f"{file}: no rule for the room {room}")
            continue
        if not path.with_name("__init__.py").is_file():
            found.append(f"{file}: its folder has no __init__.py, so tools do not see a package")
        if EMPTY_NAMES & {Path(part).stem for part in Path(file).parts}:
            found.append(f"{file}: the name does not say which question it answers")
        for line, name in imports(path, package):
            top, *rest = name.split(".")
            if top == "wholebatch":
                target = rest[0] if rest and rest[0] in rooms else "face"
                if target not in MAY_IMPORT[room] or file in SELF_CONTAINED:
                    found.append(f"{file}:{line}: {room} imports {name}")
            elif room in THIRD_PARTY and top not in sys.stdlib_module_names | THIRD_PARTY[room]:
                found.append(f"{file}:{line}: {room} imports {top}")
    return found


def test_imports_point_down_only():
    assert violations(PACKAGE) == []


def test_the_rule_is_about_this_package():
    """A rule that reads no file, or only files without imports, would always hold."""
    crossings = {
        (path.relative_to(PACKAGE).parts[0], name.split(".")[1])
        for path in PACKAGE.rglob("*.py")
        for _, name in imports(path, PACKAGE)
        if name.startswith("wholebatch.")
    }
    assert ("engine", "core") in crossings


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("core/window.py", "import torch", "core/window.py:1: core imports torch"),
        ("core/window.py", "from wholebatch.engine import sync", "core imports wholebatch.engine"),
        ("core/window.py", "from wholebatch import engine", "core imports wholebatch.engine"),
        ("core/window.py", "from ..engine.sync import ranks", "core imports wholebatch.engine.sync"),
        ("core/window.py", "from .. import engine", "core imports wholebatch.engine"),
        ("core/window.py", "import wholebatch as wb", "core imports wholebatch"),
        ("core/window.py", "def late():\n    from rich import print", "core/window.py:2: core imports rich"),
        ("core/window.py", "import importlib\nimportlib.import_module('torch')", "core imports torch"),
        ("engine/sync.py", "import numpy", "engine imports numpy"),
        ("engine/sync.py", "from wholebatch.evidence.verify import verify", "engine imports wholebatch.evidence"),
        ("evidence/report.py", "import wholebatch.integrations.keras", "evidence imports wholebatch.integrations"),
        ("evidence/report.py", "from wholebatch.recipes import text", "evidence imports wholebatch.recipes"),
        ("evidence/reference.py", "from wholebatch.core import errors", "evidence imports wholebatch.core"),
        ("integrations/keras.py", "from wholebatch.evidence import verify", "integrations imports wholebatch.evidence"),
        ("recipes/text.py", "from wholebatch.cli import app", "recipes imports wholebatch.cli"),
        ("__init__.py", "import torch", "face imports torch"),
        ("__init__.py", "from wholebatch.cli import app", "face imports wholebatch.cli"),
        ("core/utils.py", "", "core/utils.py: the name does not say"),
        ("core/common/__init__.py", "", "core/common/__init__.py: the name does not say"),
        ("core/cutting/split.py", "", "core/cutting/split.py: its folder has no __init__.py"),
        ("attic/old.py", "", "no rule for the room attic"),
    ],
)
def test_the_rule_sees_a_planted_violation(tmp_path, file, source, said):
    house = {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from wholebatch.engine import sync",
        "cli.py": "import typer\nimport wholebatch as wb\nfrom wholebatch.recipes import text",
        "core/__init__.py": "",
        "core/window.py": "import math",
        "engine/__init__.py": "",
        "engine/sync.py": "import torch\nfrom wholebatch.core import window",
        "evidence/__init__.py": "",
        "evidence/reference.py": "import torch",
        "evidence/report.py": "import matplotlib\nfrom wholebatch.engine import sync",
        "integrations/__init__.py": "",
        "integrations/keras.py": "import keras\nfrom ..engine import sync",
        "recipes/__init__.py": "",
        "recipes/text.py": "from wholebatch.evidence import report",
    }
    write(tmp_path, house)
    assert violations(tmp_path) == []
    write(tmp_path, {file: source})
    (sentence,) = violations(tmp_path)
    assert said in sentence


def write(package: Path, files: dict[str, str]) -> None:
    for file, source in files.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(source, encoding="utf-8")
