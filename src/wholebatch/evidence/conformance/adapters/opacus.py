"""Opacus: `BatchMemoryManager`, which cuts the logical batches of a loader into physical ones.

As in the docstrings of `BatchMemoryManager` and of `PrivacyEngine.make_private`, with what makes training private taken
out: no noise, no Poisson sampling, and a bound for the gradient of a row that none reaches. What is left is a mean over
the rows of a logical batch: it cuts rows, and takes the loss for a mean over rows, whatever it is.

Its divisor is ``expected_batch_size``, which `make_private` takes to be the rows of an epoch over the number of its
logical batches, rounded down. Where the last one is short, none of them may have that many rows.
"""

from torch.optim import SGD
from torch.utils.data import DataLoader

from wholebatch.evidence.conformance.scenes import ROWS
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import MicroBatch, NotExpressible, PairTask, Task, Trained, steps_of


def train(task: Task | PairTask) -> Trained:
    """Train with physical batches of the rows of a micro-batch."""
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    assert isinstance(task, Task)
    rows: list[MicroBatch] = [
        {name: tensor[row] for name, tensor in micro_batch.items()}
        for micro_batch in task.epoch
        if micro_batch is not None
        for row in range(ROWS)
    ]
    if len({int(task.targets(row)) for row in rows}) > 1:
        raise NotExpressible("its mean is over rows: rows with different numbers of labels all weigh the same")
    plain = task.make_model()
    sgd = SGD(plain.parameters(), lr=task.lr)
    steps = steps_of(sgd)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=plain,
        optimizer=sgd,
        data_loader=DataLoader(rows, batch_size=task.window * ROWS, shuffle=False),  # type: ignore[arg-type]
        noise_multiplier=0.0,
        max_grad_norm=1e10,
        poisson_sampling=False,
    )
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=ROWS, optimizer=optimizer) as physical:
        for epoch in range(task.epochs):
            for place, micro_batch in enumerate(physical, epoch * len(task.epoch)):
                if task.zero_first:
                    optimizer.zero_grad()
                task.loss(model, micro_batch).backward()
                if place in task.evaluates_after:
                    task.evaluate(model)
                optimizer.step()
                if not task.zero_first:
                    optimizer.zero_grad()
    return Trained(plain, steps())


opacus = System(
    name="opacus",
    title="Opacus, BatchMemoryManager",
    train=train,
    expresses=frozenset({"zero first", "evaluation", "runs short"}),
    lacks={
        "fp16": "it clips the gradients of rows, and does not know a loss scale",
        "two optimizers": "it makes one optimizer private",
        "stops": "it has no way to save a logical batch of which some is still to come",
    },
    distributions=("opacus", "torch"),
    install="pip install 'wholebatch[opacus]'",
)
