"""What is right, and whether a mistake is seen and named."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from wholebatch.evidence.conformance import judge as judging
from wholebatch.evidence.conformance import loops, suite
from wholebatch.evidence.conformance.adapters.textbook import textbook
from wholebatch.evidence.conformance.adapters.wholebatch import wholebatch
from wholebatch.evidence.conformance.habits import HABITS, Habit
from wholebatch.evidence.conformance.judge import change_error, compare, expected, judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.evidence.conformance.second_reading import second_reading
from wholebatch.evidence.conformance.stopping import Stopped, in_processes
from wholebatch.evidence.conformance.system import System
from wholebatch.evidence.conformance.task import NotExpressible, PairTask, Task, Trained, join

BY_NAME = {scene.name: scene for scene in SCENES}
T1_TO_T4 = [scene for scene in SCENES if scene.trap.partition("x")[0] in ("T1", "T2", "T3", "T4")]


ALONE = [scene for scene in SCENES if "ranks" not in scene.task.asks]


@pytest.mark.parametrize("scene", ALONE, ids=lambda scene: scene.name)
def test_wholebatch_passes_every_scene_or_refuses_where_that_is_honest(scene):
    verdict = judge(wholebatch, scene)
    if scene.refusal_will_do:
        assert verdict.outcome in ("pass", "refuses"), verdict
    else:
        assert verdict.outcome == "pass", verdict
        assert verdict.updates == verdict.updates_due


@pytest.mark.parametrize("scene", T1_TO_T4, ids=lambda scene: scene.name)
def test_two_readings_of_what_is_right_agree(scene):
    first, second = expected(scene.task), second_reading(scene.task)
    assert change_error(scene.task.make_model(), second.model, first.model) <= 1e-13
    assert first.updates == second.updates
    textbook_verdicts = [compare("textbook", scene, textbook.train(scene.task), right) for right in (first, second)]
    assert textbook_verdicts[0].outcome == textbook_verdicts[1].outcome


MEETS = {"batch norm", "coupled"}
BY_MICRO_BATCH = [scene for scene in SCENES if isinstance(scene.task, Task) and not scene.task.asks & MEETS]


@pytest.mark.parametrize("scene", BY_MICRO_BATCH, ids=lambda scene: scene.name)
def test_a_loop_without_a_bad_habit_is_right(scene):
    """The loop with which mistakes are named is right with the habits that it has by default."""
    right = expected(scene.task)
    found = loops.train(scene.task, Habit())
    assert change_error(scene.task.make_model(), found, right.model) <= max(1e-12, scene.tolerance)


PLANTED = {
    "T1-ragged-counts": "a mean of means",
    "T3-tail": "the tail of an epoch is carried",
    "T4-masked-micro-batch": "not a number",
    "T6-stopped": "the gradients that a window had gathered when the run was stopped are lost",
    "T7-zero-first": "only the last micro-batch",
    "T7-exception": "given up joins the next",
    "T7-gan": "the discriminator steps with",
    "T8-in-batch-negatives": "rows meet only those of their own micro-batch",
    "T8-hard-triplets": "rows meet only those of their own micro-batch",
    "T8-standardised": "rows meet only those of their own micro-batch",
    "T8-dropout": "rows meet only those of their own micro-batch",
    "T8-layer-drop": "rows meet only those of their own micro-batch",
    "T8-batch-norm": "rows meet only those of their own micro-batch",
    "T9-balance-of-the-batch": "rows meet only those of their own micro-batch",
    "T9-batch-norm": "batch norm sees micro-batches",
    "T10-sums-in-16-bits": "stagnates",
    "T10-overflow": "the schedule goes on",
    "T10-one-of-two-overflows": "one optimizer steps although",
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_mistake_of_the_textbook_loop_is_found_and_named(name):
    verdict = judge(textbook, BY_NAME[name])
    assert verdict.outcome == "fail"
    assert PLANTED[name] in verdict.why


WHERE = {
    "a mean of means: each micro-batch weighs the same, whatever it holds": "T1-ragged-counts",
    "the means of the micro-batches are added up, and divided by nothing": "T2-mean",
    "a short window is divided by the number of a full one": "T3-tail",
    "each window is divided by the same number of rows, the mean over the epoch rounded down": "T3-tail",
    "the tail of an epoch is dropped": "T3-tail",
    "the tail of an epoch is carried into the next": "T3-tail",
    "a window runs on into the next epoch until it is full": "T3-tail",
    "a window whose last micro-batch is None is dropped": "T4-none",
    "a window whose last micro-batch is None is carried into the next": "T4-none",
    "only the last micro-batch of a window counts": "T7-zero-first",
    "each micro-batch's gradient is clipped": "T9-clipping",
    "each optimizer's gradient is clipped by itself": "T10-two-optimizers",
    "the second optimizer's gradient is divided by the loss scale twice": "T10-two-optimizers",
    "one optimizer steps although the gradient of the other overflows": "T10-one-of-two-overflows",
    "the term counts once for each micro-batch": "T9-regulariser",
    "the optimizer steps after each micro-batch": "T2-mean",
    "what a window had gathered when it was given up joins the next": "T7-exception",
    "the schedule goes on although the update was skipped": "T10-overflow",
    "only the micro-batch that overflows is skipped, and the next takes its place": "T10-overflow",
    "the sum of the gradients stagnates in the dtype of the weights": "T10-sums-in-16-bits",
    "micro-batches come twice, so that all ranks have equally many": "T10x2-uneven-ranks",
    "the gradients that a window had gathered when the run was stopped are lost": "T6-stopped",
    "the epoch in which the run was stopped is seen again from its beginning": "T6-stopped",
    "an evaluation zeroes what the window had gathered": "T7-evaluation",
    "the schedule goes on with each micro-batch": "T9-schedule",
    "the moving average follows each micro-batch": "T9-moving-average",
}


@pytest.mark.parametrize(("mistake", "habit"), [(name, each) for name, habits in HABITS.items() for each in habits])
def test_each_known_mistake_is_found_and_named_in_a_scene(mistake, habit):
    scene = BY_NAME[WHERE[mistake]]
    trained = Trained(loops.train(scene.task, habit), updates=0)
    verdict = compare("planted", scene, trained, expected(scene.task))
    assert verdict.outcome == "fail"
    assert mistake in verdict.why


@pytest.mark.parametrize("scene", BY_MICRO_BATCH, ids=lambda scene: scene.name)
def test_there_is_a_mistake_that_each_scene_sees_and_names(scene):
    right = expected(scene.task)

    def is_seen(mistake):
        planted = Trained(loops.train(scene.task, HABITS[mistake][0]), right.updates)
        verdict = compare("planted", scene, planted, right)
        return verdict.outcome == "fail" and verdict.why.count(";") == 1

    assert any(is_seen(mistake) for mistake in sorted(HABITS, key=lambda mistake: WHERE[mistake] != scene.name))


@pytest.mark.parametrize("name", ["T1x2-ragged-counts", "T4x2-masked-rank"])
def test_ranks_that_weigh_the_same_are_found_and_named(name):
    """Each rank's own mean is right, and their mean is not that of the logical batch."""
    task = BY_NAME[name].task
    model = task.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    for rank in range(2):
        rows = join(task.epoch[rank::2])
        if task.targets(rows) > 0:
            (task.loss(model, rows) / 2).backward()
    optimizer.step()
    verdict = compare("planted", BY_NAME[name], Trained(model, 1), expected(task))
    assert verdict.outcome == "fail"
    assert "each rank weighs the same" in verdict.why


