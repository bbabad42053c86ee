"""Defaults, file and flags over one another; and what is said of a key or a value that is wrong."""

import pytest
from pydantic import ValidationError

from wholebatch.core.errors import ConfigError
from wholebatch.recipes.amount import Amount
from wholebatch.recipes.config import Layer, TrainConfig, configure, read_toml
from wholebatch.recipes.options import OPTIONS

RECIPE = Layer("in the test", {"recipe": "text"})


def layers(defaults=(), file=(), flags=()):
    return [
        Layer("in the defaults of text", dict(defaults)),
        Layer("in job.toml", dict(file)),
        Layer("on the command line", {"recipe": "text", **dict(flags)}, "--{}"),
    ]


def test_flags_go_over_the_file_and_the_file_over_the_defaults():
    config = configure(
        layers(
            defaults={"lr": 1.0, "seed": 1, "logical_batch": "1 row"}, file={"lr": 2.0, "seed": 2}, flags={"lr": 3.0}
        )
    )
    assert (config.lr, config.seed, config.logical_batch) == (3.0, 2, Amount(1, "rows"))
    assert config.precision == "fp32"


@pytest.mark.parametrize(
    ("defaults", "flags", "epochs", "updates"),
    [
        ({"epochs": 2}, {"updates": 7}, None, 7),
        ({"updates": 7}, {"epochs": 2}, 2, None),
        ({"epochs": 2}, {}, 2, None),
        ({"epochs": 2}, {"epochs": 3}, 3, None),
    ],
)
def test_the_later_of_epochs_and_updates_counts(defaults, flags, epochs, updates):
    config = configure(layers(defaults=defaults, flags=flags))
    assert (config.epochs, config.updates) == (epochs, updates)


def test_epochs_and_updates_in_one_place_contradict_each_other():
    with pytest.raises(ConfigError, match=r"--epochs and --updates are both given on the command line"):
        configure(layers(flags={"epochs": 1, "updates": 1}))


@pytest.mark.parametrize(
    ("wrong", "right"), [("logical_bach", "logical_batch"), ("microbatch", "micro_batch"), ("epoch", "epochs")]
)
def test_a_wrong_key_names_the_nearest_right_one(wrong, right):
    with pytest.raises(ConfigError) as caught:
        configure(layers(file={wrong: "8 rows"}))
    assert caught.value.found == f"There is no key `{wrong}` (in job.toml)."
    assert caught.value.hint == f"did you mean `{right}`?"


def test_a_key_that_is_like_no_other_gets_the_list():
    with pytest.raises(ConfigError, match="the keys are recipe, logical_batch"):
        configure(layers(file={"zzz": 1}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logical_batch", "512"),
        ("logical_batch", 512),
        ("micro_batch", "automatic"),
        ("micro_batch", "0 rows"),
        ("epochs", 0),
        ("epochs", 1.5),
        ("updates", "many"),
        ("updates", True),
        ("lr", -1.0),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("clip_norm", -0.1),
        ("precision", "fp8"),
        ("accumulate_in", "fp64"),
        ("seed", -1),
        ("seed", 2**32),
        ("out", 7),
        ("compare", "yes"),
        ("sink", "tensorbord"),
        ("sink", ["wandb", 3]),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError) as caught:
        configure(layers(file={key: value}))
    assert caught.value.found == f"`{key}` is {value!r} (in job.toml)."
    assert caught.value.hint == f"`{key}` takes {OPTIONS[key].takes}."


def test_a_flag_is_named_as_it_is_typed():
    with pytest.raises(ConfigError, match=r"`--micro-batch` is '5' \(on the command line\)"):
        configure(layers(flags={"micro_batch": "5"}))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        configure(layers(file={"lr": -1.0, "sed": 3}, flags={"precision": "fp8"}))
    for part in ("`lr` is -1.0", "no key `sed`", "`--precision` is 'fp8'", "did you mean `seed`?", "'bf16'"):
        assert part in str(caught.value)


def test_a_job_without_a_recipe_is_refused():
    with pytest.raises(ConfigError, match="`recipe` is not given"):
        configure([Layer("in job.toml", {"epochs": 1})])


@pytest.mark.parametrize("said", ["mlflow", ["mlflow"], ["mlflow", "mlflow"]], ids=str)
def test_sinks_are_named_alone_or_in_a_list(said):
    assert configure(layers(file={"sink": said})).sink == ("mlflow",)


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        configure([RECIPE]).seed = 1


def test_every_key_is_explained():
    assert list(OPTIONS) == list(TrainConfig.model_fields)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('recipe = "images"\nlogical_batch = "64 rows"\nlr = 1\ncompare = false\n')
    config = configure([read_toml(path)])
    assert (config.recipe, config.logical_batch, config.lr, config.compare) == ("images", Amount(64, "rows"), 1, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'lr = 1\nseed = "open\n', "line 2"),
        (b"lr 1\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read(content, said, tmp_path):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_toml(path)
    assert str(path) in caught.value.found


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
