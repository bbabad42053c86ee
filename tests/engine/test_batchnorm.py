"""Which layers see the cut, and the answers: refuse, convert, freeze."""

import copy
import pickle

import pytest
import torch
from torch import nn

import wholebatch as wb
from menagerie import BATCH_NORM, mean_square, numbers, regression
from properties import assert_leaves_no_trace, flat, relative_error, sgd
from wholebatch.engine.batchnorm import batch_dependent_layers

LAZY = "ignore:Lazy modules are a new feature:UserWarning"


class OwnNorm(nn.BatchNorm2d):
    """A batch norm of somebody else."""

    def forward(self, x):
        return super().forward(x) * 2


class RunningNorm(nn.Module):
    """Not torch's, but it keeps running statistics of its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        return x - x.mean(0)


def nested():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)),
            "own": OwnNorm(6),
            "plain": nn.BatchNorm1d(5, affine=False),
        }
    )


@pytest.mark.parametrize(
    ("layer", "depends"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm3d(4), True),
        (nn.SyncBatchNorm(4), True),
        (OwnNorm(4), True),
        (RunningNorm(), True),
        (nn.BatchNorm1d(4).eval(), False),
        (RunningNorm().eval(), False),
        (nn.BatchNorm1d(4, track_running_stats=False), True),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), True),
        (nn.InstanceNorm1d(4), False),
        (nn.InstanceNorm1d(4, track_running_stats=True), True),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(4), False),
        (nn.Linear(4, 4), False),
    ],
    ids=str,
)
def test_layers_that_compute_over_the_batch_are_found(layer, depends):
    assert batch_dependent_layers(nn.Sequential(nn.ReLU(), layer)) == (["1"] if depends else [])
    assert batch_dependent_layers(layer) == ([type(layer).__name__] if depends else [])


@pytest.mark.filterwarnings(LAZY)
def test_a_lazy_layer_is_found_before_it_knows_its_channels():
    assert batch_dependent_layers(nn.Sequential(nn.LazyBatchNorm2d())) == ["0"]


def trained(model, loss_fn=mean_square, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return wb.Accumulator(model, optimizer, loss_fn, **{"micro_batch": wb.Rows(3), **options}), optimizer


@pytest.mark.parametrize("layer", [nn.InstanceNorm1d(5, track_running_stats=True), RunningNorm()], ids=str)
def test_what_is_no_batch_norm_is_not_sent_to_answers_for_batch_norm(layer):
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)).double()
    with pytest.raises(wb.BatchNormError, match="keep running statistics") as error:
        trained(model)[0].step(regression(6, torch.float64))
    assert "wb.exact_batch_norm" not in error.value.hint
    assert "track_running_stats=False" in error.value.hint


@pytest.mark.parametrize("way", ["step", "updates", "window"])
def test_a_cut_batch_is_refused_and_the_layers_are_named(way):
    model = BATCH_NORM.model()
    accumulator, optimizer = trained(model)
    batch = regression(6, torch.float64)

    def in_a_loop_of_ones_own():
        with accumulator.window() as window:
            for _ in range(2):
                window.backward(mean_square(model, batch), targets=6)

    run = {
        "step": lambda: accumulator.step(batch),
        "updates": lambda: list(accumulator.updates([batch, batch], micro_batches=2)),
        "window": in_a_loop_of_ones_own,
    }[way]
    with assert_leaves_no_trace(model, optimizer), pytest.raises(wb.BatchNormError, match="whole batch: 1\\.") as error:
        run()
    for answer in ("wb.convert_batch_norm", "wb.freeze_batch_norm", 'batch_norm="per_micro_batch"'):
        assert answer in error.value.hint


def test_step_refuses_before_the_first_forward_pass():
    model = BATCH_NORM.model()
    model[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(wb.BatchNormError):
        trained(model)[0].step(regression(6, torch.float64))


def test_many_layers_are_counted_instead_of_listed():
    model = nn.Sequential(nn.Linear(5, 3), *(nn.BatchNorm1d(3) for _ in range(8))).double()
    with pytest.raises(wb.BatchNormError, match="1, 2, 3, 4, 5 and 3 more"):
        trained(model)[0].step(regression(6, torch.float64))


def test_a_batch_that_is_not_cut_may_have_batch_norm():
    model = BATCH_NORM.model()
    right = copy.deepcopy(model)
    accumulator, _ = trained(model, micro_batch=wb.Rows(6))
    assert accumulator.step(regression(6, torch.float64)).applied
    mean_square(right, regression(6, torch.float64)).backward()
    expected = flat(right.parameters()) - 0.1 * flat(p.grad for p in right.parameters())
    assert relative_error(flat(model.parameters()), expected) <= 1e-12
    assert torch.equal(model[1].running_mean, right[1].running_mean)


def test_statistics_of_parts_are_there_for_those_who_want_them():
    model = BATCH_NORM.model()
    other = copy.deepcopy(model)
    accumulator, _ = trained(model, batch_norm="per_micro_batch")
    batch = regression(6, torch.float64)
    assert accumulator.step(batch).micro_batches == 2
    for rows in (slice(0, 3), slice(3, 6)):
        mean_square(other, {name: x[rows] for name, x in batch.items()}).backward()
    expected = flat(other.parameters()) - 0.05 * flat(p.grad for p in other.parameters())
    assert relative_error(flat(model.parameters()), expected) <= 1e-12


# Convert.


@pytest.mark.parametrize(("to", "groups"), [("group", 6), ("layer", 1), ("instance", 12)])
def test_a_converted_layer_computes_what_group_norm_does(to, groups):
    model = nested()
    with torch.no_grad():
        model["stem"][1].weight.uniform_(0.5, 2)
        model["stem"][1].bias.uniform_(-1, 1)
    weight, bias = model["stem"][1].weight, model["stem"][1].bias
    x = numbers(2, 12, 4, 4, dtype=torch.float32)
    converted = wb.convert_batch_norm(model, to=to, groups=6)
    assert converted is model
    layer = converted["stem"][1]
    assert type(layer) is nn.GroupNorm
    assert layer.weight is weight
    assert layer.bias is bias
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, groups, weight, bias, 1e-5), rtol=0, atol=0)
    assert batch_dependent_layers(converted) == []


@pytest.mark.parametrize(
    ("channels", "groups", "number"), [(48, 32, 24), (64, 32, 32), (5, 32, 5), (7, 4, 1), (6, 4, 3)]
)
def test_groups_divide_the_channels(channels, groups, number):
    assert wb.convert_batch_norm(nn.BatchNorm2d(channels), groups=groups).num_groups == number


@pytest.mark.parametrize(("channels", "number"), [(4, 1), (32, 4), (96, 12), (512, 32)])
def test_groups_of_single_vectors_hold_several_values(channels, number):
    layer = wb.convert_batch_norm(nn.BatchNorm1d(channels))
    assert layer.num_groups == number
    assert layer(numbers(3, channels, dtype=torch.float32)).std(dim=1).min() > 0.5


def test_a_converted_layer_keeps_its_eps_its_mode_its_dtype_and_whether_it_scales():
    layer = wb.convert_batch_norm(nn.BatchNorm1d(4, eps=0.1, affine=False).double().eval())
    assert (layer.eps, layer.training, layer.affine) == (0.1, False, False)
    assert layer(numbers(2, 4)).dtype == torch.float64
    assert wb.convert_batch_norm(nn.BatchNorm1d(4).double())(numbers(2, 4)).dtype == torch.float64


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": nn.Sequential(shared, nn.ReLU())})
    model["c"] = shared
    wb.convert_batch_norm(model)
    assert model["a"][1] is model["b"][0] is model["c"]
    assert model["c"].weight is shared.weight


def test_an_optimizer_of_before_goes_on_stepping_the_converted_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    accumulator, _ = trained(wb.convert_batch_norm(model, groups=2))
    before = model[1].weight.detach().clone()
    assert accumulator.step(regression(6, torch.float64)).micro_batches == 2
    assert not torch.equal(model[1].weight, before)


def test_a_conversion_that_does_not_exist_is_refused_before_anything_changes():
    model = nested()
    with pytest.raises(wb.BatchNormError, match="to='batch'") as error:
        wb.convert_batch_norm(model, to="batch")
    assert 'to="layer"' in error.value.hint
    assert type(model["stem"][1]) is nn.BatchNorm2d


# Freeze.


def test_frozen_statistics_stay_also_in_training_mode():
    model = nested()
    model["stem"](numbers(4, 3, 5, 5, dtype=torch.float32))
    names, statistics = list(model.state_dict()), model["stem"][1].running_mean.clone()
    frozen = wb.freeze_batch_norm(model)
    assert frozen is model
    model.train()
    assert batch_dependent_layers(model) == []
    assert model.training
    x = numbers(4, 3, 5, 5, dtype=torch.float32)
    assert torch.equal(model["stem"](x), copy.deepcopy(model).eval()["stem"](x))
    assert torch.equal(model["stem"][1].running_mean, statistics)
    assert list(model.state_dict()) == names
    assert isinstance(model["own"], OwnNorm)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, OwnNorm])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_frozen_layer_survives_a_copy(kind, again):
    layer = wb.freeze_batch_norm(kind(4))
    with torch.no_grad():
        layer.running_mean += 1
    found = again(layer)
    assert type(found) is type(layer)
    assert isinstance(found, kind)
    assert not found.train().training
    assert not found.train(mode=True).training
    assert found.running_mean.tolist() == [1] * 4
    assert type(layer).__name__ == f"Frozen{kind.__name__}"


def test_freezing_twice_changes_nothing():
    layer = wb.freeze_batch_norm(nn.BatchNorm1d(4))
    kind = type(layer)
    assert type(wb.freeze_batch_norm(layer)) is kind


def test_affine_weights_of_a_frozen_layer_learn_exactly():
    model = BATCH_NORM.model()
    model(numbers(8, 5))
    wb.freeze_batch_norm(model)
    right = copy.deepcopy(model)
    model.train()
    accumulator, _ = trained(model)
    accumulator.step(regression(7, torch.float64))
    mean_square(right, regression(7, torch.float64)).backward()
    expected = flat(right.parameters()) - 0.1 * flat(p.grad for p in right.parameters())
    assert relative_error(flat(model.parameters()), expected) <= 1e-12
    assert not torch.equal(model[1].weight, torch.ones_like(model[1].weight))


def test_a_frozen_layer_may_still_be_converted():
    assert type(wb.convert_batch_norm(wb.freeze_batch_norm(nn.BatchNorm1d(4)))) is nn.GroupNorm


def test_a_layer_without_running_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(wb.BatchNormError, match="Batch norm 1 keeps no running statistics") as error:
        wb.freeze_batch_norm(model)
    assert "wb.convert_batch_norm" in error.value.hint


@pytest.mark.filterwarnings(LAZY)
@pytest.mark.parametrize("answer", [wb.convert_batch_norm, wb.freeze_batch_norm])
def test_a_lazy_layer_has_to_know_its_channels_first(answer):
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(wb.BatchNormError, match="Batch norm 0 is lazy") as error:
        answer(model)
    assert "one batch first" in error.value.hint
    model(numbers(4, 6, dtype=torch.float32))
    assert batch_dependent_layers(answer(model).train()) == []


def test_an_accumulator_on_other_weights_of_batch_norm_is_the_same_as_before():
    """The weights of a converted layer are the very parameters that an optimizer of before holds."""
    model = nested()
    optimizer = sgd(model.parameters())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wb.convert_batch_norm(model)
    assert {id(parameter) for parameter in model.parameters()} == held


def test_single_vectors_are_refused_by_groups_of_one_channel():
    """Of one value less its mean nothing is left, whatever the weights before it are."""
    model = wb.convert_batch_norm(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16)), to="instance")
    for rows in (1, 4):
        with pytest.raises(wb.BatchNormError, match="a single value a channel") as caught:
            model(torch.randn(rows, 3))
        assert 'to="group"' in str(caught.value)
    assert torch.isfinite(model[1](torch.randn(1, 16, 5))).all()
    grouped = wb.convert_batch_norm(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16)))
    assert grouped(torch.randn(1, 3)).abs().max() > 0