def test_a_mean_that_counts_once_for_each_rank_is_found_and_named():
    scene = BY_NAME["T1x2-ragged-counts"]
    doubled = expected(replace(scene.task, lr=2 * scene.task.lr))
    assert "once for each rank" in compare("planted", scene, doubled, expected(scene.task)).why


def test_scenes_over_ranks_are_not_judged_in_one_process():
    scene = BY_NAME["T1x2-ragged-counts"]
    assert judge(textbook, scene).why == "its adapter has no way to say: ranks"
    verdict = judge(replace(textbook, expresses=frozenset({"ranks"})), scene)
    assert (verdict.outcome, verdict.updates) == ("not expressible", None)
    assert "for 2 processes" in verdict.why
    of_ranks = replace(textbook, expresses=frozenset({"ranks"}), requires=frozenset({"ranks"}))
    assert judge(of_ranks, BY_NAME["T2-mean"]).why == "it is a way to say: ranks"


@pytest.mark.parametrize(("anew", "said"), [(True, "training begins anew"), (False, "the epoch begins again")])
@pytest.mark.parametrize("name", ["T5-forward", "T5-backward"])
def test_a_logical_batch_that_shrinks_when_memory_runs_out_is_found_and_named(name, anew, said):
    scene = BY_NAME[name]
    verdict = compare("planted", scene, Trained(loops.shrunk(scene.task, anew=anew), 4), expected(scene.task))
    assert verdict.outcome == "fail"
    assert said in verdict.why
    assert verdict.error > 0.5


