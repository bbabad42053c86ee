"""Batch norm over the whole logical batch: output, gradient and statistics are those of one undivided pass."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import wholebatch as wb
from coupled import CUTS, NORMED, classify, images, match, normed_mlp, pairs
from menagerie import Animal, numbers
from properties import change, flat, relative_error, sgd, stepped, undivided, updated
from wholebatch.engine.batchnorm import batch_dependent_layers
from wholebatch.engine.meetings.exactnorm import exact_layers
from wholebatch.engine.meetings.normalizing import Relay, merge, moments_of, normalize

FP64 = 1e-11
ROWS = 11


def exactly(animal):
    return Animal(**{**vars(animal), "build": lambda: wb.exact_batch_norm(animal.build())})


def trained(animal, make_update, dtype=torch.float64, rows=ROWS, updates=3):
    """What some updates change in the weights, and the buffers that they leave."""
    model = animal.model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = flat(model.parameters())
    for _ in range(updates):
        make_update(model, optimizer, animal.batch(rows, dtype))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return flat(model.parameters()) - before, buffers


def assert_same(found, right, within):
    assert relative_error(found[0], right[0]) <= within
    assert found[1].keys() == right[1].keys()
    for name, buffer in right[1].items():
        assert found[1][name].dtype == buffer.dtype
        torch.testing.assert_close(found[1][name], buffer, rtol=within, atol=within)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NORMED)
def test_two_updates_and_all_statistics_are_those_of_the_undivided_batch(name, cut):
    """Weights and running statistics after two updates, over up to 18 layers of batch norm."""
    right = trained(NORMED[name], undivided(NORMED[name]))
    animal = exactly(NORMED[name])
    assert_same(trained(animal, stepped(animal, CUTS[cut])), right, FP64)


@pytest.mark.parametrize("way", ["step", "updates"])
def test_memory_that_runs_out_in_the_one_backward_pass_is_not_laid_to_its_last_micro_batch(way):
    """Which holds a single row here, that no cut makes smaller."""
    animal, due = exactly(NORMED["MLP"]), [1]

    def run_out(_):
        if due:
            due.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def loss_fn(model, batch):
        loss = animal.loss_fn(model, batch)
        loss.register_hook(run_out)
        return loss

    def make_update(model, optimizer, batch):
        accumulator = wb.Accumulator(model, optimizer, loss_fn, **animal.objective, micro_batch=wb.Rows(4), check=None)
        if way == "step":
            update = accumulator.step(batch)
        else:
            parts = [{name: each[start : start + 4] for name, each in batch.items()} for start in (0, 4, 8)]
            (update,) = accumulator.updates(parts, micro_batches=3)
        assert update.retries == 1

    right = trained(NORMED["MLP"], undivided(NORMED["MLP"]), rows=9, updates=1)
    assert_same(trained(animal, make_update, rows=9, updates=1), right, FP64)


@pytest.mark.parametrize("name", NORMED)
def test_the_bound_sees_statistics_of_parts(name):
    animal = NORMED[name]
    right = trained(animal, undivided(animal), updates=1)
    found = trained(animal, stepped(animal, wb.Rows(4), batch_norm="per_micro_batch"), updates=1)
    assert relative_error(found[0], right[0]) > 1e-2
    statistic = next(name for name in right[1] if name.endswith("running_var"))
    assert relative_error(found[1][statistic], right[1][statistic]) > 1e-2


def test_in_fp32_and_under_autocast_the_difference_is_rounding():
    animal, exact = NORMED["MLP"], exactly(NORMED["MLP"])
    right = trained(animal, undivided(animal), torch.float32)
    assert_same(trained(exact, stepped(exact, wb.Rows(4)), torch.float32), right, 64 * torch.finfo(torch.float32).eps)
    half = {"precision": "bf16"}
    whole = trained(animal, stepped(animal, wb.Rows(99), **half), torch.float32)
    cut = trained(exact, stepped(exact, wb.Rows(4), **half), torch.float32)
    assert relative_error(cut[0], whole[0]) <= 4 * torch.finfo(torch.bfloat16).eps
    for name, buffer in whole[1].items():
        torch.testing.assert_close(cut[1][name], buffer, rtol=1e-2, atol=1e-2)


def test_statistics_are_in_fp32_under_autocast_and_in_16_bit_weights():
    """Around a mean of 100 a sum of squares in 16 bits would have no digit left."""
    x = (100 + numbers(64, 4, dtype=torch.float32)).bfloat16()
    for weights in (torch.float32, torch.bfloat16):
        layer = wb.exact_batch_norm(nn.BatchNorm1d(4)).to(weights)
        layer.running_mean, layer.running_var = layer.running_mean.float(), layer.running_var.float()
        found = meeting_of(layer, x, 4)
        right = F.batch_norm(x.double(), None, None, training=True)
        assert found.dtype == torch.bfloat16
        assert relative_error(found.detach().double(), right) <= torch.finfo(torch.bfloat16).eps
        assert relative_error(layer.running_mean.double(), 0.1 * x.double().mean(0)) <= 1e-6


def meeting_of(layer, x, parts):
    """What a layer makes of rows whose parts meet."""
    outputs = []

    def loss_fn(model, part):
        outputs.append(layer(part))
        return (outputs[-1].float() * model.weight.float().sum()).mean()

    model = nn.Linear(2, 1)
    everything = nn.ModuleDict({"layer": layer, "model": model})
    accumulator = wb.Accumulator(
        everything,
        sgd(model.parameters()),
        lambda both, part: loss_fn(both["model"], part),
        micro_batch=wb.Rows(-(-len(x) // parts)),
        check=None,
    )
    accumulator.step(x)
    return torch.cat(outputs)


SHAPES = {
    "1d": (nn.BatchNorm1d, (10, 4)),
    "1d of series": (nn.BatchNorm1d, (10, 4, 7)),
    "2d": (nn.BatchNorm2d, (10, 4, 3, 5)),
    "3d": (nn.BatchNorm3d, (10, 4, 2, 3, 2)),
    "synchronised": (nn.SyncBatchNorm, (10, 4, 3, 5)),
}


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_layer(kind, options):
    make, shape = SHAPES[kind]
    x = 2 + numbers(*shape)
    plain = make(4, **options).double()
    exact = wb.exact_batch_norm(copy.deepcopy(plain))
    assert relative_error(meeting_of(exact, x, 3).detach(), plain(x).detach()) <= FP64
    for (name, one), (_, other) in zip(exact.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=FP64, atol=FP64, msg=name)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_lazy_layers_become_exact_ones(kind):
    layer = wb.exact_batch_norm(kind())
    layer.eval()(torch.ones({"1": (4, 3), "2": (4, 3, 2, 2), "3": (4, 3, 2, 2, 2)}[kind.__name__[-2]]))
    assert type(layer).__name__ == f"Exact{kind.__name__[4:]}"
    assert exact_layers(layer.train()) == [type(layer).__name__]


def test_names_parameters_and_state_stay_the_same():
    model = NORMED["ResNet"].model()
    state, parameters = model.state_dict(), list(model.parameters())
    assert wb.exact_batch_norm(model) is model
    assert list(model.state_dict()) == list(state)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert batch_dependent_layers(model) == []
    assert len(exact_layers(model)) == 17
    assert exact_layers(model.eval()) == []
    assert wb.exact_batch_norm(model) is model
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_exact_too(copied):
    model = copied(wb.exact_batch_norm(normed_mlp()))
    assert exact_layers(model) == ["1", "4"]


def test_frozen_layers_stay_frozen_and_exact_ones_can_be_frozen_or_converted():
    frozen = wb.exact_batch_norm(wb.freeze_batch_norm(normed_mlp())).train()
    assert exact_layers(frozen) == []
    assert not frozen[1].training
    later = wb.freeze_batch_norm(wb.exact_batch_norm(normed_mlp())).train()
    assert exact_layers(later) == []
    assert not copy.deepcopy(later).train()[1].training
    converted = wb.convert_batch_norm(wb.exact_batch_norm(normed_mlp()))
    assert isinstance(converted[1], nn.GroupNorm)


def test_a_layer_in_evaluation_uses_what_it_has():
    def with_a_fixed_layer():
        model = wb.exact_batch_norm(normed_mlp())
        model[4].eval()
        return model

    def plain():
        model = normed_mlp()
        model[4].eval()
        return model

    right = trained(Animal(plain, pairs, match), undivided(Animal(plain, pairs, match)))
    animal = Animal(with_a_fixed_layer, pairs, match)
    assert_same(trained(animal, stepped(animal, wb.Rows(4))), right, FP64)


def test_outside_an_accumulator_nothing_changes():
    model = normed_mlp().double()
    exact = wb.exact_batch_norm(copy.deepcopy(model))
    x = numbers(9, 6)
    torch.testing.assert_close(model(x), exact(x), rtol=FP64, atol=FP64)
    torch.testing.assert_close(model.eval()(x), exact.eval()(x), rtol=FP64, atol=FP64)
    torch.testing.assert_close(model[1].running_var, exact[1].running_var, rtol=FP64, atol=FP64)


def test_channels_last_stays_so():
    x = numbers(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    layer = wb.exact_batch_norm(nn.BatchNorm2d(4).double())
    right = nn.BatchNorm2d(4).double()(x)
    assert right.is_contiguous(memory_format=torch.channels_last)
    seen = []
    layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    assert relative_error(meeting_of(layer, x, 2).detach(), right.detach()) <= FP64
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm of somebody else, around torch's."""

    def forward(self, x):
        return super().forward(x) * 2


