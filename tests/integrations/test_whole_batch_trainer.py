"""`WholeBatchTrainer` against the plain loop with the whole batch at once, in real calls of `train()`."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import ranks
import wholebatch as wb
from integrations.trainer_models import (
    VOCABULARY,
    Pooled,
    Stream,
    Tagger,
    TakesKeywords,
    change_error,
    class_weights,
    documents,
    pad,
    plainly,
    train,
    trainer_of,
    without_mask,
)
from integrations.trainer_system import whole_batch_trainer, whole_batch_trainer_loss_func
from properties import flat
from shortages import Fault
from wholebatch.evidence.conformance.judge import judge
from wholebatch.evidence.conformance.scenes import SCENES
from wholebatch.integrations.transformers import WholeBatchTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer, about what it does besides training

EXACT = 1e-12
"""Rounding of float64; the Trainer's own accumulation is off by 1e-2 and more on the same rows."""

ALONE = [scene for scene in SCENES if scene.task.asks <= whole_batch_trainer.expresses - {"ranks"}]
DIVISORS = [scene for scene in ALONE if scene.trap in ("T1", "T2", "T4")]
"""The scenes in which it matters who divides."""


@pytest.mark.parametrize(
    ("system", "scene"),
    [
        *[(whole_batch_trainer, scene) for scene in ALONE],
        *[(whole_batch_trainer_loss_func, scene) for scene in DIVISORS],
    ],
    ids=lambda each: each.name,
)
def test_conforms(system, scene):
    verdict = judge(system, scene)
    assert verdict.outcome == "pass", verdict.why


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.launch("integrations.trainer_scenes", 2, tmp_path_factory.mktemp("two"))


def test_conforms_on_two_ranks(two):
    for found in ranks.result(two, "conformance", 2):
        assert {name: verdict["why"] for name, verdict in found.items() if verdict["outcome"] != "pass"} == {}
        assert len(found) == 10


@pytest.mark.parametrize("scene", ["tail", "stream", "resumed", "uneven streams", "collated"])
def test_two_ranks_make_the_updates_of_one(two, scene):
    """Each row counts once, also where the last batches of an epoch do not go round."""
    for found in ranks.result(two, scene, 2):
        assert found["off"] < EXACT, found
        assert found["steps"] == found["due"]
        assert found["loss error"] < EXACT
        assert found.get("words") == found.get("words due")


def test_the_model_is_wrapped_for_two_ranks_and_all_of_them_refuse_together(two):
    for found in ranks.result(two, "refusal", 2):
        assert found["wrapper"] == "DistributedDataParallel"
        assert "neither over labels that are not -100 nor over rows" in found["said"]


def test_padding_that_counts_is_refused_on_two_ranks(two):
    said = [found["said"] for found in ranks.result(two, "padding", 2)]
    assert "ranks pad differently" in " ".join(said)
    assert "nothing" not in said


@pytest.mark.parametrize("make", [Tagger, TakesKeywords], ids=lambda make: make.__name__)
@pytest.mark.parametrize("loss", ["mean", "shifted", "mean of rows", "penalty"])
def test_whatever_the_loss_averages_over_is_found(make, loss):
    torch.manual_seed(0)
    model, rows = make(loss), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows)
    right, losses = plainly(model, rows)
    assert change_error(model, trained, right) < EXACT
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=EXACT)
    assert trainer.state.global_step == len(losses) == 6


@pytest.mark.parametrize("loss", ["mean", "penalty"])
def test_the_bound_sees_the_accumulation_of_the_trainer(loss):
    from transformers import Trainer

    torch.manual_seed(0)
    model, rows = TakesKeywords(loss), documents(21)
    trained = copy.deepcopy(model)
    train(trained, rows, kind=Trainer)
    assert change_error(model, trained, plainly(model, rows)[0]) > 0.01


