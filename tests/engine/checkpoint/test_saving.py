"""What is saved inside a window goes on in the next process as if nothing had happened."""

import copy
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import wholebatch as wb
from engine.checkpoint import resumed

BITWISE = ["sgd", "adamw", "fp16", "bf16 weights", "compensated"]


def run(kind, out, *, path="-", kill_after=0, rows=6):
    """Run in a process of its own, and return what came of it, or None if it was killed."""
    command = [sys.executable, resumed.__file__, kind, path, kill_after, rows, out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if kill_after else 0), done.stderr
    return None if kill_after else torch.load(out, weights_only=False)


def in_one_go(kind, out):
    """Return what comes of the run that nobody stops."""
    resumed.main(kind, "-", 0, 6, str(out))
    return torch.load(out, weights_only=False)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("kind", BITWISE)
def test_a_run_that_was_killed_inside_a_window_goes_on_bit_by_bit(tmp_path, kind):
    whole = in_one_go(kind, tmp_path / "whole.pt")
    path = tmp_path / "run.safetensors"
    run(kind, "-", path=path, kill_after=6)  # after the second micro-batch of the second window
    going_on = run(kind, tmp_path / "resumed.pt", path=path)
    whole["records"] = whole["records"][1:]  # the first window was in the process that was killed
    assert going_on["records"][0][0] == 2
    assert same(whole, going_on)


def test_it_goes_on_with_micro_batches_of_another_size(tmp_path):
    whole = in_one_go("plain", tmp_path / "whole.pt")
    path = tmp_path / "run.safetensors"
    run("plain", "-", path=path, kill_after=6)
    going_on = run("plain", tmp_path / "resumed.pt", path=path, rows=2)
    assert going_on["micro_batches"] == 12
    for name, weight in whole["weights"].items():
        assert (going_on["weights"][name] - weight).norm() <= 1e-14 * weight.norm()


def test_a_lost_window_is_seen(tmp_path):
    whole = in_one_go("plain", tmp_path / "whole.pt")
    path = tmp_path / "run.safetensors"
    run("plain", "-", path=path, kill_after=6)
    tensors = load_file(path)
    with_sums = {name: each for name, each in tensors.items() if "gradients/sums" in name}
    assert with_sums
    for each in with_sums.values():
        each.zero_()  # as if the first half of the window had been forgotten
    save_file(tensors, path, metadata=metadata_of(path))
    going_on = run("plain", tmp_path / "resumed.pt", path=path)
    assert not torch.allclose(whole["weights"]["0.weight"], going_on["weights"]["0.weight"], rtol=1e-3)


def metadata_of(path):
    with Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header["__metadata__"]


