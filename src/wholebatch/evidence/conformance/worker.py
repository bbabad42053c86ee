"""One system in a process of its own: ``python -m wholebatch.evidence.conformance.worker FILE SYSTEM SCENE...``.

For scenes over ranks there are as many of these as ranks, each with a file of its own, and the variables of torchrun.

Keras takes its backend once a process, frameworks keep state between runs, and some print; so each system is alone, and
its verdicts go to a file, a line of JSON each, as soon as they are there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import distributed

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
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
