"""Lightning: the exact update of the logical batch from an ordinary `training_step`, with one callback more.

    Trainer(accumulate_grad_batches=8, callbacks=[WholeBatch(targets=count_labels)])

Everything else stays: the module, the trainer's clipping, precision, schedules, validation, logging and checkpoints.
"""

from wholebatch.core.errors import MissingExtraError

try:
    from wholebatch.integrations.lightning.callback import WholeBatch, windows
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] not in ("lightning", "pytorch_lightning", "torch"):
        raise
    raise MissingExtraError(
        f"wholebatch.integrations.lightning needs Lightning, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[lightning]'",
    ) from None

__all__ = ["WholeBatch", "windows"]
