"""What of a Trainer cannot be made exact? Said before training, with what to do instead."""

from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from wholebatch.core.errors import ConfigError

SEAMS = ("_prepare_for_training", "_run_epoch", "get_batch_samples", "training_step", "_clip_grad_norm", "_get_grad_norm")
"""What the loop of the Trainer calls, and a window takes the place of."""


def require_supported(trainer: Any) -> None:
    """Refuse what a Trainer cannot do with windows.

    Raises:
        ConfigError: Its version has another loop, or its arguments ask for what divides or reduces gradients by itself.
    """
    for found, hint in _refusals(trainer):
        raise ConfigError(found, hint=hint)


def _refusals(trainer: Any) -> Iterator[tuple[str, str]]:
    args, accelerator = trainer.args, trainer.accelerator
    missing = [name for name in SEAMS if not hasattr(Trainer, name)]
    if missing:
        yield (
            f"The Trainer of this version of transformers has no {', '.join(missing)}.",
            "pip install -U 'wholebatch[transformers]'",
        )
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed keeps gradients where no window can sum them.",
            "leave deepspeed out: one process, or DistributedDataParallel under torchrun, with memory=... for what a "
            "device holds; or shard with torch.distributed.fsdp.fully_shard in a loop with wb.Accumulator.",
        )
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        yield (
            "Accelerate's FSDP plugin shards the model when training begins, with optimizer and checkpoints of its own.",
            "train in DistributedDataParallel under torchrun; or shard with torch.distributed.fsdp.fully_shard in a "
            "loop with wb.Accumulator.",
        )
    if trainer.is_model_parallel or trainer.is_distributed_loading_by_transformers:
        yield (
            "The model lies on several devices (hf_device_map, DistributedConfig).",
            "load it without device_map and distributed_config.",
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        yield (
            "Tensor, context or sequence parallelism lets several ranks see the same rows, which would count several "
            "times.",
            "leave parallelism_config out.",
        )
    if args.n_gpu > 1:
        yield (
            f"The Trainer would put the model into DataParallel on {args.n_gpu} devices of one process.",
            "launch one process a device: torchrun --nproc-per-node=... script.py.",
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("XLA", "MEGATRON_LM", "TP"):
        yield f"Accelerate runs this as {kind}.", "train on CPU or GPU, in one process or under torchrun."
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size changes the logical batch when memory runs out.",
            "leave it out: here memory that runs out cuts the same logical batch finer, and memory=... plans for it.",
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        yield (
            f'optim="{optim}" steps inside the backward pass, on the gradient of one micro-batch.',
            "take the same optimizer without layerwise, or wb.AdamA, which takes the gradient of a whole window.",
        )
    if args.accelerator_config.split_batches and args.world_size > 1:
        yield (
            "split_batches=True shares out each batch of the loader, and repeats rows so that all ranks have equally "
            "many.",
            "leave it out, and divide per_device_train_batch_size by the number of ranks.",
        )
