"""AdamA, and the seam for optimizers that take gradients in as they arrive. The judge is plain loops, written here."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import CALM
from properties import assert_leaves_no_trace, fingerprint, flat, relative_error, state_of, windowed
from wholebatch.engine import memory

CUT = (5, 3, 2, 1)
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(rows=11, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype) for width in (5, 3)]


def loss_of(model, part):
    return (model(part[0]) - part[1]).square().sum(1).mean()


def parts_of(rows, cut=CUT):
    return list(zip(*(each.split(cut) for each in rows), strict=True))


class Plainly:
    """AdamA as the equations have it: parts, sums and powers, all written out."""

    def __init__(self, model, lr, betas, eps, weight_decay):
        self.model, self.lr, self.betas, self.eps, self.weight_decay = model, lr, betas, eps, weight_decay
        self.first = [torch.zeros_like(each) for each in model.parameters()]
        self.second = [torch.zeros_like(each) for each in model.parameters()]
        self.times = 0

    def update(self, parts, *, squared=lambda gradients: sum(each**2 for each in gradients)):
        total = sum(len(part[0]) for part in parts)
        parameters = list(self.model.parameters())
        losses = [loss_of(self.model, part) * len(part[0]) / total for part in parts]
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        self.times += 1
        beta1, beta2 = self.betas
        with torch.no_grad():
            for place, weight in enumerate(parameters):
                of_weight = [each[place] for each in gradients]
                self.first[place] = beta1 * self.first[place] + (1 - beta1) * sum(of_weight)
                self.second[place] = beta2 * self.second[place] + (1 - beta2) * squared(of_weight)
                mean = self.first[place] / (1 - beta1**self.times)
                spread = (self.second[place] / (1 - beta2**self.times)).sqrt()
                weight -= self.lr * (mean / (spread + self.eps) + self.weight_decay * weight)


def trained(make, ways, *, dtype=torch.float64, updates=3, micro_batch=None, **options):
    model = mlp(dtype)
    optimizer = make(model.parameters())
    accumulator = wb.Accumulator(
        model, optimizer, loss_of, micro_batch=micro_batch or wb.Rows(3), check=None, **options
    )
    made = [ways(accumulator, batch(dtype=dtype, seed=seed)) for seed in range(updates)]
    return model, optimizer, made


def step(accumulator, rows):
    return accumulator.step(tuple(rows))


def window(accumulator, rows, cut=CUT):
    with accumulator.window(targets=sum(cut)) as window:
        for part in parts_of(rows, cut):
            window.backward(loss_of(accumulator._setup.model, part), targets=len(part[0]))
    return window.update


def of_a_loader(accumulator, rows):
    (update,) = accumulator.updates(parts_of(rows), micro_batches=len(CUT))
    return update


def adam_a(parameters):
    return wb.AdamA(parameters, **OPTIONS)


@pytest.mark.parametrize(("way", "cut"), [(step, (3, 3, 3, 2)), (window, CUT), (of_a_loader, CUT)])
def test_the_update_is_that_of_the_equations(way, cut):
    model, _, made = trained(adam_a, way)
    right = mlp()
    plain = Plainly(right, **OPTIONS)
    for seed in range(3):
        plain.update(parts_of(batch(seed=seed), cut))
    assert relative_error(flat(model.parameters()), flat(right.parameters())) <= 1e-12
    assert [update.micro_batches for update in made] == [4] * 3
    assert all(update.grad_norm is None and update.applied for update in made)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mistake", ["the square of the sum", "a decay for each part"])
def test_the_bound_sees_another_second_moment(mistake):
    """Beside the test above: Adam's own second moment, and one that decays at every micro-batch, are far off."""
    model, _, _ = trained(adam_a, window)
    right = mlp()
    plain = Plainly(right, **OPTIONS)
    wrong = {
        "the square of the sum": lambda gradients: sum(gradients) ** 2,
        "a decay for each part": lambda gradients: sum(g**2 * 0.95**k for k, g in enumerate(reversed(gradients))),
    }[mistake]
    for seed in range(3):
        plain.update(parts_of(batch(seed=seed)), squared=wrong)
    assert relative_error(flat(model.parameters()), flat(right.parameters())) > 1e-5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_one_micro_batch_it_is_adam(weight_decay):
    options = {**OPTIONS, "weight_decay": weight_decay}
    found = [
        flat(trained(make, step, micro_batch=wb.Rows(99))[0].parameters())
        for make in (lambda p: wb.AdamA(p, **options), lambda p: torch.optim.AdamW(p, **options))
    ]
    assert torch.equal(*found)
    if weight_decay == 0:
        adam, _, _ = trained(lambda p: torch.optim.Adam(p, **options), step, micro_batch=wb.Rows(99))
        assert torch.equal(found[0], flat(adam.parameters()))


