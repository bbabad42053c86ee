"""What is said where a framework is not installed: the line that brings it, and in no way a bare import error."""

import json
import subprocess
import sys

import pytest

WITHOUT = """
import importlib, importlib.abc, json, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {without}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
from wholebatch.core.errors import MissingExtraError
try:
    importlib.import_module("wholebatch.integrations.{page}")
except MissingExtraError as error:
    print(json.dumps([error.found, error.hint]))
"""


@pytest.mark.parametrize(
    ("page", "without"),
    [
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("accelerate", ["accelerate"]),
        ("transformers", ["transformers"]),
    ],
)
def test_a_framework_that_is_not_installed_is_named_with_its_install_line(page, without):
    source = WITHOUT.format(page=page, without=without)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    found, hint = json.loads(done.stdout)
    assert f"wholebatch.integrations.{page} needs" in found
    assert hint == f"pip install 'wholebatch[{page}]'"