@pytest.mark.parametrize("loss", ["weighted", "sum"])
def test_what_cannot_be_found_is_asked_for(loss):
    model, rows = Tagger(loss), documents(21)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wb.WeightError, match="nobody knows what to divide by") as error:
        train(model, rows)
    assert "targets=lambda inputs" in error.value.hint
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Classifier(nn.Module):
    """Says yes or no for a point."""

    def __init__(self, weights=(1.0, 1.0)):
        super().__init__()
        self.head = nn.Linear(3, 2).double()
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def forward(self, x, labels=None):
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels, weight=self.weights), "logits": logits}


def points(rows, label=lambda row: row % 2):
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=draw, dtype=torch.float64), "labels": label(row)} for row in range(rows)]


@pytest.mark.parametrize("rows", [1, 2], ids=["one row at once", "two rows at once"])
@pytest.mark.parametrize("label", [lambda _: 1, lambda row: row % 2], ids=["one class", "two classes"])
def test_weights_of_classes_are_seen_in_rows_that_do_not_show_them(rows, label):
    """A micro-batch of one row, or a logical batch of one class, is the same with weights and without."""
    setting = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
    from transformers import default_data_collator

    model, data = Classifier(), points(21, label)
    with pytest.raises(wb.WeightError, match="nobody knows what to divide by"):
        train(Classifier((1.0, 5.0)), data, options={"data_collator": None}, **setting)
    trained = copy.deepcopy(model)
    train(trained, data, options={"data_collator": None}, **setting)
    assert change_error(model, trained, plainly(model, data, collate=default_data_collator)[0]) < EXACT


class Segments(nn.Module):
    """Says of which class each pixel is, on a coarser grid, with classes in the second place and 255 left out."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 3, 2, stride=2).double()

    def forward(self, image, labels=None):
        logits = self.head(image)
        fine = nn.functional.interpolate(logits, size=labels.shape[-2:])
        return {"loss": nn.functional.cross_entropy(fine, labels, ignore_index=255), "logits": logits}


def images(rows, left_out):
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 16, 16, generator=draw, dtype=torch.float64) for _ in range(rows)]
    labels = [torch.randint(3, (16, 16), generator=draw) for _ in range(rows)]
    for place in range(rows):
        labels[place][: left_out * place % 16] = 255
    return [{"image": image, "labels": each} for image, each in zip(made, labels, strict=True)]


def test_pixels_are_classified_by_a_loss_that_knows_no_label_of_minus_100():
    """A try of -100, or of a class that there is not, ended the run with an IndexError of cross_entropy."""
    from transformers import default_data_collator

    torch.manual_seed(0)
    for left_out, options in ((0, {}), (3, {"targets": lambda inputs: (inputs["labels"] != 255).sum()})):
        model, data = Segments(), images(21, left_out)
        trained = copy.deepcopy(model)
        train(trained, data, options={"data_collator": None, **options})
        assert change_error(model, trained, plainly(model, data, collate=default_data_collator)[0]) < EXACT
    with pytest.raises(wb.WeightError, match="nobody knows what to divide by"):
        train(Segments(), images(21, 3), options={"data_collator": None})


@pytest.mark.parametrize("key", ["input_ids", "items"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_that_looks_at_its_inputs_is_told_where_to_look(key, steps):
    class Looking(WholeBatchTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs.items() if key == "items" else inputs[key]
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(wb.ConfigError, match=f"training_step looks at '{key}' of its inputs") as told:
        train(Tagger("mean"), documents(21), kind=Looking, gradient_accumulation_steps=steps)
    assert "compute_loss" in told.value.hint


def test_rows_of_a_single_token_are_waited_through():
    """A model that shifts its labels learns nothing from them; what its loss averages over shows later."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    short, long = [{"input_ids": torch.arange(1, size)} for size in (2, 6)]

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": ids.ne(0), "labels": ids.masked_fill(ids == 0, -100)}

    given = {"data_collator": collate, "on_nonfinite": "raise"}
    trainer = train(model, [short] * 8 + [long] * 8, options=given, num_train_epochs=1)
    assert trainer.state.global_step == 2
    assert trainer.last_update.targets == 8 * 4


