"""Which state does a pass move? Where that is more than random seeds, a cut batch moves it more often."""

from collections.abc import Iterable
from typing import Any

import keras

from wholebatch.core.errors import BatchNormError


def is_seed(variable: Any) -> bool:
    """Return whether this is the state of a random generator, which each pass may move."""
    return bool(variable.name == "seed_generator_state")


def refuse_moved(model: Any, moved: Iterable[Any]) -> None:
    """Refuse layers whose state a pass has moved."""
    names = [variable.path for variable in moved]
    if not names:
        return
    said = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if any(layer.trainable for layer in norms):
        raise BatchNormError(
            f"Each pass moves {said}: batch normalization computes over the rows that it sees, so that a cut batch "
            "trains otherwise than the undivided one.",
            hint="use GroupNormalization or LayerNormalization; or set layer.trainable = False, which holds its "
            "statistics fixed; or accept statistics of micro-batches with batch_norm='per_micro_batch'.",
        )
    raise BatchNormError(
        f"Each pass moves {said}, once a micro-batch instead of once an update.",
        hint="set layer.trainable = False if that holds it fixed, or accept it with batch_norm='per_micro_batch'.",
    )
