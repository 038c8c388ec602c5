"""What the engine is held against: the same model, compiled by the same route with torch's own partitioner.

Nothing of ours is in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import slimfit_fx

Gradients = dict[str, Tensor | None]


UNPACED = {"moments": "updates", "catch_up": 0}
"""Settings under which an optimizer takes the very steps that it takes without us."""


def compile_reference(
    model: nn.Module, *, executor: str = "interpreter", dynamic: bool | None = None
) -> Callable[..., Any]:
    """``model``, compiled as torch does it, with torch's own min-cut partitioner."""
    if executor == "inductor":
        return torch.compile(model, dynamic=dynamic)
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def boxed(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=boxed,
        bw_compiler=boxed,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    return torch.compile(model, backend=backend, dynamic=dynamic)


def optimized(model: nn.Module, **settings: Any) -> tuple[nn.Module, slimfit_fx.Session]:
    """The model optimized as tests want it: interpreter, strict, small values rewritten too, unless told otherwise."""
    chosen = {"executor": "interpreter", "strict": True, "min_bytes": 256, **settings}
    slimfit_fx.optimize(model, **chosen)
    return model, slimfit_fx.session(model)


def loss_of(output: Any) -> Tensor:
    """One number that depends on every floating-point tensor of ``output`` (or on its ``loss``, if it has one)."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else output.float().square().mean()
    if getattr(output, "loss", None) is not None:
        return output.loss
    parts = output.values() if isinstance(output, Mapping) else output
    return torch.stack(
        [loss_of(part) for part in parts if not isinstance(part, Tensor) or part.is_floating_point()]
    ).sum()


def step(
    call: Callable[..., Any], model: nn.Module, batch: Mapping[str, Any] | tuple[Any, ...], *, seed: int = 1
) -> tuple[Tensor, Gradients]:
    """One forward and backward from a fixed random state: (loss, gradient by parameter name)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = call(**batch) if isinstance(batch, Mapping) else call(*batch)
    loss = loss_of(output)
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters()}


def differences(expected: Gradients, found: Gradients, *, closed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What is wrong with ``found``, in words: closed units must have None, all others the very bits of ``expected``."""
    problems = [f"{name}: only in one of the two" for name in expected.keys() ^ found.keys()]
    for name in expected.keys() & found.keys():
        want, have = expected[name], found[name]
        if name in closed:
            problems += [f"{name}: closed but has a gradient"] if have is not None else []
        elif (want is None) != (have is None):
            problems.append(
                f"{name}: expected {'None' if want is None else 'a gradient'}, got {'None' if have is None else 'one'}"
            )
        elif want is not None and have is not None and not equal_bits(want, have):
            error = (want.double() - have.double()).norm() / max(want.double().norm().item(), 1e-30)
            problems.append(f"{name}: relative error {error.item():.2e}")
    return sorted(problems)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def cosine(expected: Gradients, found: Gradients) -> float:
    """Cosine of the angle between all gradients that both have, laid end to end."""
    both = [n for n in expected if expected[n] is not None and found.get(n) is not None]
    if not both:
        return math.nan
    a = torch.cat([expected[n].double().flatten() for n in both])  # type: ignore[union-attr]
    b = torch.cat([found[n].double().flatten() for n in both])  # type: ignore[union-attr]
    norm = a.norm() * b.norm()
    return 1.0 if norm == 0 and torch.equal(a, b) else (a @ b / norm).item()


@contextlib.contextmanager
def unchanged_configuration() -> Iterator[None]:
    """Fail if torch's global configuration differs at the end."""
    before = _configuration()
    yield
    after = _configuration()
    changed = {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
    assert not changed, f"global configuration changed: {changed}"


def _configuration() -> dict[str, Any]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    found: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "anomaly": torch.is_anomaly_enabled(),
    }
    for module in (dynamo, functorch, inductor):
        found |= {f"{module.__name__}.{key}": _text(value) for key, value in module.get_config_copy().items()}
    return found


def _text(value: Any) -> str:
    """Like ``repr``, but two equal sets read the same: a copied one may list its members in another order."""
    return repr(sorted(value, key=repr)) if isinstance(value, (set, frozenset)) else repr(value)
