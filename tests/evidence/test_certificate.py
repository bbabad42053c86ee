"""Twelve mistakes of a loop are found and named with the line to change, and right loops and models are not accused."""

import inspect
import json
import random

import faults
import loops
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, mse_loss

import wholebatch as wb
from menagerie import (
    CALM,
    IGNORED,
    VOCABULARY,
    Animal,
    mean_over_labels,
    mean_square,
    mlp,
    num_labels,
    numbers,
    regression,
    sum_over_labels,
    texts,
)

DTYPES = [torch.float64, torch.float32]


def certify(scene, step, dtype, rows=12):
    dtype = scene.dtype if scene.dtype != torch.float64 else dtype
    torch.manual_seed(7)
    model = scene.model().to(dtype)
    options = {"targets": scene.targets, **scene.options}
    return wb.verify(model, scene.loss_fn, scene.batch(rows, dtype), step=step, **options)


FAULTS = [(name, how) for name, spellings in faults.FAULTS.items() for how in spellings]


def test_there_are_twelve_faults():
    assert len(faults.FAULTS) == 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "how"), FAULTS, ids=["-".join(each).replace(" ", "_") for each in FAULTS])
def test_a_fault_is_named_with_its_line(name, how, dtype):
    scene, step, _ = faults.FAULTS[name][how]
    for rows in (10, 12):
        found = certify(scene, step, dtype, rows)
        assert not found.ok
        (cause,) = found.causes
        assert cause.name == name
        assert cause.where is not None
        assert cause.where.endswith("# here"), cause.where
        assert cause.hint


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", faults.CLEAN)
def test_a_clean_loop_is_not_accused(name, dtype):
    for rows in (10, 12):
        found = certify(*faults.CLEAN[name], dtype, rows)
        assert found.ok, str(found)
        assert found.causes == ()


@pytest.mark.parametrize("how", loops.FAULTS)
def test_loops_as_people_write_them_are_named(how):
    name, scene, step = loops.FAULTS[how]
    found = certify(scene, step, torch.float64, rows=10)
    assert [cause.name for cause in found.causes] == [name], str(found)
    assert not found.ok


@pytest.mark.parametrize("how", loops.CLEAN)
def test_clean_loops_as_people_write_them_are_not_accused(how):
    found = certify(*loops.CLEAN[how], torch.float64, rows=10)
    assert found.ok, str(found)