class OtherNorm(nn.BatchNorm2d):
    """A batch norm of somebody else, that calls the function itself."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


def test_a_subclass_keeps_its_own_forward_pass():
    x = numbers(8, 4, 3, 3)
    layer = wb.exact_batch_norm(OwnNorm(4).double())
    assert relative_error(meeting_of(layer, x, 2).detach(), OwnNorm(4).double()(x).detach()) <= FP64
    assert exact_layers(copy.deepcopy(layer)) == ["ExactOwnNorm"]


def test_a_subclass_that_goes_its_own_way_is_refused():
    layer = wb.exact_batch_norm(OtherNorm(4).double())
    with pytest.raises(wb.BatchNormError, match="OtherNorm computes its statistics in a way of its own"):
        meeting_of(layer, numbers(8, 4, 3, 3), 2)


def test_one_value_in_all_is_too_few_as_in_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        meeting_of(wb.exact_batch_norm(nn.BatchNorm1d(4, track_running_stats=False)), torch.ones(1, 4), 1)


class Heads(nn.Module):
    """Only some of the rows come to the layer: the boxes that were found in a picture, say."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        found = x[:, 0] > 0
        return self.last(hidden.masked_scatter(found[:, None], self.norm(hidden[found])))


@pytest.mark.parametrize("check", ["first", None])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_micro_batch_may_bring_no_row_to_a_layer(rows, check):
    """Nothing is made of the few rows of the first check, of which none may come."""
    batch = {"x": numbers(11, 5), "y": numbers(11, 3, seed=1)}
    batch["x"][:, 0] = torch.tensor([-1.0] * 6 + [1.0] * 5)
    right, cut = Heads().double(), wb.exact_batch_norm(Heads().double())
    cut.load_state_dict(right.state_dict())

    def loss_fn(model, batch):
        return F.mse_loss(model(batch["x"]), batch["y"])

    optimizer = torch.optim.SGD(right.parameters(), lr=0.1)
    loss_fn(right, batch).backward()
    optimizer.step()
    wb.Accumulator(
        cut, torch.optim.SGD(cut.parameters(), lr=0.1), loss_fn, micro_batch=wb.Rows(rows), check=check
    ).step(batch)
    for name, tensor in right.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=FP64, atol=FP64)


