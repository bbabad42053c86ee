"""In what is the model of a job wrapped, on several ranks?"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from wholebatch.core.errors import ConfigError
from wholebatch.engine.ranks.sharding import Sharding, sharded_modules
from wholebatch.recipes.config import Communication, Wrapper
from wholebatch.recipes.protocol import Recipe

_log = logging.getLogger("wholebatch")


class Wrapped:
    """A model, and what is around it.

    ``"ddp"`` is `DistributedDataParallel`, for code that expects it. ``"fsdp2"`` is `fully_shard`: between windows each
    rank holds its share of the weights, and of the optimizer's state. The update is the same in each.

    Args:
        model: As the recipe makes it, on its device. `fully_shard` changes it in place.
        recipe: Whose.
        wrapper: What goes around it.
        communication: How often ranks speak where weights are spread; with each pass, the items of `nn.ModuleList` and
            `nn.Sequential` are sharded one by one, so that a rank holds all weights of no more than one or two.
        ranks: How many there are; a process that trains alone wraps nothing.

    Attributes:
        plain: The model without a wrapper around it; an optimizer is made from it.
        trained: What the accumulator is given.

    Example:
        >>> from wholebatch.recipes.finding import find_recipe
        >>> model = nn.Linear(1, 1)
        >>> wrapped = Wrapped(model, find_recipe("text"), "ddp", "once", ranks=1)
        >>> wrapped.trained is wrapped.plain is model
        True
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, wrapper: Wrapper, communication: Communication, ranks: int
    ) -> None:
        if communication == "each" and wrapper != "fsdp2":
            raise ConfigError(
                f"communication='each' is for weights that ranks share, and with wrapper={wrapper!r} they are "
                "whole on each.",
                hint="pass wrapper='fsdp2' as well, or leave communication out: gradients are added up once a window.",
            )
        self.plain = self.trained = model
        self._recipe = recipe
        self._sharding: Sharding | None = None
        if ranks == 1:
            if wrapper != "none":
                _log.info("wrapper=%r goes around a model that several ranks train: here it is left out.", wrapper)
        elif wrapper == "ddp":
            self.trained = nn.parallel.DistributedDataParallel(model)
        elif wrapper == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            scalars = {weight for weight in model.parameters() if weight.ndim == 0}  # which it refuses to spread
            for layer in _layers(model) if communication == "each" else ():
                fully_shard(layer, ignored_params=scalars)
            fully_shard(model, ignored_params=scalars)
            self._sharding = Sharding(model, sharded_modules(model))

    def loss(self, model: nn.Module, micro_batch: Any) -> Any:
        """Return what the recipe's loss says.

        Raises:
            ConfigError: It asks for something that the wrapper hides.
        """
        try:
            return self._recipe.loss(model, micro_batch)
        except AttributeError as error:
            if not isinstance(error.obj, nn.parallel.DistributedDataParallel):
                raise
            raise ConfigError(
                f"The loss of {self._recipe.name} asks the model for `{error.name}`, which DistributedDataParallel "
                "hides.",
                hint=f"leave wrapper='ddp' out, or ask for getattr(model, 'module', model).{error.name}.",
            ) from error

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The context in which every rank has all weights, so that it may run the plain model by itself."""
        if self._sharding is None:
            yield
            return
        self._sharding.hush()
        try:
            yield
        finally:
            self._sharding.release()

    def apart(self, make: Callable[[], nn.Module]) -> nn.Module | None:
        """Return the model as one process can use it; None on all ranks but the first, where it is sharded.

        Args:
            make: Makes the model anew, for weights that are spread over ranks. They are gathered by all of them.
        """
        if self._sharding is None:
            return self.plain
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.plain, options=options)
        if not weights:
            return None
        model = make()
        model.load_state_dict(weights)
        return model


def _layers(model: nn.Module) -> list[nn.Module]:
    """The items of lists of modules that have weights, outside of each other."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        return [item for item in model if any(True for _ in item.parameters())]
    return [layer for module in model.children() for layer in _layers(module)]
