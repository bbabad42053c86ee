"""What has a checkpoint to hold that Lightning does not keep itself? The window that is open, on each rank."""

from collections.abc import Mapping
from typing import Any

from torch import distributed

from wholebatch.core.errors import ConfigError
from wholebatch.engine.accumulator import Accumulator


def kept(accumulator: Accumulator, ranks: int = 1) -> dict[str, Any]:
    """Return how many windows there were, the gradient of the one that is open, and the random state it goes on with.

    All ranks ask for it together, as they do when a trainer writes a checkpoint: the file is written by one of them,
    and holds what all have.

    Args:
        accumulator: Between two backward passes.
        ranks: Over how many it sums.
    """
    state = accumulator.state_dict()
    names = ["window", "group"]
    if state["window"]["open"] is not None:
        names.append("random")
    own = {name: state[name] for name in names}
    everybody: list[Any] = [own]
    if ranks > 1:
        everybody = [None] * ranks
        distributed.all_gather_object(everybody, own)
    return {"ranks": everybody}


def take_over(accumulator: Accumulator, state: Mapping[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Go on from there, with weights and optimizers that Lightning has restored.

    Raises:
        ConfigError: A window was open over other ranks than there are.
    """
    everybody = state["ranks"]
    if len(everybody) == ranks:
        accumulator.load_state_dict({**accumulator.state_dict(), **everybody[rank]})
    elif any(each["window"]["open"] is not None for each in everybody):
        raise ConfigError(
            f"The checkpoint was written inside a window over {len(everybody)} ranks, and here are {ranks}.",
            hint="go on with as many, or from a checkpoint that was written after a whole number of windows.",
        )
