"""Which line is to be changed? Places in the user's own source, found in what ran and in how it is written."""

import ast
import inspect
import linecache
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file.

    Example:
        >>> print(Place("train.py", 23, "optimizer.step()"))
        train.py:23: optimizer.step()
    """

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        file = os.path.relpath(self.file) if Path(self.file).is_relative_to(Path.cwd()) else self.file
        return f"{file}:{self.line}: {self.text}".removesuffix(": ")

    @classmethod
    def at(cls, file: str, line: int) -> "Place":
        """Return a line with what stands there."""
        return cls(file, line, linecache.getline(file, line).strip())


_OTHERS = tuple(
    str(Path(folder)) + os.sep
    for folder in {
        Path(torch.__file__).parent,
        Path(__file__).parents[2],
        *(Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib", "platlib")),
    }
)


def is_users(file: str) -> bool:
    """Whether a file is neither of this package nor installed nor of the standard library."""
    return not file.startswith((*_OTHERS, "<frozen", "<__array"))


def definition(function: Any) -> Place | None:
    """Return where a function is defined, or the class of an object that is called; None where nobody knows."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return Place.at(code.co_filename, code.co_firstlineno) if code is not None else None


def body(function: Any) -> Iterator[tuple[str, ast.AST]]:
    """Yield the file and the syntax tree of a function; nothing where its source cannot be read."""
    place = definition(function)
    if place is not None:
        yield from _around(place)


def division_before(backward: Place | None, fallback: Place | None) -> Place | None:
    """Return the line on which a loop divides, given the one with its backward pass.

    Args:
        backward: Where the gradient was added.
        fallback: What to return where nothing is known of that.
    """
    if backward is None:
        return fallback
    for file, function in _around(backward):
        lines = sorted({node.lineno for node in ast.walk(function) if _divides(node)})  # type: ignore[attr-defined]
        before = [line for line in lines if line <= backward.line]
        if lines:
            return Place.at(file, before[-1] if before else lines[0])
    return backward


def first_call(names: Iterable[str], functions: Iterable[Any], *, whole_file: bool = True) -> Place | None:
    """Return the first line in the source of some functions, then in their files, that calls one of these names.

    Args:
        names: Such as ``"BatchNorm1d"``; a call of ``torch.nn.BatchNorm1d`` counts.
        functions: Functions, classes or objects.
        whole_file: Whether to look through their files as well.
    """
    wanted = set(names)

    def matches(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and _last_name(node.func) in wanted

    return _first(matches, functions, whole_file=whole_file)


def first_call_at_work(names: Iterable[str], functions: Iterable[Any]) -> Place | None:
    """Return the first line that calls one of these names when functions run, not when their model is made.

    Args:
        names: Such as ``"rand"``.
        functions: Functions, classes or objects; also looked through is what they call by name in their own files.
    """
    wanted = set(names)
    running = [(file, node) for function in functions for file, tree in _source(function) for node in _at_work(tree)]
    called = {_last_name(node.func) for _, node in running if isinstance(node, ast.Call)}
    helpers = [
        (file, node)
        for file in dict.fromkeys(file for file, _ in running)
        for function in ast.walk(_parse(file))
        if isinstance(function, ast.FunctionDef) and function.name in called
        for node in _at_work(function)
    ]
    for file, node in [*running, *helpers]:
        if isinstance(node, ast.Call) and _last_name(node.func) in wanted:
            return Place.at(file, node.lineno)
    return None


def _at_work(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes in the order of their lines, without those of methods that make a model."""
    for child in ast.iter_child_nodes(tree):
        named = isinstance(child, ast.FunctionDef) and ("init" in child.name or child.name.startswith("reset"))
        if not named:
            yield child
            yield from _at_work(child)


def first_word(words: Iterable[str], functions: Iterable[Any]) -> Place | None:
    """Return the first line in the source of some functions with a name that holds one of these words."""
    wanted = tuple(words)

    def matches(node: ast.AST) -> bool:
        name = _last_name(node) if isinstance(node, ast.Name | ast.Attribute) else None
        return name is not None and any(word in name.lower() for word in wanted)

    return _first(matches, functions, whole_file=False)


def _first(matches: Callable[[ast.AST], bool], functions: Iterable[Any], *, whole_file: bool = True) -> Place | None:
    files = []
    for function in functions:
        for file, tree in _source(function):
            files.append(file)
            lines = [node.lineno for node in ast.walk(tree) if matches(node)]  # type: ignore[attr-defined]
            if lines:
                return Place.at(file, min(lines))
    for file in dict.fromkeys(files) if whole_file else []:
        lines = [node.lineno for node in ast.walk(_parse(file)) if matches(node)]  # type: ignore[attr-defined]
        if lines:
            return Place.at(file, min(lines))
    return None


def _source(thing: Any) -> Iterator[tuple[str, ast.AST]]:
    """The file and the tree of a function, or of the class of anything else."""
    if inspect.isfunction(thing) or inspect.ismethod(thing) or isinstance(thing, partial):
        yield from body(thing)
        return
    kind = thing if inspect.isclass(thing) else type(thing)
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not is_users(file):
        return
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            yield file, node


def _around(place: Place) -> Iterator[tuple[str, ast.AST]]:
    """The innermost function that holds a line."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    holding = [
        node
        for node in ast.walk(_parse(place.file))
        if isinstance(node, kinds) and _start(node) <= place.line <= (node.end_lineno or node.lineno)
    ]
    if holding:
        yield place.file, max(holding, key=lambda node: (node.lineno, -(node.end_lineno or 0)))


def _start(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    first: int = node.lineno  # type: ignore[attr-defined]
    return min([first, *(int(each.lineno) for each in decorators)])


def _parse(file: str) -> ast.AST:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # a cell of a notebook with magic lines, say
        return ast.Module([], [])


def _divides(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return isinstance(node.op, ast.Div)
    return isinstance(node, ast.Call) and _last_name(node.func) in ("div", "div_", "true_divide", "mean")


def _last_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
