"""T5 inside optimizer.step: whatever fails there, and wherever, an update happens once or not at all."""

import copy
import signal
import threading

import pytest
import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import wholebatch as wb
from properties import fingerprint, state_of
from wholebatch.engine import memory
from wholebatch.engine.steps import stepping
from wholebatch.engine.steps.stepping import Stepping

ROWS = 8
CPU = torch.device("cpu")


class Half(optim.Optimizer):
    """One's own: momentum in a list of its own, a count in its group and another in its state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "steps": 0})
        self.momenta = []

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            if not self.momenta:
                self.momenta.extend(torch.zeros_like(each) for each in group["params"])
            for momentum, parameter in zip(self.momenta, group["params"], strict=True):
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=group["lr"])
                self.state[parameter]["seen"] = self.state[parameter].get("seen", 0) + 1


def halves(kind):
    """Two optimizers, each of a half of the model."""

    def make(parameters):
        first, second = (every := list(parameters))[:3], every[3:]
        return [kind(first), optim.SGD(second, lr=0.1, momentum=0.9)]

    return make


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD with Nesterov's, foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.1),
    "AdamW, foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "AdamW, lr a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.1)),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "NAdam": lambda p: optim.NAdam(p, lr=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "ASGD, foreach": lambda p: optim.ASGD(p, lr=0.1, foreach=True),
    "of one's own": Half,
    "two, the first one's own": halves(Half),
    "two of PyTorch": halves(optim.AdamW),
}


class RunsOut(TorchDispatchMode):
    """Counts operations, and raises at one of them: before it, or after it has written."""

    def __init__(self, at=None, *, after=False, error=None):
        super().__init__()
        self.at, self.after, self.seen = at, after, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        due = self.seen - 1 == self.at
        if due and not self.after:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if due:
            raise self.error
        return result


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, 2)
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        x = nn.functional.dropout(torch.relu(self.inner(x)), 0.2, self.training)
        return self.head(self.norm(self.inner(x)))


MODELS = {"mlp": mlp, "convolutions": convolutions, "tied": Tied}


def train(make, mode=None, *, cuts=(4, None), model_of=mlp, precision="fp32"):
    """Make updates with so many rows a micro-batch (None: as before), whose steps run in a mode.

    Returns all that is left behind, and the records.
    """
    torch.manual_seed(0)
    model = model_of() if precision == "fp16" else model_of().double()
    optimizers = make(model.parameters())
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    scheduler = optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    draw = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(ROWS, 5, generator=draw).to(next(model.parameters()).dtype), "y": torch.arange(ROWS) % 2}
    accumulator = wb.Accumulator(
        model,
        optimizers,
        lambda model, part: nn.functional.cross_entropy(model(part["x"]), part["y"]),
        lr_scheduler=scheduler,
        check=None,
        batch_norm="per_micro_batch",
        precision=precision,
    )
    step = accumulator._setup.update.step

    def stepped():
        with mode:
            return step()

    if mode is not None:
        accumulator._setup.update.step = stepped
    torch.manual_seed(7)
    made = []
    for rows in cuts:
        if rows is not None:
            accumulator._cutting.micro_batch = wb.Rows(rows)
        made.append(accumulator.step(batch))
    left = {
        "weights": dict(model.state_dict()),
        "optimizers": [each.state_dict() for each in optimizers],
        "own": [getattr(each, "momenta", None) for each in optimizers],
        "schedule": scheduler.state_dict()["_last_lr"],
        "random": torch.get_rng_state(),
        "gradients": [each.grad for each in model.parameters()],
        "scale": accumulator._precision._scaler and accumulator._precision._scaler.state_dict(),
    }
    return fingerprint(copy.deepcopy(left)), made


def assert_equals_the_clean_run(make, mode, cleans, **options):
    """The run is that which had the final cut from the start, bit for bit."""
    found, made = train(make, mode, **options)
    cuts = tuple(ROWS // update.micro_batches for update in made)
    if cuts not in cleans:
        cleans[cuts] = train(make, cuts=cuts, **options)[0]
    assert found == cleans[cuts], f"at operation {mode.at}"
    assert made[-1].applied
    assert [update.rows for update in made] == [ROWS] * len(made)
    return made


def operations(make, **options):
    counting = RunsOut()
    train(make, counting, **options)
    return counting.seen


@pytest.fixture(params=["as a whole", "in pieces"])
def way(request, monkeypatch):
    """Small models are one piece; with a smaller bound they are stepped as large ones are."""
    monkeypatch.setattr(stepping, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(memory, "free_cached", lambda _device: None)  # the collection of garbage takes its time
    if request.param == "in pieces":
        monkeypatch.setattr(stepping, "WHOLE", 0)
        monkeypatch.setattr(stepping, "PIECES", 3)
    return request.param


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_that_runs_out_at_any_operation_of_the_step_leaves_the_clean_run(name, after, way):
    """At each operation of the step, in the first update (which creates the state) and in the second."""
    make, cleans = OPTIMIZERS[name], {}
    count = operations(make)
    thorough = name in ("SGD with momentum", "AdamW, foreach", "of one's own")
    retried = 0
    for at in range(0, count, 1 if thorough else 7):
        made = assert_equals_the_clean_run(make, RunsOut(at, after=after), cleans)
        retried += sum(update.retries for update in made)
    if way == "as a whole":
        assert retried > 0


@pytest.mark.parametrize("model", MODELS)
def test_the_same_on_three_models_with_dropout_and_batch_norm(model, way):
    make, cleans = OPTIMIZERS["AdamW"], {}
    for at in range(0, operations(make, model_of=MODELS[model]), 3):
        assert_equals_the_clean_run(make, RunsOut(at), cleans, model_of=MODELS[model])


def test_the_loss_scale_is_settled_once(way):
    make, cleans = OPTIMIZERS["AdamW"], {}
    long = {"precision": "fp16", "cuts": (4, None, None, None)}  # the first scale is too high
    found = 0
    for at in range(0, operations(make, **long), 11):
        mode = RunsOut(at)
        made = train(make, mode, **long)[1]
        cuts = tuple(ROWS // update.micro_batches for update in made)
        if cuts not in cleans:
            cleans[cuts] = train(make, precision="fp16", cuts=cuts)[0]
        assert train(make, RunsOut(at), **long)[0] == cleans[cuts]
        found += sum(update.retries for update in made)
    assert found > 0 or way == "in pieces"


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW"])
def test_the_comparison_sees_a_step_that_is_not_undone(name, monkeypatch):
    """Beside the tests above: without the copies, the same comparison fails."""
    monkeypatch.setattr("wholebatch.engine.steps.undo.Undo.put_back", lambda _: None)
    make = OPTIMIZERS[name]
    last = operations(make) - 1
    with pytest.raises(AssertionError):
        assert_equals_the_clean_run(make, RunsOut(last), {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_other_exception_leaves_no_trace_and_is_itself(name):
    torch.manual_seed(0)
    model = mlp()
    optimizers = OPTIMIZERS[name](model.parameters())
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    accumulator = wb.Accumulator(
        model, optimizers, lambda model, x: model(x).square().mean(), check=None, batch_norm="per_micro_batch"
    )
    rows = torch.randn(ROWS, 5)
    step = accumulator._setup.update.step
    for _ in range(2):  # before there is any state, and after
        undone = 0
        for at in range(0, 300, 9):
            error, raised = RuntimeError("a mistake of one's own"), None

            def stepped(at=at, error=error):
                with RunsOut(at, after=True, error=error):
                    return step()

            accumulator._setup.update.step = stepped
            torch.manual_seed(at)
            momenta = [getattr(each, "momenta", None) for each in optimizers]
            before = state_of(model, *optimizers), fingerprint(momenta)
            try:
                accumulator.step(rows)
            except RuntimeError as found:
                raised = found
            if raised is None:
                break  # the step has fewer operations
            assert raised is error
            assert (state_of(model, *optimizers), fingerprint(momenta)) == before
            undone += 1
        assert undone > 0
        accumulator._setup.update.step = step


LARGE = 300


def large(optimizer, *, updates=2):
    """A model of 16 parameters that are stepped in pieces, and its optimizer, after some plain steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(LARGE, LARGE) for _ in range(8)))
    made = optimizer(model.parameters())
    guarded = Stepping([made], CPU)
    for _ in range(updates):
        give_gradients(model)
        assert guarded.step() is None
    give_gradients(model)
    return model, made, guarded


