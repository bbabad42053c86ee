"""What is here, and what is missing? Versions against what each extra asks for, and what the machine has."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import wholebatch
from wholebatch.evidence.wording import say_bytes

# These extras are for working on the package itself.
_FOR_DEVELOPERS = {"all", "dev", "docs"}
_FIRST = ("torch", "cli", "plots")


def examine() -> str:
    """Return a page of text about this installation and this machine. Works without any extra.

    Example:
        >>> print(examine().splitlines()[0])
        wholebatch 0.1.0, Python 3...
    """
    lines = [
        f"wholebatch {wholebatch.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}",
        f"  {Path(wholebatch.__file__).parent}",
        f"  {sys.executable}",
        "",
        "Installed",
    ]
    lacking = []
    for extra, requirements in extras().items():
        complete = True
        for name, bounds in requirements.items():
            version = _installed(name)
            fits = version is not None and satisfies(version, bounds)
            complete &= fits
            state = "missing" if version is None else version if fits else f"{version}, but it has to be {bounds}"
            lines.append(f"  {extra:<14}{name:<14}{state}")
        if not complete:
            lacking.append(extra)
    lines += ["", "Machine", *(f"  {what:<14}{found}" for what, found in _machine())]
    if lacking:
        lines += ["", "Missing, if you want it:", *(f"  pip install 'wholebatch[{extra}]'" for extra in lacking)]
    return "\n".join(lines) + "\n"


def extras() -> dict[str, dict[str, str]]:
    """Return what each extra asks for: names and bounds of versions, such as ``">=2.9,<2.14"``."""
    found: dict[str, dict[str, str]] = {extra: {} for extra in _FIRST}
    for extra, requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        if extra not in _FOR_DEVELOPERS and name is not None and name[0] != "wholebatch":
            found.setdefault(extra, {})[name[0]] = requirement[name.end() :].strip()
    for extra, requirements in found.items():
        if extra != "torch":  # what several extras bring is told once
            found[extra] = {name: bounds for name, bounds in requirements.items() if name not in found["torch"]}
    return found


def satisfies(version: str, bounds: str) -> bool:
    """Return whether a version lies within bounds.

    Args:
        version: Such as ``"2.13.0+cpu"``; what follows the numbers does not count.
        bounds: Such as ``">=2.9,<2.14"``, in any order; empty: every version will do.

    Example:
        >>> satisfies("2.13.0+cpu", ">=2.9,<2.14"), satisfies("2.14", ">=2.9,<2.14"), satisfies("10", "<9")
        (True, False, False)
    """
    for bound in filter(None, bounds.split(",")):
        parts = re.fullmatch(r"\s*(>=|<|==)\s*([\d.]+)\s*", bound)
        if parts is None:
            continue  # another way to say it: let pip judge
        have, want = _numbers(version), _numbers(parts[2])
        if not {">=": have >= want, "<": have < want, "==": have == want}[parts[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield extras and requirements, from the installed package or from the checkout that it runs from."""
    try:
        declared = importlib.metadata.requires("wholebatch") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(wholebatch.__file__).parents[2] / "pyproject.toml"
        if project.is_file():
            listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
            yield from ((extra, requirement) for extra, each in listed.items() for requirement in each)
        return
    for line in declared:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if extra is not None:
            yield extra[1], requirement.strip()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[tuple[str, str]]:
    yield from _torch()
    yield "processors", f"{_processors()} of {os.cpu_count()}"
    yield "memory", _memory()
    try:
        disk = shutil.disk_usage(Path.cwd())
        yield "disk", f"{say_bytes(disk.free)} free of {say_bytes(disk.total)} in {Path.cwd()}"
    except OSError as error:
        yield "disk", f"cannot be read: {error.strerror}"


def _torch() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except Exception as error:  # also a broken installation, which is when a doctor is called
        yield "device", f"unknown without PyTorch ({type(error).__name__}: {error})"
        return
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        yield "device", f"{device}, {torch.accelerator.device_count()} of them"
    else:
        yield "device", "cpu (PyTorch finds no accelerator)"
    yield "threads", f"{torch.get_num_threads()} in PyTorch"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    """Return what the machine has and what is free now; a container's limit where there is one."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown on this platform"
    said = say_bytes(total)
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        if available is not None:
            said = f"{say_bytes(int(available[1]) * 1024)} free of {said}"
    if limit.is_file() and (allowed := limit.read_text(encoding="ascii").strip()).isdigit():
        said += f", this container may use {say_bytes(int(allowed))}"
    return said
