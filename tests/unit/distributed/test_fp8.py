"""fp8 products: values and gradients are those of the rounded factors, multiplied exactly; layers use them to train."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.fp8 import fp8_linear, require_fp8
from megatron.distributed.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    train_in_fp8,
)
from megatron.errors import UserError

INPUTS, WEIGHTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # Micikevicius et al., arXiv 2209.05433, table 1
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as fp8 has it, in fp64: scaled so that its largest magnitude is the format's, rounded, scaled back."""
    scale = (x.detach().abs().max().float() / LARGEST[dtype]).double()
    return (x.detach().double() / scale).float().to(dtype).double() * scale


def factors(device: str, rows: tuple[int, ...] = (3, 16), inner: int = 64, out: int = 48) -> tuple[Tensor, ...]:
    """Input [*rows, in], weight [out, in] and gradient [*rows, out], bf16, of very different sizes."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    generator = torch.Generator().manual_seed(0)
    shapes = [((*rows, inner), 3.0), ((out, inner), 0.02), ((*rows, out), 1e-6)]
    made = [torch.randn(shape, generator=generator) * size for shape, size in shapes]
    x, weight, grad = (value.bfloat16().to(device) for value in made)
    return x.requires_grad_(), weight.requires_grad_(), grad


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found.detach().double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(48,), (3, 16)])
def test_values_are_the_rounded_factors_product(device: str, rows: tuple[int, ...]) -> None:
    """Besides the factors only the result is rounded, to bf16: by 2^-8 of itself and less."""
    x, weight, grad = factors(device, rows)
    y = fp8_linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    a, w, g = rounded(x, INPUTS), rounded(weight, WEIGHTS), rounded(grad, GRADIENTS)
    assert y.dtype == grad_x.dtype == grad_weight.dtype == torch.bfloat16
    assert y.shape == (*rows, 48) and grad_x.shape == x.shape
    # A GPU's fast accumulation keeps 13 bits or so of partial sums.
    assert distance(y, a @ w.t()) < 2**-8 + (2**-9 if device == "cuda" else 0)
    assert distance(grad_x, g @ w) < 2**-8
    assert distance(grad_weight, g.flatten(0, -2).t() @ a.flatten(0, -2)) < 2**-8


@pytest.mark.parametrize("device", DEVICES)
def test_error_is_that_of_fp8(device: str) -> None:
    """e4m3 rounds by at most 2^-4 of a number and e5m2 by 2^-3, evenly spread: sqrt(1/3) of that, the root of the sum
    of squares for a product. Random signs make the relative error of a sum that of its terms."""
    x, weight, grad = factors(device, inner=256, out=256)
    y = fp8_linear(x, weight)
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    a, w, g = x.detach().double(), weight.detach().double(), grad.double()
    exact = [a @ w.t(), g @ w, g.flatten(0, 1).t() @ a.flatten(0, 1)]
    bounds = [math.hypot(2**-4, 2**-4), math.hypot(2**-3, 2**-4), math.hypot(2**-3, 2**-4)]
    for one, expected, bound in zip(found, exact, bounds, strict=True):
        error = float((one.detach().double() - expected).norm() / expected.norm())
        assert bound / 6 < error < bound / math.sqrt(3), "0 would mean that nothing was rounded"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(device: str, bad: float) -> None:
    """A step with such a number must be seen and left out: it may not be clamped to the largest fp8 number."""
    for place in range(3):
        x, weight, grad = factors(device)
        with torch.no_grad():
            (x, weight, grad)[place].view(-1)[5] = bad
        y = fp8_linear(x, weight)
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
        results = {"y": (y, (0, 1)), "grad_x": (grad_x, (1, 2)), "grad_weight": (grad_weight, (0, 2))}
        for name, (result, depends_on) in results.items():
            assert bool(result.isfinite().all()) == (place not in depends_on), (name, place)


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_and_tiny_numbers(device: str) -> None:
    """Zeros give zeros, not 0 / 0; a gradient of 1e-20 is still multiplied as well as one of 1."""
    x, weight, grad = factors(device)
    zeros = torch.zeros_like(x, requires_grad=True)
    y = fp8_linear(zeros, weight)
    assert not y.any()
    grad_x, grad_weight = torch.autograd.grad(y, (zeros, weight), torch.zeros_like(grad))
    assert not grad_x.any() and not grad_weight.any()
    (expected,) = torch.autograd.grad(fp8_linear(x, weight), x, grad)
    (tiny,) = torch.autograd.grad(fp8_linear(x, weight), x, grad * 2.0**-46)
    torch.testing.assert_close(tiny * 2.0**46, expected, rtol=2**-6, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_keeps_no_fp8_copy_of_the_weight(backend: str) -> None:
    """With ZeRO 3 the weight goes away between the passes, and a copy would not."""

    class Layer(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return fp8_linear(F.silu(x), self.weight)

    torch.compiler.reset()
    x, weight, grad = factors("cuda" if backend == "inductor" else "cpu")
    layer, kept = Layer(weight), []
    expected = torch.autograd.grad(layer(x), (x, layer.weight), grad)
    layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)  # type: ignore[method-assign]

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert (torch.bfloat16, (48, 64)) in kept
    assert not [shape for dtype, shape in kept if dtype == torch.float8_e4m3fn and set(shape) == {48, 64}]
    # The compiler leaves out roundings to bf16 between operations, so a factor may land on the next fp8 number.
    for found, one in zip(torch.autograd.grad(y, (x, layer.weight), grad), expected, strict=True):
        assert float((found - one).double().norm() / one.double().norm()) < 0.02


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_train_in_fp8_and_are_evaluated_in_bf16(kind: Callable[..., nn.Module], bias: bool) -> None:
    x, weight, _ = factors("cpu")
    layer: Any = kind(64, 48, bias).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.fill_(0.5)
    plain = layer(x)
    train_in_fp8(layer)
    assert distance(layer(x), rounded(x, INPUTS) @ rounded(weight, WEIGHTS).t() + (0.5 if bias else 0.0)) < 2**-7
    assert not torch.equal(layer(x), plain)
    layer.eval()
    assert torch.equal(layer(x), plain), "evaluation must not change"


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_each_rank_scales_its_own_part(kind: Callable[..., nn.Module]) -> None:
    """Parts of very different sizes, put together as the ranks' results are, are the whole product."""
    x, weight, _ = factors("cpu")
    column = kind is ColumnParallelLinear
    with torch.no_grad():
        (weight[:24] if column else weight[:, :32]).mul_(2.0**-12)
        weight = torch.cat((weight, weight)) if column else weight  # [96, 64] or [48, 64]
    parts = []
    for rank in range(2):
        layer: Any = kind(64, len(weight), False, TensorParallel(size=2, rank=rank)).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(weight.chunk(2, dim=0 if column else 1)[rank])
        train_in_fp8(layer)
        parts.append(layer(x if column else x.chunk(2, dim=-1)[rank]))
        part = layer.weight.detach()
        expected = rounded(x if column else x.chunk(2, dim=-1)[rank], INPUTS) @ rounded(part, WEIGHTS).t()
        assert distance(parts[-1], expected) < 2**-8
    whole = (torch.cat(parts, dim=-1) if column else parts[0] + parts[1]).detach()
    exact = x.detach().double() @ weight.detach().double().t()
    assert float((whole.double() - exact).norm() / exact.norm()) < math.hypot(2**-4, 2**-4) / math.sqrt(3)