class Attention(nn.Module):
    """A transformer layer with a mask of its own for each row."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens, mask=None):
        x = self.embedding(tokens)
        mixed, _ = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.head(self.norm(x + mixed))


def masked(model, batch):
    padding = batch["tokens"] == 0
    padding = padding & (torch.arange(6) > 0)  # the first position always attends
    return cross_entropy(
        model(batch["tokens"], mask=padding).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def sequences(rows, dtype):
    return {"x": numbers(rows, 4, 5, dtype=dtype), "y": numbers(rows, 3, dtype=dtype, seed=1)}


MODELS = {
    "transformer with attention mask": Animal(Attention, texts, masked, num_labels),
    "convolutions with group norm": CALM["convolution"],
    "gru": Animal(Recurrent, sequences, mean_square),
    "embedding with sparse gradients": CALM["sparse gradients"],
    "tied weights": CALM["shared weights"],
    "frozen part": CALM["frozen part"],
    "complex weights": CALM["complex weights"],
    "several inputs": CALM["several inputs and outputs"],
    "masked labels": CALM["counted loss"],
    "16-bit weights": Animal(mlp, regression, mean_square),
}


def counted(animal, model, micro_batch):
    """The loss of a micro-batch as a sum, and its targets."""
    loss = animal.loss_fn(model, micro_batch)
    if isinstance(loss, tuple):
        return loss
    rows = len(next(iter(micro_batch.values()))) if isinstance(micro_batch, dict) else len(micro_batch.names)
    targets = animal.targets(micro_batch) if animal.targets else torch.tensor(rows)
    return (loss * targets if targets > 0 else loss.new_zeros(())), targets


def right_step(animal):
    """A window that sums in float32 or wider and divides once."""

    def step(model, optimizer, micro_batches):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        sums = [None] * len(weights)
        targets = sum(counted(animal, model, each)[1] for each in micro_batches)
        for micro_batch in micro_batches:
            loss, held = counted(animal, model, micro_batch)
            if held == 0:
                continue
            optimizer.zero_grad()
            (loss / targets).backward()
            for place, weight in enumerate(weights):
                if weight.grad is not None:
                    term = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
                    term = term.to(torch.promote_types(term.dtype, torch.float32), copy=True)
                    sums[place] = term if sums[place] is None else sums[place] + term
        for weight, total in zip(weights, sums, strict=True):
            weight.grad = None if total is None else total.to(weight.dtype)
        optimizer.step()

    return step


@pytest.mark.parametrize("own", [False, True], ids=["accumulator", "own step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_clean_model_is_not_accused(name, dtype, own):
    animal = MODELS[name]
    dtype = torch.bfloat16 if name == "16-bit weights" else dtype
    step = right_step(animal) if own else None
    found = wb.verify(animal.model(dtype), animal.loss_fn, animal.batch(12, dtype), step=step, **animal.objective)
    assert found.ok, str(found)
    assert found.causes == ()


def rows_of(micro_batches):
    return sum(len(each["x"]) for each in micro_batches)


def right(model, optimizer, micro_batches):
    for each in micro_batches:
        (mean_square(model, each) * len(each["x"]) / rows_of(micro_batches)).backward()
    optimizer.step()


def clipped(model, optimizer, micro_batches):
    for each in micro_batches:
        (mean_square(model, each) * len(each["x"]) / rows_of(micro_batches)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "parts"), [(None, 9), (right, 10), (clipped, 11)], ids=["accumulator", "step", "clipping step"]
)
def test_a_certificate_runs_three_batches_and_a_lack_of_memory(step, parts):
    """Undivided, by rows, ragged; a step one micro-batch until memory runs out, and one more to know a clip by."""
    model, rows = mlp().double(), []
    model.register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[0])))
    found = wb.verify(model, mean_square, regression(12, torch.float64), step=step)
    assert found.ok
    assert [cut.window for cut in found.cuts] == [1, 2, 2]
    assert "\n  permuted and ragged, 2 micro-batches: off by" in str(found)
    assert sum(rows) == parts * 4


@pytest.mark.parametrize("step", [None, loops.FAULTS["clip in the loop"][2]], ids=["accumulator", "step"])
def test_cuts_are_told_apart_where_one_is_off(step):
    reduction = "mean" if step is not None else "sum"
    found = wb.verify(mlp().double(), mean_square, regression(12, torch.float64), step=step, reduction=reduction)
    assert not found.ok
    assert [cut.window for cut in found.cuts] == [1, 2, 3]
    assert "\n  permuted, 3 micro-batches: off by" in str(found)
    assert "\n  ragged, 2 micro-batches: off by" in str(found)


def retries_on_what_is_there(model, optimizer, micro_batches):
    """Skips gradients that are too large, so that its retry is not seen where they are loud."""
    optimizer.zero_grad()
    for each in micro_batches:
        for _ in range(2):
            try:
                (mean_square(model, each) * len(each["x"]) / rows_of(micro_batches)).backward()
                break
            except torch.OutOfMemoryError:
                continue
    if max(float(parameter.grad.norm()) for parameter in model.parameters()) < 100:
        optimizer.step()


def test_a_retry_is_seen_in_a_step_that_refuses_loud_gradients():
    found = wb.verify(mlp().double(), mean_square, regression(12, torch.float64), step=retries_on_what_is_there)
    assert [cause.name for cause in found.causes] == ["retry on partial gradients"]


def adds_decay(model, optimizer, micro_batches):
    """Its gradients are those of the batch only as long as they are as large as they are."""
    right_sum = rows_of(micro_batches)
    optimizer.zero_grad()
    for each in micro_batches:
        (mean_square(model, each) * len(each["x"]) / right_sum).backward()
    for parameter in model.parameters():
        parameter.grad += 0.1 * parameter.detach()
    optimizer.step()


def test_a_decay_that_the_batch_does_not_have_is_no_rounding():
    assert not wb.verify(mlp().double(), mean_square, regression(12, torch.float64), step=adds_decay).ok


@pytest.mark.parametrize("step", [None, right, loops.FAULTS["clip in the loop"][2]], ids=["none", "right", "wrong"])
def test_nothing_is_left_behind(step):
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(x._backward_hooks or {}) for x in model.parameters()]
    streams = torch.get_rng_state(), random.getstate()
    schedule_step = torch.optim.lr_scheduler.StepLR.step
    wb.verify(model, mean_square, regression(10, torch.float64), step=step)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all("train" not in vars(module) for module in model.modules())
    assert [len(x._backward_hooks or {}) for x in model.parameters()] == hooks
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert torch.optim.lr_scheduler.StepLR.step is schedule_step
    assert [x.requires_grad for x in model.parameters()] == [True, False, True, True, True, True]
    assert [x.grad is not None for x in model.parameters()] == [False, False, False, False, True, False]
    assert bool((model[3].weight.grad == 1).all())


def own_autocast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return mse_loss(model(batch["x"]).float(), batch["y"])


def test_autocast_in_the_loss_is_allowed_for():
    model = mlp()
    found = wb.verify(model, own_autocast, regression(10, torch.float32))
    assert found.ok
    assert found.eps == torch.finfo(torch.bfloat16).eps
    wrong = wb.verify(model, own_autocast, regression(10, torch.float32), reduction="sum")
    assert [cause.name for cause in wrong.causes] == ["reduction"]


def test_autocast_in_the_loss_does_not_stop_the_first_batch():
    model = mlp()
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), 0.1), own_autocast, micro_batch=wb.Rows(4))
    assert accumulator.step(regression(10, torch.float32)).skipped is None


class InFloat32(nn.Module):
    """As norms and attention of many language models do, whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x).float().softmax(-1).to(x.dtype)


