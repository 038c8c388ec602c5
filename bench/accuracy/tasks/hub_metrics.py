"""The metrics of GLUE besides accuracy, each as a share in [-1, 1]."""

from __future__ import annotations

import torch
from torch import nn

from bench.accuracy.tasks.base import POINTS, Metric, Split, predictions


def matthews(model: nn.Module, split: Split, device: torch.device) -> float:
    """Matthews' correlation, CoLA's metric."""
    from sklearn.metrics import matthews_corrcoef

    logits, labels = predictions(model, split, device)
    return float(matthews_corrcoef(labels.numpy(), logits.argmax(-1).numpy()))


def f1(model: nn.Module, split: Split, device: torch.device) -> float:
    """F1 of label 1, the metric of MRPC and QQP; 0 if nothing is labelled 1."""
    from sklearn.metrics import f1_score

    logits, labels = predictions(model, split, device)
    return float(f1_score(labels.numpy(), logits.argmax(-1).numpy(), zero_division=0.0))


def spearman(model: nn.Module, split: Split, device: torch.device) -> float:
    """Spearman's rank correlation, STS-B's metric; 0 for a model that says the same of everything."""
    from scipy.stats import spearmanr

    logits, labels = predictions(model, split, device)
    said = logits.squeeze(-1)
    if bool((said == said[0]).all()):
        return 0.0
    return float(spearmanr(said.numpy(), labels.numpy()).statistic)


MATTHEWS = Metric("Matthews correlation", higher_is_better=True, points=POINTS, score=matthews)
F1 = Metric("F1", higher_is_better=True, points=POINTS, score=f1)
SPEARMAN = Metric("Spearman correlation", higher_is_better=True, points=POINTS, score=spearman)