def test_without_a_window_it_steps_from_the_gradient_as_adam_does():
    models = [mlp(), mlp()]
    for model, make in zip(models, (adam_a, lambda p: torch.optim.AdamW(p, **OPTIONS)), strict=True):
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, batch())
            loss.backward()
            return loss

        for _ in range(3):
            assert optimizer.step(closure).item() > 0
            scheduler.step()
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


@pytest.mark.parametrize("name", sorted(CALM.keys() - {"sparse gradients", "counted loss", "regulariser"}))
def test_awkward_models_get_the_gradient_of_every_micro_batch(name):
    """The first moment of one window is (1 - beta1) times the gradient, for whatever is trained."""
    animal = CALM[name]
    rows, counts = animal.batch(8, torch.float64), (4, 4)
    with_adam, plainly = (
        change_of_moment(animal, make, rows, counts)
        for make in (adam_a, lambda p: torch.optim.Adam(p, betas=(0.8, 0.9)))
    )
    assert relative_error(with_adam, plainly) <= 1e-12


def change_of_moment(animal, make, rows, counts):
    model = animal.model()
    optimizer = make([each for each in animal.trained(model) if each.requires_grad])
    windowed(animal, counts, known=True)(model, optimizer, rows)
    return flat(optimizer.state[each]["exp_avg"] for each in animal.trained(model) if each in optimizer.state)


