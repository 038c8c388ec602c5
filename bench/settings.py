"""The twelve fine-tuning runs of the paper's code, as data, and the model and batch of each.

Source: the authors' published code for SlimFit (arXiv 2305.18513), read there; the paper may differ. All are BERT-base
or ViT-B/16, AdamW, 3 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bench.models import Case, make_case

_CASED, _UNCASED = 28996, 30522


@dataclass(frozen=True)
class Setting:
    """One run. ``size``: tokens per example (BERT) or pixels per side (ViT); ``labels`` of 1: regression."""

    task: str
    model: str
    freeze_rate: float
    batch: int
    size: int
    learning_rate: float
    labels: int
    vocab: int = _CASED
    head: str = "classification"


SETTINGS = (
    Setting("CoLA", "bert", 0.90, 32, 128, 8e-5, 2),
    Setting("SST-2", "bert", 0.95, 32, 128, 8e-5, 2),
    Setting("MRPC", "bert", 0.90, 32, 128, 1.25e-4, 2),
    Setting("STS-B", "bert", 0.85, 32, 128, 8e-5, 1),
    Setting("QQP", "bert", 0.80, 32, 128, 5e-5, 2),
    Setting("MNLI", "bert", 0.80, 32, 128, 4e-5, 3),
    Setting("QNLI", "bert", 0.95, 32, 128, 5e-5, 2),
    Setting("RTE", "bert", 0.90, 16, 128, 1.2e-4, 2),
    Setting("SQuAD 2.0", "bert", 0.80, 128, 384, 1.8e-4, 2, vocab=_UNCASED, head="answers"),
    Setting("CIFAR-10", "vit", 0.90, 32, 224, 7.5e-5, 10),
    Setting("CIFAR-100", "vit", 0.75, 32, 224, 5.5e-5, 100),
    Setting("ImageNet", "vit", 0.95, 128, 384, 5e-5, 1000),
)
TASKS = tuple(setting.task for setting in SETTINGS)


def setting_of(task: str) -> Setting:
    """Return the setting of this task; ValueError if there is none."""
    for setting in SETTINGS:
        if setting.task == task:
            return setting
    raise ValueError(f"unknown task: got {task!r}; legal: {', '.join(TASKS)}")


def case_of(setting: Setting, *, dtype: str, device: str, batch: int | None = None) -> Case:
    """Return the model and batch of ``setting``, with SDPA attention.

    BERT's config drops attention probabilities out, too. A GPU's kernels do that on the fly; on the CPU it would leave
    the flash kernel and keep the probabilities, for every rival alike. So it is done on a GPU, and left out on the CPU.
    """
    sizes: dict[str, Any] = {"length": setting.size} if setting.model == "bert" else {"resolution": setting.size}
    case = make_case(
        setting.model, layers=12, batch=batch or setting.batch, vocab=setting.vocab, labels=setting.labels,
        head=setting.head, dtype=dtype, device=device, **sizes,
    )  # fmt: skip
    return replace(case, attention_dropout=case.dropout) if device.startswith("cuda") else case


def cpu_batch(setting: Setting, most_tokens: int) -> int:
    """Return the largest batch, up to the setting's own, of at most ``most_tokens`` tokens; at least 1."""
    tokens = case_of(setting, dtype="fp32", device="cpu", batch=1).tokens
    return max(1, min(setting.batch, most_tokens // tokens))
