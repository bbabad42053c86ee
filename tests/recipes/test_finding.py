"""A recipe by name, in a file, in a module; and what is said when it is not there."""

import sys

import pytest

from wholebatch.core.errors import ConfigError
from wholebatch.recipes.finding import BUILT_IN, find_recipe

FUNCTIONS = """
def data(split):
    return [1, 2, 3]

def model():
    return None

def collate(rows):
    return rows

def loss(model, micro_batch):
    return len(micro_batch)
"""
INSTANCE = """
import beside

class Job:
    def __init__(self, start=0):
        self.start = start
    def data(self, split):
        return [self.start, beside.NUMBER]
    def model(self):
        return None
    def collate(self, rows):
        return rows
    def loss(self, model, micro_batch):
        return len(micro_batch)

class Demanding(Job):
    def __init__(self, start):
        super().__init__(start)

recipe = Job(start=5)
"""


@pytest.fixture(autouse=True)
def _leaves_no_import_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("wholebatch", "torch", "numpy")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plain.py").write_text(FUNCTIONS)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "mine.py").write_text(INSTANCE)
    (tmp_path / "jobs" / "beside.py").write_text("NUMBER = 7\n")
    return tmp_path


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_recipes_of_the_package_are_found(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert len(recipe.data("train")) > len(recipe.data("validation")) > 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("plain.py", [1, 2, 3]),
        ("./plain.py", [1, 2, 3]),
        ("jobs/mine.py:recipe", [5, 7]),
        ("jobs/mine.py:Job", [0, 7]),
    ],
)
def test_a_recipe_in_a_file_is_found_together_with_what_lies_beside_it(name, rows, folder):
    assert find_recipe(name).data("train") == rows


@pytest.mark.parametrize(("name", "rows"), [("plain:data_of", None), ("here.plain", [1, 2, 3])])
def test_a_recipe_in_a_module_of_the_current_folder_is_found(name, rows, folder):
    (folder / "here").mkdir()
    (folder / "here" / "__init__.py").touch()
    (folder / "here" / "plain.py").write_text(FUNCTIONS)
    if rows is None:
        with pytest.raises(ConfigError, match="plain has no `data_of`"):
            find_recipe(name)
    else:
        assert find_recipe(name).data("train") == rows


@pytest.mark.parametrize(
    ("name", "found", "hint"),
    [
        ("txt", "There is no recipe 'txt'", "did you mean 'text'?"),
        ("zebra", "There is no recipe 'zebra'", "text, images"),
        ("", "There is no recipe ''", "text, images"),
        ("two words", "There is no recipe 'two words'", "my_file.py:recipe"),
        ("plane.py:recipe", "There is no file plane.py", "did you mean plain.py?"),
        ("elsewhere/plain.py", "There is no file elsewhere/plain.py", "current folder"),
        ("nothing.here:recipe", "There is no module 'nothing'", "nothing/here.py:recipe"),
        ("jobs/mine.py:recipes", "jobs/mine.py has no `recipes`", "did you mean jobs/mine.py:recipe?"),
        ("jobs/mine.py:xyzzy", "jobs/mine.py has no `xyzzy`", "it has beside, Job, Demanding, recipe"),
        ("jobs/mine.py:Demanding", "cannot be called without arguments", "recipe = Demanding(...)"),
        ("jobs/mine.py", "has no `data`", "add a function data(split)"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest_that_is(name, found, hint, folder):
    with pytest.raises(ConfigError) as caught:
        find_recipe(name)
    assert found in caught.value.found
    assert hint in caught.value.hint


def test_a_toml_file_is_no_recipe(folder):
    (folder / "job.toml").touch()
    with pytest.raises(ConfigError, match="--config"):
        find_recipe("job.toml")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import math\n\nnumber = math.sqroot(2)\n", "broken.py, line 3: AttributeError"),
        ("x = 1\nif x\n    y = 2\n", "broken.py, line 2: SyntaxError"),
        ("\nimport not_installed_anywhere\n", "broken.py, line 2: ModuleNotFoundError"),
        ("def fail():\n    return 1 / 0\n\nfail()\n", "broken.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "broken.py, line 2: SystemExit"),
    ],
)
@pytest.mark.parametrize("name", ["{}/broken.py:recipe", "{}.broken:recipe"])
def test_a_file_that_cannot_be_imported_names_the_line(name, source, said, folder):
    package = f"package_{abs(hash((name, source)))}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / "broken.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        find_recipe(name.format(package))
    assert said.removeprefix("broken.py") in caught.value.found
    assert "broken" in caught.value.found