class Preference(nn.Module):
    """Prefers the first of two, given side by side or one half after the other."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1).double()

    def forward(self, pair):
        first, second = (pair["a"], pair["b"]) if isinstance(pair, dict) else pair.chunk(2)
        return {"loss": nn.functional.softplus(self.head(second) - self.head(first)).mean()}


@pytest.mark.parametrize("beside", [True, False], ids=["side by side", "halves"])
def test_rows_may_be_pairs(beside):
    """A count of rows saw none in a dict of tensors; and half a pair ended the run with an error of the model's own."""

    def collate(rows):
        first, second = (torch.stack([row[name] for row in rows]) for name in "ab")
        return {"pair": {"a": first, "b": second} if beside else torch.cat([first, second])}

    torch.manual_seed(0)
    model, data = Preference(), [{"a": one["x"], "b": two["x"]} for one, two in pairwise(points(22))]
    given = {"data_collator": collate}
    if not beside:
        with pytest.raises(wb.WeightError, match="nobody knows what to divide by") as refused:
            train(Preference(), data, options=given, remove_unused_columns=False)
        assert isinstance(refused.value.__cause__, ValueError)
        given["targets"] = lambda inputs: len(inputs["pair"]) // 2
    trained = copy.deepcopy(model)
    train(trained, data, options=given, remove_unused_columns=False)
    assert change_error(model, trained, plainly(model, data, collate=collate)[0]) < EXACT


def test_a_loss_of_many_numbers_is_refused():
    class Each(Classifier):
        def forward(self, x, labels=None):
            return {"loss": nn.functional.cross_entropy(self.head(x), labels, reduction="none")}

    with pytest.raises(wb.WeightError, match=r"a tensor of shape \[8\], not a tensor with one number"):
        train(Each(), points(21), options={"data_collator": None})


def test_a_collator_may_be_written_for_batches_of_the_usual_size():
    def two(rows):
        assert len(rows) <= 2
        return pad(rows)

    model, rows = Tagger(), documents(21)
    trained = copy.deepcopy(model)
    train(trained, rows, options={"data_collator": two})
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT


def test_what_is_declared_is_taken():
    torch.manual_seed(0)
    rows = documents(21)
    for loss, options in (
        ("weighted", {"targets": lambda inputs: class_weights(inputs["labels"]).sum()}),
        ("mean of rows", {"targets": "rows"}),
        ("sum", {"targets": "labels", "reduction": "sum"}),
    ):
        model = Tagger(loss)
        trained = copy.deepcopy(model)
        train(trained, rows, options=options)
        if loss == "sum":
            model.loss = "mean"
        assert change_error(model, trained, plainly(model, rows)[0]) < EXACT, loss


def test_what_is_declared_wrong_is_found_out():
    with pytest.raises(wb.VerifyError, match="does not average over the targets that are counted"):
        train(Tagger("mean"), documents(21), options={"targets": "rows"})
    with pytest.raises(wb.WeightError, match="targets='tokens' is no way to count"):
        train(Tagger("mean"), documents(21), options={"targets": "tokens"})


def test_a_loss_that_misuses_the_count_is_refused():
    def squared(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].square().sum() / num_items_in_batch**2

    with pytest.raises(wb.WeightError, match="neither divides by it nor leaves it alone"):
        train(Tagger(), documents(21), options={"compute_loss_func": squared})
    with pytest.raises(wb.WeightError, match="compute_loss returned a float"):
        train(Tagger(), documents(21), options={"compute_loss_func": lambda *_, **__: 1.0})


class OwnLoss(WholeBatchTrainer):
    """A Trainer of a user who writes compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def test_compute_loss_may_be_overridden():
    model, rows = Tagger("mean"), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, kind=OwnLoss, options={"eval_dataset": rows[:3]}, eval_strategy="epoch")
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2


def small(kind, **options):
    """A model of transformers, from a configuration, without a network."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    torch.manual_seed(0)
    match kind:
        case "causal":
            config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
            return transformers.AutoModelForCausalLM.from_config(config).double()
        case "masked":
            return transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**sizes, **silent)).double()
        case "sequence":
            config = transformers.BertConfig(**sizes, **silent, **options)
            return transformers.AutoModelForSequenceClassification.from_config(config).double()
        case "translation":
            config = transformers.T5Config(
                vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
            )
            config.decoder_start_token_id = 0
            return transformers.T5ForConditionalGeneration(config).double()
        case "experts":
            config = transformers.MixtralConfig(
                **sizes, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1
            )
            return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    raise AssertionError(kind)


