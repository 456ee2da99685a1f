"""The table of cuts: parts make the whole again, sections stay together, and what is not listed is whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.config import ModelConfig
from megatron.distributed.collectives import Ranks
from megatron.distributed.tensor_parallel import TensorParallel
from megatron.model.gpt import build_layers, initial_weight, named_parameters
from megatron.model.partition import Cut, cut_of


def test_each_section_is_cut_for_itself() -> None:
    """q of 4 rows, k and v of 2: rank 1 of 2 has the second half of each."""
    whole = torch.arange(8)
    cut = Cut(0, (4, 2, 2))
    assert cut.part(whole, 0, 2).tolist() == [0, 1, 4, 6]
    assert cut.part(whole, 1, 2).tolist() == [2, 3, 5, 7]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_join_to_the_whole(make_config: Callable[..., ModelConfig], ranks: int) -> None:
    config = make_config(num_key_value_heads=2, untie_embeddings_and_output_weights=True)
    parameters = named_parameters(build_layers(config, 40, 37, causal=True), config, 0)
    cut_names = set()
    for name, parameter in parameters.items():
        cut = cut_of(name, config, 40)
        if cut is None:
            continue
        cut_names.add(".".join(name.split(".")[2:]))
        whole = torch.arange(parameter.numel()).view(parameter.shape)
        parts = [cut.part(whole, rank, ranks) for rank in range(ranks)]
        assert all(cut.whole_shape(part.shape) == whole.shape for part in parts)
        assert torch.equal(cut.join(parts), whole)
    assert cut_names == {
        "word_embeddings.weight", "weight", "self_attention.query_key_value.weight", "self_attention.dense.weight",
        "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight",
    }


def test_biases_and_positions(make_config: Callable[..., ModelConfig]) -> None:
    """Biases of column-parallel layers are cut; those that are added after the sum, and positions, are whole."""
    config = make_config(disable_bias_linear=False, swiglu=False)
    block = "layers.1."
    assert cut_of(block + "self_attention.query_key_value.bias", config, 40) == Cut(0, (32, 32, 32))
    assert cut_of(block + "mlp.dense_h_to_4h.bias", config, 40) == Cut(0, (48,))
    for name in ("self_attention.dense.bias", "mlp.dense_4h_to_h.bias", "input_layernorm.weight"):
        assert cut_of(block + name, config, 40) is None
    assert cut_of("layers.0.position_embeddings.weight", config, 40) is None
    assert cut_of("layers.3.final_layernorm.bias", config, 40) is None


def test_initial_parts_are_of_the_same_whole(make_config: Callable[..., ModelConfig]) -> None:
    """No rank needs another to know its weights: built without groups, as a rank of four would."""
    config = make_config(num_key_value_heads=1)
    whole = named_parameters(build_layers(config, 40, 37, causal=True), config, 0)
    for rank in range(4):
        tensor = TensorParallel(4, rank, Ranks("no group", 4))
        parts = named_parameters(build_layers(config, 40, 37, causal=True, tensor=tensor), config, 0)
        assert parts.keys() == whole.keys()
        for name, part in parts.items():
            value = initial_weight(name, part.shape, config, 3, tensor)
            cut = cut_of(name, config, 40)
            expected = initial_weight(name, whole[name].shape, config, 3)
            assert hasattr(part, "tensor_model_parallel") == (cut is not None)
            assert torch.equal(value, expected if cut is None else cut.part(expected, rank, 4)), name
