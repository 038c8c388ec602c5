"""simplify_masks: attention without a mask that hides nothing, or is causal."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import compile_reference, differences, equal_bits, optimized, step
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as attention

from slimfit_fx.passes import simplify_masks as masks
from slimfit_fx.passes.simplify_masks import CAUSAL, NOTHING, describe_masks, read_masks
from slimfit_fx.presets import PRESETS

N = 6


def captured(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """Dynamo's graph of ``function``."""
    found = []

    def backend(module: fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(module)
        return module.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (module,) = found
    return module


def qkv(queries: int = N, keys: int = N) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return tuple(torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in sizes)  # type: ignore[return-value]


def attend(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention with ``mask(q, *more)``."""
    return lambda q, k, v, *more: attention(q, k, v, attn_mask=mask(q, *more))


def rows_and_columns(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]


def causal(q: Tensor) -> Tensor:
    rows, columns = rows_and_columns()
    return (columns <= rows).expand(2, -1, N, N)


def everything(q: Tensor) -> Tensor:
    return (torch.arange(N)[None, None, :, None] >= 0).expand(2, -1, N, N)


def additive(lowest: float) -> Callable[[Tensor], Tensor]:
    return lambda q: torch.full((N, N), lowest, dtype=q.dtype).triu(1)


SAYS = {
    "all true, expanded": (everything, NOTHING),
    "all true": (lambda q: torch.ones(N, N, dtype=torch.bool), NOTHING),
    "zeros to add": (lambda q: torch.zeros(1, 1, N, N, dtype=q.dtype), NOTHING),
    "of each key": (lambda q: torch.ones(1, 1, 1, N, dtype=torch.bool), NOTHING),
    "causal": (causal, CAUSAL),
    "lower triangle": (lambda q: torch.ones(N, N, dtype=torch.bool).tril(), CAUSAL),
    "minus infinity to add": (additive(-torch.inf), CAUSAL),
    "the lowest number to add": (additive(torch.finfo(torch.float64).min), CAUSAL),
    "and of two": (lambda q: causal(q) & everything(q), CAUSAL),
}
LEFT = {
    "a window": lambda q: causal(q) & (torch.arange(N)[None, :] > torch.arange(N)[:, None] - 3),
    "the other way": lambda q: torch.ones(N, N, dtype=torch.bool).triu(),
    "blocks": lambda q: (torch.arange(N) // 3)[:, None] == (torch.arange(N) // 3)[None, :],
    "one sample's": lambda q: causal(q) | (torch.arange(2) == 1)[:, None, None, None],
    "numbers to add": lambda q: torch.arange(N, dtype=q.dtype)[None, :] - torch.arange(N, dtype=q.dtype)[:, None],
    "random": lambda q: torch.rand(N, N) > -1,
    "made of an input": lambda q: q[0, 0, :, :1] < 1e9,
    "written to": lambda q: masked_later(torch.ones(N, N, dtype=torch.bool)),
    "written to by a view": lambda q: masked_later(torch.ones(N, N, dtype=torch.bool).tril(), by_view=True),
    "written to with a sign": lambda q: anded(torch.ones(N, N, dtype=torch.bool)),
}


def masked_later(mask: Tensor, *, by_view: bool = False) -> Tensor:
    if by_view:
        mask[1:].t()[2].fill_(False)
    else:
        mask[2, 1] = False
    return mask


def anded(mask: Tensor) -> Tensor:
    mask &= torch.arange(N) != 2
    return mask


@pytest.mark.parametrize("mask, says", SAYS.values(), ids=SAYS)
def test_the_same_without_the_mask(mask, says):
    module = captured(attend(mask), *qkv())
    before = module.code
    assert read_masks(module.graph) == (says,) and module.code == before
    inputs = qkv()
    expected = torch.autograd.grad(module(*inputs)[0].square().sum(), inputs)
    assert masks.simplify_masks(module, (says,)) == 1
    (left,) = (n for n in module.graph.nodes if n.op == "call_function")
    assert left.kwargs["attn_mask"] is None and left.kwargs.get("is_causal", False) is (says == CAUSAL)
    for one, other in zip(expected, torch.autograd.grad(module(*inputs)[0].square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mask", LEFT.values(), ids=LEFT)
def test_what_says_more_or_is_no_constant_stays(mask):
    module = captured(attend(mask), *qkv())
    before = module.code
    assert read_masks(module.graph) == (None,)
    assert masks.simplify_masks(module, (None,)) == 0 and module.code == before


def test_causal_is_another_mask_where_there_are_more_keys():
    lower = attend(lambda q: torch.ones(N, 2 * N, dtype=torch.bool).tril())
    assert read_masks(captured(lower, *qkv(N, 2 * N)).graph) == (None,)
    everywhere = attend(lambda q: torch.ones(N, 2 * N, dtype=torch.bool))
    assert read_masks(captured(everywhere, *qkv(N, 2 * N)).graph) == (NOTHING,)
    each = attend(lambda q: torch.ones(1, 1, dtype=torch.bool).tril())
    assert read_masks(captured(each, *qkv(N, 2 * N)).graph) == (NOTHING,)


def test_symbolic_sizes_are_no_constants():
    def lower(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())

    assert read_masks(captured(lower, *qkv(), dynamic=True).graph) == (None,)
    assert read_masks(captured(lower, *qkv()).graph) == (CAUSAL,)


def test_a_mask_that_is_too_large_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(masks, "MOST_ELEMENTS", N * N - 1)
    monkeypatch.setattr(masks, "_computed", lambda makers: pytest.fail("it was computed"))
    assert read_masks(captured(attend(SAYS["lower triangle"][0]), *qkv()).graph) == (None,)


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        module = captured(attend(lambda q: torch.ones(N, N, dtype=torch.bool).tril()), *(x.to("meta") for x in qkv()))
        assert read_masks(module.graph) == (CAUSAL,)


def test_a_mask_that_cannot_be_computed_stays(monkeypatch):
    def fail(makers: Any) -> Tensor:
        raise NotImplementedError("'tril' not implemented for this dtype")

    monkeypatch.setattr(masks, "_computed", fail)
    assert read_masks(captured(attend(SAYS["lower triangle"][0]), *qkv()).graph) == (None,)


def test_a_mask_is_computed_once_and_stays_for_its_other_readers(monkeypatch):
    computed, original = [], masks._computed
    monkeypatch.setattr(masks, "_computed", lambda makers: computed.append(makers) or original(makers))

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = causal(q)
        return attention(attention(q, k, v, mask, 0.0), k, v, attn_mask=mask), mask.sum()

    module = captured(twice, *qkv())
    expected = module(*qkv())
    assert read_masks(module.graph) == (CAUSAL, CAUSAL) and len(computed) == 1
    assert masks.simplify_masks(module, (CAUSAL, CAUSAL)) == 2
    found = module(*qkv())
    torch.testing.assert_close(found, expected)
    assert any(n.target == "expand" for n in module.graph.nodes), "the sum reads it"


@pytest.mark.filterwarnings("error")
def test_what_several_makers_of_a_mask_read_is_erased_once():
    def mask(q: Tensor) -> Tensor:
        places = torch.arange(N)
        return (places[None, :] - places[:, None] <= 0) & (places.expand(N, N) <= places[:, None])

    module = captured(attend(mask), *qkv())
    assert masks.simplify_masks(module, read_masks(module.graph)) == 1
    assert [n.target for n in module.graph.nodes if n.op in ("call_function", "call_method")] == [attention]


def test_attention_that_is_causal_already_has_no_mask_to_drop():
    module = captured(lambda q, k, v: attention(q, k, v, is_causal=True), *qkv())
    assert read_masks(module.graph) == (None,)


# ---- random masks

_LEAVES = st.sampled_from(["rows", "columns", "zero", "one"])
_COMPARED = st.tuples(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]), _LEAVES, _LEAVES)
_PAIRS = st.sampled_from(["and_", "or_"])
EXPRESSIONS = st.recursive(
    _COMPARED, lambda inner: st.tuples(_PAIRS, inner, inner) | st.tuples(st.just("invert"), inner), max_leaves=4
)


def evaluated(expression: tuple[Any, ...], n: int) -> Tensor:
    rows, columns = rows_and_columns(n)
    leaves = {
        "rows": rows,
        "columns": columns,
        "zero": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        "one": columns * 0 + 1,
    }
    name, *parts = expression
    return getattr(operator, name)(*(leaves[p] if isinstance(p, str) else evaluated(p, n) for p in parts))


@settings(max_examples=examples(40, share=3))
@given(expression=EXPRESSIONS, n=st.integers(1, 4))
def test_random_masks_say_what_their_values_say(expression, n):
    torch._dynamo.reset()
    module = captured(attend(lambda q: evaluated(expression, n).expand(2, 1, n, n)), *qkv(n, n))
    value = evaluated(expression, n).expand(2, 1, n, n)
    lower = torch.ones(n, n, dtype=torch.bool).tril().expand_as(value)
    expected = NOTHING if value.all() else CAUSAL if value.equal(lower) else None
    assert read_masks(module.graph) == (expected,)


# ---- in training


class Attending(nn.Module):
    """Linear layers around attention with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(2, N, 3, 8).permute(2, 0, 1, 3).unsqueeze(2)
        return self.outer(attention(q, k, v, attn_mask=causal(q)).flatten(0, 1))


NO_CODECS = dict.fromkeys(PRESETS["balanced"])
X = (torch.randn(2, N, 8, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize(
    "executor", ["interpreter", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.thorough])]
)
def test_the_exact_preset_keeps_them_and_says_so(executor):
    model = Attending()
    loss, expected = step(compile_reference(model, executor=executor), model, X)
    torch._dynamo.reset()
    model, session = optimized(Attending(), preset="exact", scheduler="none", executor=executor)
    found_loss, found = step(model, model, X)
    assert equal_bits(loss, found_loss) and differences(expected, found) == []
    (note,) = (note for note in session.plan.notes if "masks" in note)
    assert "1 that are causal: they stay" in note


@pytest.mark.parametrize("settings_, dropped", [({}, True), ({"disabled_passes": ("simplify_masks",)}, False)])
def test_other_presets_train_without_them(settings_, dropped):
    reference = Attending()
    loss, expected = step(reference, reference, X)
    model, session = optimized(Attending(), scheduler="none", codecs=NO_CODECS, **settings_)
    found_loss, found = step(model, model, X)
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found, expected)
    (note,) = (note for note in session.plan.notes if "masks" in note)
    assert ("runs without them" in note) is dropped


def test_the_note_counts_both_kinds():
    assert describe_masks((None, None), dropped=True) is None
    told = describe_masks((NOTHING, None, CAUSAL, NOTHING), dropped=True)
    assert (
        told
        == "attention masks made of constants, 2 that hide nothing and 1 that are causal: attention runs without them"
    )


def test_a_language_model_without_padding_trains_alike():
    pytest.importorskip("transformers")
    batch = hf_models.batch("llama")
    del batch["attention_mask"]
    reference = hf_models.build("llama")
    _, expected = step(reference, reference, batch)
    model, session = optimized(hf_models.build("llama"), scheduler="none", codecs=NO_CODECS)
    _, found = step(model, model, batch)
    torch.testing.assert_close(found, expected)
    told = f"{hf_models.LAYERS} that are causal: attention runs without them"
    assert any(told in note for note in session.plan.notes)