@pytest.mark.parametrize("name", ["T5-forward", "T5-backward"])
def test_memory_runs_out_in_the_middle_of_the_second_window(name):
    task = BY_NAME[name].task
    model = task.make_model()
    for place, micro_batch in enumerate(task.epoch):
        if place < 6:
            task.loss(model, micro_batch).backward()
            continue
        model.zero_grad()
        with pytest.raises(torch.OutOfMemoryError):
            task.loss(model, micro_batch).backward()
        assert model.embedding.weight.grad is None
        assert (model.head.weight.grad is not None) == (name == "T5-backward")
        for row in range(2):
            task.loss(model, {key: each[row : row + 1] for key, each in micro_batch.items()}).backward()


def test_a_run_that_stops_knows_nothing_of_the_one_before_but_what_that_left():
    """A loop that forgets to load is seen: it makes half of the updates, from the first weights."""

    def forgets(task):
        def run(task, process):
            if process.ends_before:
                raise Stopped(1)
            return textbook.train(replace(task, epoch=task.epoch[process.begins_at :], stops_before=None))

        return in_processes(task, run)

    verdict = judge(planted(forgets), BY_NAME["T6-stopped"])
    assert verdict.outcome == "fail"
    assert verdict.error > 0.5
    with pytest.raises(AssertionError, match="came to its end"):
        in_processes(BY_NAME["T6-stopped"].task, lambda task, _: Trained(task.make_model(), 0))


@pytest.mark.parametrize("name", ["T7-two-optimizers", "T7-gan"])
def test_two_players_with_the_windows_of_each_other_are_found(name):
    scene = BY_NAME[name]
    swapped = replace(scene.task, window=scene.task.generator_window, generator_window=1)
    assert compare("planted", scene, expected(swapped), expected(scene.task)).outcome == "fail"


@pytest.mark.parametrize("name", ["T9-balancing-loss", "T9-divergence"])
def test_a_term_of_rows_that_counts_with_each_micro_batch_is_found_and_named(name):
    scene = BY_NAME[name]
    trained = Trained(loops.train(scene.task, Habit(term="each")), updates=1)
    verdict = compare("planted", scene, trained, expected(scene.task))
    assert verdict.outcome == "fail"
    assert "the term counts once for each micro-batch" in verdict.why


def with_one_scaler(task, *, updates_after_each):
    """Train with two optimizers and PyTorch's scaler, which is told that the step is over after each, or after both."""
    model = task.make_model()
    optimizers = [torch.optim.SGD(weights, lr=lr) for weights, lr in task.parts(model)]
    scaler = torch.amp.GradScaler("cpu")
    for _, micro_batches in task.windows():
        for micro_batch in micro_batches:
            with torch.autocast("cpu", torch.float16):
                loss = task.loss(model, micro_batch) / task.window
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        for optimizer in optimizers:
            scaler.step(optimizer)
            if updates_after_each or optimizer is optimizers[-1]:
                scaler.update()
        model.zero_grad()
    return Trained(model, updates=4)


def test_a_scaler_that_is_updated_between_two_optimizers_divides_twice_and_that_is_named():
    """What Accelerate does on a GPU, where each of its optimizers updates the scaler."""
    scene = BY_NAME["T10-two-optimizers"]
    right = expected(scene.task)
    assert compare("once", scene, with_one_scaler(scene.task, updates_after_each=False), right).outcome == "pass"
    verdict = compare("twice", scene, with_one_scaler(scene.task, updates_after_each=True), right)
    assert verdict.outcome == "fail"
    assert "the second optimizer's gradient is divided by the loss scale twice" in verdict.why


def test_with_two_optimizers_the_bound_sees_a_gradient_that_is_not_clipped_and_rates_that_are_swapped():
    scene = BY_NAME["T10-two-optimizers"]
    task = scene.task
    right, unclipped = expected(task), expected(replace(task, clip_norm=None))
    assert compare("planted", scene, unclipped, right).error > 1
    swapped = expected(replace(task, lr=task.second_lr, second_lr=task.lr))
    assert compare("planted", scene, swapped, right).error > 0.1


def test_of_two_optimizers_one_has_the_head_and_the_other_the_rest():
    task = BY_NAME["T10-two-optimizers"].task
    model = task.make_model()
    (rest, lr), (head, second_lr) = task.parts(model)
    assert (lr, second_lr) == (task.lr, 0.25)
    assert {*map(id, head)} == {*map(id, model.head.parameters())}
    assert {*map(id, rest)} == {id(model.embedding.weight)}


def test_where_one_of_two_overflows_the_other_does_not():
    """Else the scene would be about a window that overflows as a whole."""
    task = BY_NAME["T10-one-of-two-overflows"].task
    model = task.make_model()
    with torch.autocast("cpu", torch.float16):
        loss = sum(task.loss(model, each) / task.window for each in task.epoch[: task.window])
    (65536 * loss).backward()
    assert not model.embedding.weight.grad.isfinite().all()
    assert model.head.weight.grad.isfinite().all()
    model.zero_grad()
    expected_loss = sum(task.loss(model, each) / task.window for each in task.epoch[: task.window])
    expected_loss.backward()
    assert model.embedding.weight.grad.isfinite().all()