def test_groups_frozen_parameters_and_missing_gradients():
    model = mlp()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.register_parameter("unused", unused)
    groups = [{"params": [model[0].weight, model[0].bias, unused]}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = wb.AdamA(groups, lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    accumulator = wb.Accumulator(model, optimizer, loss_of, micro_batch=wb.Rows(4), check=None)
    assert accumulator.step(tuple(batch())).applied
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert moved == ["0.weight"]
    assert unused not in optimizer.state
    model[0].bias.requires_grad_(True)
    assert accumulator.step(tuple(batch())).applied
    assert optimizer.state[model[0].bias]["step"] == 1
    assert optimizer.state[model[0].weight]["step"] == 2


def test_a_group_may_be_added_later():
    model = mlp()
    optimizer = wb.AdamA(model[0].parameters(), lr=0.1)
    accumulator = wb.Accumulator(model, optimizer, loss_of, micro_batch=wb.Rows(4), check=None)
    accumulator.step(tuple(batch()))
    optimizer.add_param_group({"params": model[2].parameters()})
    accumulator.step(tuple(batch()))
    assert [int(optimizer.state[each]["step"]) for each in model.parameters()] == [2, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_have_moments_in_32_bits(dtype):
    model, optimizer, _ = trained(adam_a, step, dtype=dtype)
    wide, _, _ = trained(adam_a, step, dtype=torch.float32)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert relative_error(flat(model.parameters()), flat(wide.parameters())) < 20 * torch.finfo(dtype).eps
    other = adam_a(mlp(dtype).parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fingerprint(other.state_dict()) == fingerprint(optimizer.state_dict())


def test_the_loss_scale_never_reaches_the_moments():
    """With a learning rate of 0, the first moment is that of Adam under the same scale."""
    options = {"dtype": torch.float32, "precision": "fp16", "updates": 4}
    found = []
    for kind in (wb.AdamA, torch.optim.Adam):
        model, optimizer, made = trained(lambda p, kind=kind: kind(p, lr=0.0), step, **options)
        found.append(flat(optimizer.state[each]["exp_avg"] for each in model.parameters()))
        assert made[-1].applied
    assert relative_error(*found) <= 1e-5


class BrokenError(RuntimeError):
    """Somebody's mistake."""


@pytest.mark.parametrize("updates", [0, 1], ids=["no state yet", "state"])
@pytest.mark.parametrize("what", ["nan", "exception", "rollback", "wrong targets", "exception in step"])
def test_a_window_that_comes_to_nothing_leaves_the_moments_as_they_were(what, updates, monkeypatch):
    model = mlp()
    optimizer = adam_a(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, loss_of, micro_batch=wb.Rows(3), check=None)
    for _ in range(updates):
        accumulator.step(tuple(batch()))
    with assert_leaves_no_trace(model, optimizer):
        opened = accumulator.window(targets=sum(CUT) + (what == "wrong targets"))
        for place, part in enumerate(parts_of(batch())):
            loss = loss_of(model, part)
            opened.backward(loss * math.nan if (what, place) == ("nan", 2) else loss, targets=len(part[0]))
            assert model[0].weight.grad is None
        if what == "nan":
            update = opened.close()
            assert "nan" in update.skipped
        elif what == "rollback":
            opened.rollback()
        elif what == "exception":
            with pytest.raises(BrokenError), opened:
                raise BrokenError
        elif what == "wrong targets":
            with pytest.raises(wb.WeightError, match=r"divided by 12 targets .* hold 11") as error:
                opened.close()
            assert "targets=n" in error.value.hint
        else:
            plain = wb.AdamA._move

            def fail(self, parameter, group):
                plain(self, parameter, group)
                if parameter.ndim == 1:
                    raise BrokenError

            with monkeypatch.context() as patched:
                patched.setattr(wb.AdamA, "_move", fail)
                with pytest.raises(BrokenError):
                    opened.close()
    right = mlp()
    plain = Plainly(right, **OPTIONS)
    for _ in range(updates):
        plain.update(parts_of(batch(), (3, 3, 3, 2)))
    plain.update(parts_of(batch(), (3, 3, 3, 2)))
    accumulator.step(tuple(batch()))
    assert relative_error(flat(model.parameters()), flat(right.parameters())) <= 1e-12


@pytest.mark.parametrize("updates", [0, 1])
def test_the_test_above_sees_moments_that_are_kept(updates, monkeypatch):
    monkeypatch.setattr("wholebatch.engine.steps.undo.Undo.put_back", lambda _: None)
    model = mlp()
    optimizer = adam_a(model.parameters())
    before = state_of(model, optimizer)
    opened = wb.Accumulator(model, optimizer, check=None).window(targets=11)
    opened.backward(loss_of(model, batch()), targets=11)
    opened.rollback()
    assert state_of(model, optimizer) != before


def test_a_shortage_is_a_retry_with_the_update_of_the_finer_cut():
    def short(model, part):
        if len(part[0]) > 3:
            loss_of(model, part).backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(model, part)

    found = []
    for loss, rows in ((short, 6), (loss_of, 3)):
        model = mlp()
        optimizer = adam_a(model.parameters())
        accumulator = wb.Accumulator(model, optimizer, loss, micro_batch=wb.Rows(rows), check=None)
        updates = [accumulator.step(tuple(batch())) for _ in range(2)]
        found.append(fingerprint([dict(model.state_dict()), optimizer.state_dict()]))
        assert updates[0].retries == (rows == 6)
    assert found[0] == found[1]


def test_training_goes_on_from_a_saved_state():
    model, optimizer, _ = trained(adam_a, step)
    again = mlp()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = pickle.loads(pickle.dumps(optimizer))
    other = adam_a(again.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, steps in ((model, optimizer), (again, other)):
        step(wb.Accumulator(each, steps, loss_of, micro_batch=wb.Rows(3), check=None), batch())
    assert torch.equal(flat(model.parameters()), flat(again.parameters()))


def test_what_it_cannot_do_is_refused():
    model = mlp()
    with pytest.raises(wb.OptimizerError, match=r"clip_norm=1.0 needs the gradient .* AdamA takes it in"):
        wb.Accumulator(model, adam_a(model.parameters()), loss_of, clip_norm=1.0)
    negative = [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}]
    for wrong in (*negative, {"lr": "x"}, {"betas": 3}, {"betas": (0.9,)}, {"betas": ("a", "b")}, {"eps": None}):
        with pytest.raises(wb.OptimizerError, match=next(iter(wrong))):
            wb.AdamA(model.parameters(), **wrong)
    embedding = nn.Embedding(4, 2, sparse=True)
    accumulator = wb.Accumulator(embedding, wb.AdamA(embedding.parameters()), check=None)
    with pytest.raises(wb.OptimizerError, match="sparse"):
        accumulator.window(targets=1).backward(embedding(torch.tensor([1, 1])).sum(), targets=1)
    assert accumulator.open_window is None


def test_targets_that_are_not_known_early_are_an_error_with_a_hint():
    model = mlp()
    optimizer = adam_a(model.parameters())
    counting = wb.Accumulator(
        model, optimizer, lambda model, part: (loss_of(model, part) * 5, 5.0), micro_batch=wb.Rows(3), check=None
    )
    plain = wb.Accumulator(model, optimizer, loss_of, check=None)
    loader = parts_of(batch())
    with assert_leaves_no_trace(model, optimizer):
        with pytest.raises(wb.WeightError, match=r"divided by 11 targets .* hold 20"):
            counting.step(tuple(batch()))
        with pytest.raises(wb.WeightError, match=r"divided by 11 targets .* hold 20"):
            next(counting.updates(loader, micro_batches=4))
        opened = plain.window()
        opened.backward(loss_of(model, loader[0]), targets=5)
        with pytest.raises(wb.WeightError, match="not known before") as error:
            opened.backward(loss_of(model, loader[1]), targets=3)
        assert "window(targets=n)" in error.value.hint
    assert [update.applied for update in plain.updates(loader, micro_batches=1)] == [True] * 4


def test_a_window_that_was_told_its_targets_takes_losses_that_count_themselves():
    found = []
    for pairs in (True, False):
        model = mlp()
        accumulator = wb.Accumulator(model, adam_a(model.parameters()), check=None)
        with accumulator.window(targets=11) as opened:
            for part in parts_of(batch()):
                rows = len(part[0])
                loss = loss_of(model, part)
                opened.backward(*((((loss * rows, rows)),) if pairs else (loss, rows)))
        found.append(flat(model.parameters()))
    assert relative_error(*found) <= 1e-12


def test_rows_are_collated_once_and_their_targets_counted_before():
    collated, counted = [], []

    def collate(rows):
        collated.append(len(rows))
        return tuple(torch.stack(each) for each in zip(*rows, strict=True))

    def targets(part):
        counted.append(len(part[0]))
        return len(part[0])

    model, right = mlp(), mlp()
    rows = list(zip(*batch(), strict=True))
    options = {"micro_batch": wb.Rows(3), "check": None}
    accumulator = wb.Accumulator(
        model, adam_a(model.parameters()), loss_of, collate=collate, targets=targets, **options
    )
    assert accumulator.step(rows).targets == 11
    assert collated == counted == [3, 3, 3, 2]
    wb.Accumulator(right, adam_a(right.parameters()), loss_of, **options).step(tuple(batch()))
    assert relative_error(flat(model.parameters()), flat(right.parameters())) <= 1e-12


class SumInMomentum(torch.optim.Optimizer):
    """One's own: SGD with momentum whose gradient sum is the momentum itself."""

    moves_early = False

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def begin_window(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["sum"].mul_(group["momentum"])

    def consume(self, parameter, gradient):
        state = self.state[parameter]
        state["sum"] = state["sum"].add_(gradient) if state else gradient
        if self.moves_early:
            parameter.sub_(gradient)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.state[parameter]["sum"], alpha=group["lr"])


def test_an_optimizer_of_ones_own_takes_gradients_in_with_the_right_scale():
    for precision in ("fp32", "fp16"):
        dtype = torch.float64 if precision == "fp32" else torch.float32
        options = {"dtype": dtype, "precision": precision, "updates": 4}
        model, _, _ = trained(lambda p: SumInMomentum(p, 0.1, 0.9), step, **options)
        right, _, _ = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), step, **options)
        assert relative_error(flat(model.parameters()), flat(right.parameters())) <= (
            1e-12 if precision == "fp32" else 1e-5
        )


def test_beside_another_optimizer():
    def halves(parameters):
        every = list(parameters)
        return [SumInMomentum(every[:2], 0.1, 0.9), torch.optim.SGD(every[2:], lr=0.1, momentum=0.9)]

    model, _, made = trained(halves, window)
    right, _, _ = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), window)
    assert relative_error(flat(model.parameters()), flat(right.parameters())) <= 1e-12
    assert made[0].grad_norm is None


