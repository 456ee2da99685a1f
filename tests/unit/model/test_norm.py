"""Where the residual stream parts: PyTorch's norms beside it; on a GPU, the kernel of both gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.norm import _Branch, branch, build_norm

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
    kept, normal = _Branch.apply(hidden, gain, EPS)
    assert torch.equal(kept, hidden) and normal.dtype == dtype
    expected = F.rms_norm(hidden.double(), (80,), gain.double(), EPS)
    assert ((normal.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def gradients(hidden: Tensor, gain: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of hidden and gain, in fp64, by PyTorch."""
    hidden, gain = hidden.double().requires_grad_(), gain.double().requires_grad_()
    normal = F.rms_norm(hidden, hidden.shape[-1:], gain, EPS)
    loss = (hidden * grads[0].double()).sum() + (normal * grads[1].double()).sum()
    return torch.autograd.grad(loss, (hidden, gain))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 1280), (7, 80), (2, 9, 128), (3000, 256), (5, 8192), (2, 12288)])
def test_the_kernel_rounds_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden, kept, normal = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    gain = torch.randn(shape[-1], device="cuda").to(dtype)
    found, parts = torch.ops.megatron.branch_gradient(hidden, gain, kept, normal, EPS)
    exact, exact_gain = gradients(hidden, gain, (kept, normal))
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()
    torch.testing.assert_close(parts.sum(dim=0).double(), exact_gain, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_compiled_code_uses_the_kernel() -> None:
    torch.compiler.reset()
    norm = nn.RMSNorm(96, EPS).to("cuda", torch.bfloat16)
    hidden, kept, normal = (torch.randn(4, 50, 96, device="cuda").bfloat16() for _ in range(3))
    hidden.requires_grad_()
    found, plain = ([*results, *torch.autograd.grad(results, (hidden, norm.weight), (kept, normal))]
                    for results in (torch.compile(branch, fullgraph=True)(norm, hidden), branch(norm, hidden)))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=5e-2)  # PyTorch rounds what it then adds
    direct, _ = torch.ops.megatron.branch_gradient(hidden.detach(), norm.weight.detach(), kept, normal, EPS)
    assert torch.equal(found[2], direct) and not torch.equal(plain[2], direct)
