"""Adding a product to the residual stream: values and gradients of PyTorch's, and no harm to what is read later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from megatron.distributed.tensor_parallel import RowParallelLinear
from megatron.model.residual import _AddProduct, join, joins_alone
from megatron.model.sharding import SequentialGPT, compile_blocks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [2, 30, 48], x [2, 30, 64], weight [48, 64]."""
    shapes = ((2, 30, 48), (2, 30, 64), (48, 64))
    hidden, x, weight = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    return hidden, x, weight


@pytest.mark.parametrize("bias", [False, True])
def test_uncompiled_it_is_pytorch(bias: bool) -> None:
    layer = RowParallelLinear(64, 48, bias)
    hidden, x, weight = inputs("cpu", torch.float32)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert torch.equal(join(hidden, layer, x, 0.5, training=False), hidden + F.linear(x, layer.weight, layer.bias))
    torch.manual_seed(3)
    found = join(hidden, layer, x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(found, hidden + F.dropout(F.linear(x, layer.weight, layer.bias), 0.5))


@pytest.mark.parametrize(("bias", "probability", "training", "alone"), [
    (False, 0.0, True, True),  # the product adds
    (True, 0.0, True, False),  # the compiler adds product, bias and stream
    (True, 0.1, True, True),  # dropout's kernel adds
    (True, 0.1, False, False),
])  # fmt: skip
def test_who_writes_the_sum(bias: bool, probability: float, training: bool, alone: bool) -> None:
    assert joins_alone(RowParallelLinear(64, 48, bias), probability, training) is alone


@pytest.mark.parametrize("device", DEVICES)
def test_value_and_gradients(device: str) -> None:
    hidden, x, weight = inputs(device, torch.float64)
    torch.testing.assert_close(_AddProduct.apply(hidden, x, weight), hidden + x @ weight.t())
    assert torch.autograd.gradcheck(_AddProduct.apply, (hidden, x, weight), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("read_later", ["nothing", "the argument", "what was added to"])
def test_compiled_it_writes_where_nothing_is_read_later(device: str, read_later: str) -> None:
    """Compiled, memory is used again; what is still needed must be what it was."""
    torch.compiler.reset()
    arguments = inputs(device, torch.float64)

    def function(add: Callable[..., Tensor], hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        stream = hidden if read_later == "the argument" else hidden.sin()
        out = add(stream, x, weight)
        return out.cos() if read_later == "nothing" else out.cos() + stream.square()

    def plain(hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return hidden + x @ weight.t()

    before = [argument.detach().clone() for argument in arguments]
    found, expected = (
        [out, *torch.autograd.grad(out, arguments, torch.ones_like(out))]
        for out in (torch.compile(function, fullgraph=True)(_AddProduct.apply, *arguments), function(plain, *arguments))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(argument, was) for argument, was in zip(arguments, before, strict=True))


@pytest.mark.gpu
def test_compiled_code_uses_the_product() -> None:
    """bf16, without dropout: the value is PyTorch's but for rounding; a bias or dropout keeps the layer's own call."""
    torch.compiler.reset()
    hidden, x, weight = inputs("cuda", torch.bfloat16)
    exact = hidden.double() + x.double() @ weight.double().t()
    for bias, probability, training, uses in (
        (False, 0.0, True, True), (False, 0.3, False, True), (False, 0.3, True, False), (True, 0.0, True, False)
    ):
        layer = RowParallelLinear(64, 48, bias).to("cuda", torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(weight)
        compiled = torch.compile(join, fullgraph=True)
        found, code = run_and_get_code(compiled, hidden, layer, x, probability, training)
        assert any("add_product_" in text for text in code) == uses
        if uses:
            error = (found.double() - exact).abs()
            assert (error <= 2**-8 * exact.abs() + 2**-8 * (exact - hidden).abs() + 1e-4).all()


@pytest.mark.gpu
def test_what_compiled_blocks_keep(make_model: Callable[..., SequentialGPT]) -> None:
    """bf16, numbers a token: what both norms make (2 h), queries, keys and values (3 h), the context (h), and the MLP's
    first product and the factor of its second (3 ffn); of the residual stream nothing but what leaves."""
    torch.compiler.reset()
    width, ffn, blocks, tokens = 256, 512, 4, 16 * 512
    model = make_model(
        num_layers=blocks, hidden_size=width, num_attention_heads=2, ffn_hidden_size=ffn, max_position_embeddings=512,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    compile_blocks(model)
    hidden = torch.randn(16, 512, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(16, 512, 128, device="cuda")
    run = list(model.layers[1:-2])

    def kept() -> int:
        before = torch.cuda.memory_allocated()
        state = model.run_blocks(run, (hidden, table), None)
        torch.cuda.synchronize()
        found = torch.cuda.memory_allocated() - before
        state[0].sum().backward()
        return found

    kept()
    expected = 2 * tokens * (blocks * (2 * width + 3 * width + width + 3 * ffn) + width)
    statistics = 4 * tokens * blocks * (2 + 2)  # of norms and attention, fp32
    assert expected <= kept() <= 1.02 * expected + statistics
