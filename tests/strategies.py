"""One strategy for small valid models, shared by all property tests.

A model is described by a :class:`Spec`: plain data whose ``repr`` is enough to build the same model again, so that a
failing example can be pasted into a test. ``build(spec)`` makes the model with fixed weights, ``inputs(spec)`` a batch.
Every layer maps (batch, length, width) to the same shape; ``LAYERS`` is the list to extend when the engine meets
something new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from effort import THOROUGH
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 17
MOST_LAYERS = 4 if THOROUGH else 3
"""Of the models that are drawn, before any of their layers is repeated."""


class Attention(nn.Module):
    """One way of many to write attention: fused or separate q/k/v, SDPA or eager, masked or not."""

    def __init__(self, width: int, *, fused: bool, eager: bool, mask: str = "none", dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.eager, self.mask, self.dropout = fused, eager, mask, dropout
        parts = [nn.Linear(width, 3 * width)] if fused else [nn.Linear(width, width) for _ in range(3)]
        self.inward, self.out = nn.ModuleList(parts), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        projected = self.inward[0](x).split(width, dim=-1) if self.fused else [layer(x) for layer in self.inward]
        q, k, v = (t.unflatten(-1, (2, width // 2)).transpose(1, 2) for t in projected)
        rate = self.dropout if self.training else 0.0
        if self.eager:
            scores = q @ k.transpose(-1, -2) * (width // 2) ** -0.5
            if self.mask == "causal":
                future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
            mixed = F.dropout(scores.softmax(-1), rate) @ v
        else:
            given = self._given(x)
            mixed = F.scaled_dot_product_attention(q, k, v, given, dropout_p=rate, is_causal=self.mask == "causal")
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def _given(self, x: Tensor) -> Tensor | None:
        """The mask that attention is handed, for all heads: (batch, 2, length, length)."""
        places = torch.arange(x.shape[1], device=x.device)
        if self.mask == "handed causal":
            seen = (places[None, :] <= places[:, None])[None, None]
        elif self.mask == "by content":
            seen = ((x.detach().mean(-1) > 0) | (places == 0))[:, None, None, :]
        else:
            return None
        return seen.expand(x.shape[0], 2, x.shape[1], x.shape[1])


class FeedForward(nn.Module):
    """Up, activation, down; ``gated`` splits a fused projection, as SwiGLU does."""

    def __init__(
        self, width: int, activation: Callable[[Tensor], Tensor], *, gated: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.gated, self.dropout = activation, gated, dropout
        self.up, self.down = nn.Linear(width, 2 * width * (2 if gated else 1)), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        return self.down(F.dropout(hidden, self.dropout, self.training))


class Convolution(nn.Module):
    """Along the length, through views: (b, l, w) -> (b, w, l) -> back."""

    def __init__(self, width: int, *, groups: int = 1, flat: bool = True) -> None:
        super().__init__()
        self.flat = flat
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=groups) if flat else nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.conv(x.unsqueeze(1)).sum(1)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Parallel(nn.Module):
    """Two layers that read one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.left(x)) + self.right(x).relu()


class Tied(nn.Module):
    """One weight, read there and back; and a second module that holds the same parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.there, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.again(F.silu(self.there(x))), self.there.weight.t())


class Computed(nn.Module):
    """A weight made of two parameters: the gradient of neither is the gradient of a matrix product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction, self.scale = (
            nn.Parameter(torch.randn(width, width) / 4),
            nn.Parameter(torch.rand(width, 1) + 0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.direction / self.direction.norm(dim=1, keepdim=True))


class Broadcast(nn.Module):
    """Parameters that are added, multiplied and indexed, of 0 to 3 dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.randn(1, 1, width) / 4), nn.Parameter(torch.tensor(1.5))
        self.table = nn.Parameter(torch.randn(3, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (
            (x + self.shift) * self.gain + self.table[1] - self.table[torch.zeros(1, dtype=torch.long, device=x.device)]
        )


class Scale(nn.Module):
    """An RMSNorm written by hand, with the cast that HF models have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Batched(nn.Module):
    """BatchNorm: its statistics are inputs that the forward writes to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view(x.shape)


class Experts(nn.Module):
    """A matrix for each expert, by transformers' operator; the second gets no row. ``turned``: kept the other way."""

    def __init__(self, width: int, *, turned: bool = False) -> None:
        super().__init__()
        self.turned, self.weight = turned, nn.Parameter(torch.randn(3, width, width) / 4)
        self.register_buffer("ends", torch.tensor([1, 1, 3], dtype=torch.int32))  # all rows behind are nobody's

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.transpose(1, 2) if self.turned else self.weight
        rows = x.flatten(0, 1).to(weight.dtype)
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, self.ends).view(x.shape)


