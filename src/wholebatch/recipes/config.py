"""What was asked for? The defaults of a recipe, a TOML file and flags, laid over one another and checked."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from wholebatch.core.budget import parse_bytes
from wholebatch.core.errors import ConfigError
from wholebatch.core.schedules.rates import Rule
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.options import OPTIONS
from wholebatch.recipes.protocol import Recipe

BatchNormChoice: TypeAlias = Literal["refuse", "exact", "group", "frozen", "per_micro_batch"]
Wrapper: TypeAlias = Literal["none", "ddp", "fsdp2"]

Communication: TypeAlias = Literal["once", "each"]
Growth: TypeAlias = Literal["geometric", "linear", "noise"]
SinkName = Literal["tensorboard", "wandb", "mlflow"]


def _parse_sinks(said: object) -> tuple[str, ...]:
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list | tuple) or not all(name in get_args(SinkName) for name in names):
        raise ValueError("names of sinks")
    return tuple(dict.fromkeys(names))


def _parse_micro_batch(said: object) -> Amount | Literal["auto"]:
    return "auto" if said == "auto" else Amount.parse(said)


def _parse_grow_to(said: object) -> Amount | None:
    return None if said is None else Amount.parse(said)


def _parse_memory(said: object) -> int | None:
    try:
        return None if said is None else parse_bytes(said)
    except ConfigError as error:
        raise ValueError(error.found) from error


class TrainConfig(BaseModel):
    """Everything that is stated about a run. `OPTIONS` says what each key takes.

    Example:
        >>> config = TrainConfig(recipe="text", logical_batch="512 rows", updates=40)
        >>> str(config.logical_batch), config.precision
        ('512 rows', 'fp32')
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recipe: str
    logical_batch: Annotated[Amount, PlainValidator(Amount.parse)] = Amount(512, "rows")
    grow_to: Annotated[Amount | None, PlainValidator(_parse_grow_to)] = None
    grow: Growth = "geometric"
    lr_rule: Rule = "none"
    noise_scale: bool = False
    micro_batch: Annotated[Amount | Literal["auto"], PlainValidator(_parse_micro_batch)] = "auto"
    memory: Annotated[int | None, PlainValidator(_parse_memory)] = None
    epochs: int | None = Field(default=None, ge=1)
    updates: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch_norm: BatchNormChoice = "refuse"
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate_in: Literal["fp32", "compensated", "weights"] | None = None
    wrapper: Wrapper = "none"
    communication: Communication = "once"
    seed: int = Field(default=0, ge=0, lt=2**32)
    out: str | None = None
    sink: Annotated[tuple[SinkName, ...], PlainValidator(_parse_sinks)] = ()
    compare: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place.

    Attributes:
        source: Where they were said, as in ``"in job.toml"``.
        values: By key.
        spelling: How a key is written there: ``"{}"``, or ``"--{}"`` for flags.
    """

    source: str
    values: Mapping[str, Any]
    spelling: str = "{}"

    def said(self, key: str) -> str:
        """Return a key as it is written there."""
        return self.spelling.format(key.replace("_", "-") if self.spelling.startswith("--") else key)


def read_toml(path: str | Path) -> Layer:
    """Return what a TOML file says.

    Args:
        path: The file.

    Raises:
        ConfigError: There is no such file, it cannot be read, or it is not TOML.
    """
    try:
        with Path(path).open("rb") as file:
            return Layer(f"in {path}", tomllib.load(file))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}.",
            hint=f"paths are taken from the current folder, {Path.cwd()}.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} is not TOML: {error}.",
            hint='write one key a line, as in logical_batch = "512 rows".',
        ) from error


def configure(layers: Sequence[Layer]) -> TrainConfig:
    """Return the configuration that layers add up to, the later over the earlier.

    Epochs and updates are two answers to one question, so that a later one replaces an earlier other.

    Args:
        layers: The recipe's defaults, a file, flags.

    Raises:
        ConfigError: A key does not exist, or a value is not what it takes; all of them are named.
    """
    values: dict[str, Any] = {}
    origin: dict[str, Layer] = {}
    for layer in layers:
        if layer.values.get("epochs") is not None and layer.values.get("updates") is not None:
            raise ConfigError(
                f"{layer.said('epochs')} and {layer.said('updates')} are both given {layer.source}.",
                hint="keep the one that shall end the run.",
            )
        for one, other in (("epochs", "updates"), ("updates", "epochs")):
            if one in layer.values:
                values.pop(other, None)
        values |= layer.values
        origin |= dict.fromkeys(layer.values, layer)
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        problems = [_problem(str(each["loc"][0]), each["type"], each["input"], origin) for each in error.errors()]
        raise ConfigError(
            " ".join(dict.fromkeys(found for found, _ in problems)),
            hint=" ".join(dict.fromkeys(hint for _, hint in problems)),
        ) from None


def defaults_of(recipe: Recipe) -> Layer:
    """Return what a recipe says for what nobody else says."""
    return Layer(f"in the defaults of {recipe.name}", recipe.defaults)


def _problem(key: str, kind: str, value: object, origin: Mapping[str, Layer]) -> tuple[str, str]:
    if kind == "missing":
        return f"`{key}` is not given.", f"`{key}` takes {OPTIONS[key].takes}."
    layer = origin[key]
    if kind == "extra_forbidden":
        nearest = difflib.get_close_matches(key, OPTIONS, n=1)
        return (
            f"There is no key `{layer.said(key)}` ({layer.source}).",
            f"did you mean `{nearest[0]}`?" if nearest else f"the keys are {', '.join(OPTIONS)}.",
        )
    return (
        f"`{layer.said(key)}` is {value!r} ({layer.source}).",
        f"`{key}` takes {OPTIONS[key].takes}.",
    )
