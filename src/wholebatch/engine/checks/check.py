"""Is the first batch safe to cut? A few of its rows as a whole against the same rows in parts, before training."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from wholebatch.core.batch import Layout, LogicalBatch
from wholebatch.core.errors import BatchNormError, SplitError, VerifyError, WholeBatchError
from wholebatch.core.split import Indices, Tokens
from wholebatch.engine import memory
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.checks.carrying import carried
from wholebatch.engine.checks.causes import Cause, carried_cause, diagnose, judged_in_training
from wholebatch.engine.checks.distance import is_rounding
from wholebatch.engine.checks.pieces import Probe, compare
from wholebatch.engine.checks.silence import evaluating, silenced
from wholebatch.engine.device import input_device
from wholebatch.engine.fit.cutting import Cutting
from wholebatch.engine.forward import Forward
from wholebatch.engine.memory import is_out_of_memory
from wholebatch.engine.objective import Objective
from wholebatch.engine.precision import Precision
from wholebatch.engine.reasons import Say
from wholebatch.engine.rehearsal import rehearsal
from wholebatch.engine.transaction import Transaction

ROWS = 8
"""How many rows the first check looks at."""

SAMPLE = 4096
"""How many entries of each parameter's gradient the first check keeps; a second gradient would take memory."""

_NO_ROWS = (
    "If the first dimension of what the loader yields holds no rows, as with the tokens of texts that stand one after "
    "the other, name its tensors in whole=[...]: then it is never cut."
)


class FirstCheck:
    """Looks at the first batch that is cut, once.

    Args:
        forward: What is to be trained, and in which precision.
        cutting: The rule by which batches are cut.
        wanted: Whether it is to look at all.
        say: Takes what was found.
    """

    def __init__(self, forward: Forward, cutting: Cutting, wanted: bool, say: Say) -> None:
        self._forward = forward
        self._cutting = cutting
        self._due = wanted
        self._say = say

    @rehearsal()
    def look(self, rows: LogicalBatch, largest: Indices) -> None:
        """Compare a few rows of a logical batch, if it is the first.

        Args:
            rows: The logical batch.
            largest: Rows that are known to fit into memory together.

        Raises:
            VerifyError: The cut changes the gradient; the error names the cause.
        """
        if not self._due:
            return
        rule = self._cutting.micro_batch
        forward = self._forward
        found = check_first(
            forward.setup.model,
            forward.objective,
            rows,
            largest,
            lengths=rows.lengths(rule.length) if isinstance(rule, Tokens) else None,
            precision=forward.precision,
        )
        self._due = found is None  # else the next batch may tell
        if found is not None:
            self._say(*found)

    def look_at_loaded(self, micro_batch: Any, layout: Layout) -> None:
        """Compare a few rows of a micro-batch that a loader has cut, if it is the first; see `look`."""
        if not self._due:
            return
        try:
            rows = layout.loaded(micro_batch)
        except SplitError as error:  # it is trained as it is
            self._due = False
            self._say(f"The first batch was not compared cut and uncut. {error.found}", logging.INFO)
            return
        if rows.rows > 1:
            try:
                self.look(rows, range(rows.rows))
            except VerifyError as error:
                raise VerifyError(error.found, hint=f"{error.hint} {_NO_ROWS}") from None
            except Exception as error:  # the next one is looked at
                if not memory.is_out_of_memory(error):
                    raise
            else:
                return
            memory.free_cached(self._forward.setup.device)


def check_first(
    model: nn.Module,
    objective: Objective,
    rows: LogicalBatch,
    fitting: Indices,
    *,
    lengths: Sequence[int] | None = None,
    precision: Precision | None = None,
) -> tuple[str, int] | None:
    """Compare a few rows of the first logical batch, cut and uncut, and leave no trace.

    Randomness and batch norm are left to their own rules here: dropout is silent, batch norm that computes over the
    batch by the user's wish is in evaluation mode, and so is a model that draws random numbers all the same.

    Args:
        model: The module.
        objective: What is to be trained.
        rows: The first logical batch.
        fitting: Rows that are known to fit into memory together.
        lengths: Length of each row, where known; the rows that are looked at then take no more tokens than `fitting`.
        precision: In which forward passes run.

    Returns:
        What was found, as a sentence, and the level at which it is to be logged; None where the gradient is infinite or
        not a number as a whole already, so that these rows do not tell, and the window will be judged by
        `on_nonfinite`.

    Raises:
        VerifyError: The cut changes the gradient; the error names the cause.
        BatchNormError: Batch norm outside of the model's layers does not run on one row.
        MeetingError: The loss takes a gradient through what meets.
    """
    pieces = _few(rows.rows, fitting, lengths)
    if not pieces:
        return (
            "The first batch was not compared cut and uncut: no two of its rows are known to fit together.",
            logging.INFO,
        )
    probe = Probe(model, objective, rows, sample=SAMPLE, precision=precision)
    transaction = Transaction(model, input_device(model))
    transaction.begin()
    try:
        dependent = set(batch_dependent_layers(model))
        with evaluating([layer for name, layer in model.named_modules() if name in dependent]):
            pieces, found = _compare(probe, pieces, transaction)
    except Exception as error:
        if isinstance(error, WholeBatchError) or is_out_of_memory(error):
            raise
        _explain(error)
        # Some models take one number of rows and no other; if they are not at fault, training will raise it again.
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return (
            f"The first batch was not compared cut and uncut: on a few of its rows the loss raises {said}",
            logging.WARNING,
        )
    finally:
        transaction.roll_back()
    errors = [each for each in found if isinstance(each, float)]
    if any(map(math.isnan, errors)):
        return None
    if not errors:
        return f"The first batch was not compared cut and uncut: {found[0]}.", logging.INFO
    compared, mode = sum(map(len, pieces)), ""
    if any(isinstance(each, _Evaluating) for each in errors):
        mode = ", in evaluation mode, since two passes in training mode differ by themselves"
    return (
        f"The first batch was compared cut and uncut on {compared} rows: equal to {max(errors):.1e} (relative){mode}.",
        logging.INFO,
    )


