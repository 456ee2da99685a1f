"""Where the residual stream parts: PyTorch's norms beside it; on a GPU, the kernel of both gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.gpt import FinalNorm
from megatron.model.norm import _Branch, _divisible, branch, build_norm, last_norm
from megatron.model.sharding import SequentialGPT, compile_blocks

EPS = 1e-5


@pytest.mark.parametrize(("name", "kind"), [("rmsnorm", nn.RMSNorm), ("layernorm", nn.LayerNorm)])
def test_uncompiled_it_is_pytorch(make_config: Callable[..., ModelConfig], name: str, kind: type[nn.Module]) -> None:
    norm = build_norm(make_config(normalization=name))
    assert type(norm) is kind
    hidden = torch.randn(3, 5, 32)
    kept, normal = branch(norm, hidden)
    assert kept is hidden and torch.equal(normal, norm(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_computes_as_pytorch(dtype: torch.dtype) -> None:
    """The formula that the compiler is given: the statistics and the product in fp32, rounded once."""
    hidden, gain = (10 * torch.randn(6, 80)).to(dtype), torch.randn(80).to(dtype)
    kept, normal = _Branch.apply(hidden, gain, EPS, False)
    assert torch.equal(kept, hidden) and normal.dtype == dtype
    expected = F.rms_norm(hidden.double(), (80,), gain.double(), EPS)
    assert ((normal.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def gradients(hidden: Tensor, gain: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of hidden and gain, in fp64, by PyTorch."""
    hidden, gain = hidden.double().requires_grad_(), gain.double().requires_grad_()
    normal = F.rms_norm(hidden, hidden.shape[-1:], gain, EPS)
    loss = (hidden * grads[0].double()).sum() + (normal * grads[1].double()).sum()
    return torch.autograd.grad(loss, (hidden, gain))