def of_a_class(value):
    """Rows with one label each."""

    def collate(rows):
        made = pad(rows)
        return {**made, "labels": torch.tensor([value(row) for row in rows])}

    return collate


@pytest.mark.parametrize(
    ("model", "collate", "bound"),
    [
        (lambda: small("causal"), pad, EXACT),
        (lambda: small("masked"), pad, EXACT),
        (lambda: small("translation"), pad, EXACT),
        (lambda: small("sequence", num_labels=3), of_a_class(lambda row: len(row["input_ids"]) % 3), EXACT),
        (lambda: small("sequence", num_labels=1), of_a_class(lambda row: len(row["input_ids"]) / 10), 1e-7),
        (lambda: small("experts"), pad, 1e-6),  # their balancing loss is in 32 bits, whatever the weights are
    ],
    ids=["causal", "masked", "translation", "classes", "regression", "experts"],
)
def test_models_of_transformers_train_as_if_undivided(model, collate, bound):
    model, rows = model(), documents(21)
    trained = copy.deepcopy(model)
    train(trained, rows, options={"data_collator": collate}, learning_rate=0.1)
    assert change_error(model, trained, plainly(model, rows, collate=collate, lr=0.1)[0]) < bound


def test_labels_are_smoothed_over_the_logical_batch():
    model, rows = small("causal"), documents(21)
    trained, judge = copy.deepcopy(model), copy.deepcopy(model)
    train(trained, rows, label_smoothing_factor=0.1)

    def smoothed(model, batch):
        logits, labels = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    assert change_error(model, trained, plainly(judge, rows, forward=smoothed)[0]) < 1e-6  # it smooths in 32 bits


def test_an_epoch_of_unknown_length_leaves_nothing_for_the_next():
    model, rows = Tagger(), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, Stream(rows), max_steps=6)
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT
    assert trainer.state.global_step == 6


def test_a_window_without_a_label_is_no_update_and_has_no_loss():
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in documents(8, seed=1)]
    model, rows = Tagger(), documents(8)
    trained = copy.deepcopy(model)
    trainer = train(trained, [*masked, *rows, *masked], num_train_epochs=1)
    right, losses = plainly(model, rows, epochs=1)
    assert change_error(model, trained, right) < EXACT
    history = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry.get("loss") for entry in history] == [None, pytest.approx(losses[0], rel=EXACT), None]
    assert "nothing to learn" in trainer.last_update.skipped
    assert trainer.lr_scheduler.last_epoch == 1  # it is stepped once an update
    assert trainer.state.log_history[-1]["train_loss"] < 10


def test_a_window_that_is_not_finite_is_skipped_as_a_whole():
    class Poisoned(Tagger):
        def loss_of(self, logits, labels):
            loss = super().loss_of(logits, labels)
            return loss * math.inf if (labels == 1).sum() == 0 else loss

    rows = documents(24)
    rows[9]["labels"] = [2] * len(rows[9]["labels"])
    rows[8]["labels"] = [2] * len(rows[8]["labels"])
    model = Poisoned()
    trained = copy.deepcopy(model)
    trainer = train(
        trained, rows, num_train_epochs=1, options={"targets": "labels", "check": None, "micro_batch": wb.Rows(1)}
    )
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 3]
    assert change_error(model, trained, plainly(model, rows[:8] + rows[16:], epochs=1)[0]) < EXACT