def _compare(
    probe: Probe, pieces: list[list[int]], transaction: Transaction
) -> tuple[list[list[int]], list[float | str]]:
    """Compare one row of each piece with the others, or its halves where a loss does not take one row.

    Returns:
        The pieces that were compared, and what was found.
    """
    halves = [piece for piece in pieces if len(piece) > 3]
    try:
        return pieces, [_compare_piece(probe, piece, transaction) for piece in pieces]
    except Exception as error:
        if isinstance(error, WholeBatchError) or is_out_of_memory(error) or not halves:
            raise
        _explain(error)
    transaction.roll_back()
    return halves, [_compare_piece(probe, piece, transaction, len(piece) // 2) for piece in halves]


def _compare_piece(probe: Probe, piece: list[int], transaction: Transaction, first: int = 1) -> float | str:
    """Return the relative error of the first rows against the others, or why nobody can tell; raise if no rounding."""
    parts = [piece[:first], piece[first:]]
    found = compare(probe, piece, parts) or [0.0]
    if is_rounding(found, probe.tolerance):
        return max(found)
    if probe.coarsen(lambda: probe.run(piece)) and is_rounding(found, probe.tolerance):  # such as autocast in the loss
        return max(found)
    buffers = carried(probe, piece)
    if buffers:
        with silenced(probe.model):  # moved once by all that meet, it is the same from the same beginning
            from_there = compare(probe, piece, parts, before=transaction.roll_back) or [0.0]
        if is_rounding(from_there, probe.tolerance):
            return max(from_there)
        cause = carried_cause(buffers)
        raise VerifyError(_off_by(found, piece) + cause.found, hint=f"{cause.hint} check=None takes it as it is.")
    if not judged_in_training(probe, piece):
        with evaluating(list(probe.model.modules())):
            judged = _judge(probe, piece, parts, found)
            return _Evaluating(judged) if isinstance(judged, float) else judged
    with silenced(probe.model):
        return _judge(probe, piece, parts, found)


class _Evaluating(float):
    """An error that was found in evaluation mode, since training mode cannot be compared."""


def _explain(error: Exception) -> None:
    """Raise a clearer error for those that say that rows are looked at together."""
    if "Expected more than 1 value per channel" in str(error):
        raise BatchNormError(
            "Batch norm that is no layer of this model (a function, or a second model in training mode) computes over "
            "the rows that it is given, and a single row has no variance.",
            hint="put what normalises into the model as layers, for wb.exact_batch_norm(model); a second model that "
            "does not learn goes into evaluation mode: teacher.eval().",
        ) from error


def _judge(probe: Probe, piece: list[int], parts: list[list[int]], found: list[float]) -> float | str:
    """Compare as `_compare_piece` does, in the mode in which layers are now."""
    try:
        found = compare(probe, piece, parts) or [0.0]
    except Exception as error:  # some models give no loss in this mode
        return f"they differ in training mode, and in evaluation mode the loss raises {type(error).__name__}"
    if is_rounding(found, probe.tolerance):
        return max(found)
    found, causes = _look_closer(probe, piece, parts, found)
    if not causes:
        return max(found)
    if any(cause.name in ("dropout", "randomness") for cause in causes):
        return "model or loss draw random numbers in evaluation mode too, or carry something over to the next pass"
    if any(cause.name == "not finite" for cause in causes):
        return math.nan
    raise VerifyError(
        _off_by(found, piece) + " ".join(cause.found for cause in causes),
        hint=" ".join(cause.hint for cause in causes) or "look closer with wb.verify(model, loss_fn, batch).",
    )


def _off_by(found: list[float], piece: list[int]) -> str:
    return (
        f"The cut changes the gradient: on {len(piece)} rows of the first batch, some against the others, it is off by "
        f"{max(found):.2g} (relative). "
    )


def _look_closer(
    probe: Probe, piece: list[int], parts: list[list[int]], found: list[float]
) -> tuple[list[float], list[Cause]]:
    """Return the errors, and their causes: without autocast if that can be, whose rounding some layers magnify."""
    if probe.autocasts:
        try:
            with probe.as_the_weights_are():
                wide = compare(probe, piece, parts) or [0.0]
                return wide, [] if is_rounding(wide, probe.tolerance) else diagnose(probe, piece, parts)
        except Exception as error:  # such as inputs of 16 bits, which meet weights of 32 only under autocast
            if is_out_of_memory(error):
                raise
    causes = diagnose(probe, piece, parts)
    return found, causes


def _few(num_rows: int, fitting: Indices, lengths: Sequence[int] | None) -> list[list[int]]:
    """Choose some rows, as different as can be, in pieces that take no more memory than `fitting` does."""
    rows = list(range(num_rows))
    together = min(ROWS, len(fitting))
    if lengths is not None:
        room = len(fitting) * max(lengths[row] for row in fitting)
        rows = [row for row in sorted(rows, key=lambda row: lengths[row]) if together * lengths[row] <= room]
    looked_at = min(ROWS, len(rows))
    if min(together, looked_at) < 2:
        return []
    chosen = [rows[place * (len(rows) - 1) // (looked_at - 1)] for place in range(looked_at)]
    pieces = [chosen[start : start + together] for start in range(0, looked_at, together)]
    return [piece for piece in pieces if len(piece) > 1]
