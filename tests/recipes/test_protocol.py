"""What is taken for a recipe, and what is said of one that lacks something."""

import types

import pytest
from tiny import Tiny, without

from wholebatch.core.errors import ConfigError
from wholebatch.recipes.protocol import FUNCTIONS, Recipe


def namespace(**changes):
    tiny = Tiny()
    functions = {name: getattr(tiny, name) for name in FUNCTIONS}
    return types.SimpleNamespace(**functions | changes)


def module():
    made = types.ModuleType("made")
    vars(made).update(vars(namespace()))
    return made


def takes_nothing():
    """A function of another form than the protocol's."""


def takes_one(width):
    """Another one."""


@pytest.mark.parametrize("thing", [Tiny(), namespace(), module()], ids=["instance", "namespace", "module"])
def test_whatever_has_the_four_functions_is_a_recipe(thing):
    recipe = Recipe.of(thing, "mine")
    assert recipe.name == "mine"
    assert len(recipe.data("train")) > 0
    assert recipe.reduction == "mean"


def test_what_is_left_out_has_a_value():
    recipe = Recipe.of(namespace(), "mine")
    assert (recipe.targets, recipe.length, recipe.optimizer, recipe.measure) == (None, None, None, None)
    assert recipe.defaults == {}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_missing_function_is_named(name):
    with pytest.raises(ConfigError, match=f"The recipe mine has no `{name}`") as caught:
        Recipe.of(without(Tiny(), name), "mine")
    assert f"{name}({', '.join(FUNCTIONS[name])})" in caught.value.hint


def test_a_misspelt_function_is_recognised():
    misspelt = namespace(colate=list)
    del misspelt.collate
    with pytest.raises(ConfigError, match="rename `colate` to `collate`"):
        Recipe.of(misspelt, "mine")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 3.0}, r"`loss` of mine is a float, which cannot be called"),
        ({"length": 7}, r"`length` of mine is a int, which cannot be called"),
        ({"data": takes_nothing}, r"`data` of mine cannot be called as data\(split\): too many positional"),
        ({"loss": takes_one}, r"cannot be called as loss\(model, micro_batch\)"),
        ({"measure": takes_one}, r"cannot be called as measure\(model, rows\)"),
        ({"model": takes_one}, r"cannot be called as model\(\): missing a required argument: 'width'"),
        ({"defaults": "epochs = 3"}, r"`defaults` of mine is a str, not a dict"),
        ({"reduction": "average"}, r"In mine: reduction='average'"),
    ],
)
def test_what_cannot_be_used_is_said(changes, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.of(namespace(**changes), "mine")


def test_a_function_with_more_arguments_that_have_defaults_will_do():
    Recipe.of(namespace(model=lambda width=8: width, collate=lambda *rows: rows), "mine")
