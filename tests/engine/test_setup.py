"""Who trains what, and whether they belong together."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import wholebatch as wb
from menagerie import mean_square, mlp, regression
from wholebatch.engine.setup import Setup


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


class ByEpoch:
    """A schedule of other libraries, which has to be told where it is."""

    def step(self, epoch, metric=None):
        raise AssertionError("it is not called")


MODEL = mlp()
FROZEN = mlp().requires_grad_(False)
WRONG = {
    "no module": (lambda: ([MODEL], sgd_of(MODEL), None), "model is a list", "ModuleList"),
    "no optimizer": (lambda: (MODEL, [], None), "no optimizer", "AdamW"),
    "not an optimizer": (lambda: (MODEL, MODEL, None), "optimizer is a Sequential", "list of optimizers"),
    "parameters of another model": (
        lambda: (MODEL, sgd_of(mlp()), None),
        r"4 of 4 parameters that are not the model's; the first has shape \(7, 5\)",
        "ModuleDict",
    ),
    "some other parameters": (
        lambda: (MODEL, torch.optim.SGD([*MODEL.parameters(), nn.Parameter(torch.ones(9))]), None),
        r"1 of 5 parameters .* shape \(9,\)",
        "parameters of the loss",
    ),
    "a parameter twice": (lambda: (MODEL, [sgd_of(MODEL), sgd_of(MODEL)], None), "same parameter: 0.weight", "one of"),
    "a closure": (
        lambda: (MODEL, torch.optim.LBFGS(MODEL.parameters()), None),
        "LBFGS needs a closure",
        "AdamW or SGD",
    ),
    "nothing to learn": (lambda: (FROZEN, sgd_of(FROZEN), None), "requires a gradient", "requires_grad_"),
    "schedule of another optimizer": (
        lambda: (MODEL, sgd_of(MODEL), lr_scheduler.StepLR(sgd_of(MODEL), 1)),
        "StepLR belongs to another optimizer",
        "passed along",
    ),
    "a class of schedules": (
        lambda: (MODEL, sgd_of(MODEL), lr_scheduler.ExponentialLR),
        "is the class ExponentialLR itself",
        "ExponentialLR(optimizer, ...)",
    ),
    "one schedule of another optimizer": (
        lambda: (MODEL, (o := sgd_of(MODEL)), [lr_scheduler.StepLR(o, 1), lr_scheduler.ConstantLR(sgd_of(MODEL))]),
        "ConstantLR belongs to another optimizer",
        "passed along",
    ),
    "a lazy layer": (
        lambda: ((lazy := nn.Sequential(nn.LazyLinear(2))), sgd_of(lazy), None),
        "no shape yet: 0.weight, 0.bias",
        "on one batch first",
    ),
    "a schedule that has to be told": (
        lambda: (MODEL, sgd_of(MODEL), ByEpoch()),
        r"ByEpoch\.step\(\) asks for `epoch`",
        "update.applied",
    ),
    "no schedule": (lambda: (MODEL, sgd_of(MODEL), 0.1), "scheduler is a float", "torch.optim.lr_scheduler"),
}


def test_an_optimizer_that_finds_its_step_by_itself_has_no_rate():
    """As Adafactor with lr=None: the update happens, and its record says that nobody stated a rate."""

    class FindsItsStep(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": None})

        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(parameter.grad.sign(), alpha=0.1)

    model = nn.Linear(3, 1)
    update = wb.Accumulator(model, FindsItsStep(model.parameters()), lambda model, x: model(x).mean()).step(
        torch.ones(4, 3)
    )
    assert update.applied
    assert math.isnan(update.lr)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_belong_together_is_refused(wrong):
    make, found, hint = WRONG[wrong]
    model, optimizer, scheduler = make()
    with pytest.raises(wb.OptimizerError, match=found) as error:
        wb.Accumulator(model, optimizer, lr_scheduler=scheduler)
    assert hint in error.value.hint
    assert isinstance(error.value, ValueError)


class Anything:
    """A schedule of one's own: it has a step, and does not say of which optimizer."""

    def step(self):
        pass


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)], [2]),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 1)]),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
        lambda _: Anything(),
    ],
)
def test_schedules_of_every_kind_belong_to_their_optimizer(schedule):
    optimizer = sgd_of(MODEL)
    assert len(Setup.of(MODEL, optimizer, schedule(optimizer)).schedulers) == 1


