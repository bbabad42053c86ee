"""Gradient noise scale: what is measured along the way is what per-row gradients say, however a window is made."""

import random

import pytest
import torch
from torch import nn

import ranks
import wholebatch as wb
from menagerie import BATCH_NORM, CALM, MIXED, Animal, mean_square, mlp, regression
from properties import parts, sgd
from wholebatch.core.noise import NoiseSample
from wholebatch.evidence import sinks

COUNTS = (5, 3, 1, 4)
ROWS = sum(COUNTS)
EXACT = 1e-11


def own_gradients(animal, model, batch, counts):
    """The sum-gradient of each micro-batch and its targets, by itself and from scratch."""
    for part, rows in parts(animal, batch, counts):
        result = animal.loss_fn(model, part)
        targets = animal.targets(part) if animal.targets else rows
        loss = result
        if isinstance(result, tuple):
            loss, targets = result[0], result[1]
            loss = loss + (targets * result[2] if len(result) == 3 else 0)
        elif animal.reduction == "mean":
            loss = loss * targets if targets else loss * 0
        if not targets:
            continue
        weights = [p for p in animal.trained(model) if p.requires_grad]
        for weight in weights:
            weight.grad = None
        loss.backward()
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in weights if p.grad is not None]
        yield (
            torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten().double() for g in grads]),
            int(targets),
        )


def direct(animal, batch, counts, dtype=torch.float64):
    """What the window says, from the gradients themselves: deviations from their mean, and inner products."""
    gradients, targets = zip(*own_gradients(animal, animal.model(dtype), batch, counts), strict=True)
    total = sum(targets)
    mean = sum(gradients) / total
    deviations = sum(n * (g / n - mean).square().sum() for g, n in zip(gradients, targets, strict=True))
    variance = float(deviations) / (len(targets) - 1)
    return NoiseSample(variance, float(mean.square().sum()) - variance / total, len(targets) - 1, total)


def measured(animal, batch, counts, way="updates", dtype=torch.float64, **options):
    model = animal.model(dtype)
    accumulator = wb.Accumulator(
        model, sgd(animal.trained(model)), animal.loss_fn, check=None, noise_scale=True, **animal.objective, **options
    )
    if way == "step":
        update = accumulator.step(batch)
    elif way == "updates":
        loader = (part for part, _ in parts(animal, batch, counts))
        (update,) = accumulator.updates(loader, micro_batches=len(counts))
    else:
        known = animal.targets(batch) if animal.targets else sum(counts)
        with accumulator.window(targets=known if way == "known" else None) as window:
            for part, rows in parts(animal, batch, counts):
                count = animal.targets(part) if animal.targets else rows
                loss = animal.loss_fn(model, part)
                window.backward(loss, None if isinstance(loss, tuple) else count)
        update = window.update
    return accumulator.noise.last, update


def assert_alike(found, right, bound=EXACT):
    size = right.variance / right.targets + abs(right.signal)
    assert (found.degrees, found.targets) == (right.degrees, right.targets)
    assert abs(found.variance - right.variance) <= bound * right.variance
    assert abs(found.signal - right.signal) <= bound * size


@pytest.mark.parametrize("name", CALM)
def test_a_window_says_what_its_gradients_say(name):
    animal = CALM[name]
    batch = animal.batch(ROWS, torch.float64)
    assert_alike(measured(animal, batch, COUNTS)[0], direct(animal, batch, COUNTS))


def test_micro_batches_of_a_row_give_the_covariance_of_the_rows():
    """tr S is the trace of the sample covariance, from per-row gradients that `torch.func` computes."""
    animal = CALM["mlp"]
    model, batch = animal.model(), animal.batch(ROWS, torch.float64)
    weights = dict(model.named_parameters())

    def loss(weights, x, y):
        return (torch.func.functional_call(model, weights, (x,)) - y).square().mean()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, batch["x"], batch["y"])
    gradients = torch.cat([rows[name].flatten(1) for name in weights], 1).detach()
    found, update = measured(animal, batch, (), "step", micro_batch=wb.Rows(1))
    assert found.variance == pytest.approx(float(torch.cov(gradients.T).trace()), rel=EXACT)
    assert found.signal == pytest.approx(float(gradients.mean(0).square().sum()) - found.variance / ROWS, rel=1e-9)
    assert update.micro_batches == ROWS


