"""Masks against an enumeration of pairs; FlexAttention, uncompiled or by a backend without kernels, against SDPA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from megatron.config import ModelConfig
from megatron.model import attention
from megatron.model.attention import Attention
from megatron.model.masks import block_mask, dense_mask, flex_obstacle
from megatron.model.sharding import SequentialGPT, compile_blocks, describe_masks, run_layers

Make = Callable[..., SequentialGPT]
KINDS = pytest.mark.parametrize("kind", ["documents", "bool"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
CPU = torch.device("cpu")


def random_mask(kind: str, causal: bool, length: int, seed: int = 0, rows: int = 2) -> Tensor:
    """Documents of mean length 50 [b, s], or half of all pairs [b, 1, s, s]."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "documents":
        return (torch.rand(rows, length, generator=generator) < 0.02).cumsum(dim=1, dtype=torch.int32)
    visible = torch.rand(rows, 1, length, length, generator=generator) < 0.5
    visible |= torch.eye(length, dtype=torch.bool)
    return visible.tril() if causal else visible


@CAUSAL
@given(documents=st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_attention_stays_inside_the_document(causal: bool, documents: list[list[int]]) -> None:
    mask = dense_mask(torch.tensor(documents, dtype=torch.int32), causal)
    assert mask.dtype == torch.bool and mask.shape == (len(documents), 1, 7, 7)
    for row, allowed in zip(documents, mask[:, 0].tolist()):
        for query in range(7):
            for key in range(7):
                assert allowed[query][key] == (row[query] == row[key] and (key <= query or not causal))


def test_a_bool_mask_is_dense_already() -> None:
    mask = random_mask("bool", False, 9)
    assert dense_mask(mask, causal=True) is mask


@KINDS
@CAUSAL
@pytest.mark.parametrize("length", [256, 200])
def test_both_forms_say_the_same(kind: str, causal: bool, length: int) -> None:
    mask = random_mask(kind, causal, length)
    expected, made = dense_mask(mask, causal), block_mask(mask, causal)
    assert torch.equal(create_mask(made.mask_mod, 2, 1, length, length, "cpu"), expected)
    tiles = F.pad(expected, (0, -length % 128, 0, -length % 128)).unfold(2, 128, 128).unfold(3, 128, 128)
    assert torch.equal(made.to_dense().bool(), tiles.any(dim=-1).any(dim=-1))  # what is skipped is hidden


@KINDS
@CAUSAL
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_equals_sdpa(kind: str, causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    mask, heads = random_mask(kind, causal, 200), (4, kv_heads, kv_heads)
    query, key, value = (torch.randn(2, count, 200, 16, dtype=torch.float64) for count in heads)
    made = block_mask(mask, causal)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = flex_attention(query, key, value, block_mask=made, enable_gqa=kv_heads < 4)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(mask, causal), enable_gqa=kv_heads < 4
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)  # an uncompiled softmax is in fp32


USABLE: dict[str, Any] = {
    "compiled": True, "device": torch.device("cuda"), "dtype": torch.bfloat16, "head_size": 64, "length": 2048,
    "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), [
    ({}, None),
    ({"dtype": torch.float16, "head_size": 16, "length": 128}, None),
    ({"head_size": 256, "length": 1000}, None),
    ({"compiled": False}, "--compile"),
    ({"device": CPU}, "a GPU"),
    ({"dropout": 0.1}, "no dropout"),
    ({"dtype": torch.float32}, "half precision"),
    ({"head_size": 8}, "16 to 256 features"),
    ({"head_size": 320}, "16 to 256 features"),
    ({"length": 127}, "128 positions"),
])  # fmt: skip
def test_where_flex_attention_serves(changes: dict[str, Any], reason: str | None) -> None:
    obstacle = flex_obstacle(**(USABLE | changes))
    assert obstacle is None if reason is None else obstacle is not None and reason in obstacle


def test_dropout_stands_in_the_way_of_training_only(make_config: Callable[..., ModelConfig], make_model: Make) -> None:
    layer = Attention(make_config(attention_dropout=0.1, kv_channels=16), causal=True)
    layer.make_block_mask = block_mask
    usable = (torch.device("cuda"), torch.bfloat16, 2048)
    assert layer.flex_obstacle(*usable, training=True) == "FlexAttention has no dropout"
    assert layer.flex_obstacle(*usable, training=False) is None
    model = make_model(dtype=torch.bfloat16, kv_channels=16, attention_dropout=0.1)
    assert describe_masks(model, torch.device("cuda"), 2048, True).startswith("dense masks through SDPA (FlexAttention")
    compile_blocks(model)
    assert describe_masks(model, torch.device("cuda"), 2048, True).endswith("(FlexAttention has no dropout)")
    assert describe_masks(model, torch.device("cuda"), 2048, False) == "FlexAttention"


@pytest.mark.parametrize(("kind", "causal", "changes", "one_by_one"), [
    ("documents", True, {}, False),
    ("documents", False, {"checkpoint_activations": True}, False),
    ("documents", False, {"recompute_granularity": "selective"}, False),
    ("bool", True, {"recompute_granularity": "selective"}, True),
    ("bool", False, {}, True),
])  # fmt: skip
def test_compiled_blocks_take_new_masks_without_compiling(
    make_model: Make,
    kind: str,
    causal: bool,
    changes: dict[str, Any],
    one_by_one: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradients through FlexAttention are those of dense masks; later steps reuse the code of the first."""
    monkeypatch.setattr(attention, "flex_obstacle", lambda **facts: None)
    # Refuses gradients on a CPU because there is no kernel; this backend needs none.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    torch.compiler.reset()
    length = 160
    sizes = {"max_position_embeddings": length, "num_key_value_heads": 2}
    plain, model = make_model(causal, **sizes, **changes), make_model(causal, **sizes, **changes)
    compile_blocks(model, backend="aot_eager", one_by_one=one_by_one)
    tokens = torch.randint(0, 37, (3, length), generator=torch.Generator().manual_seed(0))
    batch = (tokens, torch.arange(length).repeat(3, 1), tokens.flip(1), torch.ones(3, length) / (3 * length))
    for step in range(3):
        mask = random_mask(kind, causal, length, seed=step, rows=3)
        results = []
        for one in (model, plain):
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                loss = one(*batch, mask)
                results.append([loss, *torch.autograd.grad(loss, list(one.parameters()))])
        for value, expected in zip(*results):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.layers[1].self_attention.prepare_mask(mask, torch.float32), BlockMask)
    assert isinstance(plain.layers[1].self_attention.prepare_mask(mask, torch.float32), Tensor)
    torch.compiler.reset()


@KINDS
def test_a_stage_sends_the_mask_as_it_came(make_model: Make, batch: dict[str, Tensor], kind: str) -> None:
    """Prepared masks are larger, and no tensors; attention gives the same cut anywhere."""
    model = make_model()
    mask = random_mask(kind, True, 16, rows=3)
    state = (batch["inputs"], batch["positions"], mask)
    for layers in ([*model.layers[:2]], [*model.layers[2:-1]]):
        state = run_layers(layers, state, model.config, training=True)
        assert state[1] is batch["positions"] and state[2] is mask
    assert torch.equal(model.layers[-1](state), model.logits(batch["inputs"], batch["positions"], mask))