def make(width=3, *, schedule=False, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    stepping = optimizer(model.parameters(), lr=0.1)
    if schedule:
        options["lr_scheduler"] = torch.optim.lr_scheduler.LinearLR(stepping)
    return model, wb.Accumulator(model, stepping, lambda model, x: model(x).mean(), check=None, **options)


X = torch.arange(24.0).reshape(8, 3) / 10


def test_a_window_that_goes_on_can_still_be_rolled_back(tmp_path):
    model, accumulator = make()
    accumulator.step(X)
    before = torch.get_rng_state()
    window = accumulator.window()
    window.backward(model(X).mean(), targets=8)
    wb.save(tmp_path / "run", accumulator)
    _, resumed = make()
    wb.load(tmp_path / "run", resumed)
    resumed.window().rollback()
    assert torch.equal(torch.get_rng_state(), before)
    assert resumed.step(X).number == window._number + 1
    window.rollback()


def test_saving_changes_nothing(tmp_path):
    model, accumulator = make()
    other, straight = make()
    rng = torch.get_rng_state()
    for each_model, each in ((model, accumulator), (other, straight)):
        torch.set_rng_state(rng)
        with each.window() as window:
            window.backward(each_model(X).mean(), targets=8)
            if each is accumulator:
                wb.save(tmp_path / "run", accumulator)
            window.backward(each_model(2 * X).mean(), targets=8)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_another_accumulator_may_hold_the_gradients_meanwhile(tmp_path):
    torch.manual_seed(0)
    left, right = nn.Linear(3, 1), nn.Linear(3, 1)
    ours = wb.Accumulator(left, torch.optim.SGD(left.parameters(), lr=0.1))
    theirs = wb.Accumulator(right, torch.optim.SGD(right.parameters(), lr=0.1))
    window, other = ours.window(), theirs.window()
    window.backward(left(X).mean(), targets=8)
    other.backward((left(X) * right(X)).mean(), targets=8)  # leaves a gradient in the first one's weights
    state = copy.deepcopy(ours.state_dict())
    assert torch.equal(state["window"]["open"]["gradients"]["sums"][1], torch.ones(1))
    window.rollback()
    other.rollback()


def test_a_state_dict_is_copied_by_who_takes_it_over():
    model, accumulator = make()
    accumulator.step(X)
    other, resumed = make()
    resumed.load_state_dict(accumulator.state_dict())
    resumed.step(X)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    assert accumulator.state_dict()["optimizers"][0]["state"][0]["step"] == 1


def test_an_optimizer_keeps_the_dtypes_of_its_state():
    model = nn.Linear(3, 1, dtype=torch.bfloat16)
    state = []
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        accumulator = wb.Accumulator(model, optimizer)
        if state:
            accumulator.load_state_dict(state[0])
        else:
            for each in model.parameters():
                optimizer.state[each]["momentum_buffer"] = torch.full(each.shape, 1 / 3)
            state.append(copy.deepcopy(accumulator.state_dict()))
    assert all(
        torch.equal(each["momentum_buffer"], torch.full_like(each["momentum_buffer"], 1 / 3))
        and each["momentum_buffer"].dtype == torch.float32
        for each in optimizer.state.values()
    )


OLD = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@OLD
def test_a_loader_goes_on_where_it_was(tmp_path):
    def rows():
        return StatefulDataLoader(
            list(range(12)), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
        )

    _, accumulator = make()
    loader = rows()
    batches = iter(loader)
    seen = [next(batches).tolist() for _ in range(2)]
    wb.save(tmp_path / "run", accumulator, loader, extra={"seen": seen, "best": float("inf"), 3: b"x"})
    rest = [each.tolist() for each in batches]
    assert len(rest) == 4
    fresh = rows()
    assert wb.load(tmp_path / "run", make()[1], fresh) == {"seen": seen, "best": float("inf"), 3: b"x"}
    assert [each.tolist() for each in fresh] == rest


@OLD
def test_a_loader_of_micro_batches_goes_on_between_two_updates(tmp_path):
    def begun():
        model, accumulator = make(micro_batch=wb.Rows(8))
        data = list(torch.arange(66.0).reshape(22, 3) / 66)
        loader = StatefulDataLoader(data, batch_size=2, num_workers=2, generator=torch.Generator())
        return model, accumulator, loader

    model, accumulator, loader = begun()
    whole = list(accumulator.updates(loader, micro_batches=3))
    assert len(whole) == 4
    _, accumulator, loader = begun()
    for update in accumulator.updates(loader, micro_batches=3):
        if update.number == 2:
            wb.save(tmp_path / "run", accumulator, loader)
            break
    other, accumulator, loader = begun()
    torch.rand(5)  # another process stands elsewhere
    wb.load(tmp_path / "run", accumulator, loader)
    rest = list(accumulator.updates(loader, micro_batches=3))
    assert [(each.number, each.rows, each.loss) for each in rest] == [
        (each.number, each.rows, each.loss) for each in whole[2:]
    ]
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@OLD
@pytest.mark.parametrize("after", [0, 1, 2], ids=lambda count: f"after {count} updates")
def test_a_loader_that_draws_from_the_common_stream_to_begin_does_not_shift_it(tmp_path, after):
    """As any loader without a generator of its own does; dropout draws from the same stream."""

    def begun(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        accumulator = wb.Accumulator(model, torch.optim.Adam(model.parameters()), lambda model, x: model(x).mean())
        loader = StatefulDataLoader(list(torch.arange(66.0).reshape(22, 3) / 66), batch_size=2, shuffle=True)
        torch.manual_seed(seed)
        return accumulator, loader

    def losses(accumulator, loader, until=None):
        found = []
        for update in accumulator.updates(loader, micro_batches=4):
            found.append(update.loss)
            if len(found) == until:
                break
        return found

    accumulator, loader = begun(1)
    whole = losses(accumulator, loader) + losses(accumulator, loader)
    accumulator, loader = begun(1)
    first = losses(accumulator, loader, after) if after else []
    wb.save(tmp_path / "run", accumulator, loader)
    accumulator, loader = begun(2)
    wb.load(tmp_path / "run", accumulator, loader)
    assert first + losses(accumulator, loader) + losses(accumulator, loader) == whole


def test_a_disk_that_is_full_leaves_the_last_file_whole(tmp_path):
    script = """
        import resource, sys
        import torch
        import wholebatch as wb

        model = torch.nn.Linear(400, 400)
        accumulator = wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
        wb.save(sys.argv[1], accumulator, extra="first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            wb.save(sys.argv[1], accumulator, extra="second")
        except wb.ConfigError as error:
            print(error)
        print(wb.load(sys.argv[1], accumulator))
    """
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, check=True
    )
    assert "run cannot be written" in done.stdout
    assert done.stdout.splitlines()[-1] == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def text_file(path):
    path.write_text("nothing of ours")


def weights_alone(path):
    save_file({"weight": torch.ones(2)}, path)


def without_a_state(path):
    wb.save(path, make()[1])
    save_file(load_file(path), path, metadata={**metadata_of(path), "state": "["})


def with_less_than_a_state(path):
    wb.save(path, make()[1])
    save_file(load_file(path), path, metadata={**metadata_of(path), "state": '{"accumulator": {"$tensor": "x"}}'})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (lambda _: None, "There is no file"),
        (text_file, "cannot be read"),
        (weights_alone, "was not written by wb.save"),
        (without_a_state, "cannot be read"),
        (with_less_than_a_state, "holds no state of a run"),
        (Path.mkdir, "is a folder"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, written, said):
    written(tmp_path / "run")
    with pytest.raises(wb.ConfigError, match=said):
        wb.load(tmp_path / "run", make()[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 2}, r"0\.weight of shape \(4, 3\)"),
        ({"schedule": True}, "holds AdamW, and there is AdamW, LinearLR here"),
        ({"optimizer": torch.optim.SGD}, "holds AdamW, and there is SGD here"),
        ({"precision": "fp16"}, 'another precision, and here is precision="fp16"'),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_changes(tmp_path, options, said):
    _, accumulator = make()
    accumulator.step(X)
    wb.save(tmp_path / "run", accumulator)
    model, other = make(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wb.ConfigError, match=said):
        wb.load(tmp_path / "run", other)
    assert same(dict(before), dict(model.state_dict()))


def test_weights_and_parameter_groups_that_are_missing_are_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    wb.save(tmp_path / "run", wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    fewer = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(wb.ConfigError, match=r"1\.weight"):
        wb.load(tmp_path / "run", wb.Accumulator(fewer, torch.optim.SGD(fewer.parameters(), lr=0.1)))
    with pytest.raises(wb.ConfigError, match=r"parameter groups of \[\[4\]\]"):
        wb.load(tmp_path / "run", wb.Accumulator(model, torch.optim.SGD(model[0].parameters(), lr=0.1)))


def test_a_window_that_sums_in_another_way_is_refused(tmp_path):
    def half(**options):
        model = nn.Linear(3, 1, dtype=torch.bfloat16)
        return model, wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)

    model, accumulator = half()
    window = accumulator.window()
    window.backward(model(X.bfloat16()).mean(), targets=8)
    wb.save(tmp_path / "run", accumulator)
    window.rollback()
    with pytest.raises(wb.ConfigError, match="in another way"):
        wb.load(tmp_path / "run", half(accumulate_in="compensated")[1])


def test_a_window_that_waits_is_not_passed_over(tmp_path):
    model, accumulator = make()
    window = accumulator.window()
    window.backward(model(X).mean(), targets=8)
    wb.save(tmp_path / "run", accumulator)
    window.rollback()
    _, resumed = make()
    wb.load(tmp_path / "run", resumed)
    with pytest.raises(wb.WindowError, match="waits for its other micro-batches"):
        resumed.step(X)
    wb.save(tmp_path / "again", resumed)  # before it went on
    wb.load(tmp_path / "again", resumed)
    assert resumed.window().close().micro_batches == 1
    assert resumed.step(X).number == 2


def test_what_cannot_be_saved_says_so(tmp_path):
    path = tmp_path / "run"
    model, accumulator = make()
    with pytest.raises(wb.ConfigError, match=r"extra\.when is a object, which only pickle could keep"):
        wb.save(path, accumulator, extra={"when": object()})
    with pytest.raises(wb.ConfigError, match="A list does not know how far it has come"):
        wb.save(path, accumulator, [X])
    with pytest.raises(wb.ConfigError, match="cannot be written"):
        wb.save(tmp_path / "nowhere" / "run", accumulator)
    saving = wb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, x: wb.save(path, saving) or model(x).mean()
    )
    with pytest.raises(wb.WindowError, match="An update is under way"):
        saving.step(X)
    window = accumulator.window()
    loss = model(X).mean()
    loss.register_hook(lambda _: wb.save(path, accumulator))
    with pytest.raises(wb.WindowError, match="a backward pass is under way"):
        window.backward(loss, targets=8)
    folding = wb.Accumulator(model, wb.AdamA(model.parameters()))
    with folding.window(targets=8) as window:
        window.backward(model(X).mean(), targets=8)
        with pytest.raises(wb.WindowError, match="save between windows"):
            wb.save(path, folding)
    wb.save(path, folding)
    assert path.exists()
    window = accumulator.window()
    with pytest.raises(wb.WindowError, match="A window is open"):
        wb.load(path, accumulator)
    window.rollback()