def test_a_setup_knows_who_is_stepped_and_who_stands_by():
    optimizers = [torch.optim.SGD(MODEL[2].parameters(), lr=0.5), torch.optim.SGD([MODEL[0].bias], lr=0.1)]
    setup = Setup.of(MODEL, optimizers, None)
    assert [id(p) for p in setup.parameters] == [id(p) for p in (MODEL[2].weight, MODEL[2].bias, MODEL[0].bias)]
    assert [id(p) for p in setup.bystanders] == [id(MODEL[0].weight)]
    assert setup.lr == 0.5
    assert setup.device == torch.device("cpu")


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, whose groups it shares, without the hooks that an optimizer has."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        self.inner.step()


class Bound:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def hook(self, weight, optimizer=None):
        (optimizer or self.optimizer).step()


BOUND = {
    "a name": lambda each: lambda _: each.step(),
    "a table": lambda each: lambda _, table={"weight": each}: table["weight"].step(),
    "a list": lambda each: (lambda held: lambda _: held[0].step())([each]),
    "a method": lambda each: Bound(each).hook,
    "a partial": lambda each: partial(Bound(None).hook, optimizer=each),
}


@pytest.mark.parametrize("bound", BOUND)
def test_weights_that_are_stepped_inside_of_the_backward_pass_are_refused(bound):
    """They would be stepped once for each micro-batch, and moved before anybody could tell."""
    model = mlp()
    model[2].weight.register_post_accumulate_grad_hook(BOUND[bound](torch.optim.Adam([model[2].weight])))
    with pytest.raises(wb.OptimizerError, match=r"hook on 2\.weight holds an optimizer \(Adam\)") as error:
        Setup.of(model, sgd_of(model), None)
    assert "take the hooks off" in error.value.hint


def test_weights_that_pytorch_steps_inside_of_the_backward_pass_are_refused():
    model = mlp()
    model[0].bias._in_backward_optimizers = [torch.optim.SGD([model[0].bias], lr=0.1)]
    with pytest.raises(wb.OptimizerError, match=r"hook on 0\.bias holds an optimizer \(SGD\)"):
        Setup.of(model, sgd_of(model), None)


def test_hooks_that_only_look_are_none_of_its_business():
    model = mlp()
    norms, later = [], None
    model[0].weight.register_post_accumulate_grad_hook(lambda weight: norms.append(weight.grad.norm()))
    model[0].bias.register_post_accumulate_grad_hook(lambda _: later)
    Setup.of(model, sgd_of(model), None)
    accumulator = wb.Accumulator(model, sgd_of(model), mean_square, micro_batch=wb.Rows(2), check=None)
    assert accumulator.step(regression(4, torch.float32)).applied
    assert len(norms) == 2


def test_an_optimizer_around_another_that_left_its_own_making_out_is_stepped():
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    batch = {"x": torch.randn(6, 5), "y": torch.randn(6, 3)}
    for each, wrap in ((model, Wrapper), (twin, lambda inner: inner)):
        loop = wb.Accumulator(each, wrap(sgd_of(each)), mean_square, micro_batch=wb.Rows(2), check=None)
        assert loop.step(batch).applied
    assert torch.equal(model[0].weight, twin[0].weight)


def test_a_learning_rate_may_be_a_tensor():
    setup = Setup.of(MODEL, torch.optim.SGD(MODEL.parameters(), lr=torch.tensor(0.25)), None)
    assert setup.lr == 0.25


@pytest.mark.parametrize(
    "schedule", [lr_scheduler.ExponentialLR, lr_scheduler.CosineAnnealingLR], ids=lambda s: s.__name__
)
def test_a_schedule_that_the_loop_steps_too_is_refused_before_the_third_update(schedule):
    model = mlp()
    optimizer = sgd_of(model)
    scheduler = schedule(optimizer, 10 if schedule is lr_scheduler.CosineAnnealingLR else 0.5)
    accumulator = wb.Accumulator(model, optimizer, mean_square, lr_scheduler=scheduler, check=None)
    batch = {"x": torch.randn(6, 5), "y": torch.randn(6, 3)}
    for _ in range(2):
        assert accumulator.step(batch).applied
        scheduler.step()
    with pytest.raises(wb.WindowError, match=f"{schedule.__name__} was stepped by somebody else") as error:
        accumulator.step(batch)
    assert "scheduler.step()" in error.value.hint
    assert accumulator.open_window is None


def test_a_schedule_whose_state_is_loaded_between_updates_goes_on():
    model = mlp()
    optimizer = sgd_of(model)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    accumulator = wb.Accumulator(model, optimizer, mean_square, lr_scheduler=scheduler, check=None)
    batch = {"x": torch.randn(6, 5), "y": torch.randn(6, 3)}
    states = []
    for _ in range(4):
        states.append(scheduler.state_dict() | {"last_epoch": scheduler.last_epoch + 1})
        assert accumulator.step(batch).applied
    for state in (states[3], states[1], states[3]):
        scheduler.load_state_dict(state)
        assert accumulator.step(batch).applied
