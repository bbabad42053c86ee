"""What do ranks share that go their own ways for a while? Accumulated gradient normalization."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import rpc
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from wholebatch.core.batch import count_rows
from wholebatch.core.errors import ConfigError, LossError, OptimizerError, WindowError
from wholebatch.core.weights import Reduction
from wholebatch.engine import memory
from wholebatch.engine.device import input_device, move
from wholebatch.engine.objective import LossFn, Objective, TargetsFn, learns, plain_count
from wholebatch.engine.ranks.center import Center, Reduced, Vectors
from wholebatch.engine.setup import check_belonging


@dataclass(frozen=True, slots=True)
class LocalStep:
    """What one local step was.

    Attributes:
        loss: Mean over the targets of these rows, at the weights before the step, without a graph. Shape ``[]``. None
            where there was nothing to learn.
        number: Local steps of this rank so far, from 1.
        merged: Whether what this rank has found was added to the center after this step; its weights are the center
            then.
        merges: How often that has happened.
        stale: Commits of other ranks that this rank's exploration, now merged, did not know of. 0 where ranks wait for
            each other.
        skipped: Why an exploration was thrown away instead of added, or None.
    """

    loss: Tensor | None
    number: int
    merged: bool
    merges: int
    stale: int = 0
    skipped: str | None = None


class AccumulatedGradientNormalization:
    """Trains on several ranks that speak seldom: each makes some steps of its own, and adds their mean to the center.

    With center c, learning rate eta and k local steps, each rank, from w_0 = c,

        w_j = w_(j-1) - eta grad L_j(w_(j-1)),  j = 1 ... k,        then commits (w_k - c) / k,

    which is added to the center; its weights become the center again. So the center moves by a mean of k steps, however
    long the rank was on its own; without the division it would move k times as far, along gradients that are k times as
    old, which goes astray where k or the number of ranks is large.

    **This is not gradient accumulation, and the result is not that of a large batch.** Weights move at every local
    step. The commits of n ranks are added, not averaged, as published: the center moves up to n times as fast as one
    rank, and a learning rate is right for one n. With one rank and one local step it is the optimizer alone.

    Synchronous, all ranks commit at once, by one reduction, and wait for the slowest: local SGD with an outer learning
    rate of n / k. Asynchronous, the center lives on rank 0 (a parameter server), and each rank commits when it is
    ready, through `torch.distributed.rpc`; two runs are not the same then.

    Args:
        model: The module whose parameters learn: plain, not in DDP nor sharded. Its buffers stay each rank's own.
        optimizer: Makes the local steps; ``torch.optim.SGD(model.parameters(), lr=eta)`` is the published one. Another
            keeps its state on its rank.
        loss_fn: ``loss_fn(model, batch)``, as for `wb.Accumulator`.
        local_steps: k, the steps between two commits.
        synchronous: Whether ranks wait for each other.
        targets: What a loss that is a sum is divided by, as for `wb.Accumulator`. Default: rows.
        reduction: What `loss_fn` returns: ``"mean"`` over its targets, or their ``"sum"``.
        normalize: False leaves the division out, for comparison.
        process_group: The ranks of the synchronous variant. Default: all of `torch.distributed`; one process is a group
            of one.
        timeout: How long the asynchronous variant waits for an answer. Unit: seconds.
        center: What holds the center in the place of both variants, such as another way to send it. Default: as
            `synchronous` says.

    Raises:
        OptimizerError: Model and optimizer do not belong together, or a wrapper averages gradients already.
        LossError: `loss_fn` cannot be called.
        ConfigError: There is no local step, or the ranks do not know of each other.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> exploring = AccumulatedGradientNormalization(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        ...     local_steps=2,
        ... )
        >>> with exploring:
        ...     for _ in range(3):
        ...         step = exploring.step({"x": torch.ones(8, 3), "y": torch.zeros(8, 1)})
        ...         print(step.number, step.merged)
        1 False
        2 True
        3 False

    Source: Accumulated Gradient Normalization (Hermans, Spanakis and Moeckel, 2017), arXiv 1710.02368.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        local_steps: int,
        synchronous: bool = True,
        targets: TargetsFn | None = None,
        reduction: Reduction = "mean",
        normalize: bool = True,
        process_group: Any = None,
        timeout: float = 600.0,
        center: Center | None = None,
    ) -> None:
        if not _makes_a_step(local_steps):
            raise ConfigError(f"local_steps={local_steps!r} makes no step.", hint="pass a whole number, 1 or more.")
        if not synchronous and process_group is not None:
            raise ConfigError(
                "The asynchronous variant takes no process group: every rank that torch.distributed.rpc knows adds.",
                hint="leave process_group out, or take synchronous=True.",
            )
        if not callable(loss_fn):
            raise LossError(
                f"loss_fn is a {type(loss_fn).__name__}, which cannot be called.",
                hint="pass a function of the model and a batch: each local step runs it.",
            )
        check_belonging(model, (optimizer,))
        self._parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
        if isinstance(model, DistributedDataParallel) or any(isinstance(each, DTensor) for each in self._parameters):
            raise OptimizerError(
                "The model is wrapped for data parallel training, whose gradients all ranks share at every step.",
                hint="pass the plain module: here each rank explores on its own.",
            )
        self._model = model
        self._optimizer = optimizer
        self._objective = Objective(loss_fn, targets, reduction)
        self._device = input_device(model)
        self._local_steps = local_steps
        self._normalize = normalize
        self._since = 0  # local steps since the last merge, and those of them that moved the weights
        self._moves = 0
        self._number = 0
        self._merges = 0
        self._closed = False
        if center is None:
            center = Reduced(process_group) if synchronous else _served(timeout)
        self._center = center
        with self._parting_from_errors():
            self._pull(self._center.start(vectors(self._parameters)))

    def step(self, batch: Any) -> LocalStep:
        """Make one step of this rank, and after each `local_steps` of them add what they found to the center.

        Args:
            batch: What `loss_fn` takes: rows that this rank alone sees. None has nothing to learn from.

        Returns:
            What the step was.

        Raises:
            LossError, WeightError: As for `wb.Accumulator`.
            WindowError: It is closed.
            RankError: Another rank has failed.
        """
        if self._closed:
            raise WindowError("These ranks have parted: close() was called.", hint="make a new one to train on.")
        loss = self._explore(batch)
        self._number += 1
        self._since += 1
        if self._since < self._local_steps:
            return LocalStep(loss, self._number, merged=False, merges=self._merges)
        stale, skipped = self._merge()
        return LocalStep(loss, self._number, skipped is None, self._merges, stale, skipped)

    def finish(self) -> None:
        """Add what is left, and wait until all ranks have done so: then all have the same weights.

        To be called by every rank at the end of an epoch, before validation, and at the end. Ranks may have made
        different numbers of steps. A rank that calls it at once takes no part in the epoch beyond holding the center.

        Raises:
            RankError: Another rank has failed.
        """
        if self._since:
            self._merge()
        self._pull(self._center.finish())

    def close(self) -> None:
        """Finish, and take down what was set up between the ranks. Also done at the end of a ``with`` block."""
        if not self._closed:
            with self._parting_from_errors():
                self.finish()
            self._end()

    def __enter__(self) -> "AccumulatedGradientNormalization":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception) and not self._closed:  # Ctrl-C waits for nobody
            self._end(memory.in_a_line(error))

    @contextmanager
    def _parting_from_errors(self) -> Iterator[None]:
        """Let an error here leave nothing set up between the ranks."""
        try:
            yield
        except Exception as error:
            self._end(memory.in_a_line(error))
            raise

    def _end(self, failure: str | None = None) -> None:
        self._closed = True
        self._center.close(failure)

    def _explore(self, batch: Any) -> Tensor | None:
        self._optimizer.zero_grad()
        if batch is None:
            return None
        batch = move(batch, self._device)
        count = 1 if self._objective.targets is None and self._objective.reduction == "mean" else None
        if count is None:
            count = self._objective.count(batch, count_rows(batch))
        part = self._objective(self._model, batch, count)
        if not learns(part):
            return None
        loss = part.loss / plain_count(part.targets) if part.reduction == "sum" else part.loss
        loss = loss if part.once is None else loss + part.once
        loss.backward()
        self._optimizer.step()
        self._moves += 1
        return loss.detach()

    @torch.no_grad()
    def _merge(self) -> tuple[int, str | None]:
        found = vectors(self._parameters)
        for each, start in zip(found, self._start, strict=True):
            each.sub_(start)
            if self._normalize and self._moves > 1:
                each.div_(self._moves)
        finite = all(bool(each.isfinite().all()) for each in found)
        center, stale = self._center.commit(found if finite else None)
        self._pull(center)
        self._merges += 1
        return stale, None if finite else "the weights that were found are infinite or not numbers"

    @torch.no_grad()
    def _pull(self, center: Vectors) -> None:
        for parameter, values in views(self._parameters, center):
            parameter.copy_(values)
        self._start = vectors(self._parameters)  # what the weights hold of the center, where they have fewer bits
        self._since = self._moves = 0


