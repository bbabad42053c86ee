"""How does the logical batch of a run grow, and what does the learning rate do?"""

from wholebatch.core.errors import ConfigError
from wholebatch.core.schedules import ByNoise, Fixed, Geometric, Linear, Schedule
from wholebatch.recipes.config import TrainConfig


def schedule_of(config: TrainConfig) -> Schedule:
    """Return how large each logical batch of a run is, in the unit of its `logical_batch`.

    Growth goes on to the end of the run: update by update where `updates` says how many there are, else epoch by epoch.

    Args:
        config: What was asked for.

    Raises:
        ConfigError: The two amounts are in different units, or growth would shrink.

    Example:
        >>> print(schedule_of(TrainConfig(recipe="text", logical_batch="64 rows", grow_to="512 rows", epochs=4)))
        64 to 512 by equal factors over 3 epochs
    """
    first, last = config.logical_batch, config.grow_to
    if last is None:
        if config.lr_rule != "none":
            raise ConfigError(
                f"`lr_rule` is {config.lr_rule!r}, and the logical batch does not grow.",
                hint="say how large it shall become, as in grow_to = '1024 rows', or leave lr_rule out.",
            )
        return Fixed(first.count)
    if last.unit != first.unit:
        raise ConfigError(
            f"The logical batch is {first}, and is to grow to {last}.", hint=f"state both in {first.unit}."
        )
    if last.count < first.count:
        raise ConfigError(
            f"The logical batch is {first}, and cannot grow to {last}.", hint="let `grow_to` be the larger one."
        )
    if config.grow == "noise":
        return ByNoise(first.count, last.count)
    if config.updates is None and (config.epochs or 1) == 1:
        raise ConfigError(
            "The logical batch is to grow from epoch to epoch, and there is one epoch.",
            hint="state epochs = 2 or more, updates = N to grow from update to update, or grow = 'noise'.",
        )
    kind = Geometric if config.grow == "geometric" else Linear
    if config.updates is not None:
        return kind(first.count, last.count, over=max(1, config.updates - 1))
    return kind(first.count, last.count, over=(config.epochs or 1) - 1, by="epoch")
