"""What becomes of a copy of something that hangs on weights and optimizers? It says so as soon as it is used.

Hooks on weights and optimizers do not go with a copy, so that it would sum gradients otherwise, or not at all. To copy
what holds one, such as a model for a moving average, is no mistake: so the copy may exist.
"""

import copyreg
from typing import TYPE_CHECKING, Any

from wholebatch.core.errors import ConfigError


class NotCopied:
    """Is left behind by `copy`, `deepcopy` and `pickle`: what they make is empty, and an error where it is used."""

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),)  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # or every name would be one for those who check types

        def __getattr__(self, name: str) -> Any:
            kind = type(self).__name__
            if self.__dict__ or name.startswith("__"):
                raise AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=self)
            raise ConfigError(
                f"This {kind} is a copy of another, and hangs on no model and optimizer.",
                hint="copy model and optimizer, and make a wb.Accumulator of the copies; what it has come to is in "
                "accumulator.state_dict().",
            )
