"""Freezable units: the paper's rule on real architectures, and every way to choose otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_fx.units import GateUnit, find_units


def names(found) -> list[str]:
    return [unit.name for unit in found.units]


def reasons(found) -> dict[str, str]:
    return dict(found.always)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Plain(nn.Module):
    def __init__(self, head: str = "head") -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.add_module(head, nn.Linear(8, 3))


# ---- the default rule


def test_matrices_and_norm_weights_are_units_and_the_rest_has_a_reason():
    found = find_units(Plain())
    assert names(found) == [
        "blocks.0.norm.weight",
        "blocks.0.fc.weight",
        "blocks.1.norm.weight",
        "blocks.1.fc.weight",
    ]
    assert reasons(found)["blocks.0.fc.bias"] == "one-dimensional: its gradient needs no activation"
    assert reasons(found)["head.weight"] == reasons(found)["head.bias"] == "task head"
    assert found.units[1] == GateUnit("blocks.0.fc.weight", ("blocks.0.fc.weight",), numel=64, bytes=256)
    assert found.units[1].info.grad_bytes == 256


def test_units_and_always_partition_the_trainable_parameters():
    model = Plain()
    model.blocks[0].fc.weight.requires_grad_(False)
    found = find_units(model)
    everything = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(names(found)) | set(reasons(found)) == everything
    assert not set(names(found)) & set(reasons(found))


@pytest.mark.parametrize(
    ("name", "is_head"),
    [("head", True), ("classifier", True), ("fc", True), ("lm_head", True), ("proj_out", True), ("Score", True)]
    + [("decoder", False), ("fc2", False), ("forecast", False)],
)
def test_plain_head_is_known_by_its_name(name, is_head):
    assert (reasons(find_units(Plain(name))).get(f"{name}.weight") == "task head") is is_head


def test_plain_head_is_the_last_linear_and_not_in_a_numbered_block():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
    found = find_units(model)
    assert names(found) == ["fc.weight", "classifier.0.weight"]
    encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"output": nn.Linear(4, 4)})])})
    assert names(find_units(encoder)) == ["layers.0.output.weight"]


def test_plain_head_tied_to_the_embedding_is_freezable():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "lm_head": nn.Linear(4, 10, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    (unit,) = find_units(model).units
    assert unit == GateUnit("embed.weight", ("embed.weight", "lm_head.weight"), numel=40, bytes=160)


class T5LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class Normaliser(T5LayerNorm):
    """No norm by its name: "Norm" goes on with a small letter."""


@pytest.mark.parametrize(
    ("module", "units"),
    [
        (nn.LayerNorm(4), ["1.weight"]),
        (nn.RMSNorm(4), ["1.weight"]),
        (nn.GroupNorm(2, 4), ["1.weight"]),
        (nn.LayerNorm((2, 4)), ["1.weight", "1.bias"]),  # more than one dimension
        (T5LayerNorm(4), ["1.weight"]),
        (Normaliser(4), []),
        (nn.BatchNorm1d(4), []),  # keeps running statistics
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms(module, units):
    found = find_units(nn.Sequential(nn.Linear(4, 4), module))
    assert names(found) == ["0.weight", *units]


def test_sparse_embeddings_always_train():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    found = find_units(model)
    assert names(found) == ["1.weight"]
    assert reasons(found)["0.weight"] == "its embedding has sparse gradients"


def test_one_module_used_twice_is_one_unit():
    shared = nn.Linear(4, 4)
    (unit,) = find_units(nn.ModuleDict({"a": shared, "b": shared})).units
    assert unit.name == "a.weight" and unit.params == ("a.weight", "b.weight")


def test_names_are_those_of_named_parameters():
    model = Plain()
    assert [u.name for u in find_units(model, lambda name, p: True).units] == [n for n, _ in model.named_parameters()]


def test_meta_device_is_enough():
    with torch.device("meta"):
        model = Plain()
    assert len(find_units(model).units) == 4


# ---- Hugging Face


def hugging_face(kind: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.device("meta"):
        match kind:
            case "bert":
                return t.BertForSequenceClassification(t.BertConfig(vocab_size=50, **small))
            case "bert_mlm":
                return t.BertForMaskedLM(t.BertConfig(vocab_size=50, **small))
            case "bert_base":
                return t.BertModel(t.BertConfig(vocab_size=50, **small))
            case "gpt2":
                return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
            case "vit":
                return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, **small))
            case "llama":
                return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, **small))
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "bert_base", "gpt2", "vit", "llama"])
def test_hugging_face_units_follow_the_rule(kind):
    model = hugging_face(kind)
    found = find_units(model)
    params = dict(model.named_parameters())
    for unit in found.units:
        assert params[unit.name].dim() > 1 or "norm" in unit.name.lower() or "ln_" in unit.name
        assert not unit.name.endswith("bias")
    for name, reason in found.always:
        assert reason == "task head" or params[name].dim() == 1
    assert set(names(found)) | set(reasons(found)) == set(params)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("bert_base", set()),
        ("gpt2", set()),  # lm_head is the embedding
        ("vit", {"classifier.weight", "classifier.bias"}),
        ("llama", {"lm_head.weight"}),
    ],
)
def test_hugging_face_heads_always_train(kind, head):
    found = find_units(hugging_face(kind))
    assert {name for name, reason in found.always if reason == "task head"} == head


def test_hugging_face_tied_decoder_is_one_unit_with_the_embedding():
    model = hugging_face("bert_mlm")
    found = find_units(model)
    tied = {unit.name: unit.params for unit in found.units if len(unit.params) > 1}
    assert tied == {
        "bert.embeddings.word_embeddings.weight": (
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
        )
    }
    assert reasons(found)["cls.predictions.transform.dense.weight"] == "task head"


def test_hugging_face_gpt2_names_and_tie():
    found = find_units(hugging_face("gpt2"))
    assert found.units[0].params == ("transformer.wte.weight", "lm_head.weight")
    assert "transformer.h.1.mlp.c_fc.weight" in names(found)
    assert "transformer.ln_f.weight" in names(found)


def test_adapters_are_units_and_the_frozen_base_is_not():
    class Adapted(nn.Module):  # as peft: a wrapper that knows the model inside
        def __init__(self) -> None:
            super().__init__()
            self.inner = hugging_face("bert").requires_grad_(False)
            self.inner.classifier.requires_grad_(True)
            self.inner.bert.lora_A = nn.Linear(16, 2, bias=False)

        def get_base_model(self):
            return self.inner

    found = find_units(Adapted())
    assert names(found) == ["inner.bert.lora_A.weight"]
    assert set(reasons(found)) == {"inner.classifier.weight", "inner.classifier.bias"}


# ---- choosing


def test_predicate_replaces_the_rule():
    found = find_units(Plain(), lambda name, param: name.startswith("head") or param.dim() == 2)
    assert names(found) == ["blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight", "head.bias"]
    assert reasons(found)["blocks.0.norm.weight"] == "left out by the units predicate"


@pytest.mark.parametrize("patterns", ["blocks.1.*", ["blocks.1.*"], ("blocks.1.norm.*", "blocks.1.fc.*")])
def test_patterns_replace_the_rule(patterns):
    found = find_units(Plain(), patterns)
    assert names(found) == [f"blocks.1.{name}" for name in ("norm.weight", "norm.bias", "fc.weight", "fc.bias")]
    assert reasons(found)["head.weight"] == "matches no pattern in units"


def test_patterns_know_every_name_of_a_tied_parameter():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "lm_head": nn.Linear(4, 10, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    assert names(find_units(model, "lm_head.*")) == ["embed.weight"]


# ---- errors


def test_patterns_that_match_nothing_are_listed_with_what_is_near():
    with pytest.raises(ValueError, match=r"'blocks.0.fc.wieght' matches no .* near it: \['blocks.0.fc.weight'") as info:
        find_units(Plain(), ["blocks.0.fc.wieght", "blocks.*", "encoder.*"])
    assert "'encoder.*' matches no trainable parameter" in str(info.value)
    assert "'blocks.*' matches" not in str(info.value)


def test_patterns_do_not_see_frozen_parameters():
    model = Plain()
    model.blocks[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'blocks.0.\*' matches no trainable parameter"):
        find_units(model, "blocks.0.*")


@pytest.mark.parametrize("units", [3, [1], {"a": 1}])
def test_units_of_another_type(units):
    with pytest.raises(TypeError, match=r"units must be None, a predicate .* or name patterns, got"):
        find_units(Plain(), units)


def test_no_patterns():
    with pytest.raises(ValueError, match=r"units must name at least one parameter, got \[\]"):
        find_units(Plain(), [])


def test_predicate_must_answer_with_a_bool():
    with pytest.raises(TypeError, match=r"units must return True or False, got None for 'blocks.0.norm.weight'"):
        find_units(Plain(), lambda name, param: None)  # type: ignore[arg-type, return-value]


def test_nothing_freezable():
    with pytest.raises(
        ValueError, match=r"nothing is freezable among 2 trainable .*0.weight.*one-dim.*choose some with"
    ):
        find_units(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="nothing is freezable .*make units return True for some"):
        find_units(Plain(), lambda name, param: False)


def test_no_parameters():
    with pytest.raises(ValueError, match="model must have parameters, ReLU has none"):
        find_units(nn.ReLU())


def test_no_trainable_parameters():
    with pytest.raises(ValueError, match="must have trainable parameters: all 2 have requires_grad=False"):
        find_units(nn.Linear(2, 2).requires_grad_(False))


def test_lazy_parameters():
    with pytest.raises(ValueError, match=r"no shape yet: \['1.weight', '1.bias'\]: run one forward"):
        find_units(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