@pytest.mark.parametrize("way", ["window", "known"])
@pytest.mark.parametrize("name", ["mlp", "shared weights"])
def test_early_and_late_scaling_say_the_same(name, way):
    animal = CALM[name]
    batch = animal.batch(ROWS, torch.float64)
    if name == "mlp":
        assert_alike(measured(animal, batch, COUNTS, way)[0], direct(animal, batch, COUNTS))
    else:  # a mean over the labels of a micro-batch without any is not a number
        counts = (6, 7)
        assert_alike(measured(animal, batch, counts, way)[0], direct(animal, batch, counts))


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 1e-3}, {"precision": "fp16"}, {"lockstep": "joined"}],
    ids=["plain", "clip", "fp16", "joined"],
)
def test_a_logical_batch_that_is_cut_says_what_its_gradients_say(options):
    """Autocast computes a mean square in 32 bits; a loss scale that was left in would be a factor of 65,536."""
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    found, update = measured(animal, batch, (), "step", micro_batch=wb.Rows(4), **options)
    right = direct(animal, batch, (4, 4, 4, 1))
    assert_alike(found, right, 1e-6 if "precision" in options else EXACT)
    assert update.noise_scale == (pytest.approx(right.variance / right.signal) if right.signal > 0 else None)


def test_the_bound_sees_norms_of_the_running_sum():
    """What a hook behind the accumulation would see: the sum so far in place of a micro-batch's own gradient."""
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    gradients, targets = zip(*own_gradients(animal, animal.model(), batch, COUNTS), strict=True)
    so_far = torch.cumsum(torch.stack(gradients), 0)
    spread = sum(float(g.square().sum()) / n for g, n in zip(so_far, targets, strict=True))
    norm = float(so_far[-1].norm()) / sum(targets)
    wrong = NoiseSample.of(spread=spread, norm=norm, targets=sum(targets), parts=len(targets))
    with pytest.raises(AssertionError):
        assert_alike(wrong, direct(animal, batch, COUNTS), 1e-2)


@pytest.mark.parametrize("accumulate_in", ["fp32", "compensated", "weights"])
def test_gradients_of_16_bits_are_measured_in_32(accumulate_in):
    """Against the same gradients in bfloat16; the window's own sum rounds, and with it the difference of the two."""
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.bfloat16)
    found, _ = measured(animal, batch, COUNTS, dtype=torch.bfloat16, accumulate_in=accumulate_in)
    assert_alike(found, direct(animal, batch, COUNTS, torch.bfloat16), 0.05 if accumulate_in == "weights" else 0.01)


def test_weights_of_two_dtypes_are_measured_together():
    batch = MIXED.batch(ROWS, torch.float64)
    assert_alike(measured(MIXED, batch, COUNTS)[0], direct(MIXED, batch, COUNTS), 0.01)


def linear_in(direction, noise, rows, generator):
    return direction + noise * torch.randn(rows, len(direction), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_a_known_noise_scale_is_found(ragged):
    """The gradient of a row is G + sigma z, so that the noise scale is sigma^2 d / |G|^2 = 377 rows."""
    width, rows = 64, 32
    direction = torch.full((width,), 1 / width**0.5, dtype=torch.float64)
    noise = (377 / width) ** 0.5
    model = nn.Linear(width, 1, bias=False, dtype=torch.float64)
    accumulator = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda model, batch: model(batch).mean(), noise_scale=10_000
    )
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    sizes = [draw.randint(1, 2 * rows - 1) if ragged else rows for _ in range(8 * 400)]
    for _ in accumulator.updates((linear_in(direction, noise, size, generator) for size in sizes), micro_batches=8):
        pass
    assert accumulator.noise.variance == pytest.approx(377, rel=0.02)
    assert accumulator.noise.scale == pytest.approx(377, rel=0.1)


def test_micro_batches_without_targets_do_not_count():
    animal = CALM["counted loss"]
    batch = animal.batch(14, torch.float64)  # rows 0 and 7 have no labels, and a device counts them
    counts = (1, 3, 3, 1, 6)
    assert_alike(measured(animal, batch, counts)[0], direct(animal, batch, counts))
    assert direct(animal, batch, counts).degrees == 2


def test_nothing_is_measured_unless_asked():
    model = mlp()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(2))
    update = accumulator.step(regression(6, torch.float32))
    assert update.noise_scale is None
    assert accumulator.noise is None
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_the_update_is_bitwise_the_same_with_and_without():
    weights = []
    for noise_scale in (False, True):
        model = CALM["mlp"].model(torch.float32)
        accumulator = wb.Accumulator(
            model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(2), noise_scale=noise_scale
        )
        for _ in range(3):
            accumulator.step(regression(7, torch.float32))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(*weights)


