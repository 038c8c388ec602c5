"""Build a Hugging Face model and a batch for it on the meta device: no weights, no memory, no network.

A model is named by a folder or file with its ``config.json``, by one of the names in ``KNOWN``, or by any name whose
config already lies in the local Hugging Face cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx._suggest import did_you_mean, unknown

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", {}),
    "bert-base-cased": ("bert", {"vocab_size": 28996}),
    "bert-large-uncased": ("bert", _LARGE),
    "bert-large-cased": ("bert", {"vocab_size": 28996, **_LARGE}),
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", {**_ROBERTA, **_LARGE}),
    "distilbert-base-uncased": ("distilbert", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "google/vit-base-patch16-224": ("vit", {"num_labels": 1000}),
    "google/vit-base-patch16-384": ("vit", {"image_size": 384, "num_labels": 1000}),
    "google/vit-large-patch16-224": ("vit", {"num_labels": 1000, **_LARGE}),
    "google/vit-large-patch16-384": ("vit", {"image_size": 384, "num_labels": 1000, **_LARGE}),
    "facebook/deit-base-patch16-224": ("vit", {"num_labels": 1000}),
    "facebook/deit-small-patch16-224": ("vit", {"num_labels": 1000, **_SMALL}),
    "facebook/deit-tiny-patch16-224": ("vit", {"num_labels": 1000, **_TINY}),
    "meta-llama/Llama-3.2-1B": ("llama", {**_LLAMA, "architectures": ["LlamaForCausalLM"]}),
}
"""Name -> (model type, what differs from that type's default config)."""

_ORGANISATIONS = ("google-bert", "FacebookAI", "openai-community", "distilbert")
"""Owners that the Hub puts before some of the names above."""

Shape = tuple[int, ...]
Batch = dict[str, Tensor]


def _tokens(size: Shape, config: Any) -> Batch:
    return {name: _integers(size) for name in ("input_ids", "attention_mask")}


def _integers(size: Shape) -> Tensor:
    return torch.zeros(size, dtype=torch.int64, device="meta")


def _classification(size: Shape, config: Any) -> Batch:
    config.problem_type = "single_label_classification"  # or the first forward sets it, from the labels
    return {**_tokens(size, config), "labels": _integers(size[:1])}


def _per_token(size: Shape, config: Any) -> Batch:
    return {**_tokens(size, config), "labels": _integers(size)}


def _question_answering(size: Shape, config: Any) -> Batch:
    return {**_tokens(size, config), "start_positions": _integers(size[:1]), "end_positions": _integers(size[:1])}


def _images(size: Shape, config: Any) -> Batch:
    config.problem_type = "single_label_classification"
    side = getattr(config, "image_size", 224)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    pixels = torch.zeros((size[0], getattr(config, "num_channels", 3), *sides), device="meta")
    return {"pixel_values": pixels, "labels": _integers(size[:1])}


TASKS: dict[str, tuple[str, str, Callable[[Shape, Any], Batch]]] = {
    "sequence-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification", _classification),
    "image-classification": ("AutoModelForImageClassification", "ForImageClassification", _images),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification", _per_token),
    "question-answering": ("AutoModelForQuestionAnswering", "ForQuestionAnswering", _question_answering),
    "causal-lm": ("AutoModelForCausalLM", "ForCausalLM", _per_token),
    "masked-lm": ("AutoModelForMaskedLM", "ForMaskedLM", _per_token),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "ForConditionalGeneration", _per_token),
}
"""Task -> (transformers' auto class, how its architectures' names end, the batch it takes)."""


def build(
    name: str,
    *,
    task: str = "auto",
    batch: int = 8,
    length: int = 128,
    resolution: int | None = None,
    attention: str | None = None,
) -> tuple[nn.Module, Batch]:
    """Return the model in training mode and a batch of inputs with labels, all on the meta device.

    Args:
        name: path of a config, or a name (see the module's text).
        task: one of ``TASKS``, or ``"auto"``: what the config's architecture says, where masked language modelling
            stands for sequence classification, which is what such a model is fine-tuned for.
        batch: examples.
        length: tokens per example (text models).
        resolution: pixels per side (image models); None is the config's own.
        attention: ``"sdpa"`` or ``"eager"``; None is the library's choice.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: unknown name or task, or sizes that the model cannot take.
    """
    transformers = _transformers()
    _check_sizes(batch=batch, length=length, resolution=resolution)
    config = load_config(name)
    task = _task_of(config) if task == "auto" else task
    if task not in TASKS:
        raise ValueError(unknown("task", task, ("auto", *TASKS)))
    auto_class, _, make_batch = TASKS[task]
    if task == "image-classification":
        _set_resolution(config, resolution)
    else:
        _check_length(config, length)
    inputs = make_batch((batch, length), config)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = getattr(config, "eos_token_id", None) or 0  # classifying a batch needs one
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config, **options)
    return model.train(), inputs


def load_config(name: str) -> Any:
    """Return the transformers config of this path or name. Never uses the network.

    Raises:
        ValueError: there is no such file and no such name, or the file is no config.
    """
    transformers = _transformers()
    short = name.split("/", 1)[1] if name.split("/", 1)[0] in _ORGANISATIONS else name
    if Path(name).exists() or short not in KNOWN:
        try:
            return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(_no_config(name, error)) from error
    kind, changes = KNOWN[short]
    return transformers.AutoConfig.for_model(kind, **changes)


def _no_config(name: str, error: Exception) -> str:
    if Path(name).exists():
        return f"no usable config.json at {name!r}: {str(error).splitlines()[0]}"
    return (
        f"no config called {name!r} is known here{did_you_mean(name, KNOWN)}: give the path of a config.json or of its "
        f"folder, a name in the local Hugging Face cache, or one of {sorted(KNOWN)}"
    )


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        message = "transformers is needed to build a model from its config: pip install 'slimfit-fx[hf]'"
        raise ModuleNotFoundError(message) from error
    return transformers


def _task_of(config: Any) -> str:
    """Return the task that the config's architecture was made for; classification for a bare or pretrained one."""
    names = getattr(config, "architectures", None) or [""]
    for task, (_, ending, _) in TASKS.items():
        if task != "masked-lm" and names[0].endswith(ending):
            return task
    if names[0].endswith("LMHeadModel") or config.model_type == "gpt2":
        return "causal-lm"
    if getattr(config, "image_size", None) is not None:
        return "image-classification"
    return "sequence-classification"


def _check_sizes(**sizes: int | None) -> None:
    bad = [f"{name} must be >= 1, got {size!r}" for name, size in sizes.items() if size is not None and size < 1]
    if bad:
        raise ValueError("\n".join(bad))


def _check_length(config: Any, length: int) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and config.model_type in {"roberta", "xlm-roberta", "camembert"}:
        most -= config.pad_token_id + 1  # its positions are counted from there
    if isinstance(most, int) and 0 < most < length:
        raise ValueError(f"length must be at most {most} for this {config.model_type} model, got {length}")


def _set_resolution(config: Any, resolution: int | None) -> None:
    patch = getattr(config, "patch_size", None)
    if resolution is not None and isinstance(patch, int) and resolution % patch:
        raise ValueError(f"resolution must be a multiple of the patch size {patch}, got {resolution}")
    if resolution is not None:
        config.image_size = resolution
