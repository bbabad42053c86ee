"""Accumulated gradient normalization against its equations, written down for a line without a framework's gradients."""

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import wholebatch as wb
from exploring import COEFFICIENTS, ETA, LENGTHS, STEPS, TURNS, explorer, line, rows, squares, weights
from wholebatch.engine.ranks.center import Reduced
from wholebatch.engine.ranks.exploration import vectors, views
from wholebatch.engine.ranks.served import Held

RANKS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what three real processes answered."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = Path(__file__).parents[1] / "exploring.py"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(program), str(folder)],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "TORCHELASTIC_RUN_ID": "test",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    complaints = [each.communicate(timeout=300)[1] for each in running]
    assert [each.returncode for each in running] == [0] * RANKS, "\n".join(complaints)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def explored(w, batches, normalize=True):
    """a += g, theta += g with g = -eta dL/dtheta, and a / lambda; of a mean square it is 2 x'(x w - y) / m."""
    theta, a = w.clone(), torch.zeros_like(w)
    for x, y in batches:
        g = -ETA * 2 * x.T @ (x @ theta - y) / len(x)
        a += g
        theta += g
    return a / len(batches) if normalize and batches else a


def together(steps, local_steps, normalize=True):
    """Two epochs of ranks that wait for each other; a rank whose rows are used up adds nothing."""
    w, found = line().weight.detach().T.clone(), []
    for epoch in range(2):
        for start in range(0, max(steps), local_steps):
            w = w + sum(
                explored(
                    w,
                    [rows(rank, step, epoch) for step in range(start, min(start + local_steps, count))],
                    normalize,
                )
                for rank, count in enumerate(steps)
            )
        found.append(w.flatten().tolist())
    return found


def distance(found, expected):
    found, expected = torch.tensor(found).double(), torch.tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "local_steps"), [("synchronous", 2), ("synchronous, long", 3)])
def test_ranks_that_wait_for_each_other_follow_the_equations(ranks, name, local_steps):
    """With 7, 5 and 3 steps in an epoch, so that ranks end in different rounds, and inside of one."""
    for answers in ranks:
        assert distance(answers[name], together(STEPS, local_steps)) < 1e-14
    assert ranks[0][name] == ranks[1][name] == ranks[2][name]


def test_without_the_division_the_center_moves_further(ranks):
    assert distance(ranks[0]["not normalized"], together(STEPS, 2, normalize=False)) < 1e-14
    # The bound of the test above sees a division that is left out.
    assert distance(ranks[0]["not normalized"], together(STEPS, 2)) > 0.01


def test_a_rank_that_holds_the_center_adds_in_order_of_arrival(ranks):
    """Each rank explores from what it has pulled at its last commit, which others have moved on since."""
    center = line().weight.detach().T.clone()
    pulled = [center] * RANKS
    since = [0] * RANKS
    stale = [[] for _ in range(RANKS)]
    for turn, rank in enumerate(TURNS):
        center = center + explored(pulled[rank], [rows(rank, 10 * turn + step) for step in range(2)])
        pulled[rank] = center
        stale[rank].append(turn - since[rank])
        since[rank] = turn + 1
    for rank, answers in enumerate(ranks):
        assert distance(answers["in turn"]["weights"], center.flatten().tolist()) < 1e-14
        assert answers["in turn"]["stale"] == stale[rank]
    assert any(sum(each) for each in stale)


def test_no_commit_is_lost_where_all_come_when_they_like(ranks):
    """Of 10, 20 and 30 explorations each adds the mean of two equal steps."""
    slope = torch.arange(1.0, COEFFICIENTS + 1, dtype=torch.float64)
    expected = line().weight.detach().flatten() - ETA * (10 + 20 + 30) * slope
    for answers in ranks:
        assert distance(answers["at will"], expected.tolist()) < 1e-13
    lost = line().weight.detach().flatten() - ETA * (10 + 20 + 29) * slope
    assert distance(lost.tolist(), expected.tolist()) > 1e-3  # the bound sees one that is


def test_a_rank_without_rows_holds_the_center_for_the_others(ranks):
    w = line().weight.detach().T.clone()
    for start in (0, 2, 4):
        w = w + explored(w, [rows(1, step) for step in range(start, min(start + 2, 5))])
    for answers in ranks:
        assert distance(answers["only serves"], w.flatten().tolist()) < 1e-14


def test_what_one_rank_finds_beyond_numbers_is_thrown_away(ranks):
    w = line().weight.detach().T.clone()
    w = w + sum(explored(w, [rows(rank, step) for step in (0, 1)]) for rank in range(RANKS))
    w = w + sum(explored(w, [rows(rank, step) for step in (2, 3)]) for rank in (0, 2))
    for rank, answers in enumerate(ranks):
        assert distance(answers["one overflows"]["weights"], w.flatten().tolist()) < 1e-14
        *before, last = answers["one overflows"]["skipped"]
        assert before == [None] * 3
        assert ("infinite" in (last or "")) == (rank == 1)


