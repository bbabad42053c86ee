"""How long does it take until something happens? The time of ``import wholebatch`` and of ``wholebatch --help``.

Each is measured in fresh interpreters that take turns; a figure is the median. The import is timed inside the
interpreter and must load no framework; the command is timed as a whole process, interpreter and all. CPU time is what
is judged, since wall-clock time also counts what others do on the machine; it is printed beside.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from page import Bar, arguments, spread, table, tell

FRAMEWORKS = ("torch", "numpy", "jax", "keras", "tensorflow", "lightning", "transformers", "accelerate")
IMPORT = f"""
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
import wholebatch
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
loaded = [name for name in {FRAMEWORKS!r} if name in sys.modules]
print(json.dumps([wall, cpu, loaded]))
"""


def import_seconds() -> tuple[float, float, list[str]]:
    """Return wall-clock and CPU time of the import, and the frameworks that it loaded."""
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    wall, cpu, loaded = json.loads(done.stdout)
    return wall, cpu, loaded


def command_seconds(command: list[str]) -> tuple[float, float]:
    """Return wall-clock and CPU time of a command, from its start to its end.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return wall, used.ru_utime + used.ru_stime


def main() -> int:
    options = arguments(__doc__, "benchmarks/import_time.py").parse_args()
    help_command = [str(Path(sys.executable).with_name("wholebatch")), "--help"]
    import_seconds()  # the first ones compile to bytecode
    command_seconds(help_command)
    taken: dict[str, list[tuple[float, float]]] = {"import wholebatch": [], "wholebatch --help": [], "python -c ''": []}
    loaded: set[str] = set()
    for _ in range(5 if options.quick else 25):
        wall, cpu, frameworks = import_seconds()
        taken["import wholebatch"].append((wall, cpu))
        loaded.update(frameworks)
        taken["wholebatch --help"].append(command_seconds(help_command))
        taken["python -c ''"].append(command_seconds([sys.executable, "-c", ""]))
    rows = []
    cpu_ms: dict[str, float] = {}
    for name, times in taken.items():
        wall_ms, cpu_times = ([seconds * 1e3 for seconds in each] for each in zip(*times, strict=True))
        cpu_ms[name] = statistics.median(cpu_times)
        rows.append([name, f"{cpu_ms[name]:.1f}", spread(cpu_times, 1), f"{statistics.median(wall_ms):.1f}"])
    headings = ["what", "CPU ms, median", "middle half", "wall-clock ms, median"]
    text = table(headings, rows) + f"\n\nFrameworks that the import loaded: {', '.join(sorted(loaded)) or 'none'}."
    found = [
        Bar("import wholebatch, CPU ms", cpu_ms["import wholebatch"], 50, digits=1),
        Bar("frameworks loaded by the import", len(loaded), 0, digits=0),
        Bar("wholebatch --help, CPU ms", cpu_ms["wholebatch --help"], 300, digits=1),
    ]
    return tell("Import time", "import_time", options, ["wholebatch", "typer", "rich"], text, found)


if __name__ == "__main__":
    sys.exit(main())
