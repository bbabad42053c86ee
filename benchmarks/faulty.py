"""What does a rank do on which something goes wrong? A few updates, one fault, and what it saw."""

import contextlib
import json
import os
import random
import signal
import socket
import stat
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import wholebatch as wb
from wholebatch.evidence import reference

UPDATES, ROWS, PARTS, WIDTH = 5, 36, 3, 6
"""Of a run; of a logical batch; micro-batches on each rank; of the model."""

TIME_OUT = 8.0
"""How long ranks wait for each other, as the process group is told. Unit: seconds."""

STOPPED = 5.0
"""How long a rank is stopped. Unit: seconds."""

KILLED, PAUSED, SILENT = "kill a rank", "stop a rank for 5 s", "stop a rank for good"
MEMORY, LOSS = "out of memory on one rank", "raise in the loss of one rank"
SOCKETS, LINK = "close the sockets of one rank", "take the link down"
KINDS = (KILLED, PAUSED, SILENT, MEMORY, LOSS, SOCKETS, LINK)
FORWARD, BACKWARD, STEP, BETWEEN = (
    "in a forward pass",
    "in a backward pass",
    "in the optimizer's step",
    "between updates",
)


class SampleError(Exception):
    """What a user's own code may raise."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One run with one fault.

    Attributes:
        kind: Of the fault.
        ranks: How many train.
        rank: On which of them.
        wrap: How the model is shared.
        use: By which way into the accumulator.
        where: At what the rank is.
        update: In which update, from 0.
        part: At which micro-batch, where that matters.
        seed: Of the data.
    """

    kind: str
    ranks: int
    rank: int
    wrap: str
    use: str
    where: str
    update: int
    part: int
    seed: int

    @classmethod
    def drawn(cls, number: int, kinds: tuple[str, ...] = KINDS) -> "Scene":
        """Return a scene; kinds come in turn, all else by chance."""
        draw = random.Random(number)
        kind = kinds[number % len(kinds)]
        ranks = draw.choice([2, 2, 3])
        places = [FORWARD, BACKWARD] if kind in (MEMORY, LOSS) else [FORWARD, BACKWARD, STEP, BETWEEN]
        return cls(
            kind=kind,
            ranks=ranks,
            rank=draw.randrange(ranks),
            wrap=draw.choice(["bare", "DDP", "FSDP2"]),
            use=draw.choice(["step", "updates"]),
            where=draw.choice(places),
            update=draw.randrange(UPDATES),
            part=draw.randrange(PARTS),
            seed=number,
        )

    def __str__(self) -> str:
        return (
            f"{self.kind}: rank {self.rank} of {self.ranks}, {self.where}, update {self.update}, "
            f"micro-batch {self.part}, {self.wrap}, {self.use}, seed {self.seed}"
        )


def model_of(scene: Scene) -> nn.Sequential:
    torch.manual_seed(scene.seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()


def batches_of(scene: Scene) -> list[dict[str, Tensor]]:
    """Return the logical batches, whose rows weigh differently."""
    torch.manual_seed(scene.seed + 1)
    return [
        {
            "x": torch.randn(ROWS, WIDTH, dtype=torch.float64),
            "y": torch.randn(ROWS, 1, dtype=torch.float64),
            "weight": torch.randint(1, 5, (ROWS, 1)).double(),
        }
        for _ in range(UPDATES)
    ]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ((model(batch["x"]) - batch["y"]) ** 2 * batch["weight"]).sum(), batch["weight"].sum()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def right_weights(scene: Scene) -> list[list[Tensor]]:
    """Return the weights before the first update and after each, by the plain loop on whole logical batches."""
    model = model_of(scene)
    optimizer = adam(model)
    weights = [[parameter.detach().clone() for parameter in model.parameters()]]
    for batch in batches_of(scene):
        reference.update(model, optimizer, loss_fn, batch)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return weights


class Fault:
    """What goes wrong on this rank, once."""

    def __init__(self, scene: Scene, rank: int, tell: int) -> None:
        self.scene = scene
        self.active = rank == scene.rank
        self.update = self.part = 0
        self._tell = tell

    def at(self, where: str, part: int | None = None) -> None:
        """Go wrong, if this is the place and the time."""
        scene = self.scene
        here = self.active and where == scene.where and self.update == scene.update
        if here and part in (None, scene.part):
            self.active = False
            os.write(self._tell, f"{time.monotonic()}\n".encode())
            self._happen()

    def _happen(self) -> None:
        kind = self.scene.kind
        if kind == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind in (PAUSED, SILENT):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif kind == LOSS:
            raise SampleError("row 7 is broken")
        elif kind == SOCKETS:
            shut_sockets()
        else:
            time.sleep(0.3)  # until the link is down


def shut_sockets() -> None:
    """Shut every connection that this process has to another."""
    for name in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name.name)).st_mode):
                with socket.socket(fileno=os.dup(int(name.name))) as connection:
                    connection.getpeername()  # what only listens has no peer
                    connection.shutdown(socket.SHUT_RDWR)


