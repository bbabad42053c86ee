"""What TensorBoard, Weights & Biases and MLflow hold after a run, read back with their own libraries."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wholebatch as wb

UPDATES = [
    wb.Update(number=1, loss=2.5, targets=900, rows=64, micro_batches=4, lr=0.1, grad_norm=1.5, padding=0.25,
              peak_bytes=2**30, seconds=0.5),
    wb.Update(number=2, loss=float("inf"), targets=900, rows=64, micro_batches=4, lr=0.1, seconds=0.5,
              skipped="The loss is infinite."),
    wb.Update(number=3, loss=2.0, targets=450, rows=64, micro_batches=8, lr=0.1, grad_norm=1.0, retries=1, seconds=0.5),
]  # fmt: skip
START = {
    "event": "start",
    "recipe": "tiny",
    "seed": 7,
    "lr": None,
    "versions": {"torch": "2"},
    "reasons": ["one", "two"],
}
VALIDATION = {"event": "validation", "epoch": 1, "update": 3, "measures": {"loss": 2.25, "accuracy": 0.5}}


def tell(sink, end=None):
    """Write a run to a sink; `end` is raised in it."""
    with wb.sinks.Sinks(sink) as sinks:
        for event in (START, *UPDATES, VALIDATION):
            sinks.write(event)
        if end is not None:
            raise end


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events, {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(events, tag):
    return [each.tensor_proto.string_val[0].decode() for each in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_has_scalars_by_update_and_the_reason_of_a_skip(tmp_path):
    tell(wb.sinks.TensorBoard(tmp_path))
    events, curves = scalars(tmp_path)
    assert curves["loss"][0] == (1, 2.5)
    assert curves["loss"][2] == (3, 2.0)
    assert curves["loss"][1][1] != curves["loss"][1][1]  # NaN, at update 2
    assert curves["grad_norm"] == [(1, 1.5), (3, 1.0)]
    assert curves["skipped"] == [(1, 0), (2, 1), (3, 0)]
    assert curves["retries"] == [(1, 0), (2, 0), (3, 1)]
    assert curves["targets_per_second"] == [(1, 1800), (2, 1800), (3, 900)]
    assert curves["validation/accuracy"] == [(3, 0.5)]
    assert set(curves) >= {"targets", "rows", "micro_batches", "lr", "padding", "peak_bytes", "seconds"}
    assert texts(events, "skipped") == ["The loss is infinite."]
    assert '"versions.torch": "2"' in texts(events, "configuration")[0]
    assert texts(events, "finish/status") == ["done"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_later_of_two_runs_in_a_folder(tmp_path):
    for loss in (1.0, 2.0):
        sink = wb.sinks.TensorBoard(tmp_path, from_update=0)
        sink.write({"event": "update", "number": 1, "loss": loss})
        sink.close()
    assert scalars(tmp_path)[1]["loss"] == [(1, 2.0)]


@pytest.mark.parametrize(
    ("end", "said"),
    [(None, "done"), (KeyboardInterrupt(), "interrupted"), (ZeroDivisionError("by zero"), "failed")],
    ids=lambda each: str(each),
)
def test_a_run_is_finished_whichever_way_it_ends(end, said):
    seen = []
    closed = []
    sink = wb.sinks.CallbackSink(seen.append)
    sink.close = lambda: closed.append(True)
    if end is None:
        tell(sink)
    else:
        with pytest.raises(type(end)):
            tell(sink, end)
    assert [event["event"] for event in seen] == ["start", "update", "update", "update", "validation", "finish"]
    assert (seen[-1]["status"], seen[-1]["updates"], seen[-1]["skipped"]) == (said, 2, 1)
    assert closed == [True]


def test_a_sink_that_fails_is_left_behind_and_the_others_go_on(caplog):
    class Gone:
        closed = 0

        def write(self, event):
            raise wb.sinks.SinkError("The server is gone.", hint="start it.")

        def close(self):
            self.closed += 1

    gone, seen = Gone(), []
    with wb.sinks.Sinks(gone, wb.sinks.CallbackSink(seen.append)) as sinks:
        sinks.write(UPDATES[0])
        sinks.write(UPDATES[1])
    assert len(seen) == 3
    assert gone.closed == 1
    assert caplog.text.count("The server is gone.") == 1


def test_an_error_of_a_function_is_not_hidden():
    with pytest.raises(KeyError), wb.sinks.Sinks(wb.sinks.CallbackSink(lambda event: event["no such key"])) as sinks:
        sinks.write(UPDATES[0])


@pytest.mark.parametrize(
    ("sink", "module", "extra"),
    [
        ("TensorBoard", "torch.utils.tensorboard", "tensorboard"),
        ("WeightsAndBiases", "wandb", "wandb"),
        ("MLflow", "mlflow.tracking", "mlflow"),
    ],
)
def test_a_missing_extra_says_which_install_brings_it(sink, module, extra, monkeypatch, tmp_path):
    real = importlib.import_module

    def lacking(name, *more):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *more)

    monkeypatch.setattr("importlib.import_module", lacking)
    with pytest.raises(wb.MissingExtraError, match=rf"pip install 'wholebatch\[{extra}\]'"):
        getattr(wb.sinks, sink)(tmp_path)


def alone(source, folder):
    """Run Python in a process of its own, without a network to speak of: these libraries have a state of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{source}"],
        cwd=folder, env=environment | nowhere, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