def planted(train):
    return System("planted", "planted", train, wholebatch.expresses)


def test_a_right_run_with_a_wrong_report_fails_by_its_report():
    def boasts(task):
        trained = wholebatch.train(task)
        return replace(trained, losses=[loss / 4 for loss in trained.losses])

    verdict = judge(planted(boasts), BY_NAME["T2-mean"])
    assert verdict.outcome == "fail"
    assert verdict.error < 1e-10
    assert "reported loss is 0.75 off" in verdict.why


def test_a_verdict_is_confirmed_by_a_second_reading_and_disputed_where_that_says_otherwise(monkeypatch):
    ragged = BY_NAME["T1-ragged-counts"]
    assert [judge(system, ragged).confirmed for system in (wholebatch, textbook)] == [True, True]
    assert judge(textbook, BY_NAME["T4-masked-window"]).confirmed
    assert judge(wholebatch, BY_NAME["T9-clipping"]).confirmed is None
    monkeypatch.setattr(judging, "second_reading", lambda task: textbook.train(task))
    verdict = judge(wholebatch, ragged)
    assert (verdict.outcome, verdict.confirmed) == ("pass", False)
    (dispute,) = suite.disputed({"systems": {"wholebatch": {"verdicts": {ragged.name: verdict.to_dict()}}}})
    assert dispute.startswith("wholebatch, T1-ragged-counts")


def test_the_rounding_of_a_system_widens_a_tolerance_and_hides_no_mistake():
    narrow = System("narrow", "narrow", textbook.train, textbook.expresses, rounding=1e-6)
    assert judge(narrow, BY_NAME["T1-ragged-counts"]).outcome == "fail"

    def rounds(task):
        trained = wholebatch.train(task)
        with torch.no_grad():
            for weight in trained.model.parameters():
                weight.copy_(weight.float())
        return trained

    exact = planted(rounds)
    assert judge(exact, BY_NAME["T2-mean"]).outcome == "fail"
    assert judge(replace(exact, rounding=1e-5), BY_NAME["T2-mean"]).outcome == "pass"


def test_a_right_run_with_another_number_of_updates_fails():
    verdict = judge(planted(lambda task: replace(wholebatch.train(task), updates=7)), BY_NAME["T2-mean"])
    assert (verdict.outcome, verdict.why) == ("fail", "7 updates instead of 1")


def test_an_error_is_a_refusal_in_the_words_of_the_system():
    def refuses(task):
        raise ValueError("labels must not be masked\nsecond line")

    verdict = judge(planted(refuses), BY_NAME["T4-masked-window"])
    assert (verdict.outcome, verdict.why) == ("refuses", "ValueError: labels must not be masked")


def test_what_cannot_be_said_is_not_judged():
    def cannot(task):
        raise NotExpressible("it has no loop of one's own")

    assert judge(planted(cannot), BY_NAME["T1-ragged-counts"]).outcome == "not expressible"
    plain = System("plain", "plain", wholebatch.train, frozenset())
    verdict = judge(plain, BY_NAME["T9-clipping"])
    assert (verdict.outcome, verdict.why) == ("not expressible", "its adapter has no way to say: clipping")
    gives_reasons = replace(plain, lacks={"clipping": "it clips rows", "fp16": "it has no scale"})
    assert judge(gives_reasons, BY_NAME["T9-clipping"]).why == "it clips rows"
    assert judge(gives_reasons, BY_NAME["T10-two-optimizers"]).why == "it clips rows; it has no scale"
    assert judge(plain, BY_NAME["T1-ragged-counts"]).outcome == "pass"


def test_weights_that_are_not_numbers_are_infinitely_far_off():
    def breaks(task):
        trained = wholebatch.train(task)
        with torch.no_grad():
            next(trained.model.parameters()).fill_(math.nan)
        return trained

    verdict = judge(planted(breaks), BY_NAME["T2-mean"])
    assert (verdict.outcome, verdict.error) == ("fail", math.inf)
    assert verdict.to_dict()["error"] == "not finite"


def test_the_tolerance_of_a_scene_sees_a_change_that_is_off_by_ten_times_as_much():
    for scene in SCENES:
        right = expected(scene.task)
        start = scene.task.make_model()
        off = copy.deepcopy(right.model)
        with torch.no_grad():
            for weight, begin in zip(off.parameters(), start.parameters(), strict=True):
                weight.add_((weight - begin) * 10 * scene.tolerance)
        if isinstance(scene.task, PairTask) or "bf16" not in scene.task.asks:
            assert change_error(start, off, right.model) > scene.tolerance, scene.name
