"""Loops as people write them, with helpers, closures, trainers and scalers: some wrong, each in one way, some right."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable

import torch
from faults import ROWS, TEXTS, Scene
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import clip_grad_norm_

from menagerie import mean_over_labels, mean_square, mlp, num_labels, regression, sum_over_labels

FAULTS: dict[str, tuple[str, Scene, Callable[..., object]]] = {}
CLEAN: dict[str, tuple[Scene, Callable[..., object]]] = {}
IN_FLOAT32 = Scene(mlp, mean_square, regression, dtype=torch.float32)


def fault(how, name, scene):
    def keep(step):
        FAULTS[how] = (name, scene, step)
        return step

    return keep


def clean(how, scene):
    def keep(step):
        CLEAN[how] = (scene, step)
        return step

    return keep


# ---- mean of means
@fault("enumerate with nan check", "mean of means", TEXTS)
def mm_tqdm(model, optimizer, micro_batches):
    accumulation_steps = len(micro_batches)
    model.zero_grad()
    total_loss = 0.0
    for i, batch in enumerate(micro_batches):
        logits = model(batch["tokens"])
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        if torch.isnan(loss):
            continue
        loss = loss / accumulation_steps  # here
        loss.backward()
        total_loss += loss.item()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    return total_loss


class Trainer:
    def __init__(self, grad_accum=None):
        self.grad_accum = grad_accum
        self.history = []

    def compute_loss(self, model, batch):
        logits = model(batch["tokens"])
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1), ignore_index=-100)

    def training_step(self, model, batch, n):
        loss = self.compute_loss(model, batch)
        if not torch.isfinite(loss):
            return 0.0
        (loss / n).backward()  # here
        return loss.detach()

    def train_window(self, model, optimizer, micro_batches):
        optimizer.zero_grad(set_to_none=True)
        n = len(micro_batches)
        for mb in micro_batches:
            self.history.append(self.training_step(model, mb, n))
        optimizer.step()


fault("method of a trainer", "mean of means", TEXTS)(Trainer().train_window)


@fault("no_grad buffers", "mean of means", TEXTS)
def mm_buffers(model, optimizer, micro_batches):
    params = [p for p in model.parameters() if p.requires_grad]
    acc = [torch.zeros_like(p) for p in params]
    for mb in micro_batches:
        if num_labels(mb) == 0:
            continue
        loss = mean_over_labels(model, mb)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for a, g in zip(acc, grads, strict=True):
                a.add_(g, alpha=1 / len(micro_batches))  # here
    for p, a in zip(params, acc, strict=True):
        p.grad = a
    optimizer.step()


@fault("stacked losses", "mean of means", TEXTS)
def mm_stack(model, optimizer, micro_batches):
    optimizer.zero_grad()
    losses = [mean_over_labels(model, mb) for mb in micro_batches if num_labels(mb) > 0]
    torch.stack(losses).mean().backward()  # here
    optimizer.step()


@fault("scaler", "mean of means", TEXTS)
def mm_scaler(model, optimizer, micro_batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    for mb in micro_batches:
        loss = sum_over_labels(model, mb) / num_labels(mb).clamp(min=1)
        loss = loss / len(micro_batches)  # here
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()


@fault("divided after the sum", "mean of means", TEXTS)
def mm_post(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for mb in micro_batches:
        (sum_over_labels(model, mb) / num_labels(mb).clamp(min=1)).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= len(micro_batches)  # here
    optimizer.step()


@fault("weighed by rows", "weights", TEXTS)
def mm_weights_by_rows(model, optimizer, micro_batches):
    rows = sum(len(m["tokens"]) for m in micro_batches)
    for mb in micro_batches:
        loss = sum_over_labels(model, mb) / num_labels(mb).clamp(min=1)
        (loss * len(mb["tokens"]) / rows).backward()  # here
    optimizer.step()
    optimizer.zero_grad()


@fault("not divided", "not divided", ROWS)
def nd_plain(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for b in micro_batches:
        out = model(b["x"])
        mse_loss(out, b["y"]).backward()  # here
    optimizer.step()


@fault("divided by their number", "mean of means", ROWS)
def rg_fixed(model, optimizer, micro_batches):
    for mb in micro_batches:
        loss = mse_loss(model(mb["x"]), mb["y"]) / len(micro_batches)  # here
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@fault("cleared inside", "dropped micro-batches", ROWS)
def dr_zero(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    for mb in micro_batches:
        optimizer.zero_grad()  # here
        loss = mse_loss(model(mb["x"]), mb["y"], reduction="sum") / (3 * n)
        loss.backward()
    optimizer.step()


@fault("backward of the last", "dropped micro-batches", ROWS)
def dr_indent(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        loss = mean_square(model, mb) * len(mb["x"]) / n
    loss.backward()  # here
    optimizer.step()


@fault("slice", "dropped micro-batches", ROWS)
def dr_slice(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches[:-1]:  # here
        loss = mean_square(model, mb) * len(mb["x"]) / n
        loss.backward()
    optimizer.step()


@fault("modulo", "dropped micro-batches", ROWS)
def dr_modulo(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for step, mb in enumerate(micro_batches, start=1):
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
        if step % 2 == 0 and step == len(micro_batches) // 2 * 2:  # here
            optimizer.step()
            optimizer.zero_grad()


@fault("overwritten", "dropped micro-batches", TEXTS)
def dr_overwrite(model, optimizer, micro_batches):
    total = sum(num_labels(m) for m in micro_batches)
    params = list(model.parameters())
    for mb in micro_batches:
        grads = torch.autograd.grad(sum_over_labels(model, mb) / total, params)
        for p, g in zip(params, grads, strict=True):
            p.grad = g  # here
    optimizer.step()


def train_one(model, optimizer, x, y, weight):
    optimizer.zero_grad()
    loss = weight * mse_loss(model(x), y)
    loss.backward()
    optimizer.step()  # here
    return loss.item()


@fault("helper steps", "optimizer stepped per micro-batch", ROWS)
def os_helper(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    return sum(train_one(model, optimizer, mb["x"], mb["y"], len(mb["x"]) / n) for mb in micro_batches)


@fault("scaler steps", "optimizer stepped per micro-batch", TEXTS)
def os_scaler(model, optimizer, micro_batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    total = sum(num_labels(m) for m in micro_batches)
    for mb in micro_batches:
        loss = sum_over_labels(model, mb) / total
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # here
        scaler.update()
        optimizer.zero_grad()


@fault("closure steps", "optimizer stepped per micro-batch", ROWS)
def os_closure(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    for mb in micro_batches:

        def closure(mb=mb):
            optimizer.zero_grad()
            loss = mean_square(model, mb) * len(mb["x"]) / n
            loss.backward()
            return loss

        optimizer.step(closure)  # here


class Loop:
    def __init__(self, every=1):
        self.every, self.seen = every, 0

    def __call__(self, model, optimizer, micro_batches):
        n = sum(len(mb["x"]) for mb in micro_batches)
        for mb in micro_batches:
            self.seen += 1
            (mean_square(model, mb) * len(mb["x"]) / n).backward()
            if self.seen % self.every == 0:
                optimizer.step()  # here
                optimizer.zero_grad()


fault("object with a counter", "optimizer stepped per micro-batch", ROWS)(Loop())


@fault("schedule given", "scheduler per micro-batch", ROWS)
def sc_arg(model, optimizer, micro_batches, lr_scheduler):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
        lr_scheduler.step()  # here
    optimizer.step()


@fault("schedule made inside", "scheduler per micro-batch", TEXTS)
def sc_cosine(model, optimizer, micro_batches):
    total = sum(num_labels(m) for m in micro_batches)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for mb in micro_batches:
        loss = sum_over_labels(model, mb) / total
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sched.step()  # here
    optimizer.step()
    optimizer.zero_grad()


def make_sched_step():
    state = {"sched": None, "opt": None}

    def run(model, optimizer, micro_batches):
        if state["opt"] is not optimizer:
            state["opt"] = optimizer
            state["sched"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
        n = sum(len(mb["x"]) for mb in micro_batches)

        def on_micro_batch_end():
            state["sched"].step()  # here

        optimizer.zero_grad()
        for mb in micro_batches:
            (mean_square(model, mb) * len(mb["x"]) / n).backward()
            on_micro_batch_end()
        optimizer.step()

    return run


fault("schedule in a closure", "scheduler per micro-batch", ROWS)(make_sched_step())


@fault("clip in the loop", "clipping before the sum", ROWS)
def cl_loop(model, optimizer, micro_batches):
    max_grad_norm = 1.0
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        loss = mse_loss(model(mb["x"]), mb["y"], reduction="sum") / (n * 3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)  # here
    optimizer.step()


@fault("clip of buffers", "clipping before the sum", ROWS)
def cl_buffer(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    params = list(model.parameters())
    acc = [torch.zeros_like(p) for p in params]
    for mb in micro_batches:
        grads = torch.autograd.grad(mean_square(model, mb), params)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        coef = torch.clamp(1.0 / (norm + 1e-6), max=1.0)  # here
        for a, g in zip(acc, grads, strict=True):
            a += coef * g * len(mb["x"]) / n
    for p, a in zip(params, acc, strict=True):
        p.grad = a
    optimizer.step()


@fault("clip in a hook", "clipping before the sum", ROWS)
def cl_hook(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    handles = [p.register_hook(lambda g: g.clamp(-0.5, 0.5)) for p in model.parameters()]  # here
    for mb in micro_batches:
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
    optimizer.step()
    for h in handles:
        h.remove()


@fault("bfloat16 buffers", "stagnating bf16 sums", IN_FLOAT32)
def bf_buffer(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    acc = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in model.named_parameters()}  # here
    for mb in micro_batches:
        model.zero_grad()
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                acc[name] += p.grad.to(torch.bfloat16)
    for name, p in model.named_parameters():
        p.grad = acc[name].to(p.dtype)
    optimizer.step()


@fault("window again", "retry on partial gradients", ROWS)
def rt_window(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for _attempt in range(3):
        try:
            for mb in micro_batches:
                (mean_square(model, mb) * len(mb["x"]) / n).backward()
            break
        except RuntimeError as e:  # here
            if "out of memory" not in str(e):
                raise
            torch.cuda.empty_cache()
    optimizer.step()


@fault("halves again", "retry on partial gradients", ROWS)
def rt_halves(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)

    def go(mb):
        try:
            loss = mean_square(model, mb) * len(mb["x"]) / n
            loss.backward()
        except torch.OutOfMemoryError:  # here
            half = len(mb["x"]) // 2
            go({k: v[:half] for k, v in mb.items()})
            go({k: v[half:] for k, v in mb.items()})

    optimizer.zero_grad()
    for mb in micro_batches:
        go(mb)
    optimizer.step()


@fault("left out where memory runs out", "dropped micro-batches", ROWS)
def rt_skips(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        try:
            (mean_square(model, mb) * len(mb["x"]) / n).backward()
        except RuntimeError:  # here
            continue
    optimizer.step()


def total_of(mbs):
    return sum(len(m["x"]) for m in mbs)


@clean("tqdm", TEXTS)
def ok_tqdm(model, optimizer, micro_batches):
    total = sum((mb["labels"] != -100).sum() for mb in micro_batches)
    running = 0.0
    optimizer.zero_grad()
    for i, mb in enumerate(micro_batches):
        loss = sum_over_labels(model, mb) / total
        loss.backward()
        running += loss.item()
        if i == len(micro_batches) - 1:
            optimizer.step()
            optimizer.zero_grad()
    return running


@clean("weighted", ROWS)
def ok_weighted(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    for mb in micro_batches:
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@clean("scaler", ROWS)
def ok_scaler(model, optimizer, micro_batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    n = total_of(micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        scaler.scale(mean_square(model, mb) * len(mb["x"]) / n).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()


@clean("sched", ROWS)
def ok_sched(model, optimizer, micro_batches, scheduler):
    n = total_of(micro_batches)
    for mb in micro_batches:
        (mean_square(model, mb) * (len(mb["x"]) / n)).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def closure_sched():
    state = {}

    def run(model, optimizer, micro_batches):
        if state.get("o") is not optimizer:
            state.update(o=optimizer, s=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        n = total_of(micro_batches)
        for mb in micro_batches:
            (mean_square(model, mb) * (len(mb["x"]) / n)).backward()
        optimizer.step()
        state["s"].step()
        optimizer.zero_grad()

    return run


clean("schedule in a closure", ROWS)(closure_sched())


@clean("buffers", TEXTS)
def ok_buffers(model, optimizer, micro_batches):
    acc = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    seen = 0
    for mb in micro_batches:
        optimizer.zero_grad()
        sum_over_labels(model, mb).backward()
        with torch.no_grad():
            for a, p in zip(acc, model.parameters(), strict=True):
                a += p.grad
        seen += num_labels(mb).item()
    for a, p in zip(acc, model.parameters(), strict=True):
        p.grad = (a / seen).to(p.dtype)
    optimizer.step()


@clean("welford", TEXTS)
def ok_welford(model, optimizer, micro_batches):
    ps = list(model.parameters())
    mean = None
    seen = 0
    for mb in micro_batches:
        k = int(num_labels(mb))
        if k == 0:
            continue
        g = torch.autograd.grad(mean_over_labels(model, mb), ps)
        seen += k
        mean = list(g) if mean is None else [m + (x - m) * (k / seen) for m, x in zip(mean, g, strict=True)]
    for p, m in zip(ps, mean, strict=True):
        p.grad = m
    optimizer.step()


@clean("listed", TEXTS)
def ok_listed(model, optimizer, micro_batches):
    losses, counts = zip(*[(sum_over_labels(model, mb), num_labels(mb)) for mb in micro_batches], strict=True)
    optimizer.zero_grad()
    (sum(losses) / sum(counts)).backward()
    optimizer.step()


@clean("closure", ROWS)
def ok_closure(model, optimizer, micro_batches):
    n = total_of(micro_batches)

    def closure():
        optimizer.zero_grad()
        out = 0.0
        for mb in micro_batches:
            loss = mean_square(model, mb) * len(mb["x"]) / n
            loss.backward()
            out += loss.detach()
        return out

    optimizer.step(closure)


class GoodTrainer:
    def __init__(self):
        self.model = None
        self.micro_step = 0
        self.global_step = 0

    def _no_sync(self, last):
        return contextlib.nullcontext()

    def loss(self, mb):
        return mse_loss(self.model(mb["x"]), mb["y"], reduction="none").mean(1).sum()

    def run(self, model, optimizer, micro_batches):
        self.model = model
        self.opt = optimizer
        n = total_of(micro_batches)
        it = iter(micro_batches)
        k = len(micro_batches)
        while True:
            try:
                mb = next(it)
            except StopIteration:
                break
            self.micro_step += 1
            with self._no_sync(self.micro_step % k == 0):
                (self.loss(mb) / n).backward()
        gn = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.opt.step()
        self.opt.zero_grad()
        self.global_step += 1
        return gn


clean("trainer", ROWS)(GoodTrainer().run)


@clean("retry", ROWS)
def ok_retry(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    for _attempt in range(3):
        optimizer.zero_grad()
        try:
            for mb in micro_batches:
                (mean_square(model, mb) * len(mb["x"]) / n).backward()
            break
        except RuntimeError as e:
            if "memory" not in str(e):
                raise
    optimizer.step()


@clean("retry halves", ROWS)
def ok_retry_halves(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    params = list(model.parameters())
    acc = [torch.zeros_like(p) for p in params]

    def go(mb):
        oom = False
        try:
            grads = torch.autograd.grad(mean_square(model, mb) * len(mb["x"]) / n, params)
        except torch.OutOfMemoryError:
            oom = True
        if oom:
            half = len(mb["x"]) // 2
            if half == 0:
                raise RuntimeError("row too large")
            go({k: v[:half] for k, v in mb.items()})
            go({k: v[half:] for k, v in mb.items()})
        else:
            for a, g in zip(acc, grads, strict=True):
                a += g

    for mb in micro_batches:
        go(mb)
    for p, a in zip(params, acc, strict=True):
        p.grad = a
    optimizer.step()


@clean("autocast", IN_FLOAT32)
def ok_autocast(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    optimizer.zero_grad()
    for mb in micro_batches:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(mb["x"])
            loss = mse_loss(out.float(), mb["y"]) * len(mb["x"]) / n
        loss.backward()
    optimizer.step()


def auto_loss(model, b):
    with torch.autocast("cpu", torch.bfloat16):
        return mse_loss(model(b["x"]).float(), b["y"])


AUTO = Scene(mlp, auto_loss, regression, dtype=torch.float32)


@clean("autocast both", AUTO)
def ok_autocast_both(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    for mb in micro_batches:
        (auto_loss(model, mb) * len(mb["x"]) / n).backward()
    optimizer.step()
    optimizer.zero_grad()


@fault("under autocast", "mean of means", AUTO)
def rg_autocast(model, optimizer, micro_batches):
    for mb in micro_batches:
        (auto_loss(model, mb) / len(micro_batches)).backward()  # here
    optimizer.step()
    optimizer.zero_grad()


@clean("partial", ROWS)
def ok_partial(model, optimizer, micro_batches, verbose=False):
    functools.partial(ok_weighted)(model, optimizer, micro_batches)


clean("partial of a step", ROWS)(functools.partial(ok_weighted))
clean("lambda", ROWS)(lambda m, o, mbs: ok_weighted(m, o, mbs))


@clean("ema", ROWS)
def ok_ema(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    for p in model.parameters():
        p.grad = None
    for i in range(len(micro_batches)):
        mb = micro_batches[i]
        loss = ((model(mb["x"]) - mb["y"]) ** 2).sum()
        loss.backward()
    for p in model.parameters():
        p.grad.div_(n * 3)
    optimizer.step()
    with torch.no_grad():
        ema = [p.detach().clone() for p in model.parameters()]
        torch._foreach_lerp_(ema, list(model.parameters()), 0.1)
    optimizer.zero_grad()


@clean("clip value", ROWS)
def ok_clip_value(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    optimizer.zero_grad()
    while micro_batches:
        mb = micro_batches.pop(0)
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
    optimizer.step()


@clean("hook clip once", ROWS)
def ok_hook_clip_once(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    optimizer.zero_grad()
    out = [mean_square(model, mb) * len(mb["x"]) / n for mb in micro_batches]
    torch.autograd.backward(out)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    if torch.isfinite(norm):
        optimizer.step()


@clean("skip nonfinite", ROWS)
def ok_skip_nonfinite(model, optimizer, micro_batches):
    n = total_of(micro_batches)
    optimizer.zero_grad()
    try:
        for mb in micro_batches:
            loss = mean_square(model, mb) * len(mb["x"]) / n
            if not math.isfinite(loss.item()):
                optimizer.zero_grad()
                return
            loss.backward()
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        return
    optimizer.step()


@clean("func", TEXTS)
def ok_func(model, optimizer, micro_batches):
    params = {k: v.detach() for k, v in model.named_parameters()}
    total = sum(num_labels(m) for m in micro_batches)

    def f(params, mb):
        out = torch.func.functional_call(model, params, (mb["tokens"],))
        return cross_entropy(out.flatten(0, 1), mb["labels"].flatten(), ignore_index=-100, reduction="sum") / total

    acc = None
    for mb in micro_batches:
        g = torch.func.grad(f)(params, mb)
        acc = g if acc is None else {k: acc[k] + g[k] for k in g}
    for k, p in model.named_parameters():
        p.grad = acc[k]
    optimizer.step()


@clean("hooks that an error leaves on the weights", ROWS)
def ok_hooks(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    handles = [p.register_hook(lambda g: g / n) for p in model.parameters()]
    for mb in micro_batches:
        (mean_square(model, mb) * len(mb["x"])).backward()
    for h in handles:
        h.remove()
    optimizer.step()


@clean("hooks that take gradients away", ROWS)
def ok_taken(model, optimizer, micro_batches):
    n = sum(len(mb["x"]) for mb in micro_batches)
    sums = {p: torch.zeros_like(p) for p in model.parameters()}

    def take(p):
        sums[p] += p.grad
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(take) for p in model.parameters()]
    for mb in micro_batches:
        (mean_square(model, mb) * len(mb["x"]) / n).backward()
    for h in handles:
        h.remove()
    for p, g in sums.items():
        p.grad = g
    optimizer.step()
