"""What is left of a model when its dropout is silent? All that it does in training mode, and nothing drawn by chance.

Evaluation mode silences dropout too, but more than that: a batch norm of one's own then looks at no batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""The layers that draw a mask in training mode."""

_MASKING: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.feature_alpha_dropout,
    }
)

_ATTENDING: dict[Callable[..., Any], int] = {
    functional.scaled_dot_product_attention: 4,
    functional.multi_head_attention_forward: 10,
}
"""Where the share that attention drops stands among its arguments."""


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Let dropout draw nothing for a while: that of layers, of functions, and inside of attention.

    Everything else is in the mode that it is in.

    Args:
        model: Whose dropout layers are meant.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5))
        >>> with silenced(model):
        ...     functional.dropout(model(torch.ones(3)), 0.5)
        tensor([1., 1., 1.])
    """
    layers = [layer for layer in model.modules() if isinstance(layer, DROPOUT)]
    with evaluating(layers), _NoMasks():
        yield


@contextmanager
def evaluating(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put layers into evaluation mode, each by itself, and back again."""
    modes = [(layer, layer.training) for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


class _NoMasks(TorchFunctionMode):
    """Lets functions that would drop something pass it on."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MASKING:
            return args[0] if args else kwargs["input"]
        place = _ATTENDING.get(func)
        if place is not None and place < len(args):
            args = (*args[:place], 0.0, *args[place + 1 :])
        elif place is not None:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
