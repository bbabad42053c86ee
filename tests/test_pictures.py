"""The pictures of the documentation are plans beside what was measured, and the command on the page draws them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/pictures.py docs/assets"


def test_the_command_on_the_pages_draws_what_they_show(tmp_path):
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("memory.md", "will-it-fit.md")}
    assert all(COMMAND in page for page in pages.values())
    shown = {name for page in pages.values() for name in re.findall(r"assets/(memory-[\w-]+\.svg)", page)}
    assert shown == {file.name for file in (ROOT / "docs" / "assets").glob("memory-*.svg")}
    _, script, _ = COMMAND.split()
    done = subprocess.run(
        [sys.executable, ROOT / script, tmp_path, "--only", "MLP"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (off,) = re.findall(r"memory-mlp.svg: measured within ([\d.]+) % of the plan", done.stdout)
    assert float(off) <= 1
    drawn = (tmp_path / "memory-mlp.svg").read_text(encoding="utf-8")
    assert drawn.count('class="measured"') == 3 + 1  # and one in the legend
    kept = (ROOT / "docs" / "assets" / "memory-mlp.svg").read_text(encoding="utf-8")
    words = re.compile(r">([a-z][a-z ]+)</text>")
    assert words.findall(drawn) == words.findall(kept)
