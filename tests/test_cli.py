"""The command line: models from their configs, clean errors, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import slimfit_fx
from slimfit_fx import from_config
from slimfit_fx.cli import app

transformers = pytest.importorskip("transformers")
pytest.importorskip("slimfit_fx.codecs")


@pytest.fixture
def run(monkeypatch):
    """Run the command with a planner that only remembers what it was asked."""
    asked = SimpleNamespace(model=None, settings=None)

    def fake_plan(model, **settings):
        asked.model, asked.settings = model, settings
        return SimpleNamespace(to_dict=lambda: {"rows": []})

    monkeypatch.setattr(slimfit_fx, "plan", fake_plan, raising=False)

    def invoke(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, asked=asked)

    return invoke


# ---- models from configs


@pytest.mark.parametrize("name", from_config.KNOWN)
def test_known_names_need_no_network(name):
    config = from_config.load_config(name)
    assert config.model_type == from_config.KNOWN[name][0]


@pytest.mark.parametrize(
    ("name", "architecture", "million"),
    [
        ("bert-base-uncased", "BertForSequenceClassification", 109.5),
        ("google-bert/bert-large-uncased", "BertForSequenceClassification", 335.1),
        ("roberta-base", "RobertaForSequenceClassification", 124.6),
        ("distilbert-base-uncased", "DistilBertForSequenceClassification", 67.0),
        ("gpt2", "GPT2LMHeadModel", 124.4),
        ("google/vit-base-patch16-224", "ViTForImageClassification", 86.6),
        ("facebook/deit-tiny-patch16-224", "ViTForImageClassification", 5.7),
        ("google/vit-large-patch16-384", "ViTForImageClassification", 304.7),
        ("meta-llama/Llama-3.2-1B", "LlamaForCausalLM", 1235.8),
    ],
)
def test_known_models_have_their_published_size(name, architecture, million):
    model, _ = from_config.build(name)
    assert type(model).__name__ == architecture and model.training
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=0.06)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("task", from_config.TASKS)
def test_every_task_has_a_forward_with_a_loss(task):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    kind = {"image-classification": "vit", "seq2seq-lm": "t5"}.get(task, "bert")
    small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32} if kind == "t5" else small
    config = transformers.AutoConfig.for_model(kind, **small)
    config.decoder_start_token_id = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_config, "load_config", lambda name: config)
        model, batch = from_config.build("any", task=task, batch=2, length=8)
    batch.pop("attention_mask", None)  # outside of tracing, transformers looks at its values
    assert model(**batch).loss.shape == ()


def test_paths(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, architectures=["BertForTokenClassification"]
    )
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model, batch = from_config.build(str(path), batch=3, length=7)
        assert type(model).__name__ == "BertForTokenClassification"
        assert batch["labels"].shape == (3, 7)


def test_resolution_changes_the_model():
    model, batch = from_config.build("google/vit-base-patch16-224", resolution=32, batch=2)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert model.vit.embeddings.position_embeddings.shape[1] == 5


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("bert-base-uncase", {}, r"no config called 'bert-base-uncase' .*did you mean 'bert-base-uncased'"),
        ("no/such/folder", {}, "give the path of a config.json or of its folder"),
        ("gpt2", {"task": "causal"}, r"task must be one of .*got 'causal' \(did you mean 'causal-lm'"),
        ("bert-base-cased", {"batch": 0, "length": -1}, "(?s)batch must be >= 1, got 0.length must be >= 1, got -1"),
        ("bert-base-cased", {"length": 513}, "length must be at most 512 for this bert model, got 513"),
        ("roberta-base", {"length": 513}, "length must be at most 512 for this roberta model, got 513"),
        ("google/vit-base-patch16-224", {"resolution": 100}, "a multiple of the patch size 16, got 100"),
    ],
)
def test_build_refuses(name, options, match):
    with pytest.raises(ValueError, match=match):
        from_config.build(name, **options)


def test_a_file_that_is_no_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no usable config.json at"):
        from_config.build(str(tmp_path))


# ---- the command


def test_plan_passes_everything_on(run):
    result = run("plan", "bert-base-cased", "--batch", "4", "--length", "16", "--preset", "max", "--freeze-rate", "0.5")
    assert result.code == 0
    assert "BertForSequenceClassification: input_ids (4, 16)" in result.err
    settings = result.asked.settings
    assert (settings["preset"], settings["freeze_rate"]) == ("max", 0.5)
    assert settings["input_ids"].shape == (4, 16) and settings["labels"].shape == (4,)


def test_plan_json_is_all_of_stdout(run):
    result = run("plan", "google/vit-base-patch16-224", "--resolution", "32", "--json")
    assert result.code == 0 and json.loads(result.out) == {"rows": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert-base-uncase"], "did you mean 'bert-base-uncased'"),
        (["gpt2", "--preset", "maxx", "--freeze-rate", "1"], "did you mean 'max'?)\nfreeze_rate must be in [0, 1)"),
        (["gpt2", "--length", "2000"], "length must be at most 1024"),
    ],
)
def test_plan_errors_are_one_clean_message(run, arguments, message):
    result = run("plan", *arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("slimfit-fx: ") and message in result.err and "Traceback" not in result.err


def test_plan_passes_budget_and_picture_on(run, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr("slimfit_fx.planning.picture.save_picture", lambda plan, path: saved.append(path))
    arguments = ["gpt2", "--batch", "2", "--length", "8", "--budget", "32GiB", "--picture", str(tmp_path / "a.html")]
    result = run("plan", *arguments, "--json")
    assert result.code == 0 and saved == [tmp_path / "a.html"]
    assert (result.asked.settings["memory_budget"], result.asked.settings["peak"]) == ("32GiB", True)
    assert "max_gradient_error" not in result.asked.settings
    assert (
        run("plan", "gpt2", "--length", "8", "--max-gradient-error", "0.05").asked.settings["max_gradient_error"]
        == 0.05
    )
    assert "outputs" not in result.asked.settings
    assert run("plan", "gpt2", "--length", "8", "--outputs", "loss").asked.settings["outputs"] == "loss"


def test_front_passes_everything_on_and_tells_what_it_does(run, monkeypatch, tmp_path):
    asked, drawn = {}, []

    def fake_front(model, example, *, say, **settings):
        say("preset exact")
        asked.update(settings, example=example)
        return SimpleNamespace(to_dict=lambda: {"points": []}, save_picture=drawn.append)

    monkeypatch.setattr(slimfit_fx, "front", fake_front)
    options = ["--batch", "2", "--length", "8", "--freeze-rate", "0.5", "--picture", str(tmp_path / "a.png")]
    result = run("front", "gpt2", *options, "--json")
    assert result.code == 0 and json.loads(result.out) == {"points": []}
    assert asked.pop("example")["input_ids"].shape == (2, 8) and asked == {"freeze_rate": 0.5}
    assert drawn == [tmp_path / "a.png"] and "preset exact" in result.err.splitlines()


@pytest.mark.parametrize("command", ["plan", "fit"])
def test_a_budget_that_nothing_fits_is_status_1(run, monkeypatch, command):
    def refuse(*_, **__):
        raise slimfit_fx.MemoryBudgetError("memory_budget: nothing fits into 1.0 MiB")

    monkeypatch.setattr(slimfit_fx, "plan", refuse)
    monkeypatch.setattr(slimfit_fx, "max_batch", refuse)
    result = run(command, "gpt2", "--length", "8", "--budget", "1MiB")
    assert result.code == 1 and result.out == ""
    assert result.err.splitlines()[-1] == "slimfit-fx: memory_budget: nothing fits into 1.0 MiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "gpt2", "--budget", "6 gigs"], "memory_budget must be bytes"),
        (
            ["fit", "gpt2", "--budget", "1GiB", "--picture", "x.svg"],
            "picture must be a .png or .html file, got 'x.svg'",
        ),
        (["fit", "gpt2"], "Missing option '--budget'"),
        (["front", "gpt2", "--picture", "x.html"], "picture must be a .png file, got 'x.html'"),
        (["front", "gpt2", "--freeze-rate", "90"], "freeze_rate must be in [0, 1), got 90"),
        (["plan", "gpt2", "--max-gradient-error", "-1"], "max_gradient_error must be a finite number >= 0"),
        (["plan", "gpt2", "--outputs", "logits"], "outputs must be one of ['all', 'loss'], got 'logits'"),
    ],
)
def test_wrong_options_are_status_2(run, arguments, message):
    result = run(*arguments)
    assert result.code == 2 and message in result.err


def test_missing_transformers_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("plan", "gpt2")
    assert result.code == 2 and "pip install 'slimfit-fx[hf]'" in result.err


def test_version_and_help(run):
    assert run("--version").out.strip() == slimfit_fx.__version__
    assert "plan" in run("--help").out and "plan" in run().out


def test_import_is_light():
    heavy = ("transformers", "matplotlib", "typer", "sklearn", "pandas")
    code = f"import sys, slimfit_fx; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_plan_for_real(tmp_path):
    pytest.importorskip("slimfit_fx.api")
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64)
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--batch", "4", "--length", "16", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"]


def test_every_command_about_a_model_has_the_same_options():
    for command in ("plan", "fit", "front"):
        told = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for option in ("--batch", "--length", "--resolution", "--freeze-rate", "--max-gradient-error", "--json"):
            assert option in told, (command, option)
        assert "--picture" in told and ("--preset" in told) == (command != "front")


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.thorough
def test_front_for_real(tmp_path, monkeypatch):
    """Fewer points than a user gets: each is a dry run."""
    monkeypatch.setattr("slimfit_fx.tradeoff._STEPS", (("cheap", 1.0),))
    monkeypatch.setitem(slimfit_fx.front.__kwdefaults__, "presets", ("max",))
    monkeypatch.setitem(slimfit_fx.front.__kwdefaults__, "shares", (0.5,))
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=100
    )
    config.save_pretrained(tmp_path)
    options = ["--batch", "4", "--length", "16", "--json", "--picture", str(tmp_path / "front.png")]
    result = CliRunner().invoke(app, ["front", str(tmp_path), *options])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    names = {point["name"] for point in found["points"]}
    ours = {"preset exact, nothing frozen", "preset max"}
    rivals = {"torch.compile", "torch.compile, checkpointing", "activation_memory_budget 0.5"}
    assert names == ours | rivals and found["failed"] == [] and found["freeze_rate"] == 0.9
    assert {point["name"] for point in found["points"] if point["ours"]} == ours
    assert (tmp_path / "front.png").stat().st_size > 1000


@pytest.mark.thorough
@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("cheap_only")
def test_fit_for_real(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=100
    )
    config.save_pretrained(tmp_path)
    common = [str(tmp_path), "--length", "16", "--preset", "exact", "--budget", "2MiB", "--json"]
    result = CliRunner().invoke(app, ["fit", *common, "--picture", str(tmp_path / "fit.html")])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["peak_bytes"] <= 2 * 2**20 < found["next_peak_bytes"] and found["batch"] > 1
    assert "<svg" in (tmp_path / "fit.html").read_text()
    result = CliRunner().invoke(app, ["plan", *common, "--batch", str(found["batch"] + 1)])
    assert result.exit_code == 1 and f"({found['next_peak_bytes']} bytes)" in result.stderr
