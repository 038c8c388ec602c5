"""Twenty-one Hugging Face architectures, each built from a tiny config with random weights, and one batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from effort import THOROUGH
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, WIDE, VOCABULARY = 32, 2 if THOROUGH else 1, 2, 64, 97
BATCH, LENGTH, PIXELS = 4, 16, 32

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "image_size": PIXELS,
    "patch_size": 8,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("classify", _TEXT),
    "roberta": ("classify", {**_TEXT, **_ENDS}),
    "distilbert": (
        "classify",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": WIDE,
            "max_position_embeddings": 64,
        },
    ),
    "albert": ("classify", {**_TEXT, "num_hidden_layers": 2, "embedding_size": 16}),  # which share their weights
    "electra": ("classify", {**_TEXT, "embedding_size": 16}),
    "deberta-v2": (
        "classify",
        {
            **_TEXT,
            "num_hidden_layers": 1,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
        },
    ),
    "mpnet": ("classify", {**_TEXT, **_ENDS}),
    "gpt2": (
        "causal",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, **_ENDS},
    ),
    "opt": ("causal", {**_TEXT, "ffn_dim": WIDE, "word_embed_proj_dim": WIDTH, **_ENDS}),
    "llama": ("causal", _DECODER),
    "qwen2": ("causal", _DECODER),
    "mixtral": ("causal", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("causal", {**_DECODER, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8}),
    "t5": (
        "translate",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": WIDE,
            "num_layers": 1,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "translate",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": WIDE,
            "decoder_ffn_dim": WIDE,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
            **_ENDS,
        },
    ),
    "vit": ("look", _IMAGE),
    "deit": ("look", _IMAGE),
    "swin": (
        "look",
        {
            "image_size": PIXELS,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
    ),
    "beit": ("look", {**_IMAGE, "use_relative_position_bias": True}),
    "convnext": (
        "look",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "drop_path_rate": 0.1, "image_size": PIXELS},
    ),
    "clip": (
        "match",
        {
            "text_config": {**_TEXT, "projection_dim": 16, **_ENDS},
            "vision_config": {**_IMAGE, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
}
"""Model type -> (kind of task, what differs from that type's default config)."""

_CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "translate": "AutoModelForSeq2SeqLM",
    "look": "AutoModelForImageClassification",
    "match": "AutoModel",
}


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny model of this type, in training mode; equal weights for equal seeds."""
    import transformers

    kind, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(name, **{**settings, **changes})
    if kind in ("classify", "look"):
        config.problem_type = "single_label_classification"  # or the first forward sets it, and is compiled twice
    config.architectures = {"deit": ["DeiTForImageClassification"]}.get(name)  # one of two that this config can build
    torch.manual_seed(seed)
    return getattr(transformers, _CLASSES[kind]).from_config(config).train()


def batch(name: str, *, size: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    """A batch with labels for the model of this type."""
    torch.manual_seed(7)
    makers: dict[str, Callable[[int, int], dict[str, Any]]] = {
        "classify": lambda n, m: {**_text(n, m), "labels": torch.randint(0, 2, (n,))},
        "causal": lambda n, m: {**_text(n, m), "labels": _tokens(n, m), "use_cache": False},
        "translate": lambda n, m: {**_text(n, m), "labels": _tokens(n, m), "use_cache": False},
        "look": lambda n, m: {**_image(n), "labels": torch.randint(0, 2, (n,))},
        "match": lambda n, m: {**_text(n, m), **_image(n), "return_loss": True},
    }
    return makers[CONFIGS[name][0]](size, length)


def _tokens(size: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (size, length))


def _text(size: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, -length // 4 :] = 0
    tokens = _tokens(size, length)
    tokens[:, -1] = 2  # CLIP pools at the end token
    return {"input_ids": tokens, "attention_mask": mask}


def _image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, PIXELS, PIXELS)}
