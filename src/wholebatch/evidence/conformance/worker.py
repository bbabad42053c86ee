"""One system in a process of its own: ``python -m wholebatch.evidence.conformance.worker FILE SYSTEM SCENE...``.

Keras takes its backend once a process, frameworks keep state between runs, and some print; so each system is alone, and
its verdicts go to a file, a line of JSON each, as soon as they are there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.systems import SYSTEMS


def main(arguments: Sequence[str]) -> None:
    """Judge a system, and append its verdicts to a file."""
    file, system, *names = arguments
    with Path(file).open("a", encoding="utf-8") as lines:
        for scene in SCENES:
            if scene.name in names:
                lines.write(json.dumps(judge(SYSTEMS[system], scene).to_dict()) + "\n")
                lines.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
