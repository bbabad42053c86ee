"""Every example of the documentation runs as it stands, from the page and from the docstring itself."""

import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from wholebatch.cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = ROOT / "src"
MODULES = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCES.rglob("*.py"))
    if path.name != "__main__.py"
]
# The kind of all complaints about a command line; Typer does not name it.
USAGE_ERROR = typer.BadParameter.__mro__[1]
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(
    r"^(?P<margin> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]*)\")?[^\n]*\n(?P<text>.*?)^(?P=margin)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, with the line of the page on which the text of each begins."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["title"],
            textwrap.dedent(found["text"]),
            text.count("\n", 0, found.start("text")) + 1,
        )
        for found in BLOCK.finditer(text)
    ]


def run_page(page: Path) -> None:
    """Run the Python of a page in order and in one namespace, in the current folder.

    A block whose title is the name of a file is written there first. A block with the title ``prints`` is what the
    Python before it prints; dots stand for anything. A traceback names the line of the page.
    """
    namespace: dict[str, object] = {"__name__": "__page__"}
    printed = io.StringIO()
    for block in blocks(page):
        if block.title and Path(block.title).suffix:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        elif block.title == "prints":
            same = doctest.OutputChecker().check_output(block.text, printed.getvalue(), LENIENT)
            assert same, f"{page.name}:{block.line}: it prints\n{printed.getvalue()}instead of\n{block.text}"


@pytest.fixture
def accelerate_forgets():
    """All accelerators of a process share a state, and a page would hand its own on to the tests after it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# Lightning calls a part of PyTorch that is deprecated, and gives advice by warnings, which depends on the machine.
as_lightning_warns = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", r"ignore:::lightning\..*")


@as_lightning_warns
@pytest.mark.parametrize("page", [page for page in PAGES if page.is_file()], ids=lambda page: page.name)
@pytest.mark.usefixtures("accelerate_forgets")
def test_the_examples_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@as_lightning_warns
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("accelerate_forgets")
def test_the_examples_of_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=LENIENT)
    assert failed == 0


def commands(page: Path) -> list[list[str]]:
    """Return the words of each line of shell on a page that calls the command."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("wholebatch ")]


def check_command(words: list[str]) -> None:
    """Parse a line as the command does, without running it."""
    command = get_command(app)
    with suppress(typer.Exit):  # --help and the like answer at once
        context = command.make_context("wholebatch", list(words))
        name, subcommand, rest = command.resolve_command(context, words)
        subcommand.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_on_the_page_exist(page):
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize("line", ["trian text", "train text --logical-bach '2 rows'", "verify"])
def test_a_wrong_command_is_seen(line):
    with pytest.raises(USAGE_ERROR):
        check_command(shlex.split(line))


def test_the_pages_hold_examples():
    """A pattern that matches no block would make every page pass."""
    counts = {page.name: sum(block.language == "python" for block in blocks(page)) for page in PAGES}
    pages = ["README.md", "index.md", "your-loop.md", "concepts.md", "as-printed.md", "from-your-loop.md"]
    assert min(counts[name] for name in pages) > 0, counts
    assert commands(ROOT / "docs" / "command.md")


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("1. In a list\n\n    ```python\n    if True:\n        raise KeyError\n    ```\n", KeyError),
        ('```python\nprint(1)\n```\n\n```text title="prints"\n2\n```\n', AssertionError),
    ],
)
def test_a_broken_example_is_seen(page, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.md"
    path.write_text(page, encoding="utf-8")
    with pytest.raises(error):
        run_page(path)


def test_a_page_shows_files_and_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.md"
    path.write_text(
        """
```toml title="job.toml"
seed = 1
```

```python
from pathlib import Path
print(Path("job.toml").read_text(), 1 / 3)
```

```text title="prints"
seed = 1
0.33...
```
""",
        encoding="utf-8",
    )
    run_page(path)


def test_the_site_builds_and_asks_for_nothing_from_outside(tmp_path):
    """No font, script, style or picture comes from another host, so that the pages can be read offline."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert set(pages) >= {path.with_suffix(".html").name for path in (ROOT / "docs").rglob("*.md")}
    # Markdown takes ">>>" for quotations where an example of a docstring is not known to be one.
    assert "<blockquote" not in pages["reference.html"]
    outside = re.compile(r"<(?:script|img|iframe|link(?! rel=\"canonical\"))[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>")
    assert {name: outside.findall(page) for name, page in pages.items() if outside.search(page)} == {}
    assert outside.search('<link rel="stylesheet" href="https://fonts.example/css">')