class Trainee:
    """One rank of a scene.

    Args:
        scene: What happens.
        rank: Which it is.
        tell: Where the time of the fault is written.
    """

    def __init__(self, scene: Scene, rank: int, tell: int) -> None:
        self.scene, self.rank = scene, rank
        self.fault = Fault(scene, rank, tell)
        model = model_of(scene)
        self.parameters = list(model.parameters())
        self.model: nn.Module = model
        if scene.wrap == "DDP":
            self.model = DistributedDataParallel(model)
        if scene.wrap == "FSDP2":
            fully_shard(model)
            self.parameters = list(model.parameters())
        optimizer = adam(self.model)
        optimizer.register_step_pre_hook(lambda *_: self.fault.at(STEP))
        each = ROWS // scene.ranks
        self.mine = [
            {name: tensor[rank * each : (rank + 1) * each] for name, tensor in batch.items()}
            for batch in batches_of(scene)
        ]
        rows = wb.Rows(each // PARTS)
        self.accumulator = wb.Accumulator(self.model, optimizer, self.loss_fn, micro_batch=rows, check=None)

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        part = self.fault.part
        self.fault.part += 1
        self.fault.at(FORWARD, part)
        loss_sum, targets = loss_fn(model, batch)
        loss_sum.register_hook(lambda _gradient: self.fault.at(BACKWARD, part))
        return loss_sum, targets

    def make(self, number: int) -> wb.Update:
        batch = self.mine[number]
        if self.scene.use == "step":
            return self.accumulator.step(batch)
        each = len(batch["x"]) // PARTS
        parts = [{name: tensor[k * each : (k + 1) * each] for name, tensor in batch.items()} for k in range(PARTS)]
        (update,) = self.accumulator.updates(parts, micro_batches=PARTS)
        return update

    def off(self, weights: list[Tensor]) -> float:
        """Return how far this rank's weights, or its part of them, are from the right ones, relative."""
        most = 0.0
        for parameter, right in zip(self.parameters, weights, strict=True):
            mine = parameter.detach()
            if isinstance(mine, DTensor):
                mine = mine.to_local()
                pieces = torch.chunk(right, self.scene.ranks)
                right = pieces[self.rank] if self.rank < len(pieces) else right[:0]
            if mine.numel():
                most = max(most, float((mine - right).norm() / right.norm()))
        return most

    def run(self) -> dict[str, Any]:
        """Make the updates, and after an error of the user's own go on; return what was seen."""
        right = right_weights(self.scene)
        errors: list[list[str]] = []
        made = retries = 0
        while made < UPDATES:
            self.fault.update, self.fault.part = made, 0
            try:
                self.fault.at(BETWEEN)
                retries += self.make(made).retries
            except Exception as error:
                errors.append([type(error).__name__, str(error)])
                if self.scene.kind != LOSS or len(errors) > 1:
                    break
                continue
            made += 1
        return {
            "made": made,
            "retries": retries,
            "off": self.off(right[made]),
            "errors": errors,
            "ended": time.monotonic(),
        }


def be_rank(scene: Scene, rank: int, folder: Path, tell: int) -> None:
    """Be one rank of a scene, from joining the others to writing what was seen."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=scene.ranks,
        timeout=timedelta(seconds=TIME_OUT),
    )
    seen = Trainee(scene, rank, tell).run()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
