"""lay_out_masks: a mask that attention's backward reads expanded stands in memory before it is expanded."""

from __future__ import annotations

import operator

import torch
from graphs import ATEN, Sketch
from torch import fx

from slimfit_fx.passes.insert_gates import LAID_OUT
from slimfit_fx.passes.lay_out_masks import lay_out_masks

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 4, 8


class Backward:
    """A backward graph of some attentions."""

    def __init__(self) -> None:
        self.sketch = s = Sketch()
        self.heads = s.input("tangents_1", BATCH, HEADS, TOKENS, WIDTH)
        self.sums = s.input("sums", BATCH, HEADS, TOKENS)
        self.allowed = s.input("allowed", BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
        self.stored = s.input("stored", BATCH, 1, TOKENS, TOKENS)
        self.results: list[fx.Node] = []

    def mask(self) -> fx.Node:
        call = self.sketch.call
        lowest = call(ATEN.full.default, [], -torch.inf, dtype=torch.float32, device="cpu")
        return call(ATEN.where.self, self.allowed, self.stored, lowest)

    def expanded(self, mask: fx.Node) -> fx.Node:
        return self.sketch.call(ATEN.expand.default, mask, [BATCH, HEADS, TOKENS, TOKENS])

    def attention(self, mask: fx.Node) -> None:
        x = self.heads
        backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
        both = self.sketch.call(backward, x, x, x, x, x, self.sums, 0.0, False, attn_mask=mask)
        self.results.append(self.sketch.call(operator.getitem, both, 0))

    def done(self) -> fx.GraphModule:
        return self.sketch.returns(*self.results)


def pinned(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target is LAID_OUT]


def test_a_mask_is_pinned_before_it_is_expanded_once_for_all_readers():
    b = Backward()
    mask = b.mask()
    b.attention(b.expanded(mask))
    b.attention(b.expanded(mask))
    module = b.done()
    assert lay_out_masks(module) == 1
    (pin,) = pinned(module)
    assert pin.args == (mask,) and {user.target for user in pin.users} == {ATEN.expand.default}
    assert len(pin.users) == 2 and pin.meta["val"] is mask.meta["val"]
    assert lay_out_masks(module) == 0 and pinned(module) == [pin], "a second run finds nothing to do"


def test_what_lies_in_memory_anyway_or_is_not_expanded_stays():
    b = Backward()
    b.attention(b.expanded(b.stored))
    b.attention(b.sketch.call(ATEN.mul.Tensor, b.expanded(b.mask()), 1.0))
    module = b.done()
    before = module.code
    assert lay_out_masks(module) == 0 and module.code == before


def test_other_readers_of_an_expanded_value_do_not_matter():
    b = Backward()
    expanded = b.expanded(b.mask())
    b.results.append(b.sketch.call(ATEN.add.Tensor, expanded, 1.0))
    assert lay_out_masks(b.done()) == 0
    b = Backward()
    expanded = b.expanded(b.mask())
    b.attention(expanded)
    b.results.append(b.sketch.call(ATEN.add.Tensor, expanded, 1.0))
    module = b.done()
    assert lay_out_masks(module) == 1
    module.graph.lint()


def test_the_numbers_are_the_same():
    b = Backward()
    b.attention(b.expanded(b.mask()))
    module = b.done()
    torch.manual_seed(0)
    x = torch.randn(BATCH, HEADS, TOKENS, WIDTH)
    allowed = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    given = (x, torch.randn(BATCH, HEADS, TOKENS), allowed, torch.zeros(BATCH, 1, TOKENS, TOKENS))
    expected = module(*given)
    assert lay_out_masks(module) == 1
    for one, other in zip(expected, module(*given), strict=True):
        assert torch.equal(one, other)