def test_ranks_that_share_out_logical_batches_make_the_update_of_the_whole(ranks):
    w = line().weight.detach().T.clone()
    batches = wb.LogicalBatches(len(LENGTHS), rows=3)
    sizes = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        for places in batches:
            x, y = map(torch.cat, zip(*[rows(0, LENGTHS[place]) for place in places], strict=True))
            w = w + explored(w, [(x, y)])
            sizes.append(len(places))
    for answers in ranks:
        assert distance(answers["shared out"]["weights"], w.flatten().tolist()) < 1e-13
        assert [of_all for _, of_all in answers["shared out"]["made"]] == sizes
    own = [[of_rank for of_rank, _ in answers["shared out"]["made"]] for answers in ranks]
    assert [sum(each) for each in zip(*own, strict=True)] == sizes
    assert sizes == [3, 3, 1] * 2
    assert min(map(min, own)) == 0


def test_ranks_are_told_of_rows_that_come_twice(ranks):
    for answers in ranks:
        assert sum("2 rows come twice" in reason for reason in answers["repeating"]) == 1


@pytest.mark.parametrize("name", ["one fails", "one fails, asynchronous", "one fails, others wait"])
def test_ranks_hear_of_one_that_fails_and_wait_no_longer(ranks, name):
    assert [answers[name]["error"] for answers in ranks] == ["RankError", "KeyError", "RankError"]
    for answers in ranks:
        if answers[name]["error"] == "RankError":
            assert "have lost one" in answers[name]["said"]
            assert "hint: start all of them again" in answers[name]["said"]
    if name != "one fails":
        assert "rank 1 has failed ('no such column')" in ranks[0][name]["said"]


def test_a_wrapper_that_averages_gradients_is_refused(ranks):
    for answers in ranks:
        assert "wrapped for data parallel training" in answers["wrapped"]
        assert "hint: pass the plain module" in answers["wrapped"]


def test_one_rank_and_one_local_step_is_the_optimizer_alone():
    plain, model = line(), line()
    optimizer = torch.optim.SGD(plain.parameters(), lr=ETA)
    with explorer(model, local_steps=1) as exploring:
        for step in range(5):
            made = exploring.step(rows(0, step))
            optimizer.zero_grad()
            loss = squares(plain, rows(0, step))
            loss.backward()
            optimizer.step()
            assert made.merged
            assert made.merges == made.number == step + 1
            assert float(made.loss) == pytest.approx(loss.item(), rel=1e-14)
            assert distance(weights(model), weights(plain)) < 1e-14


def test_more_local_steps_are_not_the_optimizer_alone():
    """Beside the test above: it sees a center that moves by the mean of two steps instead of both."""
    plain, model = line(), line()
    optimizer = torch.optim.SGD(plain.parameters(), lr=ETA)
    with explorer(model, local_steps=2) as exploring:
        for step in range(2):
            exploring.step(rows(0, step))
            optimizer.zero_grad()
            squares(plain, rows(0, step)).backward()
            optimizer.step()
    assert distance(weights(model), weights(plain)) > 0.01


def test_weights_move_in_each_local_step_and_a_short_exploration_counts_as_much():
    model = line()
    w = model.weight.detach().T.clone()
    exploring = explorer(model, local_steps=4)
    seen = [weights(model)]
    for step in range(3):
        assert not exploring.step(rows(0, step)).merged
        seen.append(weights(model))
    assert all(one != other for one, other in pairwise(seen))
    exploring.finish()
    assert distance(weights(model), (w + explored(w, [rows(0, step) for step in range(3)])).flatten().tolist()) < 1e-14
    exploring.close()
    exploring.close()
    with pytest.raises(wb.WindowError, match=r"close\(\) was called"):
        exploring.step(rows(0, 0))


def test_steps_without_anything_to_learn_keep_the_rhythm():
    model = line()
    w = model.weight.detach().T.clone()

    def count_or_nothing(model, batch):
        x, y = batch
        return None if len(x) == 0 else ((model(x) - y).square().sum(), len(x), 0.0 * model.weight.sum())

    exploring = explorer(model, count_or_nothing, local_steps=4)
    assert exploring.step(None).loss is None
    x, y = rows(0, 0)
    assert exploring.step((x[:0], y[:0])).loss is None
    exploring.step(rows(0, 1))
    assert exploring.step(rows(0, 2)).merged
    assert distance(weights(model), (w + explored(w, [rows(0, 1), rows(0, 2)])).flatten().tolist()) < 1e-14
    masked = explorer(line(), lambda model, batch: (model(batch[0]).sum() * 0, 0), local_steps=1)
    assert masked.step(rows(0, 0)).loss is None


@pytest.mark.parametrize("options", [{}, {"targets": lambda batch: len(batch[0])}], ids=["rows", "declared"])
def test_a_sum_is_divided_by_its_targets(options):
    model = line()
    w = model.weight.detach().T.clone()
    summed = explorer(model, lambda m, b: (m(b[0]) - b[1]).square().sum(), reduction="sum", local_steps=1, **options)
    summed.step(rows(0, 0))
    assert distance(weights(model), (w + explored(w, [rows(0, 0)])).flatten().tolist()) < 1e-14