def statistics(hidden: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of hidden, rounded, and its factor [..., 1] in fp32, both from fp64."""
    scale = (hidden.double().square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return (hidden.double() * scale * gain.double()).to(hidden.dtype), scale.float()


def test_a_gain_of_zero_counts_as_one_that_is_too_small_to_be_seen() -> None:
    """What the norm makes is divided by the gain in the backward pass."""
    hidden, gain = torch.randn(6, 80).bfloat16(), torch.tensor([0.0, -0.0, 1e-30, -2.0] * 20).bfloat16()
    normal = _Branch.apply(hidden, gain, EPS, False)[1]
    exact = F.rms_norm(hidden.double(), (80,), gain.double(), EPS)
    assert ((normal.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-16).all()
    assert (normal / _divisible(gain)).isfinite().all() and not normal[:, :2].eq(0).any()


SHAPES = [(3, 5, 1280), (7, 80), (2, 9, 128), (4099, 128), (3000, 256), (1001, 288), (5, 8192), (2, 12288)]
"""Several short rows are computed at once; most counts leave a last tile in part."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_kernel(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden = 10 * torch.randn(shape, device="cuda").to(dtype)
    gain = torch.randn(shape[-1], device="cuda").to(dtype)
    gain[:2] = torch.tensor([0.0, 1e-30])
    normal, scale = torch.ops.megatron.row_norm(hidden, gain, EPS)
    exact, exact_scale = statistics(hidden.double(), _divisible(gain).double())
    assert normal.dtype == dtype and scale.shape == (*shape[:-1], 1)
    torch.testing.assert_close(scale, exact_scale, rtol=1e-6, atol=0)
    assert ((normal.double() - exact).abs() <= (torch.finfo(dtype).eps / 2 + 1e-6) * exact.abs() + 1e-30).all()


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(dtype: torch.dtype, shape: tuple[int, ...], ends: bool) -> None:
    """Of an entry that the norm rounded the kernel sees that much less; all else is rounded once."""
    hidden, kept, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    gain = _divisible((torch.randn(shape[-1], device="cuda").abs() + 0.1).to(dtype))
    normal, scale = statistics(hidden, gain)
    found, parts = torch.ops.megatron.branch_gradient(normal, gain, scale, None if ends else kept, grad)
    exact, exact_gain = gradients(hidden, gain, (torch.zeros_like(kept) if ends else kept, grad))
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    along = (grad.double() * normal.double()).abs().mean(dim=-1, keepdim=True) * scale.double()
    seen = eps * along * (hidden.double() * scale.double()).abs()
    assert ((found.double() - exact).abs() <= eps / 2 * exact.abs() + seen + 1e-5).all()
    terms = (grad.double() * hidden.double() * scale.double()).flatten(0, -2)
    error = (parts.sum(dim=0).double() - exact_gain).abs()
    assert (error <= 1e-5 * terms.abs().sum(dim=0) + eps * terms.square().sum(dim=0).sqrt() + 1e-4).all()


@pytest.mark.gpu
@pytest.mark.parametrize("alone", [False, True])
def test_compiled_code_uses_the_kernels(alone: bool) -> None:
    torch.compiler.reset()
    norm = nn.RMSNorm(96, EPS).to("cuda", torch.bfloat16)
    with torch.no_grad():
        norm.weight[:5] = torch.tensor([0.0, -1.5, 1e-30, 0.3, 2.0])
    hidden, kept, grad = (torch.randn(4, 50, 96, device="cuda").bfloat16() for _ in range(3))
    hidden.requires_grad_()
    found, plain = ([*results, *torch.autograd.grad(results, (hidden, norm.weight), (kept, grad))]
                    for results in (torch.compile(branch, fullgraph=True)(norm, hidden, alone), branch(norm, hidden)))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=5e-2)  # PyTorch rounds what it then adds
    scale = (hidden.float().square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    gain = norm.weight.detach()  # two entries of which are too small to divide by
    direct, _ = torch.ops.megatron.branch_gradient(found[1].detach(), gain, scale.detach(), kept, grad)
    torch.testing.assert_close(found[2], direct, rtol=2**-7, atol=1e-6)
    assert (found[2] == direct).float().mean() > 0.99 > (plain[2] == direct).float().mean()


def test_the_last_norm_of_a_cpu_is_pytorch(make_model: Callable[..., SequentialGPT]) -> None:
    model = make_model(True)
    compile_blocks(model, backend="eager")
    last = next(layer for layer in model.layers if isinstance(layer, FinalNorm))
    assert last.by_kernels
    hidden = torch.randn(3, 5, model.config.hidden_size)
    assert torch.equal(last(hidden, None)[0], last.final_layernorm(hidden))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_norm_is_computed_by_the_kernels(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(96, EPS).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    hidden, grad = (torch.randn(4, 50, 96, device="cuda").to(dtype) for _ in range(2))
    hidden.requires_grad_()
    normal = last_norm(norm, hidden)
    found = normal, *torch.autograd.grad(normal, (hidden, norm.weight), grad)
    assert torch.equal(normal, torch.ops.megatron.row_norm(hidden, norm.weight, EPS)[0])
    wide, gain = hidden.detach(), norm.weight.detach()
    exact = statistics(wide.double(), gain.double())[0], *gradients(wide, gain, (torch.zeros_like(grad), grad))
    eps = torch.finfo(dtype).eps
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2 * eps, atol=2 * eps * float(other.abs().max()))


@pytest.mark.gpu
def test_half_precision_without_exponents_stays_with_pytorch() -> None:
    """fp16 could not tell a row from what a gain of 1e-6 makes of it."""
    torch.compiler.reset()
    norm = nn.RMSNorm(96, EPS).to("cuda", torch.float16)
    torch.nn.init.constant_(norm.weight, 1e-6)
    hidden, kept, grad = (torch.randn(4, 50, 96, device="cuda").half() for _ in range(3))
    hidden.requires_grad_()
    results = torch.compile(branch, fullgraph=True)(norm, hidden)
    _, to_gain = torch.autograd.grad(results, (hidden, norm.weight), (kept, grad))
    exact = gradients(hidden.detach(), norm.weight.detach(), (kept, grad))[1]
    torch.testing.assert_close(to_gain.double(), exact, rtol=1e-2, atol=5e-2)
