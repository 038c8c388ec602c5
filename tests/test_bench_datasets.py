"""The loaders of the paper's tasks, on local files of the schemas of GLUE, SQuAD 2.0, CIFAR and ImageNet."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from bench.accuracy.__main__ import main
from bench.accuracy.cells import FULL, Cell
from bench.accuracy.store import Store
from bench.accuracy.tasks import hub_metrics, squad
from bench.accuracy.tasks.base import ACCURACY
from bench.accuracy.tasks.hub import PAPER_TASKS, hub_task
from bench.accuracy.train import Trainer
from slimfit_fx.demo.data import Examples

CPU = torch.device("cpu")
WORDS = "the a cat dog sat ran red blue who where what was in house tree ? .".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT and its tokenizer, as ``save_pretrained`` leaves them."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write(folder, name: str, part: str, rows: list[dict], kind: str = "jsonl"):
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / f"{part}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(str(path))


def small(monkeypatch, name: str, **changes):
    """The same task with smaller texts, images and batches."""
    task = PAPER_TASKS[name]
    smaller = dataclasses.replace(task.setting, **changes)
    monkeypatch.setitem(PAPER_TASKS, name, dataclasses.replace(task, setting=smaller))


def text_rows(name: str, count: int) -> list[dict]:
    task, rows = PAPER_TASKS[name], []
    for k in range(count):
        texts = {column: " ".join(WORDS[(k + j) % len(WORDS)] for j in range(6)) for column in task.columns}
        label = k / 7 if task.labels == 1 else k % task.labels
        rows.append({**texts, "label": label, "idx": k})
    return rows


# ---- settings


def test_the_settings_are_those_of_the_paper():
    settings = {
        name: (s.freeze_rate, s.batch, s.size, s.learning_rate)
        for name, s in ((name, task.setting) for name, task in PAPER_TASKS.items())
    }
    assert settings["cola"] == (0.90, 32, 128, 8e-5)
    assert settings["mrpc"] == (0.90, 32, 128, 1.25e-4)
    assert settings["rte"] == (0.90, 16, 128, 1.2e-4)
    assert settings["stsb"] == (0.85, 32, 128, 8e-5)
    assert settings["sst2"] == (0.95, 32, 128, 8e-5)
    assert settings["qnli"] == (0.95, 32, 128, 5e-5)
    assert settings["qqp"] == (0.80, 32, 128, 5e-5)
    assert settings["mnli"] == (0.80, 32, 128, 4e-5)
    assert settings["squad2"] == (0.80, 128, 384, 1.8e-4)
    assert settings["cifar10"] == (0.90, 32, 224, 7.5e-5)
    assert settings["cifar100"] == (0.75, 32, 224, 5.5e-5)
    assert settings["imagenet"] == (0.95, 128, 384, 5e-5)


def test_bad_names_and_missing_files_are_told(tmp_path, bert):
    with pytest.raises(ValueError, match="unknown hub task: got 'wnli'; legal: cola, sst2"):
        hub_task("wnli")
    with pytest.raises(FileNotFoundError, match=r"no data for train: one of train.parquet, train.jsonl"):
        hub_task("cola", data=tmp_path, weights=bert).load(0)


# ---- GLUE


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "qnli", "qqp", "mnli"])
def test_glue_is_read_encoded_and_scored(name, tmp_path, bert, monkeypatch):
    small(monkeypatch, name, size=16)
    write(tmp_path, name, "train", text_rows(name, 40))
    write(tmp_path, name, PAPER_TASKS[name].test, text_rows(name, 12))
    task = hub_task(name, data=tmp_path, weights=bert)
    splits = task.load(0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 12)
    batch = splits.train[torch.tensor([0, 5, 2])]
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (3, 16)
    assert bool(batch["token_type_ids"].any()) == (len(PAPER_TASKS[name].columns) == 2)
    assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
    model = task.make_model(0)
    assert model.config.num_labels == PAPER_TASKS[name].labels
    model(**batch).loss.backward()
    assert -1 <= task.metric.score(model, splits.test, CPU) <= 1


def test_nothing_of_the_reported_part_is_trained_on(tmp_path, bert):
    train, test = text_rows("rte", 40), text_rows("rte", 40)
    for row in test:
        row["sentence1"] = "tree tree tree"
    write(tmp_path, "rte", "train", train, kind="parquet")
    write(tmp_path, "rte", "validation", test, kind="parquet")
    splits = hub_task("rte", data=tmp_path, weights=bert).load(0)
    kept, held_out = splits.train.rows["idx"], splits.validation.rows["idx"]
    assert sorted([*kept, *held_out]) == list(range(40)) and len(held_out) == 4
    assert set(splits.test.rows["sentence1"]) == {"tree tree tree"}
    assert "tree tree tree" not in {*splits.train.rows["sentence1"], *splits.validation.rows["sentence1"]}


def test_a_cell_of_glue_trains(tmp_path, bert, monkeypatch):
    small(monkeypatch, "sst2", size=16, batch=8)
    write(tmp_path, "sst2", "train", text_rows("sst2", 40))
    write(tmp_path, "sst2", "validation", text_rows("sst2", 12))
    task = hub_task("sst2", data=tmp_path, weights=bert)
    row = Trainer(device=CPU, executor="interpreter")(Cell("sst2", "full", "full", 0, 1e-3), task, FULL)
    assert row.steps == 3 * (36 // 8)
    assert 0 <= row.validation <= 1 and 0 <= row.test <= 1


def test_the_command_trains_a_hub_task_and_writes_its_cells(tmp_path, bert, monkeypatch, capsys):
    small(monkeypatch, "mrpc", size=16, batch=16)
    write(tmp_path, "mrpc", "train", text_rows("mrpc", 40))
    write(tmp_path, "mrpc", "validation", text_rows("mrpc", 12))
    out = tmp_path / "out.jsonl"
    command = ["--hub", "mrpc", "--data", str(tmp_path), "--weights", str(bert), "--methods", "head"]
    assert main([*command, "--seeds", "2", "--jobs", "1", "--out", str(out)]) == 0  # the small task is of this process
    rows = Store(out).rows
    assert [row.cell.method for row in rows] == ["head"] * 6  # every rate with both seeds
    rates = sorted({row.cell.learning_rate for row in rows})
    assert [rate / rates[0] for rate in rates] == [1, 4, 16]
    shown = capsys.readouterr().out
    assert "mrpc (full)" in shown and "F1, points" in shown


# ---- metrics


class Says(torch.nn.Module):
    """Logits as they are given, whatever the input."""

    def forward(self, x, labels=None):
        return type("Out", (), {"logits": x})


def labelled(logits: list[list[float]], labels: list[float]) -> Examples:
    return Examples({"x": torch.tensor(logits)}, torch.tensor(labels))


def test_metrics_against_arithmetic():
    said = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]  # 1 1 0 0
    data = labelled(said, [1, 0, 1, 0])
    assert hub_metrics.f1(Says(), data, CPU) == pytest.approx(0.5)
    assert hub_metrics.matthews(Says(), data, CPU) == pytest.approx(0.0)
    assert ACCURACY.score(Says(), data, CPU) == 0.5
    assert hub_metrics.matthews(Says(), labelled(said, [1, 1, 0, 0]), CPU) == pytest.approx(1.0)
    ranks = labelled([[0.1], [0.4], [0.2]], [1.0, 9.0, 2.0])
    assert hub_metrics.spearman(Says(), ranks, CPU) == pytest.approx(1.0)
    assert hub_metrics.spearman(Says(), labelled([[1.0], [1.0]], [1.0, 2.0]), CPU) == 0.0


# ---- SQuAD


SQUAD_ROWS = [
    {
        "id": "1", "title": "t", "question": "what was in the house ?",
        "context": "the dog ran . the red cat was in the house .",
        "answers": {"text": ["the red cat", "cat"], "answer_start": [14, 22]},
    },
    {
        "id": "2", "title": "t", "question": "where was the tree ?",
        "context": "the dog ran .", "answers": {"text": [], "answer_start": []},
    },
]  # fmt: skip


def squad_splits(tmp_path, bert, monkeypatch, length: int):
    small(monkeypatch, "squad2", size=length, batch=4)
    typed = Dataset.from_list(SQUAD_ROWS * 10)
    (tmp_path / "squad2").mkdir()
    typed.to_parquet(str(tmp_path / "squad2" / "train.parquet"))
    Dataset.from_list(SQUAD_ROWS).to_parquet(str(tmp_path / "squad2" / "validation.parquet"))
    task = hub_task("squad2", data=tmp_path, weights=bert)
    return task, task.load(0)


@pytest.mark.parametrize("length", [32, 15])
def test_squad_answers_are_found_in_their_windows(length, tmp_path, bert, monkeypatch):
    _, splits = squad_splits(tmp_path, bert, monkeypatch, length)
    windows = splits.test
    assert (len(windows) > 2) == (length == 15)  # long texts take several windows
    found = set()
    for k, owner in enumerate(windows.owners):
        start, end = int(windows.starts[k]), int(windows.ends[k])
        if start:
            text = windows.contexts[owner][windows.spans[k][start][0] : windows.spans[k][end][1]]
            found.add((owner, text))
    assert found == {(0, "the red cat")}


def test_squad_logits_become_answers(tmp_path, bert, monkeypatch):
    _, splits = squad_splits(tmp_path, bert, monkeypatch, 32)
    windows = splits.test
    starts, ends = torch.zeros(2, 32), torch.zeros(2, 32)
    starts[0, windows.starts[0]], ends[0, windows.ends[0]] = 5.0, 5.0
    starts[1, 0] = ends[1, 0] = 5.0
    assert squad.best_answers(windows, starts, ends) == ["the red cat", ""]
    starts[0, 0] = ends[0, 0] = 9.0
    assert squad.best_answers(windows, starts, ends) == ["", ""]


def test_squad_scores_words():
    assert squad.word_f1("The red cat.", "red cat") == 1.0
    assert squad.word_f1("a red dog", "red cat") == pytest.approx(0.5)
    assert squad.word_f1("", "") == 1.0 and squad.word_f1("", "cat") == squad.word_f1("dog", "cat") == 0.0


def test_squad_trains_and_is_scored(tmp_path, bert, monkeypatch):
    task, splits = squad_splits(tmp_path, bert, monkeypatch, 32)
    model = task.make_model(0)
    batch = splits.train[slice(0, 4)]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    model(**batch).loss.backward()
    assert 0.0 <= task.metric.score(model, splits.test, CPU) <= 1.0


# ---- images


def picture(colour: int) -> bytes:
    held = io.BytesIO()
    Pictures.new("L" if colour % 2 else "RGB", (20, 28), colour).save(held, format="PNG")  # ImageNet has grey ones
    return held.getvalue()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet"])
def test_images_are_read_encoded_and_scored(name, tmp_path, vit, monkeypatch):
    try:
        AutoImageProcessor.from_pretrained(vit)
    except ImportError as error:  # older versions need torchvision, which nothing else here does
        pytest.skip(str(error).strip())
    small(monkeypatch, name, size=32, batch=4)
    task = PAPER_TASKS[name]
    features = Features({task.columns[0]: Image(), task.label: ClassLabel(num_classes=task.labels)})
    if name == "cifar100":
        features["coarse_label"] = Value("int64")
    (tmp_path / name).mkdir()
    for part, count in (("train", 20), (task.test, 6)):
        rows = [
            {task.columns[0]: {"bytes": picture(k), "path": None}, task.label: k % 10, "coarse_label": 0}
            for k in range(count)
        ]
        rows = [{key: row[key] for key in features} for row in rows]
        Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / name / f"{part}.parquet"))
    built = hub_task(name, data=tmp_path, weights=vit)
    splits = built.load(0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 6)
    batch = splits.train[torch.tensor([3, 1])]
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    model = built.make_model(0)
    assert model.config.num_labels == task.labels
    model(**batch).loss.backward()
    assert 0 <= built.metric.score(model, splits.test, CPU) <= 1
