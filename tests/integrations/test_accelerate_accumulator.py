"""An accumulator for what a real Accelerator has prepared, against updates of undivided batches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import wholebatch as wb

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from integrations.accelerate_adapter import fresh, system
from wholebatch.evidence.conformance.adapters import accelerate as peer
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.integrations.accelerate import accumulator, each_row_once

BY_NAME = {scene.name: scene for scene in SCENES}
ALONE = [scene for scene in SCENES if scene.task.asks <= system.expresses and getattr(scene.task, "ranks", 1) == 1]


@pytest.fixture(autouse=True)
def _forgets():
    """All accelerators of a process share a state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("scene", ALONE, ids=lambda scene: scene.name)
def test_every_scene_that_a_loop_can_express_passes(scene):
    verdict = judge(system, scene)
    if scene.refusal_will_do:
        assert (verdict.outcome, verdict.why.partition(":")[0]) == ("refuses", "WindowError")
    else:
        assert verdict.outcome == "pass", verdict.why
        assert verdict.confirmed is not False


@pytest.mark.parametrize("name", ["T1-ragged-counts", "T3-tail", "T4-masked-micro-batch", "T7-gan", "T7-zero-first"])
def test_accumulate_alone_fails_them(name):
    assert judge(peer.accelerate, BY_NAME[name]).outcome == "fail"


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_fn(model, batch):
    return functional.mse_loss(model(batch["x"]), batch["y"])


def rows(count=13, dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, generator=draw, dtype=torch.float64).to(dtype)
    return [{"x": each, "y": each.sum().reshape(1).sin()} for each in x]


def weights(model):
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def prepared(accelerator, **options):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    loader = DataLoader(rows(), batch_size=2)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    exact = accumulator(accelerator, model, optimizer, loss_fn, lr_scheduler=schedule, **options)
    return exact, loader, model


def undivided(epochs=1, clip=None):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for epoch in range(epochs):
        for place, start in enumerate(range(0, 13, 8)):
            optimizer.param_groups[0]["lr"] = 0.5 * 0.7 ** (2 * epoch + place)
            optimizer.zero_grad()
            loss_fn(model, torch.utils.data.default_collate(rows()[start : start + 8])).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return weights(model)


def off(model, right):
    return float((weights(model) - right).norm() / (right - weights(make())).norm())


def test_updates_and_their_schedule_are_those_of_undivided_batches():
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator, clip_norm=0.1)
    for _ in range(2):
        for update in exact.updates(loader, micro_batches=accelerator.gradient_accumulation_steps):
            assert update.skipped is None
    assert off(model, undivided(epochs=2, clip=0.1)) <= 1e-12


def test_step_cuts_what_a_prepared_loader_yields():
    accelerator = fresh(1)
    exact, _, model = prepared(accelerator, micro_batch=wb.Rows(3))
    loader = accelerator.prepare(DataLoader(rows(), batch_size=8))
    assert [exact.step(batch).micro_batches for batch in loader] == [3, 2]
    assert off(model, undivided()) <= 1e-12


def test_a_second_way_to_accumulate_is_told_and_nothing_moves():
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator)
    before = weights(model)
    with accelerator.accumulate(model):
        window = exact.window()
        for batch in loader:
            window.backward(loss_fn(model, batch), targets=len(batch["x"]))
    with pytest.raises(wb.WindowError, match=r"accelerator\.accumulate\(\) is used"):
        window.close()
    assert torch.equal(weights(model), before)
    assert exact.open_window is None
    with accelerator.accumulate(model), pytest.raises(wb.WindowError, match=r"accelerator\.accumulate\(\) is used"):
        exact.step(batch)
    assert torch.equal(weights(model), before)
    assert all(update.skipped is None for update in exact.updates(loader, micro_batches=4))


def test_backward_of_the_accelerator_inside_a_window_is_told():
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator)
    batch = next(iter(loader))
    window = exact.window()
    window.backward(loss_fn(model, batch), targets=2)
    accelerator.backward(loss_fn(model, batch))
    with pytest.raises(wb.WindowError, match="changed by somebody else"):
        window.backward(loss_fn(model, batch), targets=2)


