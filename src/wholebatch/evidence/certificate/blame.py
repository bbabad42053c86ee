"""Which line is behind a cause that lies in the model or in the loss?"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from wholebatch.engine.checks.causes import Cause
from wholebatch.evidence.certificate.source import Place, definition, first_call, first_call_at_work, first_word

_DRAWS = (
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "random", "random_"),
    *("normal", "normal_", "standard_normal", "gauss", "uniform", "uniform_", "exponential_", "log_normal_"),
    *("bernoulli", "bernoulli_", "multinomial", "beta", "dirichlet", "sample", "rsample"),
    *("choice", "choices", "shuffle", "permutation"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "drop_path"),
    *("stochastic_depth", "gumbel_softmax", "rrelu"),
)
_TERMS = ("balanc", "aux", "router", "gate", "expert")


def blame(
    causes: Iterable[Cause], model: nn.Module, loss_fn: Any, *, targets: Any = None, step: Any = None
) -> list[Cause]:
    """Return causes with the line to change, where they do not know it yet.

    Layers are looked for where they are made: in the classes of the model, then in the files of loss and step. What
    cannot be found better lies in the loss function, whose definition is named.

    Args:
        causes: What was found.
        model: In which layers have the names that the causes say.
        loss_fn: The loss.
        targets: What counts targets, or None.
        step: The user's own step, or None.
    """
    return [
        cause if cause.where is not None else replace(cause, where=_line(cause, model, loss_fn, targets, step))
        for cause in causes
    ]


def _line(cause: Cause, model: nn.Module, loss_fn: Any, targets: Any, step: Any) -> str | None:
    classes = list(dict.fromkeys(type(module) for module in model.modules()))
    functions = [each for each in (loss_fn, step) if each is not None]
    place: Place | None = None
    if cause.name == "spectral norm":
        place = first_call(("spectral_norm",), [*classes, *functions])
    elif cause.layers:
        layers = dict(model.named_modules())
        made = {type(layers[name]).__name__ for name in cause.layers if name in layers} or set(cause.layers)
        place = first_call(made, [*classes, *functions])
    elif cause.name == "randomness":
        place = first_call_at_work(_DRAWS, [loss_fn, *classes])
    elif cause.name == "balancing loss":
        place = first_word(_TERMS, [*functions, *classes])
    elif cause.name == "targets" and targets is not None:
        place = definition(targets)
    place = place or definition(loss_fn)
    return str(place) if place is not None else None