def give_gradients(model):
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def calls_of(optimizer):
    """Count what is stepped at each call."""
    counts, plain = [], type(optimizer).step

    def step(self, closure=None):
        counts.append(sum(len(group["params"]) for group in self.param_groups))
        return plain(self, closure)

    step.__module__ = plain.__module__
    return counts, step


@pytest.mark.parametrize("make", [OPTIMIZERS["AdamW"], OPTIMIZERS["SGD with Nesterov's, foreach"]])
def test_a_large_model_is_stepped_in_pieces_with_the_bits_of_a_plain_step(make, monkeypatch):
    model, optimizer, guarded = large(make)
    other = copy.deepcopy(model)
    plain = make(other.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(other)
    counts, step = calls_of(optimizer)
    monkeypatch.setattr(type(optimizer), "step", step)
    guarded.step()
    assert sum(counts) == 16
    assert len(counts) == 9  # each weight, and what is small together
    assert len(optimizer.param_groups[0]["params"]) == 16
    plain.step()
    assert fingerprint([model.state_dict(), optimizer.state_dict()]) == fingerprint(
        [other.state_dict(), plain.state_dict()]
    )


def test_the_copies_for_a_large_model_take_one_piece():
    model, optimizer, guarded = large(optim.AdamW)
    everything = sum(p.nbytes for p in model.parameters()) * 3
    with memory.tensor_peak() as plain:
        optimizer.step()
    with memory.tensor_peak() as peak:
        guarded.step()
    assert peak.peak_bytes - plain.peak_bytes < 0.2 * everything
    hooked = optimizer.register_step_post_hook(lambda *_: None)  # somebody listens: a copy of everything
    with memory.tensor_peak() as whole:
        guarded.step()
    hooked.remove()
    assert whole.peak_bytes - plain.peak_bytes > 0.9 * everything


def test_what_listens_is_called_once():
    _model, optimizer, guarded = large(optim.SGD, updates=0)
    heard = []
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    for _ in range(2):
        guarded.step()
    assert heard == ["before", "after"] * 2


def test_a_schedule_does_not_keep_an_optimizer_from_being_stepped_in_pieces():
    optimizer = optim.SGD(mlp().parameters(), lr=0.1)
    optim.lr_scheduler.StepLR(optimizer, 1)
    assert stepping.moves_one_by_one(optimizer)
    optimizer.step = lambda: None
    assert not stepping.moves_one_by_one(optimizer)
    nameless = optim.SGD(mlp().parameters(), lr=0.1)
    nameless.register_step_post_hook(eval("lambda *_: None", {}))  # as from a notebook or a string: it has no module
    assert not stepping.moves_one_by_one(nameless)
    assert not stepping.moves_one_by_one(Half(mlp().parameters()))
    assert not stepping.moves_one_by_one(type("Mine", (optim.SGD,), {})(mlp().parameters(), lr=0.1))


@pytest.mark.parametrize("at", [0, 3, 8])
def test_an_exception_that_comes_once_never_leaves_a_half(at, monkeypatch):
    """Before anything has moved it leaves nothing behind; later the update is completed first."""
    model, optimizer, guarded = large(optim.AdamW)
    before = fingerprint([model.state_dict(), optimizer.state_dict()])
    right = copy.deepcopy(model)
    plain = optim.AdamW(right.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(right)
    plain.step()
    counts, counted = calls_of(optimizer)

    def step(self, closure=None):
        counted(self, closure)
        if len(counts) == at + 1:
            raise SystemExit("preempted")

    step.__module__ = counted.__module__
    monkeypatch.setattr(optim.AdamW, "step", step)
    if at == 0:
        with pytest.raises(SystemExit):
            guarded.step()
        assert fingerprint([model.state_dict(), optimizer.state_dict()]) == before
    else:
        assert isinstance(guarded.step(), SystemExit)
        assert fingerprint([model.state_dict(), optimizer.state_dict()]) == fingerprint(
            [right.state_dict(), plain.state_dict()]
        )


def test_an_exception_that_came_too_late_is_raised_after_the_update(monkeypatch):
    model = nn.Linear(2, 1)
    accumulator = wb.Accumulator(model, optim.SGD(model.parameters(), lr=0.1), check=None)
    late = KeyboardInterrupt()
    step = accumulator._setup.update.step
    monkeypatch.setattr(accumulator._setup.update, "step", lambda: (step(), late)[1])
    window = accumulator.window()
    window.backward(model(torch.ones(3, 2)).mean(), targets=3)
    with pytest.raises(KeyboardInterrupt):
        window.close()
    assert window.update.applied


@pytest.mark.parametrize("at", [0, 8])
def test_memory_that_never_comes_back(at, monkeypatch):
    """At the first piece it leaves nothing behind; later there is no way back, and the error says so."""
    monkeypatch.setattr(stepping, "WAITS", (0.0, 0.01))
    model, optimizer, guarded = large(optim.AdamW)
    before = fingerprint([model.state_dict(), optimizer.state_dict()])
    counts, counted = calls_of(optimizer)

    def step(self, closure=None):
        if len(counts) >= at:
            raise MemoryError("there is none")
        counted(self, closure)

    step.__module__ = counted.__module__
    monkeypatch.setattr(optim.AdamW, "step", step)
    with pytest.raises(MemoryError) as error:
        guarded.step()
    if at == 0:
        assert not isinstance(error.value, wb.OutOfMemoryError)
        assert fingerprint([model.state_dict(), optimizer.state_dict()]) == before
    else:
        assert isinstance(error.value, wb.OutOfMemoryError)
        assert "after a part of the weights had moved" in str(error.value)
        assert "there is none" in str(error.value)
        assert "last checkpoint" in error.value.hint
    assert len(optimizer.param_groups[0]["params"]) == 16


def test_a_mistake_that_comes_back_after_a_part_has_moved_says_so(monkeypatch):
    _, optimizer, guarded = large(optim.AdamW)
    counts, counted = calls_of(optimizer)

    def step(self, closure=None):
        if len(counts) >= 4:
            raise ValueError("again")
        counted(self, closure)

    step.__module__ = counted.__module__
    monkeypatch.setattr(optim.AdamW, "step", step)
    with pytest.raises(ValueError, match="again") as error:
        guarded.step()
    assert "a part of the weights had moved" in error.value.__notes__[0]


@pytest.mark.parametrize("when", ["first", "new options", "loaded"])
def test_a_mistake_in_a_later_group_leaves_no_trace_the_first_time(when):
    """A state of the wrong shape, or a sparse gradient, is found by a step with a copy of everything."""
    model, optimizer, guarded = large(optim.AdamW)
    last = list(model.parameters())[-2]
    if when == "first":
        optimizer.state.clear()
        guarded = Stepping([optimizer], CPU)
        last.grad = last.grad.to_sparse()
    elif when == "new options":
        optimizer.param_groups[0]["lr"] = "no number"
    else:
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        optimizer.state[last]["exp_avg"] = torch.zeros(3)
    before = fingerprint([model.state_dict(), optimizer.state_dict()])
    with pytest.raises((RuntimeError, TypeError)):
        guarded.step()
    assert fingerprint([model.state_dict(), optimizer.state_dict()]) == before


def test_pieces_too_large_to_be_copied_are_halved(monkeypatch):
    _model, optimizer, guarded = large(optim.AdamW)
    monkeypatch.setattr(stepping, "PIECES", 2)
    plain, asked = stepping._undo_of, []

    def undo_of(pieces, *rooms):
        asked.append(sum(len(piece.parameters) for piece in pieces))
        if asked[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(pieces, *rooms)

    monkeypatch.setattr(stepping, "_undo_of", undo_of)
    assert guarded.step() is None
    assert max(asked) > 2
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_after_a_shortage_in_the_step_it_is_made_in_pieces(monkeypatch):
    torch.manual_seed(0)
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guarded = Stepping([optimizer], CPU)
    give_gradients(model)
    counts, counted = calls_of(optimizer)

    def step(self, closure=None):
        if sum(len(group["params"]) for group in self.param_groups) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        counted(self, closure)

    step.__module__ = counted.__module__
    monkeypatch.setattr(optim.SGD, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        guarded.step()
    assert guarded.step() is None
    assert sum(counts) == 6


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_the_exception_of_a_signal_handler_waits_for_the_update():
    """As where a scheduler of jobs asks for a checkpoint: what the handler raises finds a whole update."""
    model = nn.Linear(2, 1)

    class Asked(optim.SGD):
        def step(self, closure=None):
            signal.raise_signal(signal.SIGTERM)
            return super().step()

    def preempted(*_):
        raise SystemExit("preempted")

    accumulator = wb.Accumulator(model, Asked(model.parameters(), lr=0.1), check=None)
    before = signal.signal(signal.SIGTERM, preempted)
    try:
        window = accumulator.window()
        window.backward(model(torch.ones(3, 2)).mean(), targets=3)
        with pytest.raises(SystemExit):
            window.close()
        assert window.update.applied
        assert signal.getsignal(signal.SIGTERM) is preempted
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_step_without_gradients_is_made_without_copies(monkeypatch):
    """As where `before_step` takes the gradients: the optimizer is stepped, and has nothing to move."""
    model = nn.Linear(3, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    done = []
    monkeypatch.setattr(optim.SGD, "step", lambda _self: done.append("step"))
    monkeypatch.setattr(optim.SGD.step, "__module__", "torch.optim.sgd")
    monkeypatch.setattr(stepping, "_undo_of", lambda *_: done.append("copy"))
    assert Stepping([optimizer], CPU).step() is None
    assert done == ["step"]
    assert all(map(torch.equal, model.parameters(), before))
