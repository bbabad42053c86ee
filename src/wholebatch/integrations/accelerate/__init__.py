"""Accelerate: a `wb.Accumulator` for what `accelerator.prepare` returned.

    exact = accumulator(accelerator, model, optimizer, loss_fn, lr_scheduler=scheduler)
    for update in exact.updates(loader, micro_batches=accelerator.gradient_accumulation_steps):
        ...

The accelerator keeps what it does well: devices, processes, mixed precision, loaders, and `save_state`.
"""

from wholebatch.core.errors import MissingExtraError

try:
    from wholebatch.integrations.accelerate.prepared import accumulator
    from wholebatch.integrations.accelerate.repeated import each_row_once
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] not in ("accelerate", "torch"):
        raise
    raise MissingExtraError(
        f"wholebatch.integrations.accelerate needs Accelerate, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[accelerate]'",
    ) from None

__all__ = ["accumulator", "each_row_once"]