def _served(timeout: float) -> Center:
    if not rpc.is_available():
        raise ConfigError(
            "This PyTorch was built without torch.distributed.rpc, which carries the asynchronous variant.",
            hint="take synchronous=True, or a build of PyTorch with RPC.",
        )
    from wholebatch.engine.ranks.served import Served

    return Served(timeout)


def vectors(parameters: Sequence[nn.Parameter]) -> Vectors:
    """Return weights side by side: a copy, in 32 bits at least, one vector for each device and dtype."""
    return [
        torch.cat([_real(each).reshape(-1).to(dtype) for each in parts])
        for (_, dtype), parts in _kinds(parameters).items()
    ]


def views(parameters: Sequence[nn.Parameter], side_by_side: Vectors) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with its part of the vectors, in its shape."""
    for parts, vector in zip(_kinds(parameters).values(), side_by_side, strict=True):
        places = torch.split(vector, [_real(each).numel() for each in parts])
        for parameter, place in zip(parts, places, strict=True):
            shaped = place.view(_real(parameter).shape)
            yield parameter, torch.view_as_complex(shaped) if parameter.is_complex() else shaped


def _kinds(parameters: Sequence[nn.Parameter]) -> dict[tuple[torch.device, torch.dtype], list[nn.Parameter]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for each in parameters:
        wide = torch.promote_types(each.dtype.to_real(), torch.float32)
        kinds.setdefault((each.device, wide), []).append(each)
    return kinds


def _real(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return torch.view_as_real(parameter) if parameter.is_complex() else parameter


def _makes_a_step(local_steps: object) -> bool:
    return isinstance(local_steps, int) and local_steps >= 1
