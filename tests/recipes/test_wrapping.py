"""In what a job wraps its model; on several processes it is tried in test_cli_ranks.py."""

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wholebatch.core.errors import ConfigError
from wholebatch.recipes.protocol import Recipe
from wholebatch.recipes.wrapping import Wrapped, _layers


def recipe_of(loss):
    return Recipe(name="mine", data=list, model=nn.Module, collate=list, loss=loss)


def hiding():
    """A wrapper as a loss sees it, without the ranks that a real one speaks to."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(1, 1)
    return wrapper


def test_what_the_wrapper_hides_is_named():
    wrapped = Wrapped(nn.Linear(1, 1), recipe_of(lambda model, _: model.weight.sum()), "none", "once", ranks=1)
    with pytest.raises(ConfigError, match="The loss of mine asks the model for `weight`") as caught:
        wrapped.loss(hiding(), None)
    assert "getattr(model, 'module', model).weight" in caught.value.hint


def test_other_mistakes_of_a_loss_are_its_own():
    wrapped = Wrapped(nn.Linear(1, 1), recipe_of(lambda model, _: model.module.wait), "none", "once", ranks=1)
    with pytest.raises(AttributeError, match="wait"):
        wrapped.loss(hiding(), None)


@pytest.mark.parametrize("wrapper", ["none", "ddp", "fsdp2"])
def test_one_process_wraps_nothing(wrapper, caplog):
    model = nn.Linear(1, 1)
    caplog.set_level("INFO", "wholebatch")
    wrapped = Wrapped(model, recipe_of(lambda *_: None), wrapper, "once", ranks=1)
    with wrapped.whole():
        assert wrapped.plain is wrapped.trained is wrapped.apart(nn.Module) is model
    assert ("left out" in caplog.text) is (wrapper != "none")


def test_passes_that_gather_weights_need_weights_that_are_spread():
    with pytest.raises(ConfigError, match=r"communication='each'[\s\S]*wrapper='fsdp2'"):
        Wrapped(nn.Linear(1, 1), recipe_of(lambda *_: None), "ddp", "each", ranks=1)


def test_layers_are_the_items_of_lists_outside_of_each_other():
    inner = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    model = nn.ModuleDict({"layers": nn.ModuleList([inner, nn.Tanh()]), "head": nn.Linear(1, 1)})
    assert _layers(model) == [inner]
    assert _layers(inner) == [inner[0]]
    assert _layers(nn.ModuleDict({"all": inner})) == [inner[0]]