def test_the_first_gradient_is_kept_and_not_copied():
    """Autograd takes the tensor over that the hook saw; with a reference left it would copy each gradient once more."""
    model = nn.Linear(5, 3)
    accumulator = wb.Accumulator(model, sgd(model.parameters()), noise_scale=True)
    seen = []
    model.weight.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    with accumulator.window() as window:
        window.backward(model(torch.ones(2, 5)).mean(), 2)
        assert model.weight.grad.data_ptr() == seen[0]
        window.backward(model(torch.ones(2, 5)).mean(), 2)


def test_other_backward_passes_do_not_count():
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), noise_scale=True)
    with accumulator.window() as window:
        for part, rows in parts(animal, batch, COUNTS):
            torch.autograd.grad(animal.loss_fn(model, part), list(model.parameters()))
            window.backward(animal.loss_fn(model, part), rows)
    assert_alike(accumulator.noise.last, direct(animal, batch, COUNTS))


def test_a_window_of_one_micro_batch_says_nothing_and_why():
    found, update = measured(CALM["mlp"], CALM["mlp"].batch(ROWS, torch.float64), (), "step", micro_batch=wb.Rows(50))
    assert found is None
    assert update.noise_scale is None
    model = mlp()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(50), noise_scale=True)
    accumulator.step(regression(6, torch.float32))
    accumulator.step(regression(6, torch.float32))
    (reason,) = [reason for reason in accumulator.reasons if "noise_scale" in reason]
    assert "a window of one micro-batch does not show by how much" in reason


def test_micro_batches_that_meet_say_nothing_and_why():
    model = wb.exact_batch_norm(BATCH_NORM.model())
    accumulator = wb.Accumulator(model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(4), noise_scale=True)
    update = accumulator.step(BATCH_NORM.batch(12, torch.float64))
    assert update.applied
    assert update.noise_scale is None
    assert any("micro-batches meet" in reason for reason in accumulator.reasons)