def test_an_exception_in_the_loss_leaves_the_weights_alone():
    model = line()
    before = weights(model)
    with pytest.raises(KeyError), explorer(model, lambda _, batch: batch["x"]) as exploring:
        exploring.step({})
    assert weights(model) == before


def test_the_center_has_32_bits_where_weights_have_16():
    """Small changes add up in the center that a weight of 16 bits cannot show one by one."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    center = Reduced(None)
    center.start(vectors([model.weight]))
    for _ in range(4):
        center.commit([torch.full((1,), 2.0**-9)])
    assert float(center.finish()[0]) == 1 + 2.0**-7
    assert float(torch.ones(1, dtype=torch.bfloat16) + 2.0**-9) == 1


def test_parameters_of_any_kind_go_side_by_side_and_back():
    parameters = [
        nn.Parameter(torch.randn(2, 3)),
        nn.Parameter(torch.randn(3, dtype=torch.complex128)),
        nn.Parameter(torch.randn(2, 2, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn((), dtype=torch.float64)),
    ]
    side_by_side = vectors(parameters)
    assert [(each.dtype, each.numel()) for each in side_by_side] == [(torch.float32, 10), (torch.float64, 7)]
    back = {id(parameter): values for parameter, values in views(parameters, side_by_side)}
    for parameter in parameters:
        assert torch.equal(back[id(parameter)].to(parameter.dtype), parameter)


def test_a_held_center_answers_when_all_have_finished():
    held = Held([torch.zeros(2)], ranks=2)
    first = held.finish()
    assert not first.done()
    held.commit([torch.ones(2)])
    second = held.finish()
    for each in (first, second):
        center, commits = each.wait()
        assert center[0].tolist() == [1, 1]
        assert commits == 1


def test_a_held_center_lets_nobody_wait_for_a_rank_that_has_failed():
    held = Held([torch.zeros(2)], ranks=2)
    waiting = held.finish()
    held.fail("rank 1 has failed (no such column)")
    held.fail("rank 0 has failed too")
    assert waiting.wait() == held.commit([torch.ones(2)]) == "rank 1 has failed (no such column)"


@pytest.fixture
def served_alone(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.usefixtures("served_alone")
def test_one_rank_serves_itself():
    found = []
    for synchronous in (True, False):
        model = line()
        with explorer(model, synchronous=synchronous) as exploring:
            steps = [exploring.step(rows(0, step)) for step in range(5)]
        found.append(weights(model))
        assert [step.stale for step in steps] == [0] * 5
    assert distance(*found) < 1e-15


@pytest.mark.filterwarnings("ignore:You are using a Backend")  # PyTorch says so to itself
@pytest.mark.usefixtures("served_alone")
def test_ranks_that_know_each_other_already_are_left_together():
    torch.distributed.rpc.init_rpc("mine", rank=0, world_size=1)
    try:
        with explorer(line(), synchronous=False) as exploring:
            exploring.step(rows(0, 0))
        assert torch.distributed.rpc.get_worker_info().name == "mine"
    finally:
        torch.distributed.rpc.shutdown()


@pytest.mark.usefixtures("served_alone")
def test_a_failed_rank_does_not_wait_for_the_others():
    with pytest.raises(KeyError), explorer(line(), lambda _, batch: batch["x"], synchronous=False) as exploring:
        exploring.step({})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_steps": 0}, "local_steps=0"),
        ({"local_steps": 2.5}, "local_steps=2.5"),
        ({"local_steps": "4"}, "local_steps='4'"),
        ({"synchronous": False, "process_group": object()}, "takes no process group"),
        ({"synchronous": False}, "do not know where to meet"),
        ({"reduction": "median"}, "median"),
    ],
)
def test_nonsense_is_refused_with_a_hint(options, said, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(wb.WholeBatchError, match=said) as caught:
        explorer(line(), **options)
    assert "hint:" in str(caught.value)


def test_local_steps_need_a_loss():
    with pytest.raises(wb.LossError, match="loss_fn is a NoneType"):
        explorer(line(), None)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(wb.OptimizerError, match="not the model's"):
        wb.AccumulatedGradientNormalization(
            line(), torch.optim.SGD(line().parameters(), lr=0.1), squares, local_steps=2
        )


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(wb.ConfigError, match=r"one of 2.*(?s:.*)hint: call torch.distributed.init_process_group"):
        explorer(line())


def test_a_build_without_rpc_says_so(monkeypatch):
    monkeypatch.setattr(torch.distributed.rpc, "is_available", lambda: False)
    with pytest.raises(wb.ConfigError, match=r"without torch\.distributed\.rpc"):
        explorer(line(), synchronous=False)


def test_in_a_group_of_one_the_collectives_are_real(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = line(), line()
        found = []
        with explorer(model) as exploring:
            found = [exploring.step(rows(0, step)) for step in range(3)]
    finally:
        torch.distributed.destroy_process_group()
    assert [step.merged for step in found] == [False, True, False]
    with explorer(alone) as exploring:
        for step in range(3):
            exploring.step(rows(0, step))
    assert weights(model) == weights(alone)