def test_weights_that_move_inside_a_window_are_an_error_and_put_back():
    model = mlp()
    optimizer = SumInMomentum(model.parameters(), 0.1, 0.9)
    optimizer.moves_early = True
    accumulator = wb.Accumulator(model, optimizer, loss_of, micro_batch=wb.Rows(3), check=None)
    with assert_leaves_no_trace(model, optimizer):
        with pytest.raises(wb.WindowError, match="moved the weights inside an open window") as error:
            accumulator.step(tuple(batch()))
        assert "step()" in error.value.hint


def peak_of(make, layers=24, width=96):
    """What one update takes at most, above weights and optimizer state."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = make(model.parameters())
    accumulator = wb.Accumulator(
        model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=wb.Rows(2), check=None
    )
    rows = torch.randn(8, width)
    for _ in range(2):
        accumulator.step(rows)
    with memory.tensor_peak() as peak:
        accumulator.step(rows)
    return peak.peak_bytes, sum(each.nbytes for each in model.parameters())


class KeepsGradients(wb.AdamA):
    """The same, but each gradient lives until the update."""

    def consume(self, parameter, gradient):
        super().consume(parameter, gradient)
        self.kept = [*getattr(self, "kept", []), gradient]

    def step(self, closure=None):
        self.kept = []
        return super().step(closure)


def test_the_memory_of_a_gradient_is_saved():
    plain, gradient = peak_of(torch.optim.AdamW)
    folded, _ = peak_of(wb.AdamA)
    assert plain - folded >= 0.9 * gradient


def test_the_measurement_sees_gradients_that_are_kept():
    plain, gradient = peak_of(torch.optim.AdamW)
    kept, _ = peak_of(KeepsGradients)
    assert plain - kept < 0.5 * gradient


def planned_and_taken(make, dtype, *, updates=3):
    """What a plan says of one of these models, and what the last of some updates takes, all in all."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(24))).to(dtype)
    optimizer = make(model)

    def loss_fn(model, x):
        return model(x).square().mean()

    rows = torch.randn(8, 96, dtype=dtype)
    plan = wb.plan(model, optimizer, loss_fn, rows, logical_batch=8, memory="1GiB", micro_batch=wb.Rows(2), timed=False)
    accumulator = wb.Accumulator(model, optimizer, loss_fn, micro_batch=wb.Rows(2), memory="1GiB", check=None)
    for _ in range(updates):
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        states = [value for each in optimizers for state in each.state.values() for value in state.values()]
        before = sum(each.nbytes for each in [*model.parameters(), *states])
        with memory.tensor_peak() as peak:
            accumulator.step(rows)
    assert not any("could not be stepped" in reason for reason in plan.reasons)
    return plan.peak_bytes, before + peak.peak_bytes


