"""Which systems are there? Each by name, whether it is installed or not."""

from wholebatch.evidence.conformance.adapters.accelerate import accelerate, accelerate_long
from wholebatch.evidence.conformance.adapters.composer import composer, composer_tokens
from wholebatch.evidence.conformance.adapters.gradcache import gradcache
from wholebatch.evidence.conformance.adapters.keras import keras_jax, keras_torch
from wholebatch.evidence.conformance.adapters.lightning import lightning, lightning_manual
from wholebatch.evidence.conformance.adapters.opacus import opacus
from wholebatch.evidence.conformance.adapters.optax import optax_microbatch, optax_microbatch_mean, optax_multisteps
from wholebatch.evidence.conformance.adapters.textbook import textbook
from wholebatch.evidence.conformance.adapters.transformers import transformers, transformers_loss_func
from wholebatch.evidence.conformance.adapters.wholebatch import wholebatch, wholebatch_ddp, wholebatch_fsdp2
from wholebatch.evidence.conformance.system import System

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        wholebatch,
        wholebatch_ddp,
        wholebatch_fsdp2,
        textbook,
        accelerate,
        accelerate_long,
        lightning,
        lightning_manual,
        transformers,
        transformers_loss_func,
        composer,
        composer_tokens,
        opacus,
        gradcache,
        keras_torch,
        keras_jax,
        optax_multisteps,
        optax_microbatch,
        optax_microbatch_mean,
    )
}
"""In the order in which they are shown."""
