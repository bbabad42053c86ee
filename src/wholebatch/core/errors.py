"""What can go wrong, each with a hint.

Every error of the package is a `WholeBatchError` and also the built-in kind that a user would expect, so that
``except ValueError`` keeps working around a call that was given bad values.
"""


class WholeBatchError(Exception):
    """A sentence that says what was found, and a hint that says what to do.

    Args:
        found: What was found, with values and names. One or more full sentences.
        hint: What to do about it.

    Attributes:
        found: As given.
        hint: As given.

    Example:
        >>> print(WholeBatchError("The batch is empty.", hint="leave the empty batch out of the loader."))
        The batch is empty.
        <BLANKLINE>
        hint: leave the empty batch out of the loader.
    """

    def __init__(self, found: str, *, hint: str) -> None:
        super().__init__(f"{found}\n\nhint: {hint}")
        self.found = found
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.hint)


def _rebuild(kind: type[WholeBatchError], found: str, hint: str) -> WholeBatchError:
    return kind(found, hint=hint)


class SplitError(WholeBatchError, ValueError):
    """A logical batch cannot be cut into micro-batches as asked."""


class WeightError(WholeBatchError, ValueError):
    """Targets that cannot weigh a loss: negative, not a number, or none at all."""


class LossError(WholeBatchError, ValueError):
    """What the loss function returned cannot be trained on: no scalar, no graph, not a tensor."""


class WindowError(WholeBatchError, RuntimeError):
    """A window was used in an order that would lose or spoil a gradient."""


class OptimizerError(WholeBatchError, ValueError):
    """Model, optimizer and scheduler do not belong together, or the optimizer needs what a window cannot give."""


class BatchNormError(WholeBatchError, RuntimeError):
    """A layer in training mode computes over the rows that it sees, so that a cut batch would train otherwise."""


class MeetingError(WholeBatchError, RuntimeError):
    """Micro-batches cannot meet: not at the same place, with what does not fit, or where they come one by one."""


class NonFiniteError(WholeBatchError, ArithmeticError):
    """The loss or the gradient of a window is infinite or not a number."""


class VerifyError(WholeBatchError, AssertionError):
    """The gradient of the cut batch is not that of the undivided one."""


class OutOfMemoryError(WholeBatchError, MemoryError):
    """Memory ran out where no finer cut can help: in a single row, or in the optimizer's step."""


class RankError(WholeBatchError, RuntimeError):
    """Another rank failed or does not answer, so that no rank made the update."""


class ConfigError(WholeBatchError, ValueError):
    """An option, a configuration file or a recipe is not what it should be."""


class MissingExtraError(WholeBatchError, ImportError):
    """A name was used whose extra is not installed."""
