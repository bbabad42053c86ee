"""What can go wrong, each with a hint."""

import pickle

import pytest

from wholebatch.core import errors

KINDS = {
    errors.SplitError: ValueError,
    errors.WeightError: ValueError,
    errors.LossError: ValueError,
    errors.WindowError: RuntimeError,
    errors.OptimizerError: ValueError,
    errors.BatchNormError: RuntimeError,
    errors.MeetingError: RuntimeError,
    errors.NonFiniteError: ArithmeticError,
    errors.VerifyError: AssertionError,
    errors.OutOfMemoryError: MemoryError,
    errors.RankError: RuntimeError,
    errors.ConfigError: ValueError,
    errors.MissingExtraError: ImportError,
}


@pytest.mark.parametrize(("kind", "built_in"), KINDS.items(), ids=lambda kind: kind.__name__)
def test_an_error_is_also_the_built_in_kind_and_survives_a_process_boundary(kind, built_in):
    error = pickle.loads(pickle.dumps(kind("The batch is empty.", hint="fill it.")))
    assert type(error) is kind
    assert isinstance(error, errors.WholeBatchError)
    assert isinstance(error, built_in)
    assert str(error) == "The batch is empty.\n\nhint: fill it."
    assert (error.found, error.hint) == ("The batch is empty.", "fill it.")


def test_every_kind_is_listed_here():
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__}
    assert kinds == {errors.WholeBatchError, *KINDS}
