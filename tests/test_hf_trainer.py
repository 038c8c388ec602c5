"""The real Hugging Face Trainer, on tiny models and real data sets made here."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import digits
import pytest
import torch
from distributed_worker import Watch
from effort import first
from reference import compile_reference, equal_bits, optimized
from small_models import optimizer_state, same_state
from tower import Tower, rows

import slimfit_fx

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from slimfit_fx.integrations import SlimFitCallback  # noqa: E402
from slimfit_fx.integrations.hf_trainer import AttachedCallback  # noqa: E402
from slimfit_fx.runtime.measure import step_memory  # noqa: E402

CLASSES, LENGTH, VOCABULARY = 4, 12, 40
SETTINGS: dict[str, Any] = {"executor": "interpreter", "min_bytes": 256, "freeze_rate": 0.6, "strict": True}
KEYS = {"slimfit/frozen_share", "slimfit/recompiles", "slimfit/step_peak_bytes"}
COMMON: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
}
"""What people ask of Trainer."""


def bert(seed: int = 0, dropout: float = 0.1) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def texts(count: int = 64, seed: int = 0) -> Any:
    """Sequences whose label is their first token modulo the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCABULARY, (count, LENGTH), generator=generator)
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % CLASSES).tolist()})


def trainer(model: Any, folder: Any, *, callbacks: list[Any] | None = None, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**given, **changes})
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=texts(),
        eval_dataset=texts(16, seed=1),
        callbacks=callbacks,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


def prepared(how: str, make: Callable[[], Any] = bert, **settings: Any) -> tuple[Any, list[Any]]:
    """A model and the callbacks for Trainer, optimized by a callback, before Trainer, or so that both attend to it."""
    chosen = {**SETTINGS, **settings}
    if how == "callback":
        return make(), [SlimFitCallback(**chosen)]
    return slimfit_fx.optimize(make(), **chosen), [SlimFitCallback()] if how == "both" else []


def optimizer_of(run: Any) -> torch.optim.Optimizer:
    """The optimizer itself, without Accelerate's wrapper."""
    return getattr(run.optimizer, "optimizer", run.optimizer)


class Still(transformers.TrainerCallback):
    """Looks at closed units in every step."""

    watch: Watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.watch = Watch(model, slimfit_fx.session(model), getattr(optimizer, "optimizer", optimizer))

    def assert_it_was(self) -> None:
        assert self.watch.looked and self.watch.moved == [] and self.watch.gradients == []


