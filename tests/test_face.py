"""The public face: its names agree with each other, are documented, and cost nothing until they are used."""

import importlib.metadata
import inspect
import json
import subprocess
import sys

import pytest

import wholebatch as wb

HEAVY = {"torch", "numpy", "typer", "click", "pydantic", "rich", "matplotlib"}
WITHOUT_TORCH = """
import importlib.abc, json, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
import wholebatch as wb
from wholebatch.core.errors import MissingExtraError

answers = {}
for name in wb.__all__:
    try:
        getattr(wb, name)
        answers[name] = "there"
    except MissingExtraError as error:
        answers[name] = str(error)
assert sorted(set(wb.__all__) - set(dir(wb))) == []
print(json.dumps(answers))
"""


def fresh(source: str) -> str:
    """Return what a fresh interpreter prints; its complaint, if any, is part of the failure."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(source: str) -> set[str]:
    printed = fresh(f"{source}\nimport json, sys; print(json.dumps(sorted(sys.modules)))")
    return set(json.loads(printed.splitlines()[-1]))


def test_every_public_name_resolves_and_is_listed():
    assert len(wb.__all__) == len(set(wb.__all__))
    assert [name for name in wb.__all__ if not hasattr(wb, name)] == []
    assert sorted(set(wb.__all__) - set(dir(wb))) == []


def test_a_star_import_brings_the_public_names():
    namespace: dict[str, object] = {}
    exec("from wholebatch import *", namespace)
    assert set(wb.__all__) <= set(namespace)


def test_the_contract_is_there():
    """The names that the design promises for what exists now."""
    promised = {"Accumulator", "Rows", "Tokens", "Update", "verify", "convert_batch_norm", "freeze_batch_norm", "sinks"}
    promised |= {"gather", "sum_over_batch", "exact_batch_norm", "losses", "plan", "Plan", "save", "load"}
    assert promised <= set(wb.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Acumulator"):
        _ = wb.Acumulator
    with pytest.raises(ImportError):
        exec("from wholebatch import Acumulator")


def test_the_version_is_that_of_the_distribution():
    assert wb.__version__ == importlib.metadata.version("wholebatch")


def is_documented_callable(name: str) -> bool:
    thing = getattr(wb, name)
    is_error = inspect.isclass(thing) and issubclass(thing, BaseException)
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and not is_error


@pytest.mark.parametrize("name", [name for name in wb.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring(name):
    assert (inspect.getdoc(getattr(wb, name)) or "").strip()


@pytest.mark.parametrize("name", [name for name in wb.__all__ if is_documented_callable(name)])
def test_every_public_class_and_function_has_an_example(name):
    doc = inspect.getdoc(getattr(wb, name)) or ""
    assert "Example:" in doc
    assert ">>> " in doc.partition("Example:")[2]


def test_the_import_loads_no_framework():
    assert modules_after("import wholebatch") & HEAVY == set()


def test_the_look_at_the_import_sees_a_framework():
    """Beside the test above: the same look finds a name that does need torch."""
    assert "torch" in modules_after("import wholebatch; wholebatch.Accumulator")


def test_the_help_of_the_command_loads_no_framework():
    source = """
import sys
sys.argv = ["wholebatch", "--help"]
from wholebatch.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert modules_after(source) & {"torch", "numpy", "pydantic", "matplotlib"} == set()


def test_a_missing_extra_says_which_install_brings_it():
    answers = json.loads(fresh(WITHOUT_TORCH))
    assert {name for name, said in answers.items() if said == "there"} >= {"Update", "Rows", "Tokens"}
    missing = {name: said for name, said in answers.items() if said != "there"}
    assert set(missing) >= {"Accumulator", "verify", "convert_batch_norm", "freeze_batch_norm"}
    for name, said in missing.items():
        assert name in said
        assert "hint:" in said
        assert "pip install 'wholebatch[torch]'" in said
