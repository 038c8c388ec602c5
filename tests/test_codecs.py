"""Codecs: bounds, bytes, non-finite values, tracing with symbolic sizes, refusals and the registry."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
import torch
from effort import first
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import cosine, optimized, step
from small_models import Tiny, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from slimfit_fx.codecs import Codec, TopK, ValueSpec, codec_names, get_codec, register_codec
from slimfit_fx.codecs import base as codecs_base
from slimfit_fx.codecs.groupwise import PackedInt, group_layout

GROUPWISE = ("int8", "int4", "int2")
STOCHASTIC = tuple(f"{name}-sr" for name in GROUPWISE)
FIXED = ("fixed_gelu4", "fixed_int8", "fixed_uint8")
FLOAT = (*GROUPWISE, *STOCHASTIC, *FIXED, "topk")
ALL = ("bits", *FLOAT)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INNERS = (0, 1, 2, 3, 7, 8, 15, 16, 50, 64, 77, 96, 127, 128, 129, 131, 192, 197, 256, 262, 384, 577, 768)
ODD_VALUES = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Case:
    """A recipe for one tensor; prints as something to paste."""

    leading: tuple[int, ...]
    inner: int
    dtype: torch.dtype
    exponent: int
    kind: str
    seed: int

    def tensor(self) -> Tensor:
        noise = torch.randn(*self.leading, self.inner, generator=torch.Generator().manual_seed(self.seed))
        by_kind = {
            "normal": noise,
            "offset": noise + 1000,
            "constant": torch.full_like(noise, -0.7),
            "zeros": torch.zeros_like(noise),
            "outlier": torch.where(noise > 2, noise * 1e6, noise),
            "positive": noise.abs(),
        }
        largest = torch.finfo(self.dtype).max
        scaled = by_kind[self.kind].double() * 10.0**self.exponent
        return scaled.clamp(-largest, largest).to(self.dtype)


cases = st.builds(
    Case,
    leading=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    inner=st.sampled_from(INNERS) | st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    exponent=st.sampled_from((0, 0, 0, -1, 1, -4, 4, -30, 30, -45, 38)),
    kind=st.sampled_from(("normal", "offset", "constant", "zeros", "outlier", "positive")),
    seed=st.integers(0, 99),
)
quickly = settings(derandomize=True, max_examples=60, deadline=None)


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.dtype, x.shape[-1])


def check_bound(codec: Codec, x: Tensor) -> None:
    """The round trip keeps shape, dtype and layout, and every finite element within its bound."""
    y, bound = round_trip(codec, x), codec.error_bound(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    assert (bound.shape, bound.dtype) == (x.shape, torch.float32)
    finite = x.isfinite()
    error = (y.double() - x.double()).abs()
    assert (error <= bound.double())[finite].all(), f"error exceeds bound {(error / bound)[finite].max()}-fold"


def check_parts(codec: Codec, x: Tensor) -> None:
    """Parts are contiguous, keep the leading sizes, and have the promised number of bytes."""
    parts = codec.encode(x)
    assert all(part.is_contiguous() and part.shape[:-1] == x.shape[:-1] for part in parts)
    assert sum(part.nbytes for part in parts) == codec.encoded_bytes(ValueSpec.of(x))


@pytest.mark.parametrize("name", FLOAT)
@given(case=cases)
@quickly
def test_float_round_trip_within_bound_and_bytes_exact(name: str, case: Case) -> None:
    x, codec = case.tensor(), get_codec(name)
    assert codec.refuses(ValueSpec.of(x)) is None
    check_bound(codec, x)
    check_parts(codec, x)


@given(leading=st.lists(st.integers(0, 3), max_size=3), inner=st.sampled_from(INNERS), seed=st.integers(0, 9))
@quickly
def test_bits_are_lossless(leading: list[int], inner: int, seed: int) -> None:
    mask = torch.randn(*leading, inner, generator=torch.Generator().manual_seed(seed)) > 0.3
    codec = get_codec("bits")
    assert torch.equal(round_trip(codec, mask), mask)
    assert not codec.error_bound(mask).any()
    check_parts(codec, mask)


@pytest.mark.parametrize("name", (*GROUPWISE, *STOCHASTIC))
@given(case=cases, places=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ODD_VALUES)), max_size=5))
@example(case=Case((2,), 64, torch.float32, 0, "normal", 0), places=[(i, math.nan) for i in range(128)])
@example(case=Case((2,), 64, torch.float32, 0, "normal", 0), places=[(i, math.inf) for i in range(128)])
@quickly
def test_nonfinite_come_back(name: str, case: Case, places: list[tuple[int, float]]) -> None:
    """A NaN takes its group along; an infinity spares its neighbours in int8, and leaves nothing finite in the rest."""
    x, codec = case.tensor().clone(), get_codec(name)
    if x.numel() == 0:
        return
    for place, value in places:
        x.view(-1)[place % x.numel()] = value
    y = round_trip(codec, x)
    layout = group_layout(case.inner, 8 // int(name[3]))

    def touched(marks: Tensor) -> Tensor:
        """Elements of the groups in which an element is marked."""
        padded = torch.nn.functional.pad(marks, (0, layout.pad)).unflatten(-1, (layout.groups, layout.size))
        return padded.any(-1, keepdim=True).expand_as(padded).flatten(-2)[..., : case.inner]

    lost = touched(x.isnan())
    assert y[lost].isnan().all()
    kept = x.isinf() & ~lost
    assert torch.equal(y[kept], x[kept])
    if name.startswith("int8"):
        assert y[~lost & ~kept].isfinite().all()
    else:
        lost = lost | touched(kept)
        assert not y[lost].isfinite().any()
    assert codec.error_bound(x)[lost].isinf().all()
    x, y = x.masked_fill(lost, 0.0), y.masked_fill(lost, 0.0)
    finite = x.isfinite()
    assert ((y - x).abs() <= codec.error_bound(x))[finite].all()


@pytest.mark.parametrize("name", (*GROUPWISE, *STOCHASTIC))
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(name: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps
    extremes = [0.0, limits.max, limits.min, limits.tiny, -limits.tiny, least, limits.max / 2, 1.0]
    for low in extremes:
        for high in extremes:
            x = torch.tensor([low, high] * 16, dtype=dtype)
            assert round_trip(get_codec(name), x).isfinite().all()
            check_bound(get_codec(name), x)


@pytest.mark.parametrize("name", (*GROUPWISE, *STOCHASTIC))
def test_zeros_come_back_as_zeros(name: str) -> None:
    x = torch.zeros(3, 197)
    assert torch.equal(round_trip(get_codec(name), x), x)


@pytest.mark.parametrize("name", GROUPWISE)
@pytest.mark.parametrize("value", [1.0, -3.7, 1e-30, -1e30, 65504.0])
def test_constant_groups_come_back_closely(name: str, value: float) -> None:
    x = torch.full((2, 128), value)
    torch.testing.assert_close(round_trip(get_codec(name), x), x, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("name", "least_db"), [("int8", 40.0), ("int4", 18.0), ("int2", 4.0), ("topk", 2.0)])
def test_signal_to_noise_of_normal_values(name: str, least_db: float) -> None:
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    noise = (round_trip(get_codec(name), x) - x).square().mean()
    assert 10 * torch.log10(x.square().mean() / noise) > least_db


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """Over values that differ by a thousandth, as those of successive steps do."""
    generator = torch.Generator().manual_seed(1)
    x, codec, draws = torch.randn(1, 64, generator=generator), get_codec(name), 4000
    near = x * (1 + 1e-3 * torch.randn(draws, 64, generator=generator))
    step = codec.error_bound(x)[0].double()
    errors = (round_trip(codec, near) - near).double()
    assert (errors.mean(0).abs() < 5 * 0.5 * step / math.sqrt(draws)).all()
    nearest = get_codec(name.removesuffix("-sr"))
    biased = (round_trip(nearest, near) - near).double().mean(0).abs()
    assert (biased > 5 * 0.5 * step / math.sqrt(draws)).any(), "rounding to the nearest would pass this test, too"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(get_codec(name), x), round_trip(get_codec(name), x))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ALL)
def test_noncontiguous_input_is_encoded_as_its_contiguous_copy(name: str) -> None:
    base = torch.randn(64, 3, 131, generator=torch.Generator().manual_seed(0))
    for x in (base.transpose(0, 1), base.permute(1, 2, 0), base[::2, :, ::3], base[:, :1].expand(64, 5, 131)):
        value, codec = (x > 0 if name == "bits" else x), get_codec(name)
        parts, expected = codec.encode(value), codec.encode(value.contiguous())
        assert all(torch.equal(p, e) for p, e in zip(parts, expected, strict=True))


@pytest.mark.parametrize("name", GROUPWISE)
def test_layout_covers_the_row_without_waste(name: str) -> None:
    bits = int(name.removeprefix("int"))
    for inner in (*range(600), 768, 1000, 4096, 4800, 30522, 50257):
        layout = group_layout(inner, 8 // bits)
        assert layout.size * layout.groups == inner + layout.pad
        assert layout.size * bits % 8 == 0
        assert layout.pad < max(layout.size, 1)
        assert not (bits == 8 and layout.pad)
        assert inner > 128 or layout.groups <= 1
        nbytes = get_codec(name).encoded_bytes(ValueSpec((inner,), torch.float32, torch.device("cpu")))
        assert inner < 129 or nbytes < (1.13 if bits == 8 else 1.8) * inner * bits / 8 + 4


@pytest.mark.parametrize(
    ("inner", "fields", "size"),
    [(768, 1, 128), (3072, 2, 128), (64, 4, 64), (192, 2, 64), (197, 1, 197), (197, 2, 224), (4800, 1, 64)],
)
def test_layout_of_common_rows(inner: int, fields: int, size: int) -> None:
    assert group_layout(inner, fields).size == size


def test_bytes_per_element_of_a_bert_row() -> None:
    spec = ValueSpec((16, 128, 768), torch.float32, torch.device("cpu"))
    per_element = {name: get_codec(name).encoded_bytes(spec) / (16 * 128 * 768) for name in ALL}
    assert per_element["int8"] == 1 + 4 / 128
    assert per_element["int4"] == 0.5 + 8 / 128
    assert per_element["int2"] == 0.25 + 8 / 128
    assert (per_element["bits"], per_element["fixed_int8"], per_element["fixed_gelu4"]) == (0.125, 1.0, 0.5)
    assert per_element["topk"] == 77 * 6 / 768


def test_bits_and_int4_layouts() -> None:
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 1, 3, 14]] = True  # slices of two: (1,1) (0,1) (0,0) (0,0) (0,0) (0,0) (0,0) (1,0)
    assert get_codec("bits").encode(mask)[0].tolist() == [[0b10000001, 0b00000011]]
    codes, scale, middle = get_codec("int4").encode(torch.arange(16.0).view(1, 16))
    assert codes.tolist() == [[i | (i + 8) << 4 for i in range(8)]]
    torch.testing.assert_close((scale * 2, middle * 2), (torch.tensor([[1.0]]), torch.tensor([[8.0]])))
    codes, scale = get_codec("int8").encode(torch.tensor([[-126.0, 63.4, math.inf, -math.inf, 0.0]]))
    assert codes.tolist() == [[-126, 63, 127, -127, 0]]
    torch.testing.assert_close(scale, torch.tensor([[1.0]]))


def test_fixed_point_formats() -> None:
    x = torch.tensor([-9.0, -4.1, -0.3, 0.0, 0.24, 0.26, 0.5, 1.0, 3.6, 7.95, math.inf, -math.inf, math.nan])
    expected = {
        "fixed_gelu4": [-4.0, -4.0, -0.5, 0.0, 0.0, 0.5, 0.5, 1.0, 3.5, 3.5, 3.5, -4.0, 0.0],
        "fixed_int8": [-8.0, -4.125, -0.3125, 0, 0.25, 0.25, 0.5, 1.0, 3.625, 7.9375, 7.9375, -8.0, 0.0],
        "fixed_uint8": [0.0, 0.0, 0.0, 0.0, 61 / 255, 66 / 255, 128 / 255, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(round_trip(get_codec(name), x), torch.tensor(values), rtol=0, atol=1e-7)
        assert not get_codec(name).keeps_nonfinite


def test_topk_keeps_the_largest_in_compact_places() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0, math.nan, 0.5, 3.0, -math.inf, 0.1]])
    y = round_trip(TopK(0.5), x)
    assert torch.equal(y.nan_to_num(7.0), torch.tensor([[0.0, -5, 0, 7, 0, 3, torch.finfo().min, 0]]))
    assert TopK().encode(torch.randn(2, 100))[1].dtype == torch.int16
    assert TopK(1e-4).encode(torch.randn(1, 2**15 + 1))[1].dtype == torch.int32
    wide = torch.zeros(1, 2**15)
    wide[0, -1] = 1.0
    assert torch.equal(round_trip(TopK(1e-4), wide), wide)


# --- tracing ---------------------------------------------------------------------------------------------------------


def fake_with_symbolic_leading_sizes(x: Tensor) -> tuple[Tensor, FakeTensorMode]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.DYNAMIC] * (x.dim() - 1) + [DimDynamic.STATIC]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)), mode


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inner", first([197, 768]))
def test_traces_with_symbolic_leading_sizes_and_no_guard(name: str, inner: int) -> None:
    codec = get_codec(name)

    def value(*leading: int) -> Tensor:
        x = torch.randn(*leading, inner, generator=torch.Generator().manual_seed(0))
        return x > 0 if name == "bits" else x

    fake, mode = fake_with_symbolic_leading_sizes(value(3, 5))
    spec = ValueSpec.of(fake)
    assert codec.refuses(spec) is None
    with mode:
        graph = make_fx(lambda x: (*codec.encode(x), round_trip(codec, x)))(fake)
    assert mode.shape_env is not None
    guards = [str(guard.expr) for guard in mode.shape_env.guards]
    assert not guards, guards
    outputs: Any = graph.graph.output_node().args[0]
    assert outputs[-1].meta["val"].shape == fake.shape
    for leading in ((3, 5), (2, 7)):
        x = value(*leading)
        torch.manual_seed(0)
        traced = graph(x)
        torch.manual_seed(0)
        assert all(torch.equal(t, e) for t, e in zip(traced, (*codec.encode(x), round_trip(codec, x)), strict=True))
    nbytes = spec.rows * sum(part.meta["val"].shape[-1] * part.meta["val"].element_size() for part in outputs[:-1])
    assert bool(nbytes == codec.encoded_bytes(spec))


@pytest.mark.parametrize("name", ALL)
def test_refusals_give_a_reason(name: str) -> None:
    codec, legal = get_codec(name), torch.bool if name == "bits" else torch.float32
    spec = ValueSpec((2, 3), legal, torch.device("cpu"))
    assert codec.refuses(spec) is None
    assert codec.refuses(replace(spec, shape=(2, 0))) is None
    assert "0-dim" in (codec.refuses(replace(spec, shape=())) or "")
    assert "dtype int64 is not one of" in (codec.refuses(replace(spec, dtype=torch.int64)) or "")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC])
    symbolic = ValueSpec.of(mode.from_tensor(torch.zeros(2, 3, dtype=legal), symbolic_context=context))
    assert "innermost dimension is symbolic" in (codec.refuses(symbolic) or "")


# --- registry --------------------------------------------------------------------------------------------------------


def test_registry_lists_and_suggests() -> None:
    assert set(codec_names()) >= set(ALL)
    with pytest.raises(ValueError, match=r"got 'int9' \(did you mean 'int8'\?\)"):
        get_codec("int9")
    with pytest.raises(ValueError, match=r"'bits', 'fixed_gelu4', .*, got 'zstd'$"):
        get_codec("zstd")
    with pytest.raises(TypeError, match="got 8"):
        get_codec(8)  # type: ignore[arg-type]


def test_register_codec_checks_its_argument() -> None:
    with pytest.raises(TypeError, match="pass an instance, not the class"):
        register_codec(TopK)  # type: ignore[arg-type]
    assert register_codec(get_codec("int8")) is get_codec("int8")

    @dataclass(frozen=True)
    class Impostor(TopK):
        label: str = "int8"

        @property
        def name(self) -> str:
            return self.label

    with pytest.raises(ValueError, match="'int8' is taken by Int8"):
        register_codec(Impostor())
    with pytest.raises(ValueError, match="non-empty string"):
        register_codec(Impostor(label=""))


def test_a_registered_codec_stores_what_its_kind_names(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Rounded(Codec):
        """fp32 as bf16."""

        name = "rounded"

        def refuses(self, spec: ValueSpec) -> str | None:
            return "no float" if spec.dtype != torch.float32 else None

        def encode(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x.bfloat16(),)

        def decode(self, parts: tuple[Tensor, ...], spec_dtype: torch.dtype, inner: int) -> Tensor:
            return parts[0].to(spec_dtype)

        def encoded_bytes(self, spec: ValueSpec) -> Any:
            return 2 * spec.rows * spec.inner

    monkeypatch.setattr(codecs_base, "_REGISTRY", dict(codecs_base._REGISTRY))
    register_codec(Rounded())
    exact, _ = optimized(Tiny(depth=1), preset="exact", scheduler="none")
    model, session = optimized(Tiny(depth=1), scheduler="none", codecs={"gelu_input": "rounded"})
    (expected_loss, expected), (loss, grads) = step(exact, exact, tokens()), step(model, model, tokens())
    (row,) = (row for row in session.plan.rows if row.kind == "gelu_input")
    assert (row.codec, row.decision, row.bytes_open) == ("rounded", "codec", row.bytes_before // 2)
    assert torch.equal(expected_loss, loss) and 0.999 < cosine(expected, grads) < 1


@pytest.mark.parametrize("name", ALL)
def test_codecs_are_values(name: str) -> None:
    codec = get_codec(name)
    assert codec.name == name
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert hash(pickle.loads(pickle.dumps(codec))) == hash(codec)
    assert "0x" not in repr(codec)
    with pytest.raises(FrozenInstanceError):
        codec.bits = 3  # type: ignore[attr-defined]


def test_constructors_validate() -> None:
    with pytest.raises(ValueError, match="got 1.5"):
        TopK(fraction=1.5)
    with pytest.raises(ValueError, match="got bits=3"):
        PackedInt(bits=3)


# --- compiled --------------------------------------------------------------------------------------------------------


def compiled_equals_eager(names: Sequence[str], inners: Sequence[int]) -> None:
    """Compile the round trips of many codecs as one graph; one reader of each takes a slice (pytorch#195582)."""

    def round_trips(*values: Tensor) -> list[Tensor]:
        out = []
        for x in values:
            for name in names:
                value, codec = (x > 0 if name == "bits" else x), get_codec(name)
                parts = codec.encode(value)
                decoded = codec.decode(parts, value.dtype, value.shape[-1])
                out += [*parts, decoded, decoded[..., : value.shape[-1] * 5 // 6] * 2]
        return out

    values = [torch.randn(2, 3, inner, generator=torch.Generator().manual_seed(0)) for inner in inners]
    for x in values:
        x[0, 0, :2] = torch.tensor([math.inf, -math.inf])
        x[1, 2, 0] = math.nan
    torch._dynamo.reset()
    compiled = torch.compile(round_trips, fullgraph=True, dynamic=False)(*values)
    for got, expected in zip(compiled, round_trips(*values), strict=True):
        assert got.dtype == expected.dtype
        if got.is_floating_point() or got.dtype == torch.bool:
            assert torch.equal(got.double().nan_to_num(1.5), expected.double().nan_to_num(1.5))


@pytest.mark.inductor
def test_compiled_equals_eager() -> None:
    compiled_equals_eager(("int8", "int4", "bits"), (192,))


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("inner", first([197, 768, 7, 64, 192], 2))
def test_all_compiled_equal_eager(inner: int) -> None:
    compiled_equals_eager(ALL, [inner])


def written_call(function: Callable[..., Any], *inputs: Tensor) -> str:
    """What Inductor writes to call its kernels."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph does not know its code
        _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *inputs)
    return code[code.index("def call(") :]


def buffer_bytes(call: str) -> int:
    """Bytes of all buffers that the call makes."""
    made = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", call)
    assert len(made) == call.count("= empty_strided")
    sizes = [[int(size) for size in shape.split(",") if size.strip()] for shape, _ in made]
    return sum(math.prod(size) * getattr(torch, dtype).itemsize for size, (_, dtype) in zip(sizes, made, strict=True))


@pytest.mark.inductor
@pytest.mark.parametrize("name", first(["int4", "int8", "bits"]))
def test_encode_runs_inside_its_producer(name: str) -> None:
    """One kernel, and no buffer but the results' and one for the extremes of each group."""
    codec, x = get_codec(name), torch.randn(4, 768)

    def produce(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        made = torch.nn.functional.gelu(x + bias)
        return made, *codec.encode(made > 0 if name == "bits" else made)

    call = written_call(produce, x, torch.randn(768))
    assert call.count("cpp_fused") == 1
    parts = codec.encode(x > 0 if name == "bits" else x)
    extremes = sum(part.nbytes for part in parts[1:])
    assert buffer_bytes(call) == x.nbytes + sum(part.nbytes for part in parts) + extremes


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["int8", "int4", "bits"])
def test_decode_runs_inside_its_reader(name: str) -> None:
    """One kernel, and no buffer but the result's."""
    codec, x = get_codec(name), torch.randn(4, 768)
    parts = codec.encode(x > 0 if name == "bits" else x)

    def read(grad: Tensor, *parts: Tensor) -> Tensor:
        return grad * codec.decode(parts, torch.bool if name == "bits" else x.dtype, 768)

    call = written_call(read, x, *parts)
    assert call.count("cpp_fused") == 1
    assert buffer_bytes(call) == x.nbytes
