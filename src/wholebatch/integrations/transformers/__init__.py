"""The Hugging Face Trainer: the same script with one word changed, and every update that of its whole logical batch.

from wholebatch.integrations.transformers import WholeBatchTrainer

trainer = WholeBatchTrainer(model, args, train_dataset=dataset, data_collator=collator)
trainer.train()
"""

import importlib.util

from wholebatch.core.errors import MissingExtraError

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    raise MissingExtraError(
        "WholeBatchTrainer needs transformers and accelerate, and they are not installed.",
        hint="pip install 'wholebatch[transformers]'",
    )

from wholebatch.integrations.transformers.trainer import WholeBatchTrainer

__all__ = ["WholeBatchTrainer"]