@pytest.mark.parametrize("path", ["", None, 3, "a\0b", "a" * 255, "/dev/null"])
def test_what_is_no_path_of_a_file_is_refused(path, tmp_path, monkeypatch):
    """A device would be replaced by a file, if the user may do that; and nothing is left lying about."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(wb.ConfigError):
        wb.save(path, make()[1])
    with pytest.raises(wb.ConfigError):
        wb.save(tmp_path, make()[1])
    assert Path("/dev/null").is_char_device()
    assert [*tmp_path.iterdir(), *tmp_path.parent.glob(".*.part")] == []


@OLD
def test_a_loader_that_does_not_take_over_a_position_leaves_the_accumulator_as_it_was(tmp_path):
    _, accumulator = make()
    wb.save(tmp_path / "run", accumulator, StatefulDataLoader(list(range(8)), shuffle=True))
    accumulator.step(X)
    before = copy.deepcopy(accumulator.state_dict())
    with pytest.raises(wb.ConfigError, match="does not take over the position"):
        wb.load(tmp_path / "run", accumulator, StatefulDataLoader([1, 2]))
    assert same(accumulator.state_dict(), before)


@OLD
def test_the_position_of_a_loader_and_the_loader_go_together(tmp_path):
    _, accumulator = make()
    loader = StatefulDataLoader([1, 2])
    wb.save(tmp_path / "with", accumulator, loader)
    wb.save(tmp_path / "without", accumulator)
    with pytest.raises(wb.ConfigError, match="no loader was given"):
        wb.load(tmp_path / "with", accumulator)
    with pytest.raises(wb.ConfigError, match="a list cannot take it over"):
        wb.load(tmp_path / "with", accumulator, [1])
    with pytest.raises(wb.ConfigError, match="holds no position"):
        wb.load(tmp_path / "without", accumulator, loader)


def test_a_schedule_that_does_not_say_where_it_is_is_refused():
    class Own:
        def step(self):
            pass

    _, accumulator = make(lr_scheduler=Own())
    with pytest.raises(wb.ConfigError, match="A Own does not say where it is"):
        accumulator.state_dict()


def an_accumulator():
    model = nn.Linear(2, 1)
    return wb.Accumulator(model, torch.optim.AdamW(model.parameters()), lambda model, x: model(x).mean())


@pytest.mark.parametrize("way", [wb.save, wb.load], ids=["save", "load"])
def test_a_model_in_the_place_of_the_accumulator_is_refused(way, tmp_path):
    wb.save(tmp_path / "run.safetensors", an_accumulator())
    with pytest.raises(wb.ConfigError, match=r"This is a Linear, not a wb.Accumulator") as error:
        way(tmp_path / "run.safetensors", nn.Linear(2, 1))
    assert "wb.save(path, accumulator)" in error.value.hint


@pytest.mark.parametrize("state", [None, {}, {"weights": {}}], ids=str)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(wb.ConfigError, match="is no state of an accumulator"):
        an_accumulator().load_state_dict(state)


def test_torch_keeps_a_state_and_loads_it_without_pickle(tmp_path):
    first, second = an_accumulator(), an_accumulator()
    x = torch.randn(3, 2)
    assert first.step(x).applied
    torch.save(first.state_dict(), tmp_path / "state.pt")
    drawn = np.random.rand(2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (np.random.rand(2) == drawn).all()
    assert first.step(x).loss == second.step(x).loss
