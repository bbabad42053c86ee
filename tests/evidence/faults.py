"""Steps as people write them: twelve mistakes, each in several spellings, and the same loops without the mistake.

The line to change is marked with ``# here``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from menagerie import (
    TiedHead,
    mean_over_labels,
    mean_square,
    mlp,
    num_labels,
    regression,
    sum_over_labels,
    texts,
)

Step = Callable[..., object]


@dataclass(frozen=True)
class Scene:
    """What is trained: `model()`, a loss that declares its targets, and a batch that is cut into `rows` at a time."""

    model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Any]
    batch: Callable[[int, torch.dtype], Any]
    targets: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def count(batch: Any) -> Tensor:
    return num_labels(batch).clamp(min=1)


def by_share(model: nn.Module, micro_batch: Any, micro_batches: Sequence[Any]) -> Tensor:
    """The loss of a micro-batch, weighted as it should be."""
    return sum_over_labels(model, micro_batch) / sum(num_labels(each) for each in micro_batches)


TEXTS = Scene(TiedHead, mean_over_labels, texts, num_labels)
ROWS = Scene(mlp, mean_square, regression)
HALF = Scene(mlp, mean_square, regression, dtype=torch.bfloat16)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)  # here
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.drop = nn.Dropout(0.5)  # here
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))


class Calm(nn.Module):
    """The clean counterpart of the two above."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Experts(nn.Module):
    """A mixture with a soft router, whose balancing loss is a product of two means over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(5, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.embed(x))
        share = self.router(hidden).softmax(-1)
        return sum(share[:, k, None] * expert(hidden) for k, expert in enumerate(self.experts)), share


def balance(share: Tensor) -> Tensor:
    chosen = nn.functional.one_hot(share.argmax(-1), share.shape[1]).to(share.dtype)
    return share.shape[1] * (chosen.mean(0) * share.mean(0)).sum()


def balanced(model: nn.Module, batch: Any) -> Tensor:
    y, share = model(batch["x"])
    return mse_loss(y, batch["y"]) + 0.1 * balance(share)  # here


def unbalanced(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(batch["x"])[0], batch["y"])


class Towers(nn.Module):
    """Two towers and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.left(x), dim=-1), normalize(self.right(y), dim=-1)


def contrast(left: Tensor, right: Tensor, log_scale: Tensor) -> Tensor:
    return cross_entropy(log_scale.exp() * left @ right.T, torch.arange(len(left)))


def pairs_loss(model: Any, batch: Any) -> Tensor:
    return contrast(*model(batch["x"], batch["y"]), model.log_scale)


NORMED = Scene(Normed, mean_square, regression)
DROPPING = Scene(Dropping, mean_square, regression)
EXPERTS = Scene(Experts, balanced, regression)
PAIRS = Scene(Towers, pairs_loss, regression)


# Clean loops