def test_clipping_that_is_left_in_the_loop_is_told():
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator)
    list(exact.updates(loader, micro_batches=4))
    with pytest.raises(wb.WindowError, match="no gradient to clip"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    other = accelerator.prepare(make())
    loss_fn(other, next(iter(loader))).backward()
    assert float(accelerator.clip_grad_norm_(other.parameters(), 1e-3)) > 1e-3
    assert float(nn.utils.get_total_norm([each.grad for each in other.parameters()])) <= 1e-3


def test_a_hook_of_the_user_is_called_as_well():
    seen = []
    exact, loader, _ = prepared(fresh(4), before_step=lambda: seen.append(1))
    assert len(list(exact.updates(loader, micro_batches=4))) == len(seen) == 2


def test_a_state_inside_a_window_is_told(tmp_path):
    """A state that is saved there goes on without its gradient, and one that is loaded gives it other weights."""
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator)
    window = exact.window()
    accelerator.save_state(tmp_path / "empty")
    window.backward(loss_fn(model, next(iter(loader))), targets=2)
    for state in (accelerator.save_state, accelerator.load_state):
        with pytest.raises(wb.WindowError, match=f"{state.__name__} was called, and a window is open") as told:
            state(tmp_path / "empty")
        assert "wb.save" in told.value.hint
    assert window.close().applied
    accelerator.load_state(tmp_path / "empty")


def test_save_state_between_updates_is_complete(tmp_path):
    accelerator = fresh(4)
    exact, loader, model = prepared(accelerator)
    list(exact.updates(loader, micro_batches=4))
    accelerator.save_state(tmp_path)
    list(exact.updates(loader, micro_batches=4))
    through = weights(model)
    again = fresh(4)
    other, loader, model = prepared(again)
    again.load_state(tmp_path)
    list(other.updates(loader, micro_batches=4))
    assert torch.equal(weights(model), through)


def test_mixed_precision_is_the_accelerators():
    """Rounding of bfloat16 alone, and some of it: the forward pass does run under autocast."""
    accelerator = fresh(4, mixed_precision="bf16")
    model = make().float()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    exact = accumulator(accelerator, model, optimizer, loss_fn)
    exact.step(torch.utils.data.default_collate(rows(dtype=torch.float32)))
    right = make()
    loss_fn(right, torch.utils.data.default_collate(rows())).backward()
    torch.optim.SGD(right.parameters(), lr=0.5).step()
    assert 1e-5 < off(model, weights(right)) <= 32 * torch.finfo(torch.bfloat16).eps


def test_the_loss_scale_is_the_accelerators():
    accelerator = fresh(4)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as on a GPU with mixed_precision="fp16"
    exact, loader, _ = prepared(accelerator)
    batch = next(iter(loader))
    assert exact.step(batch).skipped is None
    assert accelerator.scaler.get_scale() == 2.0**16
    skipped = exact.step({"x": batch["x"] * 1e300, "y": batch["y"] * 1e306})
    assert "the norm of the gradient" in skipped.skipped or "loss" in skipped.skipped
    assert accelerator.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP", "XLA"])
def test_ways_to_train_that_own_gradients_are_refused(kind):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(wb.ConfigError, match=DistributedType[kind].value) as refused:
        accumulator(accelerator, make(), None)
    assert "DistributedDataParallel" in refused.value.hint


@pytest.mark.parametrize(("precision", "said"), [("fp8", "fp8"), ("fp16", "no effect on a cpu")])
def test_precisions_that_are_none_are_refused(precision, said):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO,
        mixed_precision=precision,
        scaler=None,
        device=torch.device("cpu"),
    )
    with pytest.raises(wb.ConfigError, match=said):
        accumulator(accelerator, make(), None)


def test_what_was_not_prepared_is_refused():
    accelerator = fresh(4)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(wb.OptimizerError, match="not a model that this accelerator has prepared"):
        accumulator(accelerator, model, optimizer, loss_fn)
    ready = accelerator.prepare(model)
    with pytest.raises(wb.OptimizerError, match="not an optimizer"):
        accumulator(accelerator, ready, optimizer, loss_fn)
    with pytest.raises(wb.ConfigError, match="no precision="):
        accumulator(accelerator, ready, optimizer, loss_fn, precision="bf16")


def test_on_one_process_no_row_comes_twice():
    accelerator = fresh(1)
    loader = accelerator.prepare(DataLoader(range(5), batch_size=2))
    assert [each.tolist() for each in each_row_once(accelerator, loader)] == [[0, 1], [2, 3], [4]]
