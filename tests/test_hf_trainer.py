"""The real Hugging Face Trainer, on tiny models and real data sets made here."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import digits
import pytest
import torch
from reference import equal_bits

import slimfit_fx

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from slimfit_fx.integrations import SlimFitCallback  # noqa: E402

CLASSES, LENGTH, VOCABULARY = 4, 12, 40
SETTINGS: dict[str, Any] = {"executor": "interpreter", "min_bytes": 256, "freeze_rate": 0.6, "strict": True}
KEYS = {"slimfit/frozen_share", "slimfit/recompiles"}


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=CLASSES,
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


def prepared(how: str) -> tuple[Any, list[Any]]:
    """A model and the callbacks for Trainer, optimized in one of the two ways."""
    if how == "callback":
        return bert(), [SlimFitCallback(**SETTINGS)]
    return slimfit_fx.optimize(bert(), **SETTINGS), []


def same_weights(one: Any, other: Any) -> bool:
    return all(equal_bits(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", ["callback", "optimize"])
def test_everything_that_trainer_does_in_one_run(how, tmp_path):
    model, callbacks = prepared(how)
    run = trainer(
        model,
        tmp_path,
        callbacks=callbacks,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        bf16=True,
        label_smoothing_factor=0.1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        lr_scheduler_type="linear",
        warmup_steps=1,
    )
    result = run.train()
    session = slimfit_fx.session(model)
    assert session.steps == result.global_step == 6 and session.recompiles == 0
    assert [step for step, _ in session.gates.history] == list(range(6)), "one decision per optimizer step"
    assert {len(opened) for _, opened in session.gates.history} == {session.scheduler.open_count}
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and len([e for e in run.state.log_history if "eval_accuracy" in e]) == 3
    assert all(entry.keys() >= KEYS for entry in logged)
    assert logged[-1]["slimfit/frozen_share"] == pytest.approx(session.gates.frozen_share)
    best = bert(seed=1)
    best.load_state_dict(type(model).from_pretrained(run.state.best_model_checkpoint).state_dict())
    assert same_weights(model, best), "load_best_model_at_end"
    predictions = run.predict(texts(16, seed=1)).predictions
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = best.eval()(input_ids=torch.tensor(texts(16, seed=1)["input_ids"])).logits.float()
    assert torch.equal(torch.tensor(predictions), expected)


@pytest.mark.parametrize(
    ("how", "restore"),
    [("callback", False), ("callback", True), ("both", False), ("optimize", False), ("optimize", True)],
    ids=["callback", "restored", "both", "optimize", "optimize and restored"],
)
def test_a_resumed_run_equals_the_run_without_a_stop(how, restore, tmp_path):
    """``restore``: with restore_callback_states_from_checkpoint, which makes new callback objects."""

    def start() -> tuple[Any, Any]:
        model = bert()
        if how != "callback":
            slimfit_fx.optimize(model, **SETTINGS)
        callbacks = {"callback": [SlimFitCallback(**SETTINGS)], "both": [SlimFitCallback()], "optimize": []}[how]
        settings = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
        return model, trainer(model, tmp_path, callbacks=callbacks, **settings)

    model, run = start()
    run.train()
    again, other = start()
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole, resumed = slimfit_fx.session(model), slimfit_fx.session(again)
    assert (whole.recompiles, resumed.recompiles) == (0, 0), "problem_type is set before the first forward"
    assert same_weights(model, again)
    assert resumed.state_dict() == whole.state_dict()
    assert [h for h in resumed.gates.history if h[0] > 3] == [h for h in whole.gates.history if h[0] > 3]
    assert len({opened for _, opened in whole.gates.history}) > 3, "a schedule that a lost state would change"


@pytest.mark.parametrize("strategy", ["epoch", "best"])
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


@pytest.mark.parametrize("how", ["callback", "optimize"])
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


def test_torch_compile_is_ignored_with_a_word(tmp_path):
    model = bert()
    with pytest.warns(RuntimeWarning, match="torch_compile=True is ignored"):
        run = trainer(
            model,
            tmp_path,
            callbacks=[SlimFitCallback(**SETTINGS)],
            torch_compile=True,
            torch_compile_backend="eager",
            max_steps=3,
        )
    run.train()
    session = slimfit_fx.session(model)
    assert session.steps == 3 and session.compiles in (1, 2)
    assert all(unit.gated for unit in session.plan.units if unit.name != "bert.embeddings.token_type_embeddings.weight")


def test_gradient_checkpointing_works_with_a_word(tmp_path):
    model = bert()
    run = trainer(model, tmp_path, callbacks=[SlimFitCallback(**SETTINGS)], gradient_checkpointing=True, max_steps=3)
    with pytest.warns(RuntimeWarning, match="checkpoints activations"):
        run.train()
    assert slimfit_fx.session(model).steps == 3


def test_settings_given_twice_are_refused(tmp_path):
    model = slimfit_fx.optimize(bert(), **SETTINGS)
    with pytest.raises(ValueError, match="optimized with other settings"):
        trainer(model, tmp_path, callbacks=[SlimFitCallback(freeze_rate=0.5)])
    with pytest.raises(ValueError, match="in config or as keywords"):
        SlimFitCallback(slimfit_fx.Config(), freeze_rate=0.5)
    with pytest.raises(ValueError, match="freeze_rate must be in"):
        SlimFitCallback(freeze_rate=90)


# ---- LoRA


def lora() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
    return peft.get_peft_model(bert(), settings)


def test_adapters_are_units_and_the_frozen_base_keeps_no_activations(tmp_path):
    model = lora()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    run = trainer(model, tmp_path, callbacks=[SlimFitCallback(**{**SETTINGS, "preset": "exact"})])
    run.train()
    session = slimfit_fx.session(model)
    assert session.steps == 6
    assert {name.split(".")[-3] for name in session.gates.names} == {"lora_A", "lora_B"}
    assert any("classifier" in name for name, reason in session.always_training if reason == "task head")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    opened = set(itertools.chain.from_iterable(o for _, o in session.gates.history))
    assert moved & set(session.gates.names) <= opened and not any("base_layer" in name for name in moved)
    kept = [row for row in session.plan.rows if row.kind == "linear_input"]
    assert kept and all("lora_" in row.module for row in kept), "inputs of frozen matrices are not saved"


# ---- to an accuracy


@pytest.mark.slow
def test_digits_to_an_accuracy_in_half_of_the_memory(tmp_path):
    pixels, labels = digits.arrays()
    train = datasets.Dataset.from_dict(
        {"pixels": pixels[: digits.TRAIN].tolist(), "labels": labels[: digits.TRAIN].tolist()}
    ).with_format("torch")

    def run(seed: int, callbacks: list[Any]) -> tuple[float, int]:
        model = digits.pretrained()
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
        )
        transformers.Trainer(model, arguments, train_dataset=train, callbacks=callbacks).train()
        return digits.accuracy(model), digits.peak(model)

    plain, plain_peak = digits.mean_accuracy(lambda seed: run(seed, []))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours, our_peak = digits.mean_accuracy(lambda seed: run(seed, [SlimFitCallback(**digits.OURS)]))
    assert ours >= plain - 0.01, (ours, plain)
    assert 2 * our_peak <= plain_peak, (our_peak, plain_peak)
