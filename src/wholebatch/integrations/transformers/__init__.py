"""The Hugging Face Trainer: the same script with one word changed, and every update that of its whole logical batch.

from wholebatch.integrations.transformers import WholeBatchTrainer

trainer = WholeBatchTrainer(model, args, train_dataset=dataset, data_collator=collator)
trainer.train()
"""

import importlib

from wholebatch.core.errors import MissingExtraError

try:
    importlib.import_module("accelerate")
    importlib.import_module("transformers")
except ModuleNotFoundError as missing:
    if missing.name not in ("torch", "accelerate", "transformers"):
        raise
    raise MissingExtraError(
        f"wholebatch.integrations.transformers needs accelerate and transformers, and {missing.name} is not installed.",
        hint="pip install 'wholebatch[transformers]'",
    ) from None

from wholebatch.integrations.transformers.trainer import WholeBatchTrainer

__all__ = ["WholeBatchTrainer"]
