"""Three models with dropout and batch norm, and a fault that runs out of memory in any phase of a micro-batch."""

import torch
from torch import nn

import wholebatch as wb
from properties import fingerprint

ROWS = 12
SAID = "[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"


class Dense(nn.Module):
    """Batch norm over each micro-batch, and one layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.again = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = nn.functional.dropout(torch.tanh(self.norm(self.first(x))), 0.5, self.training)
        return self.head(self.again(torch.relu(self.again(x))))


def exact():
    """Batch norm over the whole logical batch, so that the micro-batches are joined in one graph."""
    return wb.exact_batch_norm(
        nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 3, 2),
            nn.BatchNorm1d(3),
            nn.Dropout(0.3),
            nn.ReLU(),
            nn.Conv1d(3, 3, 2),
            nn.BatchNorm1d(3),
            nn.Flatten(),
            nn.Linear(9, 2),
        )
    )


class Recurrent(nn.Module):
    """Tied weights, a frozen part and batch norm without weights of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(5, 5), nn.GRU(1, 5, batch_first=True)
        self.norm, self.head, self.frozen = nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.embed(nn.functional.dropout(x, 0.2, self.training))
        x = self.norm(self.layers(x.unsqueeze(2))[0][:, -1])
        return self.head(self.embed(self.frozen(nn.functional.dropout(x, 0.2, self.training))))


MODELS = {"dense": Dense, "exact": exact, "recurrent": Recurrent}


def names_of(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class Fault:
    """Runs out of memory once, at the so manieth time that a phase is reached."""

    def __init__(self, phase=None, at=0):
        self.phase, self.at, self.raised = phase, at, False
        self.seen = {}

    def reach(self, phase):
        place = self.seen[phase] = self.seen.get(phase, -1) + 1
        if phase == self.phase and place == self.at:
            self.raised = True
            raise RuntimeError(SAID)


def phases_of(model):
    return ["forward", "loss", *(f"backward of {name}" for name in names_of(model))]


def prepared(make, fault, *, rows, adaptive=True):
    """Return what trains, and what tells all that it leaves behind."""
    torch.manual_seed(0)
    model = make().double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: fault.reach(f"backward of {name}"))

    def loss_fn(model, micro_batch):
        out = model(micro_batch["x"])  # draws random numbers and moves the running mean first
        fault.reach("forward")
        loss = nn.functional.cross_entropy(out, micro_batch["y"], reduction="sum")
        fault.reach("loss")
        return loss, len(micro_batch["x"])

    parameters = [each for each in model.parameters() if each.requires_grad]
    first = torch.optim.AdamW if adaptive else torch.optim.SGD  # the first makes rounding larger where it divides
    optimizers = [first(parameters[:2], lr=0.1), torch.optim.SGD(parameters[2:], lr=0.1, momentum=0.9)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    accumulator = wb.Accumulator(
        model,
        optimizers,
        loss_fn,
        micro_batch=wb.Rows(rows),
        lr_scheduler=scheduler,
        check=None,
        batch_norm="per_micro_batch",
    )

    def left():
        return fingerprint(
            {
                "model": model.state_dict(),
                "optimizers": [each.state_dict() for each in optimizers],
                "lr": scheduler.get_last_lr(),
                "random": torch.get_rng_state(),
                "gradients": [each.grad for each in model.parameters()],
            }
        )

    torch.manual_seed(7)
    return accumulator, left


def batch():
    draw = torch.Generator().manual_seed(1)
    return {"x": torch.randn(ROWS, 5, generator=draw, dtype=torch.float64), "y": torch.arange(ROWS) % 2}
