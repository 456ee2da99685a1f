"""The chunked head and loss against ``torch.nn.functional.cross_entropy``."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model import cross_entropy
from megatron.model.cross_entropy import linear_cross_entropy, weighted_nll

ROWS, WIDTH, VOCABULARY, TOKENS = 23, 8, 40, 29


@pytest.fixture(params=[1, 4, 23], ids=lambda count: f"{count}_chunks")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut the rows into so many chunks; TOKENS rounds up to 32 columns."""
    count: int = request.param
    monkeypatch.setattr(cross_entropy, "MAX_CHUNK_ELEMENTS", -(-ROWS // count) * 32)
    return count


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head weight, targets, weights (every third is 0)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, TOKENS, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) / 1000
    weights[::3] = 0
    return hidden.requires_grad_(), head.requires_grad_(), targets, weights


def reference(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by plain PyTorch in fp64: a softmax over the real tokens only."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    loss = (F.cross_entropy(hidden @ head[:TOKENS].t(), targets, reduction="none") * weights.double()).sum()
    return (loss, *torch.autograd.grad(loss, (hidden, head)))


def test_chunk_count(chunks: int) -> None:
    slices = cross_entropy._chunks(ROWS, 32)
    assert len(slices) == chunks
    assert [i for s in slices for i in range(ROWS)[s]] == list(range(ROWS))


def test_loss_and_gradients_equal_plain_pytorch(chunks: int) -> None:
    hidden, head, targets, weights = problem()
    loss = linear_cross_entropy(hidden, head, targets, weights, TOKENS)
    gradients = torch.autograd.grad(3 * loss, (hidden, head))
    expected, *expected_gradients = reference(hidden, head, targets, weights)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, 3 * wanted, rtol=1e-10, atol=1e-17)
    assert (gradients[0][::3] == 0).all() and (gradients[1][TOKENS:] == 0).all()


def test_gradcheck(chunks: int) -> None:
    hidden, head, targets, weights = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: 1000 * linear_cross_entropy(h, w, targets, weights, TOKENS), (hidden, head)
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision(chunks: int, dtype: torch.dtype, rtol: float) -> None:
    hidden, head, targets, weights = problem(dtype)
    loss = linear_cross_entropy(hidden, head, targets, weights, TOKENS)
    gradients = torch.autograd.grad(loss, (hidden, head))
    expected, *expected_gradients = reference(hidden, head, targets, weights)
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in gradients)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients):
        assert (gradient.double() - wanted).norm() <= rtol * wanted.norm()


def test_half_precision_keeps_gradients_of_tiny_weights() -> None:
    """Weights of 1/(b s) times a probability would be 0 in fp16; a loss scale can only rescue what is not yet lost."""
    hidden, head, targets, _ = problem(torch.float16)
    weights = torch.full((ROWS,), 1e-7)
    loss = linear_cross_entropy(hidden, head, targets, weights, TOKENS)
    gradients = torch.autograd.grad(2.0**20 * loss, (hidden, head))
    _, *expected = reference(hidden, head, targets, weights)
    for gradient, wanted in zip(gradients, expected):
        assert (gradient.double() / 2**20 - wanted).norm() <= 5e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_zero(dtype: torch.dtype) -> None:
    """A micro-batch in which nothing was masked: loss and gradients are 0, not NaN."""
    hidden, head, targets, weights = problem(dtype)
    loss = linear_cross_entropy(hidden, head, targets, weights * 0, TOKENS)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, head)))


def test_a_target_that_is_no_token() -> None:
    """Impossible ids cost infinity where they count, and nothing (not NaN) where the weight is 0."""
    hidden, head, targets, weights = problem(torch.float32)
    targets[0] = targets[1] = TOKENS
    assert weights[0] == 0 and weights[1] > 0
    assert torch.isinf(linear_cross_entropy(hidden, head, targets, weights, TOKENS))
    weights[1] = 0
    loss = linear_cross_entropy(hidden, head, targets, weights, TOKENS)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)


def test_without_gradients(chunks: int) -> None:
    hidden, head, targets, weights = problem()
    expected = F.cross_entropy(hidden @ head[:TOKENS].t(), targets, reduction="none") * weights
    rows = weighted_nll(hidden, head, targets, weights, TOKENS)
    assert not rows.requires_grad
    torch.testing.assert_close(rows, expected.detach(), rtol=1e-12, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, head, targets, weights, TOKENS), expected.sum())


def test_no_tensor_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four chunks nothing of ROWS x VOCABULARY elements is made, forward or backward."""
    monkeypatch.setattr(cross_entropy, "MAX_CHUNK_ELEMENTS", 6 * 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] != WIDTH:
                    largest = max(largest, tensor.numel())
            return result

    hidden, head, targets, weights = problem(torch.bfloat16)
    with Watch():
        linear_cross_entropy(hidden, head, targets, weights, TOKENS).backward()
    # The transposed head [WIDTH, 32] is a view and larger than no chunk.
    assert 0 < largest <= max(6 * 32, WIDTH * 32)


def test_one_chunk_of_logits_at_a_time(chunks: int) -> None:
    """Made in place or not, a chunk's logits are gone before the next one's gradient is made."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def terms(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        alive.append(sum(other() is not None for other in seen))
        nll, grad = cross_entropy.chunk_terms(logits, *rest)
        seen.extend((weakref.ref(logits), weakref.ref(grad)))
        return nll, grad

    linear_cross_entropy(*problem(), TOKENS, terms)
    assert alive == [0] * chunks
