"""What does a run have to be told to train as it was tuned? A configuration file; what it cannot say, as comments."""

from typing import get_args

from wholebatch.core.errors import ConfigError
from wholebatch.core.schedules.rates import Rule
from wholebatch.core.tuning import Tuning
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import TrainConfig
from wholebatch.recipes.ingredients import rows_of
from wholebatch.recipes.protocol import Recipe


def check_rule(rule: str) -> Rule:
    """Return the rule of that name.

    Raises:
        ConfigError: There is none.
    """
    for each in get_args(Rule):
        if rule == each:
            found: Rule = each
            return found
    raise ConfigError(f"`--lr-rule` is {rule!r}.", hint="it takes none, linear (SGD) or sqrt (Adam).")


def settings_of(recipe: Recipe, config: TrainConfig, tuning: Tuning, rule: Rule) -> str:
    """Return a TOML file that `wholebatch train --config` reads.

    Args:
        recipe: What was tuned.
        config: What was asked for.
        tuning: What was found out; a size was chosen.
        rule: How the learning rate follows; ``"none"`` leaves it as it is.

    Example:
        >>> from wholebatch.core.tuning import Measured, Timed
        >>> from wholebatch.recipes.finding import find_recipe
        >>> chosen = Timed(32, 32.0, 4, 0.1)
        >>> tuning = Tuning(present=64, noise=Measured(40.0, 35.0, 46.0, 20), timed=(chosen,), chosen=chosen,
        ...                 micro_batch="8 rows", peak_bytes=1, changes=(), reasons=())
        >>> config = TrainConfig(recipe="images", logical_batch="64 rows", micro_batch="8 rows")
        >>> print(settings_of(find_recipe("images"), config, tuning, "none"), end="")
        # By wholebatch tune: noise scale 40 targets (35 to 46).
        logical_batch = "32 rows"
        micro_batch = "8 rows"
    """
    chosen, noise = tuning.chosen, tuning.noise
    assert chosen is not None
    high = f"{noise.high:,.0f}" if noise.high is not None else "no bound"
    lines = [
        f"# By wholebatch tune: noise scale {noise.scale or 0.0:,.0f} targets ({noise.low or 0.0:,.0f} to {high})."
    ]
    lines.append(f'logical_batch = "{_amount(recipe, config, chosen.rows)}"')
    lines.append(f'micro_batch = "{tuning.micro_batch if config.micro_batch != "auto" else "auto"}"')
    if config.memory is not None:
        lines.append(f'memory = "{config.memory} B"')
    for change in tuning.changes:
        if change.rule != rule:
            continue
        rates = {after["lr"] for after in change.after}
        if len(rates) == 1:
            lines.append(f"lr = {rates.pop():.6g}  # by the rule {rule}")
        else:
            lines.append("# The optimizer has several learning rates, which this file cannot say. In the recipe:")
        lines += [f"# {line}" for line in str(change).splitlines()[1:]]
    return "\n".join(lines) + "\n"


def _amount(recipe: Recipe, config: TrainConfig, rows: int) -> str:
    """Rows, or as many tokens where the run counts these."""
    if config.logical_batch.unit == "rows":
        return str(Amount(rows, "rows")).replace(",", "")
    assert recipe.length is not None  # the present amount was counted with it
    every = rows_of(recipe, "train")
    tokens = sum(recipe.length(every[place]) for place in range(len(every)))
    return f"{max(1, round(rows * tokens / len(every)))} tokens"