def test_the_moments_are_merged_stably():
    """Around a mean of 1e8 the squares alone would lose all digits of a variance of 1."""
    x = 1e8 + numbers(64, 3)
    layer = wb.exact_batch_norm(nn.BatchNorm1d(3, momentum=1.0, affine=False).double())
    meeting_of(layer, x, 16)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-6, atol=0.0)
    naive = ((x.square().sum(0) - x.sum(0).square() / 64) / 63 - x.var(0)).abs()
    assert bool((naive > 1e-2).any())


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 2, 2)], ids=str)
def test_first_and_second_derivatives(shape):
    x, weight, bias = (
        numbers(*shape).requires_grad_(),
        numbers(3, seed=1).requires_grad_(),
        numbers(3, seed=2).requires_grad_(),
    )
    moments = torch.stack([numbers(3, seed=3), numbers(3, seed=4).square() + 0.5]).requires_grad_()

    def whole(x, weight, bias):
        """What two micro-batches of different size come to, with the short way of the gradient where it is open."""
        parts = [x[:1], x[1:]]
        relays = [Relay(), Relay()]
        brought = [moments_of(part, relay) for part, relay in zip(parts, relays, strict=True)]
        met = merge([part.numel() // 3 for part in parts], brought)
        return torch.cat(
            [normalize(part, met, weight, bias, 1e-5, relay) for part, relay in zip(parts, relays, strict=True)]
        )

    def alone(*inputs):
        return normalize(*inputs, 1e-5, None)

    assert torch.autograd.gradcheck(lambda x: moments_of(x, Relay()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: moments_of(x, Relay()), (x,))
    assert torch.autograd.gradcheck(alone, (x, moments, weight, bias))
    assert torch.autograd.gradgradcheck(alone, (x, moments, weight, bias))
    assert torch.autograd.gradcheck(lambda *some: alone(*some, None, None), (x, moments))
    assert torch.autograd.gradcheck(whole, (x, weight, bias))
    assert torch.autograd.gradgradcheck(whole, (x, weight, bias))
    torch.testing.assert_close(whole(x, weight, bias), F.batch_norm(x, None, None, weight, bias, training=True))


def test_it_saves_its_input_and_no_more():
    """As torch's own: what is held for the backward pass is the input, not three of its kind."""
    x = numbers(32, 16, 8, 8, dtype=torch.float32).requires_grad_()
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    moments = torch.stack([torch.zeros(16), torch.ones(16)]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        moments_of(x, Relay())
        normalize(x, moments, None, None, 1e-5, Relay())
    assert sum(held.values()) <= 1.01 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("whole_model", [True, False])
def test_activation_checkpointing_does_not_meet_twice(whole_model):
    """Recomputed parts take what the meeting came to; the running statistics move once."""

    class Recomputes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = normed_mlp()

        def forward(self, x):
            if whole_model:
                return checkpoint(self.layers, x, use_reentrant=False)
            x = checkpoint(self.layers[:3], x, use_reentrant=False)
            return checkpoint(self.layers[3:], x, use_reentrant=False)

    plain = Animal(normed_mlp, pairs, match)
    animal = Animal(lambda: wb.exact_batch_norm(Recomputes()), pairs, match)
    right = trained(plain, undivided(plain))
    found = trained(animal, stepped(animal, wb.Rows(4)))
    assert_same((found[0], {name.removeprefix("layers."): each for name, each in found[1].items()}), right, FP64)


def recomputing_mlp():
    """Two blocks that are recomputed, each with batch norm."""
    block = lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())  # noqa: E731
    return nn.Sequential(block(), block(), nn.Linear(6, 3))


def mean_square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def cut_and_checked(accumulator, _model, batch):
    assert accumulator.step(batch).micro_batches == 3
    assert "equal" in accumulator.reasons[0]


def alone_in_its_window(accumulator, model, batch):
    with accumulator.window() as window:
        window.backward(mean_square(model, batch), targets=len(batch[0]))


@pytest.mark.parametrize("make", [cut_and_checked, alone_in_its_window])
def test_blocks_are_recomputed_where_a_micro_batch_is_alone(make):
    """As in the first check, and in a window of a single micro-batch; the running statistics move once there, too."""
    right = recomputing_mlp().double()
    model = wb.exact_batch_norm(copy.deepcopy(right))
    wb.checkpoint_blocks(model)
    batch = numbers(9, 6), numbers(9, 3)
    mean_square(right, batch).backward()
    sgd(right.parameters()).step()
    make(wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(3)), model, batch)
    for found, wanted in zip(model.state_dict().values(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_second_micro_batch_is_refused_where_recomputing_hides_the_meeting():
    """A reentrant checkpoint meets in its backward pass alone, after the micro-batch was counted."""
    norm = wb.exact_batch_norm(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))).double()
    accumulator = wb.Accumulator(norm, sgd(norm.parameters()))
    window = accumulator.window()
    rows = numbers(4, 3).requires_grad_()
    window.backward(checkpoint(norm, rows, use_reentrant=True).mean(), targets=4)
    loss = checkpoint(norm, rows, use_reentrant=True).mean()
    with pytest.raises(wb.MeetingError, match="one by one"):
        window.backward(loss, targets=4)


def test_a_layer_in_two_places_meets_twice():
    def shared():
        norm = nn.BatchNorm1d(6)
        return nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh(), nn.Linear(6, 6), norm)

    right = trained(Animal(shared, pairs, match), undivided(Animal(shared, pairs, match)))
    animal = exactly(Animal(shared, pairs, match))
    assert_same(trained(animal, stepped(animal, wb.Rows(4))), right, FP64)
    assert int(right[1]["1.num_batches_tracked"]) == 6


def test_frozen_affine_weights_get_no_gradient():
    def build():
        model = normed_mlp()
        model[1].requires_grad_(False)
        model[4].bias.requires_grad_(False)
        return model

    animal = Animal(
        build, pairs, match, trained=lambda model: [each for each in model.parameters() if each.requires_grad]
    )
    exact = exactly(animal)
    batch = pairs(ROWS, torch.float64)
    right = change(animal, undivided(animal), [batch])
    assert relative_error(change(exact, stepped(exact, wb.Rows(4)), [batch]), right) <= FP64


def test_updates_from_a_loader_are_exact():
    animal = NORMED["MLP"]
    exact = exactly(animal)
    right = trained(animal, undivided(animal))
    assert_same(trained(exact, updated(exact, (4, 1, 6))), right, FP64)


def test_the_reason_names_the_layers():
    model = exactly(NORMED["ResNet"]).model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), classify, micro_batch=wb.Rows(4), check=None)
    accumulator.step(images(8, torch.float64))
    (reason,) = accumulator.reasons
    assert "batch norm is exact in 1, 2.norm1, 2.norm2 and 14 layers more" in reason


