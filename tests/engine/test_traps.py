"""The traps that real systems fall into, each in its smallest scene: who counts, divides and steps, and when.

The judge is the plain loop, or plain arithmetic written here; SGD, float64.
"""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import wholebatch as wb
from menagerie import CALM, IGNORED, TiedHead, mean_over_labels, mlp, num_labels, numbers, whole_numbers
from properties import flat, relative_error, sgd
from wholebatch.evidence import reference

EXACT = 1e-12


def masked(*labels):
    """One row of five tokens for each number of valid labels."""
    tokens = whole_numbers(11, len(labels), 5, seed=sum(labels))
    kept = torch.arange(5)[None, :] < torch.tensor(labels)[:, None]
    return {"tokens": tokens, "labels": tokens.roll(1, 1).masked_fill(~kept, IGNORED)}


def joined(*micro_batches):
    given = [part for part in micro_batches if part is not None]
    return {name: torch.cat([part[name] for part in given]) for name in given[0]}


def text_model():
    torch.manual_seed(3)
    return TiedHead().double()


def right_change(model, *batches):
    """What the plain loop changes, an update for each undivided batch."""
    model = copy.deepcopy(model)
    before = flat(model.parameters())
    for batch in batches:
        reference.update(model, sgd(model.parameters()), mean_over_labels, batch)
    return flat(model.parameters()) - before


def accumulator_of(model, loss_fn=mean_over_labels, **options):
    options = {"targets": num_labels, "check": None, **options}
    return wb.Accumulator(model, sgd(model.parameters()), loss_fn, **options)


def test_every_target_counts_once_however_ragged_the_counts():
    """T1: four micro-batches with 1, 5, 3 and 2 valid labels."""
    model, micro_batches = text_model(), [masked(n) for n in (1, 5, 3, 2)]
    right, before = right_change(model, joined(*micro_batches)), flat(model.parameters())
    (update,) = accumulator_of(model).updates(micro_batches, micro_batches=4)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert update.targets == 11


class IgnoresKeywords(nn.Linear):
    """A forward pass that takes extra keywords, and ignores them."""

    def forward(self, x, **ignored):
        return super().forward(x)


