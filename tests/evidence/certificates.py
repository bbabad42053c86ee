"""Prints what wb.verify says of every planted mistake and of every clean loop and model that the tests have.

``python tests/evidence/certificates.py``: a row for each of the twelve mistakes, with how many of its spellings are
named in float64 and float32 (or in the dtype of the scene), each with the line to change; then the clean loops and
models. Takes some 20 seconds, and ends with 1 if a mistake is not named or something clean is accused.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the tests share; this folder is there already

import faults
import loops
import test_certificate
import test_clean_models

import wholebatch as wb

DTYPES = (torch.float64, torch.float32)


def named() -> Iterator[tuple[str, int, int]]:
    """Yield each mistake, how often it is named with its line, and how often it is planted."""
    for name, spellings in faults.FAULTS.items():
        planted = [(scene, step) for scene, step, _ in spellings.values()]
        seen = total = 0
        for scene, step in planted:
            for dtype in DTYPES:
                found = test_certificate.certify(scene, step, dtype)
                total += 1
                seen += [cause.name for cause in found.causes] == [name] and str(found.causes[0].where).endswith(
                    "# here"
                )
        for other, scene, step in loops.FAULTS.values():
            if other == name:
                found = test_certificate.certify(scene, step, torch.float64, rows=10)
                total += 1
                seen += [cause.name for cause in found.causes] == [name]
        yield name, seen, total


def cleared() -> Iterator[tuple[str, int, int]]:
    """Yield each clean loop or model, how often it passes, and how often it is examined."""
    for name, (scene, step) in {**faults.CLEAN, **loops.CLEAN}.items():
        yield f"loop: {name}", sum(test_certificate.certify(scene, step, dtype).ok for dtype in DTYPES), len(DTYPES)
    for name, animal in test_certificate.MODELS.items():
        examined = []
        for dtype in (torch.bfloat16,) if name == "16-bit weights" else DTYPES:
            for step in (None, test_certificate.right_step(animal)):
                batch = animal.batch(12, dtype)
                examined.append(wb.verify(animal.model(dtype), animal.loss_fn, batch, step=step, **animal.objective).ok)
        yield f"model: {name}", sum(examined), len(examined)
    for name in test_clean_models.CASES:
        examined = []
        for dtype in DTYPES:
            for own in (False, True):
                case = test_clean_models.made(name, dtype)
                step = test_clean_models.by_targets(case) if own else None
                examined.append(wb.verify(case.model, case.loss_fn, case.batch, step=step, **case.options).ok)
        yield f"model: {name}", sum(examined), len(examined)


def table(head: tuple[str, str], rows: Iterator[tuple[str, int, int]]) -> bool:
    """Print a table in Markdown, and return whether every row is full."""
    print(f"| {head[0]:<40} | {head[1]:>12} |\n| :{'-' * 39} | {'-' * 11}: |")
    full = True
    for name, seen, total in rows:
        print(f"| {name:<40} | {f'{seen} of {total}':>12} |", flush=True)
        full &= seen == total
    print()
    return full


def main() -> int:
    """Print both tables; 0 if all is as it should be."""
    good = [table(("planted mistake", "named"), named()), table(("clean", "not accused"), cleared())]
    print("all named, none accused" if all(good) else "NOT as it should be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