class Gathers(torch.optim.Optimizer):
    """Keeps the sum of what it takes in as its state."""

    def __init__(self, params):
        super().__init__(params, {})

    def begin_window(self):
        for state in self.state.values():
            state["sum"].zero_()

    def consume(self, parameter, gradient):
        state = self.state[parameter]
        state["sum"] = state["sum"].add_(gradient) if state else gradient

    def step(self, closure=None):
        with torch.no_grad():
            for parameter, state in self.state.items():
                parameter.sub_(state["sum"].to(parameter.dtype), alpha=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda model: wb.AdamA(model.parameters()),
        lambda model: [wb.AdamA(model[:12].parameters()), torch.optim.AdamW(model[12:].parameters())],
    ],
    ids=["AdamA", "beside another"],
)
def test_a_plan_knows_that_gradients_are_taken_in(make, dtype):
    """Its moments are as wide as they are, and no gradient lives from one micro-batch to the next."""
    planned, taken = planned_and_taken(make, dtype)
    assert planned == pytest.approx(taken, rel=0.01)


def test_a_plan_counts_what_an_optimizer_keeps_of_what_it_takes_in():
    planned, taken = planned_and_taken(lambda model: Gathers(model.parameters()), torch.float32)
    assert planned == pytest.approx(taken, rel=0.01)
