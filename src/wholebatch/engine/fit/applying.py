"""How does a plan become a model's behaviour? Blocks that recompute, activations that wait on the host."""

from typing import Any

from torch import nn

from wholebatch.core.applied import Applied
from wholebatch.core.errors import ConfigError
from wholebatch.core.plan import Plan
from wholebatch.engine.fit.checkpointing import keep, recompute
from wholebatch.engine.fit.offloading import bring_back, offload


def apply(plan: Plan, model: Any) -> Applied:
    """Let a model train as its plan says, and return what takes it back.

    Args:
        plan: From `wb.plan`.
        model: The one that was planned, or another like it. Changed in place.

    Raises:
        ConfigError: It is no module, or has no such blocks.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"A plan was to be applied to a {type(model).__name__}.", hint="pass the model, as in plan.apply(model)."
        )
    wrapped = recompute(model, plan.checkpointing)
    offloaded = plan.offload and offload(model)

    def take_back() -> None:
        keep(wrapped)
        if offloaded:
            bring_back(model)

    return Applied(plan.checkpointing, plan.offload, take_back)