class Witness:
    """Makes a callback that writes down what it is told."""

    def __init__(self):
        from transformers import TrainerCallback

        witness = self
        self.events, self.norms = [], []

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **_):
                witness.events.append("before")
                witness.norms.append(float(flat(weight.grad for weight in model.parameters()).norm()))

            def on_optimizer_step(self, *_, **__):
                witness.events.append("after")

            def on_step_begin(self, *_, **__):
                witness.events.append("begin")

            def on_substep_end(self, *_, **__):
                witness.events.append("sub")

            def on_step_end(self, *_, **__):
                witness.events.append("end")

        self.callback = Callback()


def test_events_come_as_they_do_from_the_trainer_and_see_the_gradient():
    from transformers import Trainer

    rows = documents(21)
    seen = {}
    for kind in (Trainer, WholeBatchTrainer):
        witness = Witness()
        trainer = train(small("causal"), rows, kind=kind, callbacks=[witness.callback], max_grad_norm=0.05)
        seen[kind] = witness.events, [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
        assert witness.norms == pytest.approx([0.05] * 6, rel=1e-4)
        assert "on_pre_optimizer_step" not in vars(trainer.callback_handler)
    assert seen[Trainer][0] == seen[WholeBatchTrainer][0]
    assert seen[Trainer][1] == pytest.approx(seen[WholeBatchTrainer][1], rel=1e-6)


def test_a_run_that_is_resumed_ends_as_one_that_is_not(tmp_path):
    from transformers import TrainerCallback

    rows, model = documents(21), Tagger(dropout=0.3)
    setting = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 2,
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    whole, stopped, resumed = (copy.deepcopy(model) for _ in range(3))
    trainer_of(whole, rows, tmp_path / "whole", **setting).train()
    trainer_of(stopped, rows, tmp_path / "cut", callbacks=[Stop()], **setting).train()
    again = trainer_of(resumed, rows, tmp_path / "cut", **setting)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert torch.equal(flat(resumed.parameters()), flat(whole.parameters()))
    assert not torch.equal(flat(stopped.parameters()), flat(whole.parameters()))


@pytest.mark.parametrize("first", ["the Trainer's", "ours"])
def test_a_checkpoint_of_either_is_resumed_by_the_other(tmp_path, first):
    from transformers import Trainer

    kinds = [Trainer, WholeBatchTrainer] if first == "the Trainer's" else [WholeBatchTrainer, Trainer]
    model, rows = small("causal"), documents(21)
    setting = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    trainer_of(copy.deepcopy(model), rows, tmp_path / "cut", kind=kinds[0], max_steps=2, **setting).train()
    resumed, whole = copy.deepcopy(model), copy.deepcopy(model)
    again = trainer_of(resumed, rows, tmp_path / "cut", kind=kinds[1], **setting)
    again.train(resume_from_checkpoint=True)
    trainer_of(whole, rows, tmp_path / "whole", **setting).train()
    assert again.state.global_step == 6
    assert change_error(model, resumed, whole) < EXACT


def test_a_trainer_of_a_kind_of_its_own_comes_in_by_inheritance(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Translating(WholeBatchTrainer, Seq2SeqTrainer):
        pass

    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
        predict_with_generate=True,
        report_to="none",
        use_cpu=True,
    )
    rows = documents(9)
    trainer = Translating(
        small("translation"), arguments, train_dataset=rows, data_collator=pad, micro_batch=wb.Rows(3)
    )
    trainer.train()
    assert (trainer.last_update.rows, trainer.state.global_step) == (1, 2)
    assert len(trainer.predict(rows[:2], max_length=4).predictions) == 2


def test_bf16_is_that_of_the_trainer():
    """The forward pass is in 16 bits and weights, gradients and their sum are not, as with `wb.Accumulator`."""
    model, rows = small("causal").float(), documents(21)
    trained = copy.deepcopy(model)
    train(trained, rows, bf16=True, learning_rate=0.1)
    error = change_error(model, trained, plainly(model, rows, lr=0.1)[0])
    assert 1e-5 < error < 0.02
    assert next(trained.parameters()).dtype == torch.float32


def test_the_noise_scale_is_measured_if_asked():
    trainer = train(Tagger(), documents(24), options={"noise_scale": True, "micro_batch": wb.Rows(1)})
    assert trainer.last_update.noise_scale is not None
    assert train(Tagger(), documents(8)).last_update.noise_scale is None


def test_a_second_call_of_train_begins_anew():
    model, rows = Tagger(), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, num_train_epochs=1)
    trainer.train()
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT
    assert trainer.state.global_step == 3


