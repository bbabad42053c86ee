"""What has a checkpoint to hold that Lightning does not keep itself? The window that is open, if one is."""

import warnings
from collections.abc import Mapping
from typing import Any

from wholebatch.engine.accumulator import Accumulator


def kept(accumulator: Accumulator, ranks: int = 1) -> dict[str, Any]:
    """Return how many windows there were, the gradient of the one that is open, and the random state it goes on with.

    Args:
        accumulator: Between two backward passes.
        ranks: Over how many it sums; of several, a checkpoint holds the state of the first alone.
    """
    if ranks > 1:
        if accumulator.open_window is not None:
            warnings.warn(
                f"This checkpoint is written inside a window over {ranks} ranks and does not hold its gradient: a run "
                "that goes on from it leaves out the micro-batches that the window had seen. Save after a whole number "
                "of windows.",
                stacklevel=2,
            )
        return {}
    state = accumulator.state_dict()
    names = ("window", "random") if state["window"]["open"] is not None else ("window",)
    return {name: state[name] for name in names}


def take_over(accumulator: Accumulator, state: Mapping[str, Any]) -> None:
    """Go on from there, with weights and optimizers that Lightning has restored."""
    if state:
        accumulator.load_state_dict({**accumulator.state_dict(), **state})