class Apply(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(1.5).add_(x)
    y[:, 0] = y[:, 0] * 2
    return F.relu(y * 0.5, inplace=True)


def _views(x: Tensor) -> Tensor:
    flat = x.transpose(1, 2).flatten(1).view(x.shape[0], x.shape[2], -1).permute(0, 2, 1)
    return torch.cat([flat[:, 1:], flat[:, :1].expand(-1, 1, -1)], dim=1) * x.unsqueeze(0).squeeze(0)


def _several(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    values, places = x.max(dim=-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-3) + values * (places > 2).to(x.dtype)


def _unbound(x: Tensor) -> Tensor:
    return torch.stack([2 * part.sin() for part in x.unbind(dim=-1)], dim=-1) + x.cumsum(-1).tanh()


def _masked(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x) * (x.abs() < 2).to(x.dtype) + x.clamp(-1, 1)


def _has_experts() -> bool:
    """Whether transformers is installed, and has here the operator of its experts."""
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.integrations.moe")
    return hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")


LAYERS: dict[str, Callable[[int, float], nn.Module]] = {
    "linear": lambda w, d: nn.Linear(w, w),
    "linear without bias": lambda w, d: nn.Linear(w, w, bias=False),
    "layernorm": lambda w, d: nn.LayerNorm(w),
    "layernorm without bias": lambda w, d: nn.LayerNorm(w, bias=False),
    "plain layernorm": lambda w, d: nn.LayerNorm(w, elementwise_affine=False),
    "rmsnorm": lambda w, d: nn.RMSNorm(w),
    "rmsnorm by hand": lambda w, d: Scale(w),
    "groupnorm": lambda w, d: nn.Sequential(
        Apply(lambda x: x.transpose(1, 2)), nn.GroupNorm(2, w), Apply(lambda x: x.transpose(1, 2))
    ),
    "batchnorm": lambda w, d: Batched(w),
    "gelu": lambda w, d: nn.GELU(),
    "gelu by tanh": lambda w, d: nn.GELU("tanh"),
    "silu": lambda w, d: nn.SiLU(),
    "relu": lambda w, d: nn.ReLU(),
    "tanh": lambda w, d: nn.Tanh(),
    "dropout": lambda w, d: nn.Dropout(d),
    "attention": lambda w, d: Residual(Attention(w, fused=False, eager=False, dropout=d)),
    "fused attention": lambda w, d: Residual(Attention(w, fused=True, eager=False, mask="causal")),
    "attention that is handed a causal mask": lambda w, d: Residual(
        Attention(w, fused=True, eager=False, mask="handed causal", dropout=d)
    ),
    "attention masked by content": lambda w, d: Residual(
        Attention(w, fused=False, eager=False, mask="by content", dropout=d)
    ),
    "eager attention": lambda w, d: Residual(Attention(w, fused=True, eager=True, mask="causal", dropout=d)),
    "separate eager attention": lambda w, d: Attention(w, fused=False, eager=True),
    "ffn": lambda w, d: Residual(FeedForward(w, F.gelu, dropout=d)),
    "relu ffn": lambda w, d: FeedForward(w, F.relu),
    "gated ffn": lambda w, d: Residual(FeedForward(w, F.silu, gated=True)),
    "convolution": lambda w, d: Convolution(w),
    "grouped convolution": lambda w, d: Convolution(w, groups=2),
    "image convolution": lambda w, d: Residual(Convolution(w, flat=False)),
    "parallel": lambda w, d: Parallel(w),
    "tied": lambda w, d: Tied(w),
    "computed weight": lambda w, d: Computed(w),
    "broadcast": lambda w, d: Broadcast(w),
    "in place": lambda w, d: Apply(_in_place),
    "views": lambda w, d: Apply(_views),
    "several outputs": lambda w, d: Apply(_several),
    "unbound": lambda w, d: Apply(_unbound),
    "masked": lambda w, d: Apply(_masked),
}
"""Name -> layer of (width, dropout rate)."""
if _has_experts():
    LAYERS |= {"experts": lambda w, d: Experts(w), "turned experts": lambda w, d: Residual(Experts(w, turned=True))}

HEADS = ("logits", "loss", "tied to the embedding", "several outputs", "intermediate too", "loss and logits")


@dataclass(frozen=True)
class Spec:
    """A model and how it is run."""

    layers: tuple[str, ...]
    head: str = "loss"
    width: int = 8
    tokens: bool = True
    repeat: int | None = None
    """This layer runs a second time at the end: a shared module."""
    frozen: tuple[int, ...] = ()
    """Layers with ``requires_grad=False``."""
    break_at: int | None = None
    """Graph break before this layer."""
    sizes: str = "static"
    """Which sizes are symbolic: "static", "batch" or "all"."""
    autocast: bool = False
    dropout: float = 0.0
    batch: int = 3
    length: int = 4
    every_parameter: bool = True
    """Whether every parameter is a unit; else the default rule."""

    def is_unit(self, name: str, param: nn.Parameter) -> bool:
        """What ``units=`` is given."""
        return self.every_parameter or param.dim() > 1

    @property
    def dynamic(self) -> bool | None:
        return True if self.sizes == "all" else None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()


class Model(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCABULARY, spec.width) if spec.tokens else None
        self.layers = nn.ModuleList(LAYERS[name](spec.width, spec.dropout) for name in spec.layers)
        self.head = nn.Linear(spec.width, VOCABULARY, bias=False)
        if spec.tokens and spec.head == "tied to the embedding":
            self.head.weight = self.embed.weight
        for index in spec.frozen:
            self.layers[index].requires_grad_(False)

    def first(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers[: self.spec.break_at]:
            x = layer(x)
        return x

    def second(self, x: Tensor) -> Tensor:
        if self.spec.break_at is not None:
            for layer in self.layers[self.spec.break_at :]:
                x = layer(x)
        return x if self.spec.repeat is None else self.layers[self.spec.repeat](x)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        early = self.first(x)
        if self.spec.break_at is not None:
            torch._dynamo.graph_break()
        late = self.second(early)
        logits = self.head(late)
        if self.spec.head == "several outputs":
            return {"logits": logits, "pooled": logits.mean(1), "places": logits.argmax(-1)}
        if self.spec.head == "intermediate too":
            return logits, early, late
        if self.spec.head == "logits":
            return logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "late": late} if self.spec.head == "loss and logits" else loss


def build(spec: Spec) -> nn.Module:
    """The model in training mode; always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(spec).train()


def inputs(spec: Spec, *, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """(tokens or vectors, labels); with symbolic batch sizes marked so."""
    generator = torch.Generator().manual_seed(1)
    size = (spec.batch if batch is None else batch, spec.length)
    labels = torch.randint(VOCABULARY, size, generator=generator)
    data = (
        torch.randint(VOCABULARY, size, generator=generator)
        if spec.tokens
        else torch.randn(*size, spec.width, generator=generator)
    )
    if spec.sizes == "batch":
        for tensor in (data, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
    return data, labels


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    sizes: tuple[str, ...] = ("static", "static", "static", "batch", "all"),
    max_layers: int = MOST_LAYERS,
    repeats: tuple[int, ...] = (1, 1, 3),
) -> Spec:
    """Small valid models, some of identical blocks; shrinks towards one linear layer with static sizes.

    Up to half of ``max_layers`` are repeated, as often as one of ``repeats`` says.
    """
    layers = tuple(draw(st.lists(st.sampled_from(tuple(LAYERS)), min_size=1, max_size=max_layers)))
    if len(layers) <= max_layers // 2:
        layers *= draw(st.sampled_from(repeats))
    places = st.integers(0, len(layers) - 1)
    spec = Spec(
        layers=layers,
        head=draw(st.sampled_from(HEADS)),
        width=draw(st.sampled_from((8, 12, 16))),
        tokens=draw(st.booleans()),
        repeat=draw(st.none() | places),
        frozen=tuple(sorted(draw(st.sets(places, max_size=1)))),
        break_at=draw(st.none() | st.none() | places),
        sizes=draw(st.sampled_from(sizes)),
        autocast=draw(st.sampled_from((False, False, False, True))),
        dropout=draw(st.sampled_from((0.0, 0.1, 0.5))),
        length=draw(st.sampled_from((4, 5, 8))),
        every_parameter=draw(st.booleans()),
    )
    return spec if any(True for _ in trainable(spec)) else dataclasses.replace(spec, frozen=())


def trainable(spec: Spec) -> list[str]:
    return [name for name, param in build(spec).named_parameters() if param.requires_grad]