def test_memory_that_runs_out_cuts_the_same_logical_batch_finer():
    fault = Fault("forward", at=2)

    class Short(Tagger):
        def forward(self, input_ids, attention_mask=None, labels=None):
            if self.training:
                fault.reach("forward")
            return super().forward(input_ids, labels=labels)

    rows = documents(21)
    model = Short()
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, options={"check": None}, num_train_epochs=1)
    assert fault.raised
    assert any("1 row" in reason for reason in trainer.accumulator.reasons), trainer.accumulator.reasons
    assert trainer.last_update.micro_batches == 5  # of one row each
    assert change_error(model, trained, plainly(model, rows, epochs=1)[0]) < EXACT


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [
        ({"micro_batch": wb.Rows(3)}, 2),
        ({"micro_batch": wb.Tokens(40, length=lambda row: len(row["input_ids"]))}, None),
        ({"micro_batch": "auto"}, 1),
        ({"memory": "2GiB"}, 1),
    ],
    ids=["rows", "tokens", "auto", "memory"],
)
def test_the_micro_batch_is_free_and_the_logical_batch_is_not(options, micro_batches):
    model, rows = Tagger(), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, options=options)
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT
    assert trainer.last_update.rows == 5
    assert micro_batches is None or trainer.last_update.micro_batches == micro_batches


def test_rows_of_like_length_go_together():
    """The Trainer pads 2 rows that come one after the other; sorted, the same rows take a tenth less."""
    from transformers import Trainer

    rows = documents(40)
    tokens = {}
    for kind in (Trainer, WholeBatchTrainer):
        trainer = train(small("causal"), rows, kind=kind, include_num_input_tokens_seen="all")
        tokens[kind] = trainer.state.num_input_tokens_seen
        assert trainer.state.total_flos > 0
    assert tokens[WholeBatchTrainer] < 0.9 * tokens[Trainer]
    for kind in (Trainer, WholeBatchTrainer):
        trainer = train(small("causal"), rows, kind=kind, include_num_input_tokens_seen="non_padding")
        tokens[kind] = trainer.state.num_input_tokens_seen
    assert tokens[WholeBatchTrainer] == tokens[Trainer] == 2 * sum(len(row["input_ids"]) for row in rows)


def test_outside_of_training_the_loader_gives_what_it_does_for_the_trainer(tmp_path):
    trainer = trainer_of(Tagger(), documents(6), tmp_path)
    first = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(first["input_ids"], pad(documents(6)[:2])["input_ids"])


