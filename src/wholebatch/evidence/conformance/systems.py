"""Which systems are there? Each by name, whether it is installed or not."""

from wholebatch.evidence.conformance.adapters.textbook import textbook
from wholebatch.evidence.conformance.adapters.wholebatch import wholebatch
from wholebatch.evidence.conformance.system import System

SYSTEMS: dict[str, System] = {system.name: system for system in (wholebatch, textbook)}
"""In the order in which they are shown."""