@pytest.mark.gpu
def test_compiled_equals_eager_on_a_gpu() -> None:
    x, weight, grad = factors("cuda", rows=(4, 64), inner=256, out=512)
    torch.compiler.reset()
    results = []
    for function in (fp8_linear, torch.compile(fp8_linear, dynamic=False)):
        y = function(x, weight)
        results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    for eager, compiled in zip(*results, strict=True):
        assert distance(compiled, eager.detach()) < 2**-7


@pytest.mark.parametrize(
    ("capability", "words"),
    [(None, "--fp8 needs a GPU: leave it out"), ((8, 0), "NVIDIA A100-SXM4-80GB has 8.0: leave it out"), ((8, 9), ""),
     ((9, 0), ""), ((10, 0), ""), ((12, 0), "")],
)  # fmt: skip
def test_devices(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    device = torch.device("cpu" if capability is None else "cuda:0")
    if not words:
        require_fp8(device)
        return
    with pytest.raises(UserError) as caught:
        require_fp8(device)
    assert str(caught.value).endswith(words) and "\n" not in str(caught.value)


def test_copies_of_a_model_keep_the_choice() -> None:
    layer = ColumnParallelLinear(32, 16, False)
    train_in_fp8(layer)
    assert copy.deepcopy(layer).trains_in_fp8
