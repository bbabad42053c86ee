"""On what does Keras run here? Both pages have the same functions, and only one of them can be imported."""

from typing import Any

import keras

backend: Any
if keras.backend.backend() == "jax":
    from wholebatch.integrations.keras import on_jax as backend
else:
    from wholebatch.integrations.keras import on_torch as backend

__all__ = ["backend"]
