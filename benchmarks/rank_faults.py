"""What becomes of ranks when something goes wrong on one of them? Many runs, with one fault each.

Each run is two or three real processes (gloo) that make five updates in float64; the model is bare, in
`DistributedDataParallel`, or sharded with FSDP2, and logical batches come by `step` or by `updates`. Which rank it
hits, in which update and micro-batch, and whether in a forward pass, a backward pass, the optimizer's step or between
updates, is drawn. A rank is killed, stopped for 5 s, or stopped for good; it runs out of memory, or its loss raises;
its sockets are closed; or the link between all ranks goes down without a word (the loopback device of a network
namespace).

A run is as it should be if every rank that lives has exactly the weights of the plain loop after as many updates as it
has made (to 1e-12), and has made all of them or says why not in an error that names a rank; if stopping for 5 s costs
no update, nor running out of memory in `step`; if after an exception in the loss all ranks go on to the end; and if
nobody is still waiting when the stated time-out of 8 s, and 4 s for a busy machine, have passed since the fault.

On a machine so busy that ranks wait 8 s for each other before the fault has come, a run begins again, three times at
most; then it counts as wrong.

Takes about twenty minutes.
"""

import argparse
import collections
import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faulty
from faulty import KINDS, LINK, LOSS, MEMORY, PAUSED, SILENT, STOPPED, TIME_OUT, UPDATES, Scene
from page import Bar, arguments, table, tell

SLACK = 4.0
"""What a busy machine may take beside the time-out. Unit: seconds."""

GIVEN_UP = 40.0
"""After so long a run is ended from outside, and counts as one that hangs. Unit: seconds."""

INSIDE = "WHOLEBATCH_FAULTS_INSIDE"

Seen = dict[int, dict[str, Any]]
"""What each rank that lived has seen."""


def play(scene: Scene, folder: Path) -> tuple[Seen, float | None]:
    """Run a scene; return what its ranks saw, and the longest time from the fault until a rank had ended.

    The time is None if there was no fault.
    """
    hears, tells = os.pipe()
    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=faulty.be_rank, args=(scene, rank, folder, tells)) for rank in range(scene.ranks)]
    for rank in ranks:
        rank.start()
    os.close(tells)
    began = time.monotonic()
    told = os.read(hears, 100) if select.select([hears], [], [], GIVEN_UP)[0] else b""
    os.close(hears)
    fault = float(told) if told else began
    hit = ranks[scene.rank]
    if scene.kind == PAUSED:
        time.sleep(STOPPED)
        os.kill(hit.pid, signal.SIGCONT)
    if scene.kind == LINK:
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    woken = fault
    for rank in sorted(ranks, key=lambda rank: rank is hit):
        if scene.kind == SILENT and rank is hit:
            woken = time.monotonic()
            os.kill(hit.pid, signal.SIGCONT)
        rank.join(max(0.1, fault + GIVEN_UP - time.monotonic()))
        if rank.is_alive():
            rank.kill()
            rank.join()
    if scene.kind == LINK:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    files = {place: folder / f"{place}.json" for place in range(scene.ranks)}
    seen = {place: json.loads(file.read_text()) for place, file in files.items() if file.exists()}
    since = {place: woken if place == scene.rank else fault for place in seen}
    if not told:
        return seen, None
    return seen, max((each["ended"] - since[place] for place, each in seen.items()), default=GIVEN_UP)


def judge(scene: Scene, seen: Mapping[int, Mapping[str, Any]], seconds: float | None) -> list[str]:
    """Return what is not as it should be; nothing, for most."""
    wrong = []
    living = [rank for rank in range(scene.ranks) if scene.kind != faulty.KILLED or rank != scene.rank]
    wrong += [f"rank {rank} says nothing" for rank in living if rank not in seen]
    if seconds is None:
        wrong.append("the fault never came")
    elif seconds > TIME_OUT + SLACK:
        wrong.append(f"{seconds:.1f} s until all had ended")
    for rank, each in seen.items():
        if not each["off"] <= 1e-12:
            wrong.append(f"rank {rank} is {each['off']:.1e} off after {each['made']} updates")
        all_made = each["made"] == UPDATES
        kinds = [kind for kind, _ in each["errors"]]
        if scene.kind == PAUSED or (scene.kind == MEMORY and scene.use == "step"):
            if not all_made or kinds:
                wrong.append(f"rank {rank} made {each['made']} updates and says {each['errors']}")
        elif scene.kind == MEMORY and not all_made and kinds == ["OutOfMemoryError"]:
            pass  # the owner of the loop is told on every rank
        elif scene.kind == LOSS:
            own = rank == scene.rank
            clear = kinds == (["SampleError"] if own else ["RankError"]) and "row 7 is broken" in each["errors"][0][1]
            if not all_made or not clear or (not own and f"rank {scene.rank}" not in each["errors"][0][1]):
                wrong.append(f"rank {rank} made {each['made']} updates and says {each['errors']}")
        elif not all_made and (kinds[-1:] != ["RankError"] or "rank" not in each["errors"][-1][1].lower()):
            wrong.append(f"rank {rank} made {each['made']} updates and says {each['errors']}")
    if scene.kind == MEMORY and not any(each["retries"] for each in seen.values()) and scene.use == "step":
        wrong.append("nobody ran out of memory")
    return wrong


