"""The suite for other projects: ``pytest --wholebatch-adapter=my_module:adapter`` runs every scene on their system.

An adapter is a function that takes a task and returns what it trained, or a whole `System`. What it can be asked beyond
windows of micro-batches it says in ``adapter.expresses``, a set of the words of `Task.asks`; scenes that ask for more
are skipped. A refusal fails its test, unless an error is an honest answer in the scene, or ``adapter.refuses`` names
the scene.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from wholebatch.evidence.conformance.scenes import Scene
    from wholebatch.evidence.conformance.system import System


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("wholebatch", "conformance of gradient accumulation").addoption(
        "--wholebatch-adapter",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="run the scenes of wholebatch's conformance suite on this adapter; may be given several times",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each scene and adapter."""
    wanted: list[str] = config.getoption("--wholebatch-adapter")
    if not wanted:
        return
    try:
        from wholebatch.evidence.conformance.scenes import SCENES
    except ImportError as error:
        raise pytest.UsageError(f"--wholebatch-adapter: {error}.\nhint: pip install 'wholebatch[torch]'.") from error

    for where in wanted:
        system, refuses = _find(where, config)
        for scene in SCENES:
            items.append(  # noqa: PERF401 - the caller's list
                _SceneTest.from_parent(
                    session, name=f"{where}[{scene.name}]", system=system, scene=scene, refuses=refuses
                )
            )


def _find(where: str, config: pytest.Config) -> tuple[System, frozenset[str]]:
    from wholebatch.evidence.conformance.system import System

    folder = str(config.invocation_params.dir)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # and it stays there, for what the adapter imports when it is called
    module, _, name = where.partition(":")
    try:
        adapter = getattr(importlib.import_module(module), name or "adapter")
    except Exception as error:  # whatever the user's module raises
        raise _wrong(where, f"{type(error).__name__}: {error}", folder) from error
    if not isinstance(adapter, System) and not callable(adapter):
        raise _wrong(where, f"it is of type {type(adapter).__name__} and cannot be called", folder)
    refuses = frozenset(getattr(adapter, "refuses", ()))
    if isinstance(adapter, System):
        return adapter, refuses
    return System(where, where, adapter, frozenset(getattr(adapter, "expresses", ()))), refuses


def _wrong(where: str, found: str, folder: str) -> pytest.UsageError:
    return pytest.UsageError(
        f"--wholebatch-adapter={where}: {found}.\n"
        f"hint: name a function that can be imported from {folder}, as in my_module:adapter."
    )


class _NotConforming(Exception):  # noqa: N818 - the finding of a test
    pass


class _SceneTest(pytest.Item):
    """One scene on one system."""

    def __init__(self, *, system: System, scene: Scene, refuses: frozenset[str], **node: Any) -> None:
        super().__init__(**node)
        self._system, self._scene, self._refuses = system, scene, refuses

    def runtest(self) -> None:
        """Judge."""
        from wholebatch.evidence.conformance.judge import judge

        verdict = judge(self._system, self._scene)
        if verdict.outcome == "not expressible":
            pytest.skip(verdict.why)
        if verdict.outcome == "refuses" and (self._scene.refusal_will_do or self._scene.name in self._refuses):
            pytest.skip(f"refuses, as it may: {verdict.why}")
        if verdict.outcome != "pass":
            raise _NotConforming(f"{verdict.outcome}: {verdict.why}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return what is wrong, without a traceback into the suite."""
        if isinstance(excinfo.value, _NotConforming):
            hint = (
                f"\nhint: if a refusal is meant here, say so: adapter.refuses = {{{self._scene.name!r}}}."
                if str(excinfo.value).startswith("refuses")
                else ""
            )
            return f"{self._scene.name}: {self._scene.right}.\n{excinfo.value}{hint}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Return where this stands, and its name."""
        return "wholebatch conformance", None, self.name
