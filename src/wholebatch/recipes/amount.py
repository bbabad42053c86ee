"""How much is that? A number of rows or of tokens, as it is written in a flag or a file."""

import re
from dataclasses import dataclass
from typing import Literal, cast

_AMOUNT = re.compile(r"\s*(\d{1,3}(?:,\d{3})+|\d[\d_]*)\s*(row|token)s?\s*")


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with its unit.

    Attributes:
        count: At least 1.
        unit: ``"rows"`` or ``"tokens"``.

    Example:
        >>> Amount.parse("65536 tokens")
        Amount(count=65536, unit='tokens')
        >>> print(Amount.parse("65_536 tokens"), Amount.parse("1 row"), sep=", ")
        65,536 tokens, 1 row
    """

    count: int
    unit: Literal["rows", "tokens"]

    def __str__(self) -> str:
        return f"{self.count:,} {self.unit if self.count != 1 else self.unit[:-1]}"

    @classmethod
    def parse(cls, said: object) -> "Amount":
        """Return the amount that a text stands for.

        Args:
            said: Such as ``"512 rows"``; an `Amount` is returned as it is.

        Raises:
            ValueError: It is not a number with one of the two units, or less than 1.
        """
        if isinstance(said, Amount):
            return said
        found = _AMOUNT.fullmatch(said) if isinstance(said, str) else None
        if found is None:
            raise ValueError("a number of rows or tokens")
        count = int(re.sub("[,_]", "", found[1]))
        if count < 1:
            raise ValueError("at least 1")
        return cls(count, cast(Literal["rows", "tokens"], f"{found[2]}s"))