def test_the_first_batch_is_checked_in_lockstep():
    model = exactly(NORMED["MLP"]).model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), match, micro_batch=wb.Rows(4))
    accumulator.step(pairs(ROWS, torch.float64))
    assert "compared cut and uncut on 8 rows: equal to" in accumulator.reasons[0]
    assert wb.verify(model, match, pairs(ROWS, torch.float64)).ok


def test_a_refusal_names_it():
    model = normed_mlp()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), match, micro_batch=wb.Rows(4))
    with pytest.raises(wb.BatchNormError, match=r"wb\.exact_batch_norm\(model\)"):
        accumulator.step(pairs(ROWS, torch.float32))


@pytest.mark.parametrize("change", [wb.exact_batch_norm, wb.convert_batch_norm, wb.freeze_batch_norm])
def test_what_is_no_module_is_refused(change):
    with pytest.raises(wb.BatchNormError, match="this is a list"):
        change([nn.BatchNorm1d(3)])


@pytest.mark.parametrize("lockstep", ["auto", "replay", "joined"])
def test_running_statistics_of_another_model_in_the_loss_move_once_an_update(lockstep):
    """The check on the first batch, a failed attempt and a second pass leave them alone."""
    maker = wb.exact_batch_norm(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))).double()
    whole = copy.deepcopy(maker)
    critic = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    fails = [True]

    def loss_fn(critic, noise):
        with torch.no_grad():
            made = maker(noise)
        said = critic(made)
        if fails:
            raise ArithmeticError
        return F.softplus(said).mean()

    accumulator = wb.Accumulator(critic, sgd(critic.parameters()), loss_fn, micro_batch=wb.Rows(4), lockstep=lockstep)
    noise = numbers(11, 3)
    with pytest.raises(ArithmeticError):
        accumulator.step(noise)
    fails.clear()
    for _ in range(2):
        accumulator.step(noise)
        whole(noise)
    for now, then in zip(maker.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-12, atol=1e-12)
