"""The kernel of cross entropy's terms, against the plain code in fp64. It runs on a GPU only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.model import sharding
from megatron.model.cross_entropy import chunk_terms, linear_cross_entropy
from megatron.model.head_kernels import has_softmax_terms, softmax_terms
from megatron.model.sharding import SequentialGPT, compile_blocks


def test_which_logits_have_it() -> None:
    assert not has_softmax_terms(torch.zeros(2, 16))  # on a CPU


@pytest.mark.gpu
def test_which_logits_of_a_gpu_have_it() -> None:
    logits = torch.zeros(4, 16, device="cuda")
    assert has_softmax_terms(logits) and has_softmax_terms(logits.half())
    for other in (logits.double(), logits[:, :9].clone(), logits[:, :8]):
        assert not has_softmax_terms(other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(700, 50264, 50258), (3, 40, 37), (5, 8192, 8192), (9, 8200, 8193)])
def test_terms(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """nll to fp32's precision; softmax * weight rounded once, 0 where there is no token; all in place of the logits."""
    rows, columns, tokens = shape
    logits = (5 * torch.randn(rows, columns, device="cuda")).to(dtype)
    logits[0] += 1000  # exponentials of these overflow
    targets = torch.randint(tokens, (rows,), device="cuda")
    weights = torch.rand(rows, device="cuda")
    weights[1] = 0
    exact_nll, exact = chunk_terms(logits.double(), targets, weights.double(), tokens)
    nll, found = softmax_terms(logits, targets, weights, tokens)
    assert found.data_ptr() == logits.data_ptr() and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), exact_nll, rtol=1e-5, atol=5e-4)
    limit = torch.finfo(dtype)
    smallest = max(limit.smallest_normal * limit.eps, torch.finfo(torch.float32).smallest_normal)
    assert ((found.double() - exact).abs() <= (limit.eps / 2 + 5e-4) * exact + smallest).all()
    assert (found[:, tokens:] == 0).all() and (found[1] == 0).all()


@pytest.mark.gpu
def test_what_is_not_finite_stays_so() -> None:
    logits = torch.randn(4, 64, device="cuda").bfloat16()
    logits[0, 3], logits[1, 3] = torch.nan, torch.inf
    targets = torch.tensor([1, 1, 63, 1], device="cuda")  # 63 is no token: it has no probability
    nll, terms = softmax_terms(logits, targets, torch.ones(4, device="cuda"), 60)
    assert nll[0].isnan() and not nll[1].isfinite() and nll[2] == torch.inf and nll[3].isfinite()
    assert terms[2:].isfinite().all()


@pytest.mark.gpu
def test_a_compiled_model_uses_it(make_model: Callable[..., SequentialGPT], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the head as without it, within bf16 noise; the compiler never sees the logits."""
    calls: list[tuple[int, ...]] = []

    def note(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        calls.append(tuple(logits.shape))
        return softmax_terms(logits, targets, weights, num_tokens)

    monkeypatch.setattr(sharding, "softmax_terms", note)
    model = make_model(True, torch.bfloat16).cuda()
    compile_blocks(model)
    terms = model.layers[-1].terms
    results = []
    for function in (chunk_terms, terms):
        torch.manual_seed(0)
        hidden = torch.randn(30, 64, device="cuda").bfloat16().requires_grad_()
        head = torch.randn(104, 64, device="cuda").bfloat16().requires_grad_()
        targets = torch.randint(99, (30,), device="cuda")
        loss = linear_cross_entropy(hidden, head, targets, torch.rand(30, device="cuda") / 30, 99, function)
        results.append([loss, *torch.autograd.grad(loss, (hidden, head))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    assert calls == [(30, 104)]
