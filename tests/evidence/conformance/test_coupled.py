"""Trap 8: rows that meet across micro-batches. What is right, what each mistake looks like, and what GradCache does."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.optim import SGD

import wholebatch as wb
from wholebatch.evidence.conformance.adapters.gradcache import gradcache
from wholebatch.evidence.conformance.adapters.textbook import textbook
from wholebatch.evidence.conformance.adapters.wholebatch import wholebatch
from wholebatch.evidence.conformance.encoders import Encoder, as_drawn, with_draws
from wholebatch.evidence.conformance.judge import change_error, compare, expected, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import Trained, join
from wholebatch.evidence.conformance.two_passes import ANEW, PIECEWISE, cached

T8 = [scene for scene in SCENES if scene.trap == "T8"]
BY_NAME = {scene.name: scene for scene in T8}
RANDOM = ["T8-dropout", "T8-layer-drop"]


def two_passes(task, *, restores):
    """A gradient cache that restores the random stream of PyTorch for its second pass, and that of Python or not."""
    model = task.make_model()
    optimizer = SGD(model.parameters(), lr=task.lr)
    states, pieces = [], []
    with torch.no_grad():
        for each in task.epoch:
            states.append((torch.get_rng_state(), random.getstate()))
            pieces.append(model(each["input_ids"]))
    rows = torch.cat(pieces).requires_grad_()
    task.loss_of(model, rows, join(task.epoch)["labels"]).backward()
    for each, (torch_state, python_state), part in zip(task.epoch, states, rows.grad.split(4), strict=True):
        torch.set_rng_state(torch_state)
        if restores == "all":
            random.setstate(python_state)
        torch.autograd.backward(model(each["input_ids"]), part)
    optimizer.step()
    return Trained(model, 1)


def system(train):
    return System("planted", "planted", train, textbook.expresses)


RESTORES_ALL = system(lambda task: two_passes(task, restores="all"))
RESTORES_TORCH = system(lambda task: two_passes(task, restores="torch"))


@pytest.mark.parametrize("name", ["T8-in-batch-negatives", "T8-hard-triplets", *RANDOM])
def test_a_gradient_cache_that_restores_all_random_streams_is_right(name):
    """So what is said of one that does not is about random numbers, and about nothing else."""
    verdict = judge(RESTORES_ALL, BY_NAME[name])
    assert (verdict.outcome, verdict.why) == ("pass", "")


def test_a_coin_of_python_that_is_thrown_again_in_the_second_pass_is_found_and_named():
    assert judge(RESTORES_TORCH, BY_NAME["T8-dropout"]).outcome == "pass"
    verdict = judge(RESTORES_TORCH, BY_NAME["T8-layer-drop"])
    assert verdict.outcome == "fail"
    assert verdict.error > 0.01
    assert ANEW in verdict.why


@pytest.mark.parametrize("name", ["T8-batch-norm", "T8-standardised"])
def test_a_gradient_cache_whose_layers_see_micro_batches_is_found(name):
    scene = BY_NAME[name]
    verdict = compare("planted", scene, Trained(cached(scene.task, first=scene.task), 1), expected(scene.task))
    assert verdict.outcome == "fail"
    # without a loss that compares rows, a cache does what the textbook loop does
    assert (PIECEWISE if name == "T8-batch-norm" else "rows meet only") in verdict.why


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_right_goes_by_what_was_drawn_and_by_nothing_else(name):
    torch.manual_seed(0)
    random.seed(0)
    task = BY_NAME[name].task
    trained = wholebatch.train(task)
    right = expected(as_drawn(task, trained.model))
    assert change_error(task.make_model(), trained.model, right.model) < 1e-12
    other = textbook.train(task).model  # draws others
    wrong = expected(as_drawn(task, other))
    assert change_error(task.make_model(), trained.model, wrong.model) > 0.01


@pytest.mark.parametrize("name", RANDOM)
def test_what_was_drawn_is_neither_all_nor_nothing(name):
    """A coin that falls the same way for everyone would show nothing."""
    torch.manual_seed(0)
    random.seed(0)
    drawn = wholebatch.train(BY_NAME[name].task).model.drawn
    kept = torch.cat([draws[-1] for draws in drawn.values()])
    assert 0 < int((kept == 0).sum()) < len(kept)
    assert len(drawn) == 32  # no two texts are the same


def test_draws_are_replayed_row_by_row():
    model = Encoder(drops="features")
    ids = torch.arange(10).view(2, 5) % 11
    first = model(ids)
    assert not torch.equal(first, model(ids))
    model.replays = 0
    torch.testing.assert_close(model(ids.flip(0)).flip(0), first)


def test_a_task_without_random_numbers_is_left_alone():
    task = BY_NAME["T8-batch-norm"].task
    assert as_drawn(task, task.make_model()) is task
    assert with_draws(task, {}, 0).make_model().replays == 0


@pytest.mark.parametrize("name", ["T8-in-batch-negatives", "T8-hard-triplets"])
def test_a_loss_whose_rows_do_not_meet_is_refused_and_the_refusal_names_gather(name):
    """As somebody would write it who has not read anything: the loss of a single batch."""
    task = BY_NAME[name].task
    model = task.make_model()
    accumulator = wb.Accumulator(model, SGD(model.parameters(), lr=0.5), task.loss, micro_batch=wb.Rows(4))
    with pytest.raises(wb.WholeBatchError, match=r"wb\.gather"):
        accumulator.step(join(task.epoch))


def test_a_temperature_that_counts_once_for_each_micro_batch_is_found():
    """The weight of a loss that is computed on all rows, and added up over the micro-batches, is counted k times."""
    scene = BY_NAME["T8-in-batch-negatives"]
    right = expected(scene.task)
    four_times, start = expected(scene.task).model, scene.task.make_model()
    with torch.no_grad():
        gone = four_times.log_temperature - start.log_temperature
        four_times.log_temperature.add_(3 * gone)
    assert abs(float(gone.detach())) > 1e-3
    assert compare("planted", scene, Trained(four_times, 1), right).outcome == "fail"


def test_other_negatives_are_other_updates():
    """The scene sees a window that is one micro-batch short."""
    scene = BY_NAME["T8-in-batch-negatives"]
    short = expected(replace(scene.task, epoch=scene.task.epoch[:3]))
    assert compare("planted", scene, short, expected(scene.task)).error > 0.01


class TestGradCache:
    """What the authors' code does, where it is installed."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("gradcache")

    @pytest.mark.parametrize(
        ("name", "outcome", "why"),
        [
            ("T8-in-batch-negatives", "pass", ""),
            ("T8-hard-triplets", "pass", ""),
            ("T8-dropout", "pass", ""),
            ("T8-standardised", "fail", "rows meet only"),
            ("T8-layer-drop", "fail", ANEW),
            ("T8-batch-norm", "fail", PIECEWISE),
        ],
    )
    def test_it_is_exact_until_something_else_meets_or_is_drawn(self, name, outcome, why):
        verdict = judge(gradcache, BY_NAME[name])
        assert verdict.outcome == outcome, verdict
        assert why in verdict.why

    def test_as_installed_it_cannot_be_imported(self):
        """Why the page makes it known by another name as well; when this fails, the page can do without."""
        ended = subprocess.run(
            [sys.executable, "-c", "from gradcache import GradCache"], capture_output=True, text=True, check=False
        )
        assert "ImportError" in ended.stderr