class Twice(nn.Module):
    """One weight in two pieces that are recomputed in backward passes of their own: its gradient comes in parts."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True)
        return x


def test_a_gradient_that_comes_in_parts_is_not_taken_for_whole():
    animal = Animal(Twice, regression, mean_square)
    found, update = measured(animal, animal.batch(ROWS, torch.float64), COUNTS)
    assert update.applied
    assert found is None


def test_a_skipped_window_adds_nothing():
    animal = CALM["mlp"]
    model = animal.model()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), mean_square, micro_batch=wb.Rows(4), check=None, noise_scale=True
    )
    accumulator.step(animal.batch(ROWS, torch.float64))
    before = accumulator.noise.state_dict()
    spoilt = animal.batch(ROWS, torch.float64)
    spoilt["x"][7] = torch.inf
    update = accumulator.step(spoilt)
    assert update.skipped
    assert update.noise_scale is None
    assert accumulator.noise.state_dict() == before


def test_a_micro_batch_that_was_split_for_memory_counts_once(monkeypatch):
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    failures = iter([False, False, True, *[False] * 9])

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):
            if next(failures):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    def loss_fn(model, part):  # fails when the head has its gradient and the body has not
        return nn.functional.mse_loss(model[2](model[1](Fails.apply(model[0](part["x"])))), part["y"])

    model = animal.model()
    accumulator = wb.Accumulator(model, sgd(model.parameters()), loss_fn, check=None, noise_scale=True)
    (update,) = accumulator.updates((part for part, _ in parts(animal, batch, (4, 4, 5))), micro_batches=3)
    assert update.retries == 1
    assert_alike(accumulator.noise.last, direct(animal, batch, (4, 4, 3, 2)))


def test_weights_that_are_unfrozen_or_added_count_from_then_on():
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    model = animal.model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    optimizer.add_param_group({"params": [model[2].bias]})
    accumulator = wb.Accumulator(model, optimizer, mean_square, micro_batch=wb.Rows(4), check=None, noise_scale=True)
    accumulator.step(batch)
    few = accumulator.noise.last
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].weight]})
    accumulator.step(batch)
    assert_alike(accumulator.noise.last, direct(animal, batch, (4, 4, 4, 1)))
    assert few.variance < 0.9 * accumulator.noise.last.variance


def test_averages_and_an_open_window_go_on_from_a_file(tmp_path):
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)

    def make():
        model = animal.model()
        return wb.Accumulator(model, sgd(model.parameters()), mean_square, noise_scale=True), model

    whole, whole_model = make()
    first, first_model = make()
    second, second_model = make()
    pieces = list(parts(animal, batch, COUNTS))

    def run(accumulator, model, window, some):
        for part, rows in some:
            window.backward(mean_square(model, part), rows)

    for accumulator, model in ((whole, whole_model), (first, first_model)):
        with accumulator.window() as window:
            run(accumulator, model, window, pieces)
    window = whole.window()
    run(whole, whole_model, window, pieces)
    update = window.close()
    run(first, first_model, first.window(), pieces[:2])
    wb.save(tmp_path / "state", first)
    first.open_window.rollback()  # or it would be in the company of what other tests gather
    wb.load(tmp_path / "state", second)
    window = second.window()
    run(second, second_model, window, pieces[2:])
    assert window.close().noise_scale == update.noise_scale
    assert second.noise.state_dict() == whole.noise.state_dict()


def test_what_cannot_be_measured_is_refused():
    model = mlp()
    with pytest.raises(wb.OptimizerError, match="takes it in and forgets it"):
        wb.Accumulator(model, wb.AdamA(model.parameters()), mean_square, noise_scale=True)
    for wrong in (0, -3, "yes", 2.5):
        with pytest.raises(wb.ConfigError, match="no number of windows"):
            wb.Accumulator(model, sgd(model.parameters()), mean_square, noise_scale=wrong)


def test_micro_batches_by_tokens_are_told_to_differ_by_more_than_chance():
    model = mlp()
    accumulator = wb.Accumulator(
        model, sgd(model.parameters()), mean_square, micro_batch=wb.Tokens(8, length=len), collate=list, noise_scale=7
    )
    assert any("rows of like length" in reason for reason in accumulator.reasons)
    assert accumulator.noise.windows == 7


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.launch("engine.noise_scenes", 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("wrap", ["bare", "ddp", "fsdp"])
def test_ranks_measure_what_one_process_measures(two, wrap):
    animal = CALM["mlp"]
    batch = animal.batch(ROWS, torch.float64)
    right = direct(animal, batch, (2, 2, 2, 2, 2, 2, 1))
    found = ranks.result(two, f"measure [{wrap}]", 2)
    assert found[0] == found[1]
    for each in found:
        assert_alike(NoiseSample(**each["last"]), right)
        assert (
            each["scale"] == pytest.approx(right.variance / right.signal) if right.signal > 0 else each["scale"] is None
        )


def test_a_rank_that_fails_is_heard_of_where_noise_is_measured(two):
    found = ranks.result(two, "failure", 2)
    assert "could not" in found[0]["said"]
    assert all(each["then"] for each in found)


def test_ranks_that_do_not_agree_to_measure_are_told(two):
    assert all("noise_scale" in each["said"] for each in ranks.result(two, "disagreement", 2))


def test_ranks_that_speak_with_each_pass_are_refused(two):
    assert all('communication="once"' in each["said"] for each in ranks.result(two, "each", 2))


@pytest.mark.parametrize("several", [False, True], ids=["rows", "micro-batches"])
def test_ranks_follow_a_schedule_together(two, several):
    found = ranks.result(two, "schedule of micro-batches" if several else "schedule of rows", 2)
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["rows"] == [8, 8, 16, 16, 16, 6]
    assert found[0]["off"] < EXACT


def test_ranks_grow_by_noise_together(two):
    """Each decides for itself, from numbers that are the same on both to the bit."""
    one, other = ranks.result(two, "schedule by noise", 2)
    assert one == other
    assert [size for _, size in one["changes"]] == [4, 8, 16]
    assert one["scale"] == pytest.approx(144, rel=0.3)
    assert max(one["rows"]) == 2 * 16 * 4


def test_sinks_and_report_show_it(tmp_path):
    _, update = measured(CALM["mlp"], CALM["mlp"].batch(ROWS, torch.float64), (), "step", micro_batch=wb.Rows(1))
    assert update.to_dict()["noise_scale"] == update.noise_scale
    log = sinks.JsonLines(tmp_path / "log.jsonl")
    log.write({"event": "update", **update.to_dict()})
    log.close()
    assert '"noise_scale": ' in (tmp_path / "log.jsonl").read_text()
