"""In what a job wraps its model; on several processes it is tried in test_cli_ranks.py."""

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wholebatch.core.errors import ConfigError
from wholebatch.recipes.protocol import Recipe
from wholebatch.recipes.wrapping import Wrapped


def recipe_of(loss):
    return Recipe(name="mine", data=list, model=nn.Module, collate=list, loss=loss)


def hiding():
    """A wrapper as a loss sees it, without the ranks that a real one speaks to."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(1, 1)
    return wrapper


def test_what_the_wrapper_hides_is_named():
    wrapped = Wrapped(nn.Linear(1, 1), recipe_of(lambda model, _: model.weight.sum()), "none", ranks=1)
    with pytest.raises(ConfigError, match="The loss of mine asks the model for `weight`") as caught:
        wrapped.loss(hiding(), None)
    assert "getattr(model, 'module', model).weight" in caught.value.hint


def test_other_mistakes_of_a_loss_are_its_own():
    wrapped = Wrapped(nn.Linear(1, 1), recipe_of(lambda model, _: model.module.wait), "none", ranks=1)
    with pytest.raises(AttributeError, match="wait"):
        wrapped.loss(hiding(), None)


@pytest.mark.parametrize("wrapper", ["none", "ddp", "fsdp2"])
def test_one_process_wraps_nothing(wrapper, caplog):
    model = nn.Linear(1, 1)
    caplog.set_level("INFO", "wholebatch")
    wrapped = Wrapped(model, recipe_of(lambda *_: None), wrapper, ranks=1)
    with wrapped.whole():
        assert wrapped.plain is wrapped.trained is wrapped.apart(nn.Module) is model
    assert ("left out" in caplog.text) is (wrapper != "none")
