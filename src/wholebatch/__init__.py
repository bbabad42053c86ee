"""Train exactly as if the whole batch fit.

Say which batch the optimizer should see; wholebatch cuts it into micro-batches that fit, and makes the update of the
whole::

    import wholebatch as wb

    accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(8))
    for batch in loader:
        update = accumulator.step(batch)

The names below are the public face. They are found on first use, so that importing the package costs milliseconds and
loads no framework.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wholebatch.core import schedules
    from wholebatch.core.errors import (
        BatchNormError,
        ConfigError,
        LossError,
        MeetingError,
        MissingExtraError,
        NonFiniteError,
        OptimizerError,
        OutOfMemoryError,
        RankError,
        SplitError,
        VerifyError,
        WeightError,
        WholeBatchError,
        WindowError,
    )
    from wholebatch.core.plan import Plan
    from wholebatch.core.record import Update
    from wholebatch.core.split import Rows, Tokens
    from wholebatch.core.weights import mean_weights
    from wholebatch.engine import losses
    from wholebatch.engine.accumulator import Accumulator
    from wholebatch.engine.batchnorm import convert_batch_norm, freeze_batch_norm
    from wholebatch.engine.checkpoint.saving import load, save
    from wholebatch.engine.fit.checkpointing import checkpoint_blocks, uncheckpoint_blocks
    from wholebatch.engine.fit.planning import plan
    from wholebatch.engine.meetings.exactnorm import exact_batch_norm
    from wholebatch.engine.meetings.meeting import gather, own_rows, sum_over_batch
    from wholebatch.engine.meetings.normmask import mask_batch_norm
    from wholebatch.engine.meetings.spilling import offload_to_file
    from wholebatch.engine.ranks.batches import LogicalBatches
    from wholebatch.engine.ranks.exploration import AccumulatedGradientNormalization
    from wholebatch.engine.steps.optimizers import AdamA
    from wholebatch.engine.window import Window
    from wholebatch.evidence import sinks
    from wholebatch.evidence.verify import Verification, verify

__version__ = "0.1.0"

_HOMES = {
    "AccumulatedGradientNormalization": "engine.ranks.exploration",
    "Accumulator": "engine.accumulator",
    "AdamA": "engine.steps.optimizers",
    "BatchNormError": "core.errors",
    "ConfigError": "core.errors",
    "LogicalBatches": "engine.ranks.batches",
    "LossError": "core.errors",
    "MeetingError": "core.errors",
    "MissingExtraError": "core.errors",
    "NonFiniteError": "core.errors",
    "OptimizerError": "core.errors",
    "OutOfMemoryError": "core.errors",
    "Plan": "core.plan",
    "RankError": "core.errors",
    "Rows": "core.split",
    "SplitError": "core.errors",
    "Tokens": "core.split",
    "Update": "core.record",
    "Verification": "evidence.verify",
    "VerifyError": "core.errors",
    "WeightError": "core.errors",
    "WholeBatchError": "core.errors",
    "Window": "engine.window",
    "WindowError": "core.errors",
    "checkpoint_blocks": "engine.fit.checkpointing",
    "convert_batch_norm": "engine.batchnorm",
    "exact_batch_norm": "engine.meetings.exactnorm",
    "freeze_batch_norm": "engine.batchnorm",
    "gather": "engine.meetings.meeting",
    "load": "engine.checkpoint.saving",
    "losses": "engine.losses",
    "mask_batch_norm": "engine.meetings.normmask",
    "mean_weights": "core.weights",
    "offload_to_file": "engine.meetings.spilling",
    "own_rows": "engine.meetings.meeting",
    "plan": "engine.fit.planning",
    "save": "engine.checkpoint.saving",
    "schedules": "core.schedules",
    "sinks": "evidence.sinks",
    "sum_over_batch": "engine.meetings.meeting",
    "uncheckpoint_blocks": "engine.fit.checkpointing",
    "verify": "evidence.verify",
}

__all__ = [
    "AccumulatedGradientNormalization",
    "Accumulator",
    "AdamA",
    "BatchNormError",
    "ConfigError",
    "LogicalBatches",
    "LossError",
    "MeetingError",
    "MissingExtraError",
    "NonFiniteError",
    "OptimizerError",
    "OutOfMemoryError",
    "Plan",
    "RankError",
    "Rows",
    "SplitError",
    "Tokens",
    "Update",
    "Verification",
    "VerifyError",
    "WeightError",
    "WholeBatchError",
    "Window",
    "WindowError",
    "__version__",
    "checkpoint_blocks",
    "convert_batch_norm",
    "exact_batch_norm",
    "freeze_batch_norm",
    "gather",
    "load",
    "losses",
    "mask_batch_norm",
    "mean_weights",
    "offload_to_file",
    "own_rows",
    "plan",
    "save",
    "schedules",
    "sinks",
    "sum_over_batch",
    "uncheckpoint_blocks",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in ("torch", "numpy"):
            raise
        from wholebatch.core.errors import MissingExtraError

        raise MissingExtraError(
            f"wholebatch.{name} needs PyTorch, and {missing.name} is not installed.",
            hint="pip install 'wholebatch[torch]'",
        ) from None
    value = module if _HOMES[name].rpartition(".")[2] == name and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