def test_layers_that_compute_in_float32_under_float64_are_allowed_for():
    assert wb.verify(InFloat32().double(), mean_square, regression(10, torch.float64)).ok


class Output(dict):
    __getattr__ = dict.__getitem__


class WithKeywords(nn.Module):
    """As the models of Transformers: keywords in, an output with a loss out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY))

    def forward(self, *, tokens, labels=None):
        logits = self.body(tokens)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return Output(loss=loss, logits=logits)


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_a_model_with_keywords_and_a_list_of_rows(rows):
    batch = texts(rows + 1, torch.float64)
    listed = [{name: x[row] for name, x in batch.items()} for row in range(1, rows + 1)]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    found = wb.verify(
        WithKeywords().double(), lambda model, each: model(**each).loss, listed, targets=num_labels, collate=collate
    )
    assert found.ok, str(found)


def test_functional_dropout_is_named():
    def loss_fn(model, batch):
        return mse_loss(dropout(model(batch["x"]), 0.5), batch["y"])

    found = wb.verify(mlp().double(), loss_fn, regression(10, torch.float64), step=right)
    assert not found.ok
    found = wb.verify(mlp().double(), loss_fn, regression(10, torch.float64))
    assert [cause.name for cause in found.causes] == ["randomness"]


@pytest.mark.parametrize("how", [right, clipped])
def test_batch_norm_and_dropout_are_named_together(how):
    """One after the other is silenced, against ``model.train()`` too; what the user has put there stays."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model[3].train = stays = lambda _mode=True: model[3]
    found = wb.verify(model, mean_square, regression(12, torch.float64), step=how)
    assert [cause.name for cause in found.causes] == ["batch norm", "dropout"]
    assert [vars(layer).get("train") for layer in model] == [None, None, None, stays]


def jittered(x):
    return x + torch.randn_like(x)  # this draws


class Jittered(nn.Module):
    """Draws when it is made, and in a function of its own when it runs."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(jittered(x)) + self.token


class Weighing(Jittered):
    def reset_parameters(self):
        self.token.data.normal_()

    def forward(self, x):
        return random.random() * self.layer(x) + self.token  # and this


@pytest.mark.parametrize(("kind", "line"), [(Jittered, "# this draws"), (Weighing, "# and this")])
def test_the_line_that_draws_is_one_that_runs(kind, line):
    torch.manual_seed(0)
    found = wb.verify(kind().double(), mean_square, regression(24, torch.float64))
    (cause,) = found.causes
    assert cause.name == "randomness"
    assert cause.where.endswith(line)


def test_spectral_norm_is_where_it_is_called():
    """Layers of the older kind are plain ones by their class, which other lines make as well."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 3)), nn.Tanh()).double()  # this one
    found = wb.verify(model, lambda model, batch: mean_square(model, batch), regression(12, torch.float64))
    assert [cause.name for cause in found.causes] == ["spectral norm"]
    assert found.causes[0].where.endswith("# this one")


