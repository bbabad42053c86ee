"""Several real processes make the update of one: bare, in DDP, and with FSDP2, however uneven their parts are."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import ranks
import wholebatch as wb
from engine.sync_scenes import LEAVES_PASSES
from menagerie import CALM
from wholebatch.core.window import WindowState
from wholebatch.engine.ranks import message
from wholebatch.engine.weighing import Weighing

EXACT = 1e-12
WRAPS = ["bare", "ddp", "fsdp", "each"]
ON_FOUR = ["bare", "hsdp", "hsdp each"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found in all scenes; one start for all of them."""
    return ranks.launch("engine.sync_scenes", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks.launch("engine.sync_scenes", 4, tmp_path_factory.mktemp("four"))


EVERY_WAY = [*((2, wrap) for wrap in WRAPS), *((4, wrap) for wrap in ON_FOUR)]
LEAVING = ("shortage", "failure", "random faults")
UNDONE_TOGETHER = [way for way in EVERY_WAY if not way[1].endswith("each")]


def name_of(way):
    return f"{way[1]}-{way[0]}"


def in_scene(request):
    num_ranks, wrap = request.param
    found = request.getfixturevalue("two" if num_ranks == 2 else "four")

    def of(name):
        if name in LEAVING and wrap.endswith("each") and not LEAVES_PASSES:
            pytest.skip("a PyTorch whose FSDPModule has no reset_iter_state")
        return ranks.result(found, f"{name} [{wrap}]", num_ranks)

    return of


@pytest.fixture(params=EVERY_WAY, ids=name_of)
def scene(request):
    """Returns what each rank found in a scene, for every number of ranks and every wrapper."""
    return in_scene(request)


@pytest.fixture(params=UNDONE_TOGETHER, ids=name_of)
def undoing(request):
    """The same, where ranks can go back together."""
    return in_scene(request)


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_animal_is_trained_as_by_one_process(two, wrap):
    for found in ranks.result(two, f"every animal [{wrap}]", 2):
        assert set(CALM) - set(found) <= ({"sparse gradients"} if wrap == "each" else set())
        assert {animal: off for animal, off in found.items() if off > EXACT} == {}


def test_every_target_counts_once_on_whatever_rank_it_is(scene):
    for found in scene("ragged"):
        assert found["off"] <= EXACT
        assert found["losses off"] <= EXACT
        assert [update["targets"] for update in found["updates"]] == [36, 21, 36]
        assert [update["rows"] for update in found["updates"]] == [13, 8, 13]


def test_ranks_agree_on_the_record_but_for_their_own_micro_batches(scene):
    shared = [
        [{name: value for name, value in update.items() if name != "micro_batches"} for update in found["updates"]]
        for found in scene("ragged")
    ]
    assert all(each == shared[0] for each in shared)
    assert len({found["updates"][0]["micro_batches"] for found in scene("ragged")}) > 1


def test_the_bound_sees_a_mean_over_ranks(two):
    for found in ranks.result(two, "a mean over ranks is seen", 2):
        assert found["off"] > 1e-2


@pytest.mark.parametrize("kind", ["sized", "unsized", "none at the end", "ends at a window's end", "one a window"])
def test_loaders_of_different_length_end_together(scene, kind):
    by_rank = [found[kind] for found in scene("loaders")]
    assert len({len(found["updates"]) for found in by_rank}) == 1
    for found in by_rank:
        assert found["off"] <= EXACT
        assert [update["number"] for update in found["updates"]] == list(range(1, len(found["updates"]) + 1))
        assert all(update["skipped"] is None for update in found["updates"])


@pytest.mark.parametrize("kind", ["no labels", "no rows", "None", "an empty list"])
def test_a_rank_with_nothing_to_learn_takes_part(scene, kind):
    *others, last = scene("nothing here")
    for found in (*others, last):
        assert found[kind]["off"] <= EXACT
    assert last[kind]["update"]["micro_batches"] == 0


def test_a_loop_of_one_s_own_may_have_nothing_on_a_rank(undoing):
    *others, last = undoing("nothing here")
    for found in (*others, last):
        assert found["no window"]["off"] <= EXACT
    assert last["no window"]["update"]["micro_batches"] == 0


def test_nothing_to_learn_anywhere_is_no_update(scene):
    for found in scene("nothing here"):
        assert found["nowhere"]["moved"] == 0
        assert "nothing to learn" in found["nowhere"]["update"]["skipped"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_shortage_on_one_rank_recuts_all_of_them(scene, where):
    *others, last = scene("shortage")
    assert last[where]["times"] == 2
    for found in (*others, last):
        assert found[where]["retries"] == [2, 0]
        assert found[where]["off"] <= EXACT
        assert found[where]["equal"]
        assert found[where]["stream"]
    assert any("another rank" in reason for reason in others[0][where]["reasons"])


@pytest.mark.parametrize("kind", ["forward of 1", "forward of 2", "backward of 1", "backward of 2"])
def test_a_loader_s_micro_batch_that_does_not_fit_on_one_rank_is_split_there(undoing, kind):
    *others, last = undoing("shortage in a loader")
    assert last[kind]["times"] == 1
    assert last[kind]["retries"] == [1]
    for found in (*others, last):
        assert found[kind]["off"] <= EXACT
    for found in others:
        assert found[kind]["retries"] == [0]


@pytest.mark.parametrize("wrap", ["bare", "ddp", "fsdp"])
def test_memory_that_runs_out_after_gradients_were_sent_is_an_error_on_all(two, wrap):
    """Nobody waits, nothing has moved, and the next window is made."""
    other, short = ranks.result(two, f"short after gradients were sent [{wrap}]", 2)
    assert short["said"][0] == "OutOfMemoryError"
    assert "sent" in short["said"][1]
    assert other["said"][0] == "RankError"
    for found in (other, short):
        assert found["moved"] == 0
        assert found["off"] <= EXACT


def test_a_row_that_does_not_fit_on_one_rank_is_an_error_on_all(two):
    other, short = ranks.result(two, "no finer cut", 2)
    assert short["said"][0] == "OutOfMemoryError"
    assert other["said"][0] == "RankError"
    assert "rank 1" in other["said"][1]
    assert "one row" in other["said"][1]
    assert short["moved"] == other["moved"] == 0


def test_a_shortage_in_one_rank_s_step_is_made_good_there(two):
    for found in ranks.result(two, "shortage in the optimizer's step", 2):
        assert found["off"] <= EXACT


FAILURES = {
    "loss": "SampleError: row 7 is broken",
    "targets": "SampleError: row 7 has no label",
    "backward": "SampleError: in a hook",
    "batch": "SplitError: The tensors of one logical batch disagree",
    "loader": "SampleError: no file for row 7",
    "window": "SampleError: in my loop",
    "rollback": "it rolled its window back",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_on_one_rank_is_told_on_all_and_moves_nothing(scene, kind):
    *others, last = scene("failure")
    if kind not in last:
        pytest.skip("a window of one's own, in which ranks go in step")
    number = len(others)
    assert last[kind]["said"][0] == FAILURES[kind].split(":")[0].replace("it rolled its window back", "nothing")
    for found in others:
        assert found[kind]["said"][0] == "RankError"
        assert f"rank {number} could not: {FAILURES[kind]}" in found[kind]["said"][1]
        assert "hint:" in found[kind]["said"][1]
    for found in (*others, last):
        assert found[kind]["moved"] == 0
        assert found[kind]["off"] <= EXACT  # and the next logical batch is trained on


def test_a_fault_is_the_right_update_or_an_error_on_every_rank(scene):
    by_rank = [found["faults"] for found in scene("random faults")]
    struck = set()
    for of_one in zip(*by_rank, strict=True):
        assert len({each["applied"] for each in of_one}) == 1
        assert all(each["moved"] == each["applied"] for each in of_one)
        assert all(each["off"] <= EXACT for each in of_one)
        said = sorted(each["said"] for each in of_one)
        if of_one[0]["kind"].startswith("raise") and any(each["struck"] for each in of_one):
            assert said == ["RankError"] * (len(of_one) - 1) + ["SampleError"]
            struck.add(of_one[0]["kind"])
        elif of_one[0]["applied"]:
            assert set(said) == {"nothing"}
            struck.add(of_one[0]["kind"])
        elif of_one[0]["kind"] != "infinite":  # a single row that does not fit
            assert said == ["OutOfMemoryError"] + ["RankError"] * (len(of_one) - 1)
    assert {"none", "short", "raise", "stop", "empty"} <= struck


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_infinity_on_one_rank_skips_the_update_on_all(two, wrap, precision):
    for found in (each[precision] for each in ranks.result(two, f"not finite [{wrap}]", 2)):
        assert found["skipped"] is not None
        assert found["moved"] == 0
        assert found["applied"]
        assert found["scale"] == (None if precision == "fp32" else 32768.0)
        assert found["off"] <= (1e-6 if precision == "fp32" else 4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_not_finite_is_raised_on_all_where_that_is_asked_for(two, wrap):
    for found in ranks.result(two, f"not finite [{wrap}]", 2):
        assert found["raise"]["said"][0] == "NonFiniteError"
        assert found["raise"]["moved"] == 0


@pytest.mark.parametrize("kind", ["fp32", "compensated", "weights", "bf16 on the wire"])
def test_sums_in_16_bits_over_ranks(two, kind):
    for found in ranks.result(two, "sums in 16 bits", 2):
        assert found[kind] <= 4 * torch.finfo(torch.bfloat16).eps


def test_weights_may_be_gathered_in_16_bits_and_kept_in_32(two):
    for found in ranks.result(two, "weights gathered in 16 bits", 2):
        assert found["once"] <= 4 * torch.finfo(torch.bfloat16).eps
        assert found["each"] <= 4 * torch.finfo(torch.bfloat16).eps
        assert found["refused"][0] == "OptimizerError"
        assert "reduce_dtype" in found["refused"][1]


def test_gradients_travel_in_the_dtype_that_was_asked_for(two):
    gradient = 66 * 8
    for found in ranks.result(two, "in which dtype gradients travel", 2):
        assert found["None"]["off"] <= EXACT
        assert found["fp32"]["off"] <= 4 * torch.finfo(torch.float32).eps
        assert EXACT < found["bf16"]["off"] <= 4 * torch.finfo(torch.bfloat16).eps
        sent = [found[kind]["sent"][0][1] for kind in ("None", "fp32", "bf16")]
        assert sent == [gradient, gradient // 2, gradient // 4]


@pytest.mark.parametrize("wrap", ["bare", "ddp"])
@pytest.mark.parametrize(
    ("kind", "windows"), [("step of 1", 1), ("step of 4", 1), ("step of 24", 1), ("window", 1), ("updates", 2)]
)
def test_a_window_is_one_reduction_and_one_small_message(two, wrap, kind, windows):
    for found in ranks.result(two, f"counted [{wrap}]", 2):
        assert found[kind] == [["gloo:all_reduce", size] for size in (found["gradient"], 64) for _ in range(windows)]


def test_a_loader_without_a_length_that_ends_with_a_window_costs_one_more_round(two):
    for found in ranks.result(two, "counted [bare]", 2):
        assert len(found["unsized"]) == 4


def test_sharded_weights_are_gathered_once_a_window(two):
    for found in ranks.result(two, "counted [fsdp]", 2):
        for kind in ("step of 1", "step of 24", "window"):
            names = [name for name, _ in found[kind]]
            assert names == ["gloo:all_gather"] * 2 + ["gloo:all_reduce"] * 2
            assert found[kind][2:] == [["gloo:all_reduce", found["gradient"]], ["gloo:all_reduce", 64]]


def test_sharded_weights_may_be_gathered_with_each_pass(two):
    for found in ranks.result(two, "counted [each]", 2):
        for rows, passes in ((1, 17), (4, 5), (24, 1)):
            names = [name for name, _ in found[f"step of {rows}"]]
            assert names.count("gloo:all_gather") == 4 * passes  # two layers, forward and backward
            assert len(names) == 6 * passes + 2  # two layers are reduced; passes are agreed on, and the message is sent
            assert found[f"step of {rows}"].count(["gloo:all_reduce", 64]) == 1


@pytest.mark.parametrize("wrap", ["bare", "ddp", "fsdp"])
def test_each_rank_plans_and_checks_for_itself(two, wrap):
    first, second = ranks.result(two, f"by default [{wrap}]", 2)
    for found in (first, second):
        assert all(each["off"] <= EXACT for each in found.values())
        assert any("the whole batch of" in reason for reason in found["auto"]["reasons"])
        assert any("compared cut and uncut" in reason for reason in found["check"]["reasons"])
    assert "plan" not in second
    assert wrap == "fsdp" or (first["plan"]["fits"] and first["verify"]["ok"])


def test_buckets_are_sent_while_the_last_backward_pass_runs(two):
    for found in ranks.result(two, "while the backward pass runs", 2):
        assert found["off"] <= EXACT
        done = [place for place, told in enumerate(found["told"]) if told == "first layer done"]
        assert len(done) == found["passes"]
        assert not any(told.startswith("sent") for told in found["told"][: done[-2] if len(done) > 1 else 0])
        assert sum(told.startswith("sent") for told in found["told"][: done[-1]]) >= 2
        assert found["told"][-1] == "sent 8"  # the message comes last


def test_gradients_that_arrive_late_are_sent_again_once(two):
    for found in ranks.result(two, "gradients that arrive after their bucket was sent", 2):
        assert found["shared"]["off"] <= EXACT
        assert found["once"]["off"] <= EXACT
        assert found["shared"]["sent"][0] == found["once"]["sent"][0] + 2
        assert found["shared"]["sent"][1] == found["once"]["sent"][1] == 2


def test_what_nobody_has_used_does_not_move(two):
    for found in ranks.result(two, "parameters used on some ranks", 2):
        assert found["off"] <= EXACT
        assert found["idle moved"] == 0
        assert found["states"] == 4
        assert found["sent"][1] == 3


def test_windows_of_two_players_may_be_open_at_the_same_time(two):
    for found in ranks.result(two, "two players", 2):
        assert found["off"] <= EXACT


def test_ranks_are_made_equal_once_or_refused(two):
    first, second = ranks.result(two, "unequal at the start", 2)
    for found in (first, second):
        assert found["off"] <= EXACT
        assert found["another model"][0] == found["another rate"][0] == "RankError"
        assert "rank 0 has weight of shape (3, 5)" in found["another model"][1]
        assert "rank 1 has weight of shape (4, 5)" in found["another model"][1]
        assert "'lr': 2.0" in found["another rate"][1]
    assert any("4 of 4 weights and buffers of rank 1 differed" in reason for reason in second["reasons"])
    assert not any("differed" in reason for reason in first["reasons"])


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("batch norm", "BatchNormError", "compute over the rows"),
        ("batch norm of parts", "nothing", ""),
        ("AdamA", "OptimizerError", "takes gradients in as they arrive"),
        ("static graph", "OptimizerError", "static_graph"),
        ("dtype", "ConfigError", "int8"),
    ],
)
def test_what_is_not_exact_over_ranks_is_refused(two, kind, error, said):
    for found in ranks.result(two, "refused", 2):
        assert found[kind][0] == error
        assert said in found[kind][1]


JOINED = """
    import os, sys, time
    import datetime as dt
    from pathlib import Path
    import torch
    import wholebatch as wb

    rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    Path(f"{store} {rank}").touch()
    while not Path(f"{store} {1 - rank}").exists():
        time.sleep(0.1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=dt.timedelta(seconds=6)
    )
"""
"""Two processes that wait for each other before they join, so that the time-out is for what comes then."""

DYING = """
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    passes = 0

    def loss_fn(model, x):
        global passes
        passes += 1
        if rank == 1 and passes == 4:
            if how == "dies":
                os._exit(7)
            time.sleep(60)
        return model(x).square().mean()

    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, check=None,
                                 micro_batch=wb.Rows(1))
    accumulator.step(torch.ones(3, 2))
    before = model.weight.detach().clone()
    for _ in range(2):
        try:
            accumulator.step(torch.ones(3, 2))
        except wb.RankError as error:
            print(error, bool(torch.equal(before, model.weight)), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_gone_is_a_clear_error_within_the_time_out(tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(JOINED + DYING)]
    gone = subprocess.Popen([*command, "1", str(tmp_path / "store"), how], stdout=subprocess.DEVNULL)
    left = subprocess.run([*command, "0", str(tmp_path / "store"), how], capture_output=True, text=True, timeout=90)
    gone.kill()
    gone.wait()
    said = left.stdout
    assert said, left.stderr
    assert said.count("a rank is gone, or did not answer within the time-out") == 2
    assert "cannot go on with the others" in said
    assert said.count("hint:") == said.count("True") == 2


SHORT = """
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    passes = 0

    def loss_fn(model, x):
        global passes
        passes += 1
        out = model(x)
        if rank == 1 and passes == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return out.square().mean()

    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, check=None,
                                 micro_batch=wb.Rows(2), communication="each")
    accumulator._setup.group._traffic.can_go_back = False  # as with an older PyTorch
    accumulator.step(torch.ones(6, 2))
    before = [each.to_local().clone() for each in model.parameters()]
    began = time.monotonic()
    for _ in range(2):
        try:
            if how == "lives":
                list(accumulator.updates([torch.ones(1, 2)] * 3, micro_batches=3))
            else:
                accumulator.step(torch.ones(6, 2))
        except wb.WholeBatchError as error:
            still = all(torch.equal(one, each.to_local()) for one, each in zip(before, model.parameters()))
            print(type(error).__name__, error, still, time.monotonic() - began < 40, flush=True)
            if rank == 1 and how == "ends":
                break
    if rank == 1 and how != "ends":
        time.sleep(60)
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["ends", "lives"])
def test_in_step_without_a_way_out_of_a_pass_a_shortage_is_an_error_on_every_rank(tmp_path, how):
    """On the others when its process ends, or else at the time-out, here 6 s."""
    command = [sys.executable, "-c", textwrap.dedent(JOINED + SHORT)]
    short = subprocess.Popen([*command, "1", str(tmp_path / "store"), how], stdout=subprocess.PIPE, text=True)
    other = subprocess.run([*command, "0", str(tmp_path / "store"), how], capture_output=True, text=True, timeout=90)
    short.kill()
    said, _ = short.communicate()
    assert "OutOfMemoryError" in said.splitlines()[0]
    assert "Memory ran out (CUDA out of memory" in said
    assert ("ranks cannot go back together" if how == "ends" else "cannot be taken back") in said
    if how == "lives":
        assert "cannot go on with the others: it left a window in the middle (" in said
    assert other.stdout.count("RankError") == other.stdout.count("hint:") == other.stdout.count("True True") == 2, (
        other.stderr + other.stdout
    )
    assert "a rank is gone, or did not answer within the time-out" in other.stdout


def test_the_page_s_example_says_the_same_on_two_ranks_as_on_one(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "many-machines.md"
    program = tmp_path / "train.py"
    program.write_text(page.read_text().split("```python\n")[1].split("```")[0])
    alone = {key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, str(program)], env=alone, capture_output=True, text=True, check=True).stdout
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    launched = subprocess.run(launch, env=alone, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count(said.strip()) == 2  # the ranks may write over each other's ends of lines
    assert launched.stdout.replace(said.strip(), "").strip() == ""


def test_an_accumulator_that_was_made_before_the_ranks_were_is_refused(monkeypatch):
    model = torch.nn.Linear(2, 1)
    accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), check=None)
    with accumulator.window() as window:
        window.backward(model(torch.ones(1, 2)).sum(), targets=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(wb.WindowError, match="one of 2 ranks"):
        accumulator.window()


def test_counts_that_cannot_weigh_are_seen_on_their_device():
    weighing = Weighing(targets=None, micro_batches=1, scale=None)
    for count, spoilt in ((2.0, 0), (-1.0, 1), (float("nan"), 1), (float("inf"), 1)):
        state = WindowState(targets=torch.tensor(count))
        assert float(message.spoilt(weighing, state)) == spoilt
    assert message.spoilt(weighing, WindowState(targets=3)) == 0


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 1000])
def test_masks_differ_exactly_where_ranks_do(num_ranks):
    alike = [message.mask_of([True, False], num_ranks)] * num_ranks
    apart = [*alike[1:], message.mask_of([True, True], num_ranks)]
    for masks, differ in ((alike, False), (apart, True)):
        total, squares = float(sum(masks)), float(sum(mask**2 for mask in masks))
        assert (num_ranks * squares != total**2) is differ
        assert squares * num_ranks < 2**53