LOSSES = {
    "a model that ignores keywords": (
        lambda model, batch: mse_loss(model(batch["x"], num_items_in_batch=4), batch["y"]),
        {},
    ),
    "a mean": (lambda model, batch: mse_loss(model(batch["x"]), batch["y"]), {}),
    "a sum by a count": (
        lambda model, batch: mse_loss(model(batch["x"]), batch["y"], reduction="sum") / len(batch["x"]) / 3,
        {},
    ),
    "a sum": (
        lambda model, batch: mse_loss(model(batch["x"]), batch["y"], reduction="sum"),
        {"reduction": "sum", "targets": lambda batch: batch["y"].numel()},
    ),
    "a pair": (
        lambda model, batch: (mse_loss(model(batch["x"]), batch["y"], reduction="sum"), batch["y"].numel()),
        {},
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_does_not_depend_on_who_divides(loss):
    """T2: 4 micro-batches of 1 row against 1 of 4 have a gradient of the same norm."""
    loss_fn, options = LOSSES[loss]
    batch = {"x": numbers(4, 5), "y": numbers(4, 3, seed=1)}
    norms = []
    for rows in (1, 4):
        torch.manual_seed(0)
        model = IgnoresKeywords(5, 3).double()
        accumulator = wb.Accumulator(
            model, sgd(model.parameters()), loss_fn, micro_batch=wb.Rows(rows), check=None, **options
        )
        norms.append(accumulator.step(batch).grad_norm)
    assert norms[0] / norms[1] == pytest.approx(1, rel=EXACT)


@pytest.mark.parametrize("count", [10, 3, 8], ids=["ragged", "shorter than a window", "even"])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_the_tail_of_an_epoch_is_the_mean_of_its_own_rows(count, sized):
    """T3: 10 micro-batches in windows of 4, two epochs; nothing survives the end of an epoch."""
    model, micro_batches = text_model(), [masked(1 + k % 5, 3) for k in range(count)]
    logical = [joined(*micro_batches[start : start + 4]) for start in range(0, count, 4)]
    right, before = right_change(model, *logical, *logical), flat(model.parameters())
    accumulator = accumulator_of(model)
    updates = []
    for _ in range(2):
        loader = micro_batches if sized else iter(micro_batches)
        updates += list(accumulator.updates(loader, micro_batches=4))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert [update.micro_batches for update in updates] == [min(4, count - s) for s in range(0, count, 4)] * 2


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("nothing", [None, "masked"])
def test_a_micro_batch_without_a_target_takes_its_place_and_adds_nothing(place, nothing):
    """T4: left out of the divisor, and no NaN from a mean over nothing."""
    model, micro_batches = text_model(), [masked(3, 1), masked(2)]
    right, before = right_change(model, joined(*micro_batches)), flat(model.parameters())
    micro_batches.insert(place, masked(0, 0) if nothing == "masked" else None)
    (update,) = accumulator_of(model).updates(micro_batches, micro_batches=3)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert (update.targets, update.micro_batches, update.rows) == (6, 2, 5 if nothing else 3)


def test_a_loss_function_may_say_that_there_is_nothing_to_learn():
    model, batch = text_model(), masked(3, 0, 2, 0)
    right, before = right_change(model, batch), flat(model.parameters())

    def loss_fn(model, part):
        labels = part["labels"] != IGNORED
        if not labels.any():
            return None
        return cross_entropy(model(part["tokens"])[labels], part["labels"][labels], reduction="sum"), labels.sum()

    update = accumulator_of(model, loss_fn, targets=None, micro_batch=wb.Rows(1)).step(batch)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert (update.micro_batches, update.rows, update.targets) == (2, 4, 5)


@pytest.mark.parametrize("counted", [int, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_mean_over_no_target_does_not_spoil_its_window(counted, place):
    """T4: 0 / 0 in one micro-batch, with the count a number or a tensor."""
    model = text_model()
    micro_batches = [masked(3, 1), masked(2)]
    right, before = right_change(model, joined(*micro_batches)), flat(model.parameters())
    micro_batches.insert(place, masked(0))
    with accumulator_of(model).window() as window:
        for part in micro_batches:
            kept = part["labels"] != IGNORED
            each = cross_entropy(model(part["tokens"]).mT, part["labels"], ignore_index=IGNORED, reduction="none")
            window.backward(each.sum() / kept.sum(), targets=counted(int(kept.sum())))
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert math.isfinite(window.update.loss)


def hands_out(way, accumulator, micro_batches):
    if way == "step":
        return accumulator.step(joined(*micro_batches))
    if way == "updates":
        return next(accumulator.updates(micro_batches, micro_batches=len(micro_batches)))
    with accumulator.window() as window:
        for part in micro_batches:
            count = num_labels(part)
            window.backward(mean_over_labels(accumulator._setup.model, part), count if way == "tensors" else int(count))
    return window.update


@pytest.mark.parametrize("way", ["step", "updates", "numbers", "tensors"])
def test_a_window_without_a_target_is_no_update_and_says_why(way):
    """T4: no step of the optimizer, no stale gradient, and the next window is as if it had not been."""
    model = text_model()
    accumulator = accumulator_of(model, micro_batch=wb.Rows(1))
    before = flat(model.parameters())
    update = hands_out(way, accumulator, [masked(0), masked(0)])
    assert "nothing to learn" in update.skipped
    assert (update.targets, math.isnan(update.loss), update.grad_norm) == (0, True, None)
    assert torch.equal(flat(model.parameters()), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    right = right_change(model, joined(masked(2), masked(4)))
    assert hands_out(way, accumulator, [masked(2), masked(4)]).applied
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT


def test_a_batch_that_is_none_is_a_window_without_a_target():
    accumulator = accumulator_of(text_model())
    assert "nothing to learn" in accumulator.step(None).skipped


def test_gradients_that_somebody_left_behind_are_never_added():
    """T7, T4: what lies in ``.grad`` before a window is not part of it."""
    model, batch = text_model(), masked(3, 1, 2)
    right, before = right_change(model, batch), flat(model.parameters())
    mean_over_labels(model, masked(5)).backward()
    accumulator_of(model, micro_batch=wb.Rows(1)).step(batch)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_parameters_that_nobody_steps_are_left_as_they_were():
    model = text_model()
    mean_over_labels(model, masked(5)).backward()
    found = model.mix.weight.grad
    copied = found.clone()
    accumulator = wb.Accumulator(model, sgd([model.embedding.weight]), mean_over_labels, targets=num_labels)
    assert accumulator.step(masked(3, 1)).applied
    assert model.mix.weight.grad is found
    assert torch.equal(found, copied)
    assert model.embedding.weight.grad is None


def test_gradients_zeroed_before_the_first_backward_pass_change_nothing():
    model, parts = text_model(), [masked(3), masked(1)]
    right, before = right_change(model, joined(*parts)), flat(model.parameters())
    window = accumulator_of(model).window()
    model.zero_grad()
    for part in parts:
        window.backward(mean_over_labels(model, part), num_labels(part))
    window.close()
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT


MEDDLING = {
    "zero_grad": lambda _, optimizer: optimizer.zero_grad(),
    "zero_grad in place": lambda _, optimizer: optimizer.zero_grad(set_to_none=False),
    "backward": lambda model, _: mean_over_labels(model, masked(2)).backward(),
    "clipping": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
}


@pytest.mark.parametrize("end", ["backward", "close"])
@pytest.mark.parametrize("meddling", MEDDLING)
def test_meddling_with_the_gradients_of_an_open_window_is_an_error(meddling, end):
    """T7: zeroed, scaled or added to between two micro-batches; nothing is lost, the window can be run again."""
    model = text_model()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, mean_over_labels, targets=num_labels, check=None)
    before = flat(model.parameters())
    window = accumulator.window()
    window.backward(mean_over_labels(model, masked(3)), 3)
    MEDDLING[meddling](model, optimizer)
    with pytest.raises(wb.WindowError, match="by somebody else") as error:
        window.close() if end == "close" else window.backward(mean_over_labels(model, masked(1)), 1)
    assert "optimizer.zero_grad()" in error.value.hint
    assert not window.is_open
    assert torch.equal(flat(model.parameters()), before)
    assert accumulator.step(masked(3)).applied


@pytest.mark.parametrize("end", ["backward", "close"])
@pytest.mark.parametrize("of", ["embedding", "mix"])
def test_a_backward_pass_of_somebody_else_before_the_first_micro_batch_is_an_error(of, end):
    """T7: it joined the gradient of the window without a word, or was lost in a window of nothing else."""
    model = text_model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_over_labels, targets=num_labels, check=None)
    before = flat(model.parameters())
    window = accumulator.window()
    getattr(model, of).weight.sum().backward()
    with pytest.raises(wb.WindowError, match="by somebody else") as error:
        window.close() if end == "close" else window.backward(mean_over_labels(model, masked(1)), 1)
    assert "window.backward()" in error.value.hint
    assert not window.is_open
    assert torch.equal(flat(model.parameters()), before)
    assert all(weight.grad is None for weight in model.parameters())
    assert accumulator.step(masked(3)).applied


def test_an_optimizer_that_steps_inside_a_window_is_an_error_and_moves_nothing():
    """T7: the window stays open, and becomes the update that it would have been."""
    model, parts = text_model(), [masked(3), masked(1)]
    right, before = right_change(model, joined(*parts)), flat(model.parameters())
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer)
    window = accumulator.window()
    for part in parts:
        window.backward(mean_over_labels(model, part), num_labels(part))
        with pytest.raises(wb.WindowError, match="stepped inside an open window") as error:
            optimizer.step()
        assert "window.close() steps" in error.value.hint
    window.close()
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    optimizer.step()


def test_an_optimizer_is_free_again_when_its_accumulator_is_gone():
    model = text_model()
    optimizer = sgd(model.parameters())
    accumulator = wb.Accumulator(model, optimizer)
    accumulator.window()
    del accumulator
    gc.collect()  # an open window and its accumulator know each other
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks


def test_two_windows_may_end_in_one_iteration():
    """T7: an update exactly where it is declared."""
    model, first, second = text_model(), masked(3, 1), masked(2)
    right, before = right_change(model, first, second), flat(model.parameters())
    accumulator = accumulator_of(model)
    updates = []
    for _ in range(1):
        for batch in (first, second):
            with accumulator.window() as window:
                window.backward(mean_over_labels(model, batch), num_labels(batch))
            updates.append(window.update)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert [update.number for update in updates] == [1, 2]


def test_two_windows_of_one_accumulator_do_not_overlap():
    accumulator = accumulator_of(text_model())
    window = accumulator.window()
    for opens in (accumulator.window, lambda: accumulator.step(masked(2)), lambda: accumulator.step(None)):
        with pytest.raises(wb.WindowError, match="open already") as error:
            opens()
        assert "roll back the first" in error.value.hint
    with pytest.raises(wb.WindowError, match="open already"):
        next(accumulator.updates([masked(2)], micro_batches=1))
    window.rollback()
    assert accumulator.step(masked(2)).applied


@pytest.mark.parametrize("broken_off", [False, True])
def test_an_evaluation_inside_a_window_does_not_disturb_it(broken_off):
    """T7: begun, and finished or broken off, between two micro-batches; the update is that of the window."""
    model = text_model()
    parts = [masked(3), masked(1), masked(4, 2)]
    right, before = right_change(model, joined(*parts)), flat(model.parameters())
    validation = iter([masked(2), masked(5), masked(1)])

    def loader():
        for part in parts:
            yield part
            model.eval()
            with torch.no_grad():
                for held_out in validation:
                    mean_over_labels(model, held_out)
                    if broken_off:
                        break
            model.train()

    (update,) = accumulator_of(model).updates(loader(), micro_batches=3)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert update.micro_batches == 3


def players():
    torch.manual_seed(5)
    return nn.Linear(2, 4).double(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def losses_of(generator, critic, real, noise):
    made = generator(noise)
    return critic(made.detach()).mean() - critic(real).mean(), -critic(made).mean()


def plain_gan(real, noise, every):
    """The same game in plain arithmetic: each player's gradient by itself, and steps of 1."""
    generator, critic = players()
    kept = {id(player): [] for player in (generator, critic)}
    for k, (x, z) in enumerate(zip(real, noise, strict=True), 1):
        critic_loss, generator_loss = losses_of(generator, critic, x, z)
        for player, loss in ((critic, critic_loss), (generator, generator_loss)):
            gradients = torch.autograd.grad(loss, list(player.parameters()), retain_graph=True)
            kept[id(player)].append((len(x), gradients))
        for player, window in ((critic, every[0]), (generator, every[1])):
            if k % window == 0:
                rows = sum(n for n, _ in kept[id(player)])
                with torch.no_grad():
                    for place, parameter in enumerate(player.parameters()):
                        parameter -= sum(n * gradients[place] for n, gradients in kept[id(player)]) / rows
                kept[id(player)] = []
    return flat([*generator.parameters(), *critic.parameters()])


@pytest.mark.parametrize("every", [(1, 1), (2, 2), (2, 3), (3, 1)], ids=str)
def test_two_players_with_interleaved_windows_of_their_own(every):
    """T7: the generator's backward pass reaches the critic, whose window is open; each gets only its own gradient."""
    rows = (3, 1, 2, 5, 2, 4)
    real = [numbers(n, 4, seed=k) for k, n in enumerate(rows)]
    noise = [numbers(n, 2, seed=100 + k) for k, n in enumerate(rows)]
    generator, critic = players()
    two = [wb.Accumulator(player, sgd(player.parameters())) for player in (critic, generator)]
    windows = [accumulator.window() for accumulator in two]
    for k, (x, z) in enumerate(zip(real, noise, strict=True), 1):
        losses = losses_of(generator, critic, x, z)
        for window, loss in zip(windows, losses, strict=True):
            window.backward(loss, targets=len(x))
        for place, accumulator in enumerate(two):
            if k % every[place] == 0:
                windows[place].close()
                windows[place] = accumulator.window()
    for window in windows:
        window.rollback()
    found = flat([*generator.parameters(), *critic.parameters()])
    assert relative_error(found, plain_gan(real, noise, every)) <= EXACT


def test_the_scene_of_two_players_sees_gradients_that_leak():
    """The textbook loop with one ``.grad`` for both: the critic steps with what the generator left there."""
    real, noise = [numbers(3, 4), numbers(3, 4, seed=1)], [numbers(3, 2), numbers(3, 2, seed=1)]
    generator, critic = players()
    steps = [sgd(player.parameters()) for player in (critic, generator)]
    for x, z in zip(real, noise, strict=True):
        critic_loss, generator_loss = losses_of(generator, critic, x, z)
        (critic_loss / 2).backward(retain_graph=True)
        (generator_loss / 2).backward()
    for optimizer in steps:
        optimizer.step()
    found = flat([*generator.parameters(), *critic.parameters()])
    assert relative_error(found, plain_gan(real, noise, (2, 2))) > 1e-2


def test_two_optimizers_of_one_model_may_have_windows_of_different_length():
    """T7: the body is stepped every second micro-batch, the head every third; each is a bystander of the other."""
    rows = (3, 1, 2, 5, 2, 4)
    batches = [{"x": numbers(n, 5, seed=k), "y": numbers(n, 3, seed=50 + k)} for k, n in enumerate(rows)]
    torch.manual_seed(0)
    model = mlp().double()
    other = copy.deepcopy(model)
    two = [wb.Accumulator(model, sgd(part.parameters())) for part in (model[0], model[2])]
    windows = [accumulator.window() for accumulator in two]
    kept = [[], []]
    for k, batch in enumerate(batches, 1):
        for window in windows:
            window.backward(mse_loss(model(batch["x"]), batch["y"]), targets=len(batch["x"]))
        for part, sums in zip((other[0], other[2]), kept, strict=True):
            gradient = torch.autograd.grad(mse_loss(other(batch["x"]), batch["y"]), list(part.parameters()))
            sums.append((len(batch["x"]), gradient))
        for place, (part, every) in enumerate([(other[0], 2), (other[2], 3)]):
            if k % every == 0:
                windows[place].close()
                windows[place] = two[place].window()
                total = sum(n for n, _ in kept[place])
                with torch.no_grad():
                    for i, parameter in enumerate(part.parameters()):
                        parameter -= sum(n * gradient[i] for n, gradient in kept[place]) / total
                kept[place] = []
    for window in windows:
        window.rollback()
    assert relative_error(flat(model.parameters()), flat(other.parameters())) <= EXACT
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_windows_on_one_optimizer_cannot_both_become_an_update():
    """T7: the step of one would move the weights under the other; nothing moves, and each may go on alone."""
    model, batch = text_model(), masked(3, 1)
    before, optimizer = flat(model.parameters()), sgd(model.parameters())
    two = [wb.Accumulator(model, optimizer, mean_over_labels, targets=num_labels) for _ in range(2)]

    def both():
        with two[0].window() as first, two[1].window() as second:
            for window in (first, second):
                window.backward(mean_over_labels(model, batch), num_labels(batch))
            first.close()

    with pytest.raises(wb.WindowError):
        both()
    assert torch.equal(flat(model.parameters()), before)
    assert all(accumulator.step(batch).applied for accumulator in two)


def test_a_window_that_is_rolled_back_leaves_the_gradient_of_another_alone():
    """T7: two accumulators on one model."""
    model, batch = text_model(), masked(3, 1)
    right, before = right_change(model, batch), flat(model.parameters())
    optimizers = sgd(model.parameters()), sgd(model.parameters())
    first, second = (wb.Accumulator(model, optimizer).window() for optimizer in optimizers)
    first.backward(mean_over_labels(model, masked(5)), 5)
    second.backward(mean_over_labels(model, batch), num_labels(batch))
    first.rollback()
    second.close()
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT


def test_parameters_that_join_the_optimizer_later_are_part_of_the_window():
    """Gradual unfreezing: a parameter group that is added after the accumulator was made."""
    torch.manual_seed(0)
    model = mlp().double()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=1.0)
    accumulator = wb.Accumulator(model, optimizer, clip_norm=0.1)
    optimizer.add_param_group({"params": model[0].parameters()})
    x, y = numbers(9, 5), numbers(9, 3, seed=1)
    with accumulator.window() as window:
        for rows in (slice(0, 2), slice(2, 9)):
            window.backward(mse_loss(model(x[rows]), y[rows]), targets=len(x[rows]))
    reference.update(other, sgd(other.parameters()), lambda m, _: mse_loss(m(x), y), None, clip_norm=0.1)
    assert relative_error(flat(model.parameters()), flat(other.parameters())) <= EXACT


@pytest.mark.parametrize("cut", [(8,), (4, 4), (5, 1, 2), (1,) * 8], ids=str)
def test_a_term_that_acts_once_acts_once_whatever_the_cut(cut):
    """T9: a regulariser beside a sum; (loss / targets + once) is the objective."""
    animal = CALM["regulariser"]
    batch = animal.batch(8, torch.float64)
    model = animal.model()
    loss, targets, once = animal.loss_fn(model, batch)
    objective = loss / targets + once
    right = flat(torch.autograd.grad(objective, list(model.parameters())))
    accumulator = wb.Accumulator(model, sgd(model.parameters()))
    before, start = flat(model.parameters()), 0
    with accumulator.window() as window:
        for rows in cut:
            part = {name: tensor[start : start + rows] for name, tensor in batch.items()}
            window.backward(animal.loss_fn(model, part))
            start += rows
    assert relative_error(before - flat(model.parameters()), right) <= EXACT
    assert window.update.loss == pytest.approx(objective.item(), rel=EXACT)


def test_a_term_without_a_graph_is_recorded_and_adds_no_gradient():
    model, batch = text_model(), masked(3, 1, 4)
    right, before = right_change(model, batch), flat(model.parameters())

    def loss_fn(model, part):
        return mean_over_labels(model, part) * num_labels(part), num_labels(part), torch.tensor(10.0)

    update = accumulator_of(model, loss_fn, targets=None, micro_batch=wb.Rows(1)).step(batch)
    assert relative_error(flat(model.parameters()) - before, right) <= EXACT
    assert update.loss > 10


def test_a_moving_average_of_the_weights_is_taken_once_an_update():
    """T9: averages that hang on the optimizer's step see whole updates only."""
    model = text_model()
    optimizer = sgd(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    accumulator = wb.Accumulator(
        model, optimizer, mean_over_labels, targets=num_labels, micro_batch=wb.Rows(1), check=None
    )
    for labels in [(3, 1, 2), (0, 0), (1, 4)]:
        accumulator.step(masked(*labels))
    assert average.n_averaged == 2
