"""One rank of a run that is killed inside a window, or goes on in it. Run by test_ranks.py.

Arguments: rank, file for the ranks to meet at, path of the checkpoint, file for the weights of the end, and "killed"
for the run that ends behind its checkpoint, with SIGKILL.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import wholebatch as wb
from engine.checkpoint.rank_scenes import Run, seed
from ranks import Place

WRAP = "ddp"


def main(rank: str, store: str, path: str, out: str, *killed: str) -> None:
    torch.set_num_threads(1)
    place = Place(int(rank), 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=place.rank, world_size=place.ranks)
    run = Run(WRAP)
    seed(place)
    if killed:
        run.train(place, WRAP, until=Path(path))
        time.sleep(0.5)  # or the other hears of this end before it has ended itself
        os.kill(os.getpid(), signal.SIGKILL)
    done = wb.load(path, run.accumulator) if Path(path).parent.exists() else (0, 0)
    run.train(place, WRAP, done)
    torch.save(run.weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