def same_weights(one: Any, other: Any) -> bool:
    return all(equal_bits(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", first(["callback", "optimize"]))
def test_everything_that_trainer_does_in_one_run(how, tmp_path):
    """The best checkpoint is made to be the first, so that loading it changes the model."""
    model, callbacks = prepared(how)
    still, measured = Still(), itertools.count()
    run = trainer(
        model,
        tmp_path,
        callbacks=[*callbacks, still],
        bf16=True,
        **COMMON,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        lr_scheduler_type="linear",
        warmup_steps=1,
    )
    run.compute_metrics = lambda _: {"accuracy": -next(measured)}
    result = run.train()
    still.assert_it_was()
    session = slimfit_fx.session(model)
    assert session.steps == result.global_step == 6 and session.recompiles == 0
    assert [step for step, _ in session.gates.history] == list(range(6)), "one decision per optimizer step"
    assert {len(opened) for _, opened in session.gates.history} == {session.scheduler.open_count}
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and len([e for e in run.state.log_history if "eval_accuracy" in e]) == 3
    assert all(entry.keys() >= KEYS for entry in logged)
    assert logged[-1]["slimfit/frozen_share"] == pytest.approx(session.gates.frozen_share)
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best, last = (type(model).from_pretrained(tmp_path / f"checkpoint-{number}") for number in (2, 6))
    assert same_weights(model, best) and not same_weights(model, last), "load_best_model_at_end"
    predictions = run.predict(texts(16, seed=1)).predictions
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = best.eval()(input_ids=torch.tensor(texts(16, seed=1)["input_ids"])).logits.float()
    assert torch.equal(torch.tensor(predictions), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_the_loss_alone_trainer_trains_and_evaluates(smoothing, tmp_path):
    """It reads logits in evaluation only; with label smoothing it computes the loss of them itself, so they stay."""
    model, callbacks = prepared("callback", outputs="loss")
    changes = {**COMMON, "bf16": True, "label_smoothing_factor": smoothing, "max_steps": 2}
    run = trainer(model, tmp_path, callbacks=callbacks, **changes)
    run.train()
    session = slimfit_fx.session(model)
    assert session.steps == 2 and session.recompiles == 0
    assert any("left out" in note for note in session.plan.notes) is (smoothing == 0.0)
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


class Rows(Tower):
    """As Trainer calls it; Inductor compiles it soon."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x)}


@pytest.mark.inductor
def test_the_step_peak_is_in_the_logs(tmp_path):
    """With the default executor: what is logged of a step is its prediction, and the allocator agrees."""
    model, predicted = Rows(), []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            predicted.append(slimfit_fx.session(model).predict_peak().peak_bytes)

    settings = {**SETTINGS, "executor": "inductor", "preset": "exact"}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=64,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = datasets.Dataset.from_dict({"x": rows(256)[0].tolist()})
    run = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Watch(), SlimFitCallback(**settings)])
    run.train()
    session = slimfit_fx.session(model)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert session.executor == "inductor" and all(entry.keys() >= KEYS for entry in logged)
    assert [entry["slimfit/step_peak_bytes"] for entry in logged] == predicted and len(set(predicted)) > 1
    assert logged[-1]["slimfit/frozen_share"] == pytest.approx(session.gates.frozen_share)
    assert {entry["slimfit/recompiles"] for entry in logged} == {0} and session.compiles == 1
    model.zero_grad()
    (x,) = rows(64)
    found = step_memory(lambda: model(x)["loss"], lambda loss: loss.backward()).peak_bytes
    assert session.predict_peak().peak_bytes == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("how", "restore"),
    [
        ("callback", False),
        pytest.param("callback", True, marks=pytest.mark.thorough),
        pytest.param("both", False, marks=pytest.mark.thorough),
        pytest.param("optimize", False, marks=pytest.mark.thorough),
        pytest.param("optimize", True, marks=pytest.mark.thorough),
    ],
    ids=["callback", "restored", "both", "optimize", "optimize and restored"],
)
def test_a_resumed_run_equals_the_run_without_a_stop(how, restore, tmp_path):
    """``restore``: with restore_callback_states_from_checkpoint, which makes new callback objects."""

    def start() -> tuple[Any, Any]:
        model, callbacks = prepared(how)
        settings = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
        return model, trainer(model, tmp_path, callbacks=callbacks, **settings)

    model, run = start()
    run.train()
    again, other = start()
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole, resumed = slimfit_fx.session(model), slimfit_fx.session(again)
    assert (whole.recompiles, resumed.recompiles) == (0, 0), "problem_type is set before the first forward"
    assert same_weights(model, again)
    states = [[optimizer_state(optimizer_of(t), p) for p in m.parameters()] for t, m in ((run, model), (other, again))]
    assert all(map(same_state, *states)) and all(states[0]), "every unit was open once"
    assert resumed.state_dict() == whole.state_dict()
    assert [h for h in resumed.gates.history if h[0] > 3] == [h for h in whole.gates.history if h[0] > 3]
    assert len({opened for _, opened in whole.gates.history}) > 3, "a schedule that a lost state would change"


@pytest.mark.parametrize("strategy", first(["best", "epoch"]))
def test_the_schedule_is_in_the_checkpoint_whenever_it_is_written(strategy, tmp_path):
    model = slimfit_fx.optimize(bert(), **SETTINGS)
    chosen: dict[str, Any] = {"save_strategy": strategy, "num_train_epochs": 1, "max_steps": -1}
    if strategy == "best":
        chosen |= {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "accuracy"}
    run = trainer(model, tmp_path, **chosen)
    seen: dict[int, Any] = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = slimfit_fx.session(model).state_dict()

    run.add_callback(Watch())
    run.train()
    folders = list(tmp_path.glob("checkpoint-*"))
    assert folders
    for folder in folders:
        kept = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["SlimFitCallback"]
        expected = seen[int(folder.name.removeprefix("checkpoint-"))]
        assert kept["attributes"]["saved"] == json.loads(json.dumps(expected))


def test_a_model_that_was_not_optimized_leaves_nothing_in_a_checkpoint(tmp_path):
    slimfit_fx.optimize(bert(), **SETTINGS)
    run = trainer(bert(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    assert "SlimFitCallback" not in run.state.stateful_callbacks
    assert not any(KEYS & entry.keys() for entry in run.state.log_history)


@pytest.mark.parametrize("how", first(["callback", "optimize"]))
def test_a_checkpoint_without_a_schedule_says_so(how, tmp_path):
    trainer(bert(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert "SlimFitCallback" not in json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text()).get(
        "stateful_callbacks", {}
    )
    model, callbacks = prepared(how)
    run = trainer(model, tmp_path, callbacks=callbacks, max_steps=3)
    with pytest.warns(RuntimeWarning, match="holds no schedule") as said:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len([w for w in said if "slimfit_fx" in str(w.message)]) == 1


def test_a_model_from_model_init_and_a_callback_added_later(tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    run = transformers.Trainer(args=arguments, model_init=lambda: bert(), train_dataset=texts())
    run.add_callback(SlimFitCallback(**SETTINGS))
    run.train()
    assert slimfit_fx.session(run.model).steps == 2


def ours_of(said: Any) -> list[str]:
    """Our messages among the warnings."""
    return [str(w.message) for w in said if "slimfit_fx" in str(w.message)]


@pytest.mark.parametrize(
    ("how", "executor", "backend"),
    [
        *first((how, "interpreter", "eager") for how in ("callback", "optimize", "both")),
        pytest.param("callback", "inductor", None, marks=[pytest.mark.inductor, pytest.mark.thorough]),
    ],
    ids=["callback", "optimize", "both", "defaults"],
)
def test_torch_compile_is_ignored_with_a_word(how, executor, backend, tmp_path):
    """``backend``: what torch compiles the model's evaluation with."""
    model, callbacks = prepared(how, executor=executor)
    still, settings = Still(), {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 3}
    with pytest.warns(RuntimeWarning) as said:
        run = trainer(model, tmp_path, callbacks=[*callbacks, still], **settings)
        run.train()
    (message,) = ours_of(said)
    assert "torch_compile=True is ignored" in message
    still.assert_it_was()
    session = slimfit_fx.session(model)
    assert session.executor == executor and session.steps == 3 and session.compiles in (1, 2)
    assert all(unit.gated for unit in session.plan.units if unit.name != "bert.embeddings.token_type_embeddings.weight")
    compiles, found = session.compiles, run.evaluate()
    assert session.compiles == compiles and found["eval_loss"] == pytest.approx(loss_without_us(model), rel=1e-5)


def loss_without_us(model: Any) -> float:
    """The mean loss on Trainer's data of evaluation, of a plain model with the same weights."""
    plain = bert().eval()
    plain.load_state_dict(model.state_dict())
    batch = {key: torch.tensor(texts(16, seed=1)[key]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        return plain(**batch).loss.item()


@pytest.mark.parametrize("how", first(["callback", "optimize"]))
def test_gradient_checkpointing_works_with_a_word(how, tmp_path):
    model, callbacks = prepared(how)
    still = Still()
    with pytest.warns(RuntimeWarning) as said:
        run = trainer(model, tmp_path, callbacks=[*callbacks, still], gradient_checkpointing=True, max_steps=3)
        run.train()
    (message,) = ours_of(said)
    assert "checkpoints activations" in message
    still.assert_it_was()
    assert slimfit_fx.session(model).steps == 3
    assert run.evaluate()["eval_loss"] == pytest.approx(loss_without_us(model), rel=1e-5)


def test_settings_given_twice_are_refused(tmp_path):
    model = slimfit_fx.optimize(bert(), **SETTINGS)
    with pytest.raises(ValueError, match="optimized with other settings"):
        trainer(model, tmp_path, callbacks=[SlimFitCallback(freeze_rate=0.5)])
    with pytest.raises(ValueError, match="in config or as keywords"):
        SlimFitCallback(slimfit_fx.Config(), freeze_rate=0.5)
    with pytest.raises(ValueError, match="freeze_rate must be in"):
        SlimFitCallback(freeze_rate=90)


@pytest.mark.parametrize(
    ("given", "changed", "said"),
    [
        ({}, {"deepspeed": "stage2.json"}, r"deepspeed='stage2.json' wraps the model in DeepSpeed.*\(FSDP2\)"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "fsdp_config has version 1.*use fully_shard"),
    ],
    ids=["DeepSpeed", "FSDP1"],
)
@pytest.mark.parametrize("how", ["callback", "optimize"])
def test_what_trainer_would_wrap_the_model_in_is_refused(how, given, changed, said, tmp_path):
    """Told by the arguments alone: Trainer itself would ask for several processes, and for DeepSpeed to be there."""
    model, callbacks = prepared(how)
    run = callbacks[0] if callbacks else AttachedCallback()
    with mock.patch.dict(os.environ):  # which FSDP's arguments write to
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert {"deepspeed", "fsdp_plugin_args", "torch_compile"} <= vars(arguments).keys(), "as _check reads them"
    vars(arguments).update(changed)
    with pytest.raises(ValueError, match=said):
        run.on_init_end(arguments, transformers.TrainerState(), transformers.TrainerControl(), model=model)


# ---- LoRA


def lora() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
    return peft.get_peft_model(bert(), settings)


@pytest.mark.parametrize("how", first(["optimize", "callback"]))
def test_adapters_are_units_and_the_frozen_base_keeps_no_activations(how, tmp_path):
    model, callbacks = prepared(how, lora, preset="exact")
    before, still = {name: param.detach().clone() for name, param in model.named_parameters()}, Still()
    trainer(model, tmp_path, callbacks=[*callbacks, still]).train()
    session = slimfit_fx.session(model)
    assert session.steps == 6 and session.recompiles == 0
    still.assert_it_was()
    assert {name.split(".")[-3] for name in session.gates.names} == {"lora_A", "lora_B"}
    assert any("classifier" in name for name, reason in session.always_training if reason == "task head")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    opened = set(itertools.chain.from_iterable(o for _, o in session.gates.history))
    assert moved & set(session.gates.names) <= opened and not any("base_layer" in name for name in moved)
    kept = [row for row in session.plan.rows if row.kind == "linear_input"]
    assert kept and all("lora_" in row.module for row in kept), "inputs of frozen matrices are not saved"


def adapted_rows(*matrices: str) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(Rows(), peft.LoraConfig(r=4, target_modules=list(matrices)))


def test_what_only_a_frozen_matrix_needs_is_not_allocated():
    """By the allocator, all units open: what enters ``mid`` is gone, and what enters lora_B has come."""
    from bench.measure import step_peak

    (x,) = rows(64)

    def saved(model: Any) -> int:
        model, _ = optimized(model.train(), preset="exact", freeze_rate=0.0)
        model(x=x)["loss"].backward()
        model.zero_grad()
        return step_peak(lambda: model(x=x)["loss"], backward=lambda loss: loss.backward()).saved_bytes

    assert saved(adapted_rows("up")) == saved(Rows()) - 64 * 32 * 4 + 64 * 4 * 4


@pytest.mark.inductor
@pytest.mark.thorough
def test_adapters_with_the_default_executor(tmp_path):
    model, still = adapted_rows("up", "mid", "down"), Still()
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=[],
    )
    data = datasets.Dataset.from_dict({"x": rows(256)[0].tolist()})
    callbacks = [SlimFitCallback(freeze_rate=0.5, min_bytes=256, strict=True), still]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    session = slimfit_fx.session(model)
    assert (session.executor, session.steps, session.compiles, session.recompiles) == ("inductor", 4, 1, 0)
    assert len(session.gates.names) == 6 and len({opened for _, opened in session.gates.history}) > 1
    still.assert_it_was()


# ---- the same training


def train_both(ours: Any, plain: Any, folder: Any, **changes: Any) -> None:
    callback = SlimFitCallback(**{**SETTINGS, "preset": "exact", "freeze_rate": 0.0})
    for model, callbacks in ((ours, [callback]), (plain, [])):
        trainer(model, folder, callbacks=callbacks, **COMMON, **changes).train()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["fp32", "bf16"])
def test_exact_with_nothing_frozen_is_trainer_without_us(bf16, tmp_path):
    """To the bit of the same model compiled without us, with dropout."""
    ours, plain = bert(), bert()
    plain._compiled_call_impl = compile_reference(plain._call_impl)
    train_both(ours, plain, tmp_path, bf16=bf16)
    assert same_weights(ours, plain) and not same_weights(ours, bert())


def test_exact_with_nothing_frozen_is_trainer_without_us_within_rounding(tmp_path):
    """Not compiled at all; without dropout, whose masks would be others, and with SGD, which blows no rounding up."""
    ours, plain = bert(dropout=0.0), bert(dropout=0.0)
    train_both(ours, plain, tmp_path, optim="sgd")
    moved, error = (
        max((a - b).abs().max().item() for a, b in zip(plain.parameters(), other.parameters(), strict=True))
        for other in (bert(), ours)
    )
    assert error < 1e-4 * moved, (error, moved)


# ---- to an accuracy


def adapted_reader() -> Any:
    peft = pytest.importorskip("peft")
    matrices = ["qkv", "proj", "up", "down"]
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=matrices, modules_to_save=["head"], lora_dropout=0.0)
    return peft.get_peft_model(digits.pretrained(), settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "make"),
    [
        ("callback", digits.pretrained),
        pytest.param("optimize", digits.pretrained, marks=pytest.mark.thorough),
        pytest.param("callback", adapted_reader, marks=pytest.mark.thorough),
    ],
    ids=["callback", "optimize", "LoRA"],
)
def test_digits_to_an_accuracy_in_half_of_the_memory(how, make, tmp_path):
    """With LoRA: half of what LoRA takes without us."""
    pixels, labels = digits.arrays()
    train = datasets.Dataset.from_dict(
        {"pixels": pixels[: digits.TRAIN].tolist(), "labels": labels[: digits.TRAIN].tolist()}
    ).with_format("torch")

    def run(seed: int, ours: bool) -> tuple[float, int]:
        model, callbacks = make(), []
        if ours and how == "optimize":
            slimfit_fx.optimize(model, **digits.OURS)
        elif ours:
            callbacks = [SlimFitCallback(**digits.OURS)]
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=digits.SIZE,
            num_train_epochs=digits.EPOCHS,
            learning_rate=digits.RATE,
            seed=seed,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=100,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        transformers.Trainer(model, arguments, train_dataset=train, callbacks=callbacks).train()
        assert not ours or slimfit_fx.session(model).steps == digits.STEPS
        return digits.accuracy(model), digits.peak(model)

    plain, plain_peak = digits.mean_accuracy(lambda seed: run(seed, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours, our_peak = digits.mean_accuracy(lambda seed: run(seed, True))
    assert ours >= plain - 0.01, (ours, plain)
    assert 2 * our_peak <= plain_peak, (our_peak, plain_peak)
