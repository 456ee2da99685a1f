"""The list of layers: parameters, initial weights, weight decay groups, dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.config import ModelConfig
from megatron.model.gpt import build_layers, decayed, initialize_weights
from megatron.model.sharding import SequentialGPT

Batch = dict[str, torch.Tensor]
Make = Callable[..., SequentialGPT]

# Rows of the published table (d_model ffw kv heads layers) and their millions of parameters.
PUBLISHED = [
    ((128, 512, 32, 4, 3), 7.0), ((512, 2048, 64, 8, 8), 50.7), ((768, 3072, 64, 12, 12), 123.6),
    ((1280, 5120, 128, 10, 18), 416.9), ((1792, 7168, 128, 14, 26), 1086.3), ((5120, 20480, 128, 40, 47), 15028.3),
]


@pytest.mark.parametrize(("row", "millions"), PUBLISHED)
def test_parameter_count_of_published_rows(row: tuple[int, ...], millions: float) -> None:
    """N = 4 L d^2 + 3 L d f + 6 L d + V d counts 6 d of norms and biases a block and the unpadded vocabulary.

    The model has 2 d of norms a block, d at the end, and 50,304 rows.
    """
    width, _, head, heads, layers = row
    config = ModelConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=heads, kv_channels=head, max_position_embeddings=2048,
        use_rotary_position_embeddings=True, normalization="rmsnorm", swiglu=True, disable_bias_linear=True,
    )
    with torch.device("meta"):
        model = SequentialGPT(build_layers(config, 50304, 50257, causal=True), config)
    count = sum(parameter.numel() for parameter in model.parameters())
    formula = count + 4 * layers * width - width - (50304 - 50257) * width
    ffn = int((4 * width * 2 / 3) / 64) * 64
    assert formula == 4 * layers * width**2 + 3 * layers * width * ffn + 6 * layers * width + 50257 * width
    assert round(formula / 1e6, 1) == millions


def test_parameter_names(make_model: Make) -> None:
    """Checkpoints depend on them."""
    block = [
        "input_layernorm.weight", "self_attention.query_key_value.weight", "self_attention.dense.weight",
        "post_attention_layernorm.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight",
    ]
    expected = ["layers.0.word_embeddings.weight", *(f"layers.{i}.{n}" for i in (1, 2) for n in block)]
    expected.append("layers.3.final_layernorm.weight")
    assert [name for name, _ in make_model().named_parameters()] == expected
    untied = make_model(untie_embeddings_and_output_weights=True)
    assert [name for name, _ in untied.named_parameters()] == [*expected, "layers.4.weight"]
    tied = make_model()
    assert tied.layers[-1].weight is tied.layers[0].word_embeddings.weight


def test_decay_by_name_is_decay_by_dimension(make_model: Make) -> None:
    model = make_model(
        normalization="layernorm", use_rotary_position_embeddings=False, swiglu=False, disable_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if decayed(name)} == {n for n, p in parameters.items() if p.dim() == 2}
    assert 0 < sum(map(decayed, parameters)) < len(parameters)


def test_initial_weights(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(
        num_layers=8, hidden_size=64, ffn_hidden_size=128, init_method_std=0.02, normalization="layernorm",
        disable_bias_linear=False,
    )
    layers = build_layers(config, 640, 600, causal=True)
    state = torch.get_rng_state()
    initialize_weights(layers, config, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in SequentialGPT(layers, config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        std = 0.02 / 4 if name.endswith(("dense.weight", "dense_4h_to_h.weight")) else 0.02  # sqrt(2 * 8) = 4
        # Standard errors of a mean and of a standard deviation; 5 of them leave no chance of a false alarm.
        assert abs(parameter.mean()) < 5 * std / parameter.numel() ** 0.5, name
        assert abs(parameter.std() - std) < 5 * std / (2 * parameter.numel()) ** 0.5, name


def test_initial_weights_depend_on_seed_and_name_only(make_config: Callable[..., ModelConfig]) -> None:
    """So a pipeline stage makes its layers, in any dtype, as the whole model would."""
    config = make_config()

    def build(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Module]:
        layers = [layer.to(dtype) for layer in build_layers(config, 40, 37, causal=True)]
        initialize_weights(layers, config, seed)
        return layers

    whole, again, other, half = build(1), build(1), build(2), build(1, torch.bfloat16)
    stage = build_layers(config, 40, 37, causal=False)[2:]
    initialize_weights(stage, config, 1, first=2)
    for index in range(4):
        for name, parameter in whole[index].named_parameters():
            assert torch.equal(parameter, again[index].get_parameter(name))
            assert torch.equal(parameter.bfloat16(), half[index].get_parameter(name))
            assert parameter.dim() == 1 or not torch.equal(parameter, other[index].get_parameter(name))
    assert torch.equal(stage[0].mlp.dense_4h_to_h.weight, whole[2].mlp.dense_4h_to_h.weight)
    assert not torch.equal(whole[1].mlp.dense_h_to_4h.weight, whole[2].mlp.dense_h_to_4h.weight)


def test_no_probability_for_mask_and_padding(make_model: Make, batch: Batch) -> None:
    logits = make_model().logits(batch["inputs"], batch["positions"])
    assert logits.shape == (3, 16, 40)
    assert torch.isinf(logits[..., 37:]).all() and torch.isfinite(logits[..., :37]).all()


def test_dropout_is_on_in_training_only(make_model: Make, batch: Batch) -> None:
    for changes in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        plain, model = make_model(), make_model(**changes)
        torch.manual_seed(0)
        assert not torch.equal(model(**batch), model(**batch))
        model.eval()
        assert torch.equal(model(**batch), plain(**batch))


def test_dropout_keeps_the_mean_and_drops_the_share(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(hidden_dropout=0.25, hidden_size=64)
    embedding = build_layers(config, 40, 37, causal=True)[0]
    torch.nn.init.ones_(embedding.word_embeddings.weight)
    torch.manual_seed(0)
    hidden = embedding(torch.zeros(64, 64, dtype=torch.int64), torch.zeros(64, 64, dtype=torch.int64))[0]
    share = (hidden == 0).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / hidden.numel()) ** 0.5
    torch.testing.assert_close(hidden[hidden != 0].unique(), torch.tensor([4 / 3]))


def test_pieces_of_the_list_work_on_positions(make_model: Make, batch: Batch) -> None:
    """A pipeline stage hands positions on; a block makes the rotary table that SequentialGPT shares between blocks."""
    model = make_model()
    state = (batch["inputs"], batch["positions"])
    for layer in model.layers[:-1]:
        state = layer(*state)
        assert torch.equal(state[1], batch["positions"])
    assert torch.equal(model.layers[-1](state), model.logits(batch["inputs"], batch["positions"]))