class OwnLoader(WholeBatchTrainer):
    """A Trainer of a user whose loader collates."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=pad)


def test_a_loader_of_ones_own_keeps_its_micro_batches():
    model, rows = Tagger(), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, kind=OwnLoader)
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT
    assert trainer.last_update.micro_batches == 3


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)], ids=["global", "its own"])
def test_a_collator_that_draws_is_compared_on_what_it_drew(generator):
    def masking(rows):
        made = pad(rows)
        hidden = torch.rand(made["input_ids"].shape, generator=generator) < 0.5
        return {**made, "input_ids": made["input_ids"].masked_fill(hidden, 0)}

    trainer = train(Tagger(), documents(21), options={"data_collator": masking})
    assert "compared cut and uncut on 2 rows: equal" in " ".join(trainer.accumulator.reasons)

    with pytest.raises(wb.VerifyError, match="does not average over the targets"):
        train(Tagger(), documents(21), options={"data_collator": masking, "targets": "rows"})


def test_a_collator_that_draws_and_changes_its_rows_is_asked_once():
    draws = []

    def masking(rows):
        draws.append(len(rows))
        for row in rows:
            row["labels"] = [-100 if torch.rand(()) < 0.3 else label for label in row.pop("labels")]
        return pad(rows)

    train(Tagger(), documents(21), options={"data_collator": masking, "check": None, "targets": "labels"})
    assert sum(draws) == 2 * 21


def test_where_padding_counts_rows_are_padded_as_in_the_undivided_batch():
    def collate(rows):
        return without_mask(pad(rows))

    model, rows = Pooled(), documents(21)
    trained = copy.deepcopy(model)
    trainer = train(trained, rows, options={"data_collator": collate})
    assert change_error(model, trained, plainly(model, rows, collate=collate)[0]) < EXACT
    assert trainer.last_update.micro_batches == 3
    (reason,) = [each for each in trainer.accumulator.reasons if "how much it is padded" in each]
    assert "attention_mask" in reason

    unchecked = copy.deepcopy(model)
    train(unchecked, rows, options={"data_collator": collate, "check": None})
    assert change_error(model, unchecked, plainly(model, rows, collate=collate)[0]) > 1e-3


def test_where_nobody_can_tell_whether_padding_counts_the_refusal_stands(monkeypatch):
    said = "The first batch was not compared cut and uncut: on a few of its rows the loss raises RuntimeError: ...", 30
    monkeypatch.setattr("wholebatch.integrations.transformers.beginning.look", lambda *_: said)
    with pytest.raises(wb.VerifyError, match="The cut changes the gradient"):
        train(Pooled(), documents(21), options={"data_collator": lambda rows: without_mask(pad(rows))})


def test_batch_norm_is_refused_or_exact():
    class Normed(Tagger):
        def __init__(self):
            super().__init__()
            self.dropout = nn.BatchNorm1d(5).double()

    rows = [{"input_ids": row["input_ids"][:3] * 2, "labels": row["labels"][:3] * 2} for row in documents(21)]
    rows = [{name: words[:5] for name, words in row.items()} for row in rows]
    with pytest.raises(wb.BatchNormError, match="dropout"):
        train(Normed(), rows)
    model = Normed()
    trained = wb.exact_batch_norm(copy.deepcopy(model))
    train(trained, rows)
    assert change_error(model, trained, plainly(model, rows)[0]) < EXACT


def test_the_loss_scale_is_saved_and_taken_up_again(tmp_path):
    """float16 needs an accelerator for the Trainer, whose scaler stands in here for one."""
    rows = documents(16)
    trainer = trainer_of(Tagger().float(), rows, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "scaler.pt", weights_only=True)
    assert saved["scale"] == 2.0**10
    assert saved["_growth_tracker"] == 2


REFUSED = {
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "changes the logical batch"),
    "layerwise": ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["head"]}, "inside the backward pass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path, name):
    arguments, said = REFUSED[name]
    with pytest.raises(wb.ConfigError, match=said) as error:
        trainer_of(Tagger(), documents(4), tmp_path, **arguments)
    assert error.value.hint


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("is_deepspeed_enabled", "DeepSpeed"),
        ("is_fsdp_enabled", "FSDP plugin"),
        ("is_model_parallel", "several devices"),
    ],
)
def test_other_engines_are_refused(tmp_path, attribute, said):
    from wholebatch.integrations.transformers.refusals import require_supported

    trainer = trainer_of(Tagger(), documents(4), tmp_path)
    setattr(trainer, attribute, True)
    with pytest.raises(wb.ConfigError, match=said):
        require_supported(trainer)


@pytest.mark.parametrize(
    "options", [{"targets": "tokens"}, {"reduction": "average"}, {"memory": "much"}], ids=lambda each: next(iter(each))
)
def test_what_is_no_option_is_refused_before_training(tmp_path, options):
    with pytest.raises(wb.WholeBatchError) as error:
        trainer_of(Tagger(), documents(4), tmp_path, options=options)
    assert error.value.hint


def test_a_step_on_its_own_is_no_window(tmp_path):
    trainer = trainer_of(Tagger(), documents(4), tmp_path)
    with pytest.raises(wb.ConfigError, match="not with a logical batch"):
        trainer.training_step(trainer.model, pad(documents(2)))