def weighted(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
    optimizer.step()


def weighted_by_rows(model, optimizer, micro_batches):
    model.train()
    total = sum(len(micro_batch["x"]) for micro_batch in micro_batches)
    for micro_batch in micro_batches:
        (mse_loss(model(micro_batch["x"]), micro_batch["y"]) * len(micro_batch["x"]) / total).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def divided_at_the_end(model, optimizer, micro_batches, lr_scheduler):
    optimizer.zero_grad()
    targets = 0
    for micro_batch in micro_batches:
        sum_over_labels(model, micro_batch).backward()
        targets += int(num_labels(micro_batch))
    for parameter in model.parameters():
        parameter.grad /= targets
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()


def clipped_hard(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
    clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def clipped_by_value(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
    clip_grad_value_(model.parameters(), 1e-2)
    optimizer.step()


def clipped_by_layer(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
    for parameter in model.parameters():
        clip_grad_norm_([parameter], 1e-2)
    optimizer.step()


def functional(model, optimizer, micro_batches):
    weights = list(model.parameters())
    sums = [torch.zeros_like(weight) for weight in weights]
    for micro_batch in micro_batches:
        loss = by_share(model, micro_batch, micro_batches)
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total
    optimizer.step()


def one_backward(model, optimizer, micro_batches):
    optimizer.zero_grad()
    torch.stack([by_share(model, micro_batch, micro_batches) for micro_batch in micro_batches]).sum().backward()
    optimizer.step()


def skips_large_gradients(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
    if clip_grad_norm_(model.parameters(), 1e9) > 1e3:
        return
    optimizer.step()


def starts_anew(model, optimizer, micro_batches):
    parts = list(micro_batches)
    while True:
        optimizer.zero_grad()
        try:
            for part in parts:
                by_share(model, part, parts).backward()
            break
        except torch.OutOfMemoryError:
            parts = [half for part in parts for half in halves(part)]
    optimizer.step()


def gives_up(model, optimizer, micro_batches):
    optimizer.zero_grad()
    try:
        for micro_batch in micro_batches:
            by_share(model, micro_batch, micro_batches).backward()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        optimizer.zero_grad()
        return
    optimizer.step()


def sums_in_float32(model, optimizer, micro_batches):
    total = sum(len(micro_batch["x"]) for micro_batch in micro_batches)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in model.parameters()]
    for micro_batch in micro_batches:
        (mean_square(model, micro_batch) * len(micro_batch["x"]) / total).backward()
        for weight, into in zip(model.parameters(), sums, strict=True):
            into += weight.grad
            weight.grad = None
    for weight, into in zip(model.parameters(), sums, strict=True):
        weight.grad = into.to(weight.dtype)
    optimizer.step()
    optimizer.zero_grad()


def cached(model, optimizer, micro_batches):
    """Two passes: the loss of all embeddings first, then the embeddings again, with the gradient that was found."""
    optimizer.zero_grad()
    with torch.no_grad():
        pairs = [model(each["x"], each["y"]) for each in micro_batches]
    left, right = (torch.cat(side).requires_grad_() for side in zip(*pairs, strict=True))
    contrast(left, right, model.log_scale).backward()
    start = 0
    for each in micro_batches:
        end = start + len(each["x"])
        one, other = model(each["x"], each["y"])
        torch.autograd.backward([one, other], [left.grad[start:end], right.grad[start:end]])
        start = end
    optimizer.step()


def term_once(model, optimizer, micro_batches):
    """The balancing loss of the whole window, from its own forward pass."""
    optimizer.zero_grad()
    total = sum(len(each["x"]) for each in micro_batches)
    for each in micro_batches:
        (unbalanced(model, each) * len(each["x"]) / total).backward()
    (0.1 * balance(model(torch.cat([each["x"] for each in micro_batches]))[1])).backward()
    optimizer.step()


def halves(part: Any) -> list[Any]:
    half = -(-len(part["tokens"]) // 2)
    both = [{name: x[:half] for name, x in part.items()}, {name: x[half:] for name, x in part.items()}]
    return [each for each in both if len(each["tokens"])]


CLEAN: dict[str, tuple[Scene, Step]] = {
    "weighted": (TEXTS, weighted),
    "weighted by rows": (ROWS, weighted_by_rows),
    "divided at the end": (TEXTS, divided_at_the_end),
    "clipped hard": (TEXTS, clipped_hard),
    "clipped by value": (TEXTS, clipped_by_value),
    "clipped by layer": (TEXTS, clipped_by_layer),
    "functional": (TEXTS, functional),
    "one backward": (TEXTS, one_backward),
    "skips large gradients": (TEXTS, skips_large_gradients),
    "starts anew": (TEXTS, starts_anew),
    "gives up": (TEXTS, gives_up),
    "sums in float32": (HALF, sums_in_float32),
    "two passes": (PAIRS, cached),
    "term once": (EXPERTS, term_once),
    "layer norm": (Scene(Calm, mean_square, regression), weighted_by_rows),
}


# Mean of means


def divided_by_their_number(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        logits = model(micro_batch["tokens"])
        loss = cross_entropy(logits.flatten(0, 1), micro_batch["labels"].flatten(), ignore_index=-100)
        loss = loss / len(micro_batches)  # here
        loss.backward()
    optimizer.step()


def mean_of_stacked_losses(model, optimizer, micro_batches):
    losses = [mean_over_labels(model, micro_batch) for micro_batch in micro_batches]
    torch.stack(losses).mean().backward()  # here
    optimizer.step()
    optimizer.zero_grad()


def divided_after_the_sum(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        mean_over_labels(model, micro_batch).backward()
    for parameter in model.parameters():
        parameter.grad.div_(len(micro_batches))  # here
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def mean_of_means_clipped(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        (mean_over_labels(model, micro_batch) / len(micro_batches)).backward()  # here
    clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


# Ragged last window

ACCUMULATE = 3


def fixed_number(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for place, micro_batch in enumerate(micro_batches):
        loss = mean_square(model, micro_batch) / ACCUMULATE  # here
        loss.backward()
        if (place + 1) % ACCUMULATE == 0 or place + 1 == len(micro_batches):
            optimizer.step()
            optimizer.zero_grad()


def fixed_number_of_four(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        (mean_square(model, micro_batch) / 4).backward()  # here
    optimizer.step()


def only_full_windows(model, optimizer, micro_batches):
    for place, micro_batch in enumerate(micro_batches):
        (mean_square(model, micro_batch) * len(micro_batch["x"]) / sum(len(m["x"]) for m in micro_batches)).backward()
        if (place + 1) % ACCUMULATE == 0:
            optimizer.step()  # here
            optimizer.zero_grad()


def windows_of_two(model, optimizer, micro_batches):
    for place, micro_batch in enumerate(micro_batches):
        loss = mean_square(model, micro_batch)
        loss = loss / 2  # here
        loss.backward()
        if (place + 1) % 2 == 0 or place == len(micro_batches) - 1:
            optimizer.step()
            optimizer.zero_grad()


def windows_of_five(model, optimizer, micro_batches):
    for place, micro_batch in enumerate(micro_batches):
        (mean_square(model, micro_batch) / 5).backward()
        if (place + 1) % 5 == 0:
            optimizer.step()  # here
            optimizer.zero_grad()


# Temperature counted k times


def cached_with_the_temperature_twice(model, optimizer, micro_batches):
    optimizer.zero_grad()
    with torch.no_grad():
        pairs = [model(each["x"], each["y"]) for each in micro_batches]
    for place, each in enumerate(micro_batches):
        again = [*pairs[:place], model(each["x"], each["y"]), *pairs[place + 1 :]]
        left, right = (torch.cat(side) for side in zip(*again, strict=True))
        contrast(left, right, model.log_scale).backward()  # here
    optimizer.step()


def scaled_by_hand(model, optimizer, micro_batches):
    weighted_pairs = [model(each["x"], each["y"]) for each in micro_batches]
    losses = []
    for place in range(len(weighted_pairs)):
        sides = [
            [x if at == place else x.detach() for at, x in enumerate(side)]
            for side in zip(*weighted_pairs, strict=True)
        ]
        losses.append(contrast(torch.cat(sides[0]), torch.cat(sides[1]), model.log_scale))
    optimizer.zero_grad()
    sum(losses).backward()  # here
    optimizer.step()


# Balancing loss per micro-batch


def balance_added_each_time(model, optimizer, micro_batches):
    optimizer.zero_grad()
    total = sum(len(each["x"]) for each in micro_batches)
    for each in micro_batches:
        y, share = model(each["x"])
        loss = mse_loss(y, each["y"]) * len(each["x"]) / total
        aux_loss = 0.1 * balance(share)
        (loss + aux_loss).backward()  # here
    optimizer.step()


def balance_averaged(model, optimizer, micro_batches):
    optimizer.zero_grad()
    total = sum(len(each["x"]) for each in micro_batches)
    for each in micro_batches:
        y, share = model(each["x"])
        aux_loss = 0.1 * balance(share)  # here
        ((mse_loss(y, each["y"]) + aux_loss) * len(each["x"]) / total).backward()
    optimizer.step()


def decay_added_each_time(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for each in micro_batches:
        penalty = 0.1 * sum(weight.square().sum() for weight in model.parameters())
        loss = mse_loss(model(each["x"]), each["y"]) * len(each["x"]) / sum(len(m["x"]) for m in micro_batches)
        (loss + penalty).backward()  # here
    optimizer.step()


def decayed(model: nn.Module, batch: Any) -> Tensor:
    return mean_square(model, batch) + 0.1 * sum(weight.square().sum() for weight in model.parameters())


# Optimizer stepped per micro-batch


def steps_inside(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        optimizer.zero_grad()
        (mean_over_labels(model, micro_batch) / len(micro_batches)).backward()
        optimizer.step()  # here


def steps_without_clearing(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
        update(optimizer)


def update(optimizer):
    optimizer.step()  # here


class Trainer:
    def __init__(self):
        self.clip = 1.0

    def train_step(self, model, optimizer, micro_batches):
        for micro_batch in micro_batches:
            by_share(model, micro_batch, micro_batches).backward()
            clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()  # here
            optimizer.zero_grad()


# Retry on partial gradients


def halves_after_failure(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        try:
            by_share(model, micro_batch, micro_batches).backward()
        except torch.cuda.OutOfMemoryError:  # here
            torch.cuda.empty_cache()
            for half in halves(micro_batch):
                by_share(model, half, micro_batches).backward()
    optimizer.step()


def whole_window_again(model, optimizer, micro_batches):
    optimizer.zero_grad()
    parts = micro_batches
    for _attempt in range(3):
        try:
            for part in parts:
                by_share(model, part, parts).backward()
            break
        except RuntimeError as error:  # here
            if "out of memory" not in str(error):
                raise
            parts = [half for part in parts for half in halves(part)]
    optimizer.step()


def asks_a_friend(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        for _attempt in range(2):
            if tried(model, micro_batch, micro_batches):
                break
    optimizer.step()


def tried(model, micro_batch, micro_batches):
    try:
        by_share(model, micro_batch, micro_batches).backward()
    except Exception:  # here
        return False
    return True


# Stagnating bf16 sums


def adds_in_bfloat16(model, optimizer, micro_batches):
    optimizer.zero_grad()
    total = sum(len(each["x"]) for each in micro_batches)
    for micro_batch in micro_batches:
        (mean_square(model, micro_batch) * len(micro_batch["x"]) / total).backward()  # here
    optimizer.step()


def adds_in_buffers_of_bfloat16(model, optimizer, micro_batches):
    total = sum(len(each["x"]) for each in micro_batches)
    sums = [torch.zeros_like(weight) for weight in model.parameters()]
    for micro_batch in micro_batches:
        (mean_square(model, micro_batch) * len(micro_batch["x"]) / total).backward()  # here
        for weight, into in zip(model.parameters(), sums, strict=True):
            into += weight.grad
            weight.grad = None
    for weight, into in zip(model.parameters(), sums, strict=True):
        weight.grad = into
    optimizer.step()


# Clipping before the sum


def clips_inside(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # here
    optimizer.step()


def clips_inside_gently(model, optimizer, micro_batches):
    """A norm that this batch never reaches, so that nothing shows until it does."""
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
        clip_grad_norm_(model.parameters(), 1e3)  # here
    optimizer.step()


def clips_values_inside(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
        for parameter in model.parameters():
            parameter.grad.data.clamp_(-1e-3, 1e-3)  # here
    optimizer.step()


def clips_each_gradient(model, optimizer, micro_batches):
    weights = list(model.parameters())
    sums = [torch.zeros_like(weight) for weight in weights]
    for micro_batch in micro_batches:
        gradients = torch.autograd.grad(by_share(model, micro_batch, micro_batches), weights)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = (1e-3 / (norm + 1e-6)).clamp(max=1.0)  # here
        for total, gradient in zip(sums, gradients, strict=True):
            total += factor * gradient
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total
    optimizer.step()


# Scheduler per micro-batch


def schedules_inside(model, optimizer, micro_batches, scheduler):
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        by_share(model, micro_batch, micro_batches).backward()
        scheduler.step()  # here
    optimizer.step()


def schedules_at_every_step(model, optimizer, micro_batches, *, lr_scheduler):
    for micro_batch in micro_batches:
        optimizer.zero_grad()
        by_share(model, micro_batch, micro_batches).backward()
        optimizer.step()
        lr_scheduler.step()  # here


class WithSchedule:
    """It brings its schedule along."""

    def __init__(self):
        weight = nn.Parameter(torch.ones(1))
        self.schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight], lr=1.0), 1)

    def __call__(self, model, optimizer, micro_batches):
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            by_share(model, micro_batch, micro_batches).backward()
            self.schedule.step()  # here
        optimizer.step()


# Dropped micro-batches


def clears_inside(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        optimizer.zero_grad()  # here
        by_share(model, micro_batch, micro_batches).backward()
    optimizer.step()


def clears_the_model_inside(model, optimizer, micro_batches):
    for micro_batch in micro_batches:
        model.zero_grad()  # here
        (mean_over_labels(model, micro_batch) / len(micro_batches)).backward()
    optimizer.step()


def leaves_out_the_last(model, optimizer, micro_batches):
    optimizer.zero_grad()
    total = sum(num_labels(each) for each in micro_batches)
    for micro_batch in micro_batches[:-1]:
        (sum_over_labels(model, micro_batch) / total).backward()  # here
    optimizer.step()


def leaves_out_the_short(model, optimizer, micro_batches):
    optimizer.zero_grad()
    rows = len(micro_batches[0]["tokens"])
    for micro_batch in micro_batches:
        if len(micro_batch["tokens"]) < rows:
            continue
        by_share(model, micro_batch, micro_batches).backward()  # here
    optimizer.step()


DECAYED = Scene(mlp, decayed, regression)
PLAIN_EXPERTS = Scene(Experts, unbalanced, regression)

FAULTS: dict[str, dict[str, tuple[Scene, Step | None, Any]]] = {
    "batch norm": {
        "model": (NORMED, None, Normed),
        "step": (NORMED, weighted_by_rows, Normed),
    },
    "dropout": {
        "model": (DROPPING, None, Dropping),
        "step": (DROPPING, weighted_by_rows, Dropping),
    },
    "mean of means": {
        each.__name__: (TEXTS, each, each)
        for each in (divided_by_their_number, mean_of_stacked_losses, divided_after_the_sum, mean_of_means_clipped)
    },
    "ragged last window": {
        each.__name__: (ROWS, each, each)
        for each in (fixed_number, fixed_number_of_four, only_full_windows, windows_of_two, windows_of_five)
    },
    "temperature counted k times": {
        each.__name__: (PAIRS, each, each) for each in (cached_with_the_temperature_twice, scaled_by_hand)
    },
    "balancing loss": {
        "loss": (EXPERTS, None, balanced),
        "averaged": (EXPERTS, balance_averaged, balanced),
        "added": (EXPERTS, balance_added_each_time, balance_added_each_time),
        "decay": (DECAYED, decay_added_each_time, decay_added_each_time),
    },
    "optimizer stepped per micro-batch": {
        "inside": (TEXTS, steps_inside, steps_inside),
        "elsewhere": (TEXTS, steps_without_clearing, update),
        "method": (TEXTS, Trainer().train_step, Trainer.train_step),
    },
    "retry on partial gradients": {
        "halves": (TEXTS, halves_after_failure, halves_after_failure),
        "window": (TEXTS, whole_window_again, whole_window_again),
        "elsewhere": (TEXTS, asks_a_friend, tried),
    },
    "stagnating bf16 sums": {
        each.__name__: (HALF, each, each) for each in (adds_in_bfloat16, adds_in_buffers_of_bfloat16)
    },
    "clipping before the sum": {
        each.__name__: (TEXTS, each, each)
        for each in (clips_inside, clips_inside_gently, clips_values_inside, clips_each_gradient)
    },
    "scheduler per micro-batch": {
        "inside": (TEXTS, schedules_inside, schedules_inside),
        "its own": (TEXTS, WithSchedule(), WithSchedule.__call__),
    },
    "dropped micro-batches": {
        each.__name__: (TEXTS, each, each)
        for each in (clears_inside, clears_the_model_inside, leaves_out_the_last, leaves_out_the_short)
    },
}
"""By name and spelling: what is trained, the step (None: loss and model alone), and what holds the line to change."""