def test_decoupled_decay_of_a_step_is_judged_by_its_sum():
    """What does not grow with the loss, as a decay that the step adds, is no clip."""

    def loss_fn(model, batch):
        return mean_square(model, batch) + 0.05 * sum(weight.square().sum() for weight in model.parameters())

    def step(model, optimizer, micro_batches):
        for each in micro_batches:
            (mean_square(model, each) * len(each["x"]) / rows_of(micro_batches)).backward()
        for weight in model.parameters():
            weight.grad.add_(weight.detach(), alpha=0.1)
        optimizer.step()

    assert wb.verify(mlp().double(), loss_fn, regression(10, torch.float64), step=step).ok


def test_a_step_with_other_arguments_is_refused():
    with pytest.raises(wb.ConfigError, match="cannot be called"):
        wb.verify(mlp(), mean_square, regression(6, torch.float32), step=num_labels)


def test_an_error_of_the_step_is_raised_as_it_is():
    def step(model, optimizer, micro_batches):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        wb.verify(mlp(), mean_square, regression(6, torch.float32), step=step)


def test_the_certificate_says_where_the_step_is():
    found = wb.verify(mlp().double(), mean_square, regression(6, torch.float64), step=right)
    assert str(inspect.getsourcelines(right)[1]) in found.to_dict()["step"]


def test_a_loss_that_counts_by_itself():
    def loss_fn(model, batch):
        return sum_over_labels(model, batch), num_labels(batch)

    found = wb.verify(CALM["shared weights"].model(), loss_fn, texts(10, torch.float64), step=faults.weighted)
    assert found.ok
    wrong = wb.verify(
        CALM["shared weights"].model(), loss_fn, texts(10, torch.float64), step=faults.divided_by_their_number
    )
    assert [cause.name for cause in wrong.causes] == ["mean of means"]


def test_rows_without_labels_are_no_alarm():
    batch = texts(10, torch.float64)
    batch["labels"][:4] = IGNORED
    model = CALM["shared weights"].model()
    assert wb.verify(model, mean_over_labels, batch, targets=num_labels).ok
    assert wb.verify(model, mean_over_labels, batch, targets=num_labels, step=faults.weighted).ok


def test_one_giant_row_among_small_ones():
    batch = {"x": numbers(10, 5) * torch.tensor([1e4] + [1.0] * 9)[:, None], "y": numbers(10, 3, seed=1)}
    assert wb.verify(mlp().double(), mean_square, batch, step=right).ok


def test_a_step_that_never_steps_is_no_update():
    def forgets(model, optimizer, micro_batches):
        for each in micro_batches:
            mean_square(model, each).backward()

    found = wb.verify(mlp().double(), mean_square, regression(10, torch.float64), step=forgets)
    assert [cause.name for cause in found.causes] == ["no update"]
    assert "0 updates" in str(found)


def test_a_mistake_that_nobody_knows_is_called_unknown():
    def signs(model, optimizer, micro_batches):
        for each in micro_batches:
            (mean_square(model, each) * len(each["x"]) / rows_of(micro_batches)).backward()
        for weight in model.parameters():
            weight.grad = weight.grad.sign()
        optimizer.step()

    found = wb.verify(mlp().double(), mean_square, regression(10, torch.float64), step=signs)
    assert [cause.name for cause in found.causes] == ["unknown"]
    assert "no mistake that is known explains it" in str(found)


def test_steps_of_the_schedule_are_told():
    _, scene, step = loops.FAULTS["schedule made inside"]
    assert "3 steps of the schedule" in str(certify(scene, step, torch.float64))


def test_two_schedules_stepped_once_each_are_no_alarm():
    def step(model, optimizer, micro_batches):
        schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.optim.lr_scheduler.ConstantLR(optimizer)]
        right(model, optimizer, micro_batches)
        for schedule in schedules:
            schedule.step()

    assert wb.verify(mlp().double(), mean_square, regression(10, torch.float64), step=step).ok


def test_an_error_that_is_not_finite_is_valid_json():
    found = wb.verify(mlp().double(), mean_square, regression(10, torch.float64), step=loops.FAULTS["not divided"][2])
    assert found.to_dict()["error"] == found.error
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is False
