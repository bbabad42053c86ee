"""A run that is stopped inside a window, and goes on in another process. Run by test_saving.py.

Arguments: kind of run, path of the checkpoint (or - for none), micro-batches until the run is killed (or 0), rows of a
micro-batch from there on, and where to write what came of it.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import wholebatch as wb

WINDOWS, PER_WINDOW, ROWS = 3, 4, 6


class Net(nn.Module):
    """Draws from every random stream, counts in buffers, and shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.ones(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.level.mul_(0.99)
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.head(self.drop(torch.relu(self.second(self.first(x)))) * self.level * scale)


KINDS = {
    "sgd": ({}, torch.float32, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adamw": ({"clip_norm": 0.5}, torch.float32, lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)),
    "fp16": ({"precision": "fp16"}, torch.float32, lambda p: torch.optim.SGD(p, lr=0.1)),
    "bf16 weights": ({}, torch.bfloat16, lambda p: torch.optim.AdamW(p, lr=0.01)),
    "compensated": ({"accumulate_in": "compensated"}, torch.bfloat16, lambda p: torch.optim.SGD(p, lr=0.1)),
    "plain": ({}, torch.float64, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}


def main(kind: str, path: str, kill_after: int, rows: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    options, dtype, make = KINDS[kind]
    model = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)) if kind == "plain" else Net()).to(dtype)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)
    accumulator = wb.Accumulator(model, optimizer, lr_scheduler=schedule, **options)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(WINDOWS, PER_WINDOW * ROWS, 5, generator=generator).to(dtype)
    window_now, row_now = 0, 0
    if Path(path).exists():
        window_now, row_now = wb.load(path, accumulator)
    else:
        rows = ROWS
    updates, done = [], 0
    while window_now < WINDOWS:
        with accumulator.window() as window:
            while row_now < PER_WINDOW * ROWS:
                x = data[window_now, row_now : row_now + rows]
                keep = torch.arange(row_now, row_now + len(x)) % 5 != 0  # uneven targets
                with accumulator.autocast():
                    loss = model(x)[keep].square().mean()
                window.backward(loss, targets=int(keep.sum()), rows=len(x))
                row_now, done = row_now + len(x), done + 1
                if done == kill_after:
                    wb.save(path, accumulator, extra=(window_now, row_now))
                    os.kill(os.getpid(), signal.SIGKILL)
        updates.append(window.update)
        window_now, row_now = window_now + 1, 0
    last = updates[-1]
    torch.save(
        {
            "weights": model.state_dict(),
            "level": getattr(model, "level", None),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.last_epoch,
            "random": [torch.rand(1), random.random(), float(np.random.rand())],
            "records": [(each.number, each.loss, each.targets, each.rows, each.grad_norm, each.lr) for each in updates],
            "scale": accumulator.state_dict()["loss scale"],
            "micro_batches": last.micro_batches,
        },
        out,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