def outcome(seen: Mapping[int, Mapping[str, Any]]) -> str:
    """Return what became of a run, in a word."""
    made = {each["made"] for each in seen.values()}
    if made != {UPDATES}:
        return "error"
    return "went on" if any(each["errors"] for each in seen.values()) else "right"


def isolate() -> None:
    """Begin again in a network namespace of its own, where that can be had."""
    unshare = shutil.which("unshare")
    if unshare is None or shutil.which("ip") is None or INSIDE in os.environ:
        return
    up = [unshare, "--map-root-user", "--net", "ip", "link", "set", "lo", "up"]
    if subprocess.run(up, capture_output=True, check=False).returncode == 0:
        os.execve(unshare, [*up[:3], sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


def work(numbers: list[int]) -> None:
    """Run some scenes, and print what became of each as a line of JSON."""
    isolate()
    if INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for number in numbers:
        scene = Scene.drawn(number)
        if scene.kind == LINK and INSIDE not in os.environ:
            continue
        for _ in range(3):
            with tempfile.TemporaryDirectory(prefix="wholebatch-fault-") as folder:
                seen, seconds = play(scene, Path(folder))
            if seconds is not None:
                break
        wrong = judge(scene, seen, seconds)
        print(json.dumps([number, outcome(seen), seconds, wrong, seen]), flush=True)
        if wrong:
            print(f"{scene}: {'; '.join(wrong)}", file=sys.stderr, flush=True)


def main() -> int:
    parser = arguments(__doc__, "benchmarks/rank_faults.py")
    parser.add_argument("--runs", type=int, default=200, help="how many")
    parser.add_argument("--only", type=int, help="the run of this number alone, and all that its ranks have seen")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time: most of their time is waiting")
    parser.add_argument("--numbers", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.numbers:
        work(options.numbers)
        return 0
    numbers = range(len(KINDS) if options.quick else options.runs) if options.only is None else [options.only]
    shares = [list(numbers)[job :: options.jobs] for job in range(min(options.jobs, len(numbers)))]
    workers = [
        subprocess.Popen([sys.executable, __file__, "--numbers", json.dumps(share)], stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    lines = [line for worker in workers for line in worker.communicate()[0].splitlines()]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a worker failed")
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    longest: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    failures = []
    for number, became, seconds, wrong, seen in sorted(map(json.loads, lines), key=lambda line: line[0]):
        scene = Scene.drawn(number)
        counts[scene.kind][became if not wrong else "wrong"] += 1
        longest[scene.kind] = max(longest[scene.kind], seconds or 0.0)
        if wrong:
            failures.append(f"- {scene}: {'; '.join(wrong)}")
        if options.only is not None:
            print(json.dumps(seen, indent=1), file=sys.stderr)
    words = ("right", "went on", "error", "wrong")
    rows = [
        [kind, str(sum(count.values())), *(str(count[word]) for word in words), f"{longest[kind]:.1f}"]
        for kind, count in counts.items()
    ]
    headings = ["fault", "runs", "all updates", "error, then all updates", "error on every rank", "WRONG", "longest, s"]
    intro = (
        f"{len(lines)} runs, {options.jobs} at a time, the time-out of the process group {TIME_OUT:g} s; *longest* is "
        "the time from the fault until the last rank had ended (for a rank stopped for good, from when it went on)."
    )
    missing = [] if len(lines) == len(numbers) else ["The link was not taken down: there are no network namespaces."]
    text = "\n\n".join([intro, table(headings, rows), *missing, *(["\n".join(failures)] if failures else [])])
    bars = [
        Bar("runs that end wrong, unclear or late", sum(count["wrong"] for count in counts.values()), 0, digits=0),
        Bar("longest from a fault to the end of a rank, s", max(longest.values()), TIME_OUT + SLACK, digits=1),
    ]
    return tell("One fault a run, on several ranks", "rank_faults", options, ["wholebatch", "torch"], text, bars)


if __name__ == "__main__":
    sys.exit(main())
