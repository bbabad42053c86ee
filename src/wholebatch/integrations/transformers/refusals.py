"""What of a Trainer cannot be made exact? Said before training, with what to do instead."""

from collections.abc import Iterator
from typing import Any

from transformers import Trainer

from wholebatch.core.errors import ConfigError

SEAMS = (
    "_prepare_for_training",
    "_run_epoch",
    "get_batch_samples",
    "training_step",
    "_clip_grad_norm",
    "_get_grad_norm",
)
"""What the loop of the Trainer calls, and a window takes the place of."""

_OWN_LOOP = "or shard with torch.distributed.fsdp.fully_shard in a loop with wb.Accumulator."


def require_supported(trainer: Any) -> None:
    """Refuse what a Trainer cannot do with windows.

    Raises:
        ConfigError: Its version has another loop, or its arguments ask for what divides or reduces gradients by itself.
    """
    for refusal in (*_of_engines(trainer), *_of_arguments(trainer.args)):
        raise refusal


def _of_engines(trainer: Any) -> Iterator[ConfigError]:
    missing = [name for name in SEAMS if not hasattr(Trainer, name)]
    if missing:
        yield ConfigError(
            f"The Trainer of this version of transformers has no {', '.join(missing)}.",
            hint="pip install -U 'wholebatch[transformers]'",
        )
    if trainer.is_deepspeed_enabled:
        yield ConfigError(
            "DeepSpeed keeps gradients where no window can sum them.",
            hint="leave deepspeed out: one process, or DistributedDataParallel under torchrun, with memory=... for "
            f"what a device holds; {_OWN_LOOP}",
        )
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        yield ConfigError(
            "Accelerate's FSDP plugin shards the model when training begins, with an optimizer and checkpoints of its "
            "own.",
            hint=f"leave fsdp out and train in DistributedDataParallel under torchrun; {_OWN_LOOP}",
        )
    if trainer.is_model_parallel or getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield ConfigError(
            "The model lies on several devices (hf_device_map, DistributedConfig).",
            hint="load it without device_map and distributed_config.",
        )
    if max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        yield ConfigError(
            "With tensor, context or sequence parallelism several ranks see the same rows, which would count several "
            "times.",
            hint="leave parallelism_config out.",
        )
    kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    if kind in ("XLA", "MEGATRON_LM"):
        yield ConfigError(
            f"Accelerate runs this as {kind}, which steps in a way of its own.",
            hint="train on CPU or GPU, in one process or under torchrun.",
        )


def _of_arguments(args: Any) -> Iterator[ConfigError]:
    if args.n_gpu > 1:
        yield ConfigError(
            f"The Trainer would put the model into DataParallel, on {args.n_gpu} devices of one process.",
            hint="launch a process for each device: torchrun --nproc-per-node=... script.py.",
        )
    if args.auto_find_batch_size:
        yield ConfigError(
            "auto_find_batch_size changes the logical batch when memory runs out.",
            hint="leave it out: here memory that runs out cuts the same logical batch finer, and memory=... plans it.",
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        yield ConfigError(
            f'optim="{optim}" steps inside the backward pass, on the gradient of one micro-batch.',
            hint="take the same optimizer without layerwise; or wb.AdamA, which takes in the gradient of a window.",
        )
    if args.accelerator_config.split_batches and args.world_size > 1:
        yield ConfigError(
            "split_batches=True shares out each batch of the loader, and repeats rows so that all ranks have as many.",
            hint="leave it out, and divide per_device_train_batch_size by the number of ranks.",
        )
