"""The models that the benchmarks train, built from their configs: random weights, random data, no network.

BERT is ``BertForSequenceClassification`` or ``...ForQuestionAnswering``, ViT is ``ViTForImageClassification`` with
16-pixel patches, both of width 768; GPT-2 and Llama are ``...ForCausalLM``; all from transformers, at any depth.
``attention_dropout`` is 0 by default: on CPU, SDPA with dropout leaves the flash kernel and materialises the attention
probabilities, for every rival alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bench import emulated_gpu

MODELS = ("bert", "vit", "gpt2", "llama")
DTYPES = ("fp32", "tf32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"batch": 16, "dropout": 0.1, "labels": 2},
    "vit": {"batch": 8, "dropout": 0.0, "labels": 10},
    "gpt2": {"batch": 8, "dropout": 0.1},
    "llama": {"batch": 8, "dropout": 0.0},
}


@dataclass(frozen=True)
class Case:
    """One model, one batch, one device. ``length`` counts tokens (text), ``resolution`` pixels per side (ViT).

    ``head`` is what the model is fine-tuned for: "classification" (one label: regression) or, for BERT, "answers"
    (extractive question answering).
    """

    model: str
    layers: int = 4
    batch: int = 16
    length: int = 128
    resolution: int = 224
    width: int = 768
    heads: int = 12
    vocab: int = 30522
    labels: int = 2
    head: str = "classification"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    attention: str = "sdpa"
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens per example: the length of a text; ViT's patches and its class token."""
        return (self.resolution // 16) ** 2 + 1 if self.model == "vit" else self.length

    @property
    def unit_bytes(self) -> int:
        """Bytes of one (batch, tokens, width) activation: what figures "in units" are counted in."""
        return self.batch * self.tokens * self.width * (2 if self.dtype in _AUTOCAST else 4)

    @property
    def name(self) -> str:
        """A name fit for a file: everything in which two cases usually differ."""
        size = f"res{self.resolution}" if self.model == "vit" else f"len{self.length}"
        parts = [self.model, f"{self.layers}layers", f"batch{self.batch}", size, self.dtype, self.device]
        if self.width != 768:
            parts.insert(2, f"width{self.width}")
        if self.attention != "sdpa":
            parts.append(f"{self.attention}-attention")
        if self.attention_dropout:
            parts.append(f"attention-dropout{self.attention_dropout}")
        return "-".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain Python."""
        return asdict(self)


def make_case(model: str, **settings: Any) -> Case:
    """Return the case of ``model`` with its own defaults; a setting of None means the default."""
    if model not in MODELS:
        raise ValueError(f"unknown model: got {model!r}; legal: {', '.join(MODELS)}")
    known = {f.name for f in fields(Case)}
    given = {k: v for k, v in settings.items() if v is not None and k in known}
    return Case(model=model, **{**_DEFAULTS[model], **given})


def set_up(dtype: str) -> None:
    """Make this process compute as cases of ``dtype`` do."""
    if emulated_gpu.is_active():
        emulated_gpu.prepare()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def build_model(case: Case, *, seed: int = 0) -> nn.Module:
    """Return the model of ``case`` in training mode on its device, weights drawn with ``seed``."""
    set_up(case.dtype)
    torch.manual_seed(seed)
    build = {"bert": _build_bert, "vit": _build_vit, "gpt2": _build_gpt2, "llama": _build_llama}[case.model]
    model = build(case)
    return model.to(case.device).train()


def _common(case: Case) -> dict[str, Any]:
    return {
        "hidden_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "intermediate_size": 4 * case.width,
        "hidden_dropout_prob": case.dropout,
        "attention_probs_dropout_prob": case.attention_dropout,
        "attn_implementation": case.attention,
        "num_labels": case.labels,
        "problem_type": _problem(case),  # set late, it would cost the first step a recompile
    }


def _problem(case: Case) -> str:
    return "regression" if case.labels == 1 else "single_label_classification"


def _build_bert(case: Case) -> nn.Module:
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

    positions = max(512, case.length)
    config = BertConfig(vocab_size=case.vocab, max_position_embeddings=positions, **_common(case))
    kind = BertForQuestionAnswering if case.head == "answers" else BertForSequenceClassification
    model: nn.Module = kind(config)
    return model


def _build_vit(case: Case) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=case.resolution, patch_size=16, **_common(case))
    model: nn.Module = ViTForImageClassification(config)
    return model


def _build_gpt2(case: Case) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=case.vocab,
        n_positions=max(512, case.length),
        n_embd=case.width,
        n_layer=case.layers,
        n_head=case.heads,
        resid_pdrop=case.dropout,
        embd_pdrop=case.dropout,
        attn_pdrop=case.attention_dropout,
        attn_implementation=case.attention,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else the library logs that it takes this one, which breaks the graph in two
    return model


def _build_llama(case: Case) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocab,
        max_position_embeddings=max(512, case.length),
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        attn_implementation=case.attention,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def make_batch(case: Case, *, seed: int = 0) -> dict[str, Tensor]:
    """Return one batch as keyword arguments of the model: int64 ids and mask, or fp32 pixels; and what to learn."""
    generator = torch.Generator().manual_seed(seed)
    batch = _targets(case, generator)
    if case.model != "vit":
        shape = (case.batch, case.length)
        batch["input_ids"] = torch.randint(0, case.vocab, shape, generator=generator)
        if case.model == "bert":
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        else:
            batch["labels"] = batch["input_ids"]
    else:
        batch["pixel_values"] = torch.randn(case.batch, 3, case.resolution, case.resolution, generator=generator)
    return {name: value.to(case.device) for name, value in batch.items()}


def _targets(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    if case.head == "answers":
        names = ("start_positions", "end_positions")
        return {name: torch.randint(0, case.length, (case.batch,), generator=generator) for name in names}
    if case.labels == 1:
        return {"labels": torch.randn(case.batch, generator=generator)}
    return {"labels": torch.randint(0, case.labels, (case.batch,), generator=generator)}


def autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast region that the forward of ``case`` runs in; an empty one for fp32 and TF32."""
    if case.dtype not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(case.device).type, dtype=_AUTOCAST[case.dtype])


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def state_bytes(state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Bytes of an optimizer's state tensors."""
    tensors = (value for entry in state.values() for value in entry.values() if isinstance(value, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)
