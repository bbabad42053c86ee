"""``pytest --wholebatch-adapter=my_module:adapter``, typed in the folder of a project that has only the package."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import wholebatch
from wholebatch.evidence.conformance import plugin
from wholebatch.evidence.conformance.scenes import SCENES

ROOT = Path(__file__).parents[3]

ADAPTER = """
import wholebatch

assert wholebatch.__file__.startswith({site!r})  # the installed package, and not the checkout

from wholebatch.evidence.conformance.adapters.{name} import {name} as system

def adapter(task):
    return system.train(task)

adapter.expresses = {expresses}
"""

FORGETFUL = """
import torch

from wholebatch.evidence.conformance.task import Trained, steps_of


def adapter(task):
    import beside  # where the project keeps its own

    model = task.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    steps = steps_of(optimizer)
    for i, micro_batch in enumerate(task.epoch):
        if beside.FORGETS or i % task.window == 0:
            optimizer.zero_grad()
        (task.loss(model, micro_batch) / task.window).backward()
        if i % task.window == task.window - 1:
            optimizer.step()
    return Trained(model, steps())


refusing = lambda task: 1 / 0
number = 3
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which the package lies as it is installed, with what it tells pytest, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(
        Path(wholebatch.__file__).parent, folder / "wholebatch", ignore=shutil.ignore_patterns("__pycache__")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    told = folder / "wholebatch-0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: wholebatch\nVersion: {wholebatch.__version__}\n")
    (told / "entry_points.txt").write_text(
        "[pytest11]\n" + "\n".join(f"{name} = {where}" for name, where in project["entry-points"]["pytest11"].items())
    )
    return folder


@pytest.fixture
def run(site, tmp_path):
    """Runs pytest in the folder of another project."""

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return subprocess.run(
            # the program `pytest`, and not `python -m pytest`, which puts the folder into the path
            [sys.executable, "-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("name", "expresses", "passed", "failed"),
    [("wholebatch", {"clipping", "unsized"}, 10, 0), ("textbook", set(), 3, 5)],
)
def test_every_scene_is_a_test_that_passes_fails_or_is_skipped(run, site, tmp_path, name, expresses, passed, failed):
    (tmp_path / "my_module.py").write_text(ADAPTER.format(name=name, expresses=expresses, site=str(site)))
    ended = run("-p", "no:randomly", "--wholebatch-adapter=my_module:adapter", "-rA")
    counts = {word: ended.stdout.count(f"\n{word} ") for word in ("PASSED", "FAILED")}
    assert counts == {"PASSED": passed, "FAILED": failed}, ended.stdout + ended.stderr
    assert f"{len(SCENES) - passed - failed} skipped" in ended.stdout
    assert ended.returncode == (1 if failed else 0)
    assert ("a mean of means" in ended.stdout) == (name == "textbook")


def test_a_wrong_loop_fails_with_its_mistake_and_a_refusal_with_the_way_to_allow_it(run, tmp_path):
    (tmp_path / "my_module.py").write_text(FORGETFUL)
    (tmp_path / "beside.py").write_text("FORGETS = True\n")
    ended = run(
        "--wholebatch-adapter=my_module:adapter", "--wholebatch-adapter=my_module:refusing", "-k", "T2-mean", "-rA"
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "2 failed" in ended.stdout
    assert "only the last micro-batch of a window counts" in ended.stdout
    assert "refuses: ZeroDivisionError: division by zero" in ended.stdout
    assert "adapter.refuses = {'T2-mean'}" in ended.stdout
    assert "Traceback" not in ended.stdout


def test_a_module_that_is_not_there_is_a_sentence(run, tmp_path):
    ended = run("--wholebatch-adapter=nowhere:adapter")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    said = ended.stdout + ended.stderr
    assert "--wholebatch-adapter=nowhere:adapter: ModuleNotFoundError: No module named 'nowhere'." in said
    assert f"hint: name a function that can be imported from {tmp_path}, as in my_module:adapter." in said
    assert "Traceback" not in said
    assert "INTERNALERROR" not in said


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("its_module:absent", "AttributeError: module 'its_module' has no attribute 'absent'"),
        ("its_module:number", "it is of type int and cannot be called"),
        ("its_broken", "SyntaxError: "),
    ],
)
def test_what_is_no_adapter_is_a_sentence(tmp_path, monkeypatch, where, found):
    (tmp_path / "its_module.py").write_text(FORGETFUL)
    (tmp_path / "its_broken.py").write_text("def adapter(task:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("its_module", "its_broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    config = SimpleNamespace(invocation_params=SimpleNamespace(dir=tmp_path))
    with pytest.raises(pytest.UsageError) as error:
        plugin._find(where, config)
    assert f"--wholebatch-adapter={where}: {found}" in str(error.value)
    assert "\nhint: name a function" in str(error.value)


def test_the_plugin_costs_those_nothing_who_do_not_use_it():
    """It is loaded with every pytest of everybody who has the package."""
    said = (
        "import sys, wholebatch.evidence.conformance.plugin\n"
        "assert not {'torch', 'numpy', 'typer'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", "import pytest\n" + said], check=True)