MLFLOW = """
import wholebatch as wb
from test_sinks_read_back import tell

for end in (None, KeyboardInterrupt(), ZeroDivisionError()):
    sink = wb.sinks.MLflow("run")
    try:
        tell(sink, end)
    except BaseException as error:
        assert error is end, error
from mlflow.tracking import MlflowClient
client = MlflowClient("sqlite:///run/mlflow.db")
experiment = client.get_experiment_by_name("wholebatch")
runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "KILLED"], runs
run = client.get_run(sink.run_id)
def curve(name):
    return [(each.step, each.value) for each in client.get_metric_history(sink.run_id, name)]
losses = curve("loss")
assert (losses[0], losses[2]) == ((1, 2.5), (3, 2.0)), losses
assert losses[1][1] != losses[1][1]
assert curve("skipped") == [(1, 0), (2, 1), (3, 0)]
assert curve("retries")[-1] == (3, 1)
assert curve("validation/accuracy") == [(3, 0.5)]
assert run.data.params["seed"] == "7" and run.data.params["versions.torch"] == "2", run.data.params
assert run.data.tags["skipped"] == "The loss is infinite.", run.data.tags
import pathlib
(reasons,) = pathlib.Path("run/mlartifacts", sink.run_id).rglob("skipped.txt")
assert reasons.read_text() == "update 2: The loss is infinite.\\n"
print("read back")
"""


def test_mlflow_has_metrics_parameters_reasons_and_how_it_ended(tmp_path):
    assert alone(MLFLOW, tmp_path).splitlines()[-1] == "read back"


WANDB = """
import wholebatch as wb
from test_sinks_read_back import tell, written

tell(wb.sinks.WeightsAndBiases("run"))
found, ends = written("run")
assert ends == [0], ends
rows = [{item.key or ".".join(item.nested_key): item.value_json for item in each.history.item}
        for each in found if each.WhichOneof("record_type") == "history"]
assert [row["update"] for row in rows] == ["1", "2", "3", "3"], rows
assert [row.get("loss") for row in rows] in (["2.5", "NaN", "2.0", None], ["2.5", "NaN", "2", None]), rows
assert rows[1]["skipped_reason"] == '"The loss is infinite."', rows[1]
assert [float(row["skipped"]) for row in rows[:3]] == [0, 1, 0]
assert float(rows[3]["validation/accuracy"]) == 0.5
parts = [part for each in found for part in (each.config, each.run.config)]
settings = {item.key: item.value_json for part in parts for item in part.update}
assert settings["seed"] == "7", settings

try:
    tell(wb.sinks.WeightsAndBiases("broken"), KeyboardInterrupt())
except KeyboardInterrupt:
    pass
assert written("broken")[1] == [1]
print("read back")
"""


def records(file):
    """Yield the records of an offline run: blocks of 32 KiB, each record in parts with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def written(folder, seconds=120):
    """Return the records of the only run in a folder, and its exit codes.

    A process beside ours writes them, so that the last may take a moment after the run is finished.
    """
    until = time.monotonic() + seconds
    while True:
        found = [record for file in Path(folder, "wandb").glob("offline-run-*/*.wandb") for record in records(file)]
        ends = [each.exit.exit_code for each in found if each.WhichOneof("record_type") == "exit"]
        if ends or time.monotonic() > until:
            return found, ends
        time.sleep(0.05)


def test_wandb_offline_has_history_configuration_and_how_it_ended(tmp_path):
    assert alone(WANDB, tmp_path).splitlines()[-1] == "read back"
