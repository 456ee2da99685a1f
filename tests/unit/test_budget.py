"""Budgets against the published figures, parameter counts against transformers."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.budget import (
    MODEL_TABLE,
    TOKEN_TABLE,
    budget_from_epochs,
    budget_from_flops,
    flops_per_token,
    parameter_count,
    peak_flops,
    published_parameter_count,
    read_model_table,
    read_token_table,
    training_days,
    training_flops,
)
from megatron.config import ModelConfig
from megatron.errors import UserError

# 2507.15857, name -> millions of parameters by its formula.
PUBLISHED = """
7 7.0, 14 13.6, 44 50.7, 57 64.8, 74 80.5, 90 95.0, 106 109.6, 117 123.6, 140 144.8, 163 166.1, 175 179.2, 196 198.3,
217 217.5, 251 250.8, 278 275.7, 306 300.6, 425 416.9, 489 475.6, 509 495.9, 552 534.4, 587 566.7, 632 615.3, 664 637.6,
724 700.3, 816 785.2, 893 856.4, 1018 971.3, 1143 1086.3, 1266 1207.6, 1424 1353.6, 1731 1644.9, 2298 2165.3,
4516 4231.9, 9293 8640.6, 16183 15028.3
"""
# Rows whose heads together are not as wide as the model: the formula is not their size.
NARROW_OR_WIDE = {"20M", "35M", "11452M", "12569M", "13735M", "14940M"}


def row_model(name: str, **changes: Any) -> ModelConfig:
    row = read_model_table()[name]
    recipe: dict[str, Any] = {
        "num_layers": row.layers,
        "hidden_size": row.d_model,
        "num_attention_heads": row.heads,
        "kv_channels": row.head_size,
        "max_position_embeddings": 2048,
        "use_rotary_position_embeddings": True,
        "normalization": "rmsnorm",
        "swiglu": True,
        "disable_bias_linear": True,
    }
    return ModelConfig(**recipe | changes)


def test_every_published_size() -> None:
    table = read_model_table()
    entries = [entry.split() for entry in PUBLISHED.replace("\n", " ").split(",")]
    assert len(entries) == 35
    for name, millions in entries:
        assert f"{table[name + 'M'].parameters / 1e6:.1f}" == millions, name


def test_table_has_every_published_row() -> None:
    table = read_model_table()
    assert len(table) == 54
    assert {name for name, row in table.items() if row.heads * row.head_size != row.d_model} == NARROW_OR_WIDE
    row = table["425M"]
    assert (row.d_model, row.table_ffn, row.head_size, row.heads, row.layers) == (1280, 5120, 128, 10, 18)
    assert row.ffn == 3392


def test_tables_match_the_facts(shared_dir: Path) -> None:
    facts = (shared_dir / "FACTS.md").read_text("utf-8")
    rows = re.findall(r"(\d+M) (\d+) (\d+) (\d+) (\d+) (\d+)[;.]", facts)
    assert [(r.name, r.d_model, r.table_ffn, r.head_size, r.heads, r.layers) for r in read_model_table().values()] == [
        (name, *map(int, sizes)) for name, *sizes in rows
    ]
    base, tokens = "", {}
    for name, count in re.findall(r"(\w+) (\d{7,})", facts.split("prefix `DATA_`")[1].split("Subsets")[0]):
        base = base if name.startswith("_") else name
        tokens[base + name if name.startswith("_") else name] = int(count)
    assert read_token_table() == tokens
    assert len(tokens) == 46 + 3


def test_the_formula_is_the_exact_count_but_for_its_norms() -> None:
    """It counts 6 L d where two RMSNorms a block and a final one have (2 L + 1) d."""
    for name, row in read_model_table().items():
        if name not in NARROW_OR_WIDE:
            exact = parameter_count(row_model(name), 50_257)
            assert exact == row.parameters - (4 * row.layers - 1) * row.d_model
            assert abs(exact - row.parameters) < 2e-3 * row.parameters


def torch_count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_count_equals_llama(untied: bool, kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        num_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        kv_channels=20,
        ffn_hidden_size=100,
        max_position_embeddings=64,
        use_rotary_position_embeddings=True,
        normalization="rmsnorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=untied,
    )
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=3,
                hidden_size=96,
                num_attention_heads=6,
                num_key_value_heads=kv_heads,
                head_dim=20,
                intermediate_size=100,
                vocab_size=512,
                tie_word_embeddings=not untied,
            )
        )
    llama.tie_weights()
    assert parameter_count(config, 512) == torch_count(llama)


def test_count_equals_gpt2() -> None:
    """Layer norms, learned positions, GELU and biases everywhere."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(num_layers=3, hidden_size=96, num_attention_heads=6, max_position_embeddings=64)
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=3, n_embd=96, n_head=6, n_positions=64, vocab_size=512)
        )
    gpt2.tie_weights()
    assert parameter_count(config, 512) == torch_count(gpt2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"swiglu": False},
        {"disable_bias_linear": False},
        {"normalization": "layernorm"},
        {"use_rotary_position_embeddings": False, "untie_embeddings_and_output_weights": True},
        {"num_key_value_heads": 1},
    ],
)
def test_count_equals_our_model(changes: dict[str, Any]) -> None:
    gpt = pytest.importorskip("megatron.model.gpt")
    config = row_model("7M", **changes)
    with torch.device("meta"):
        layers = torch.nn.ModuleList(gpt.build_layers(config, 50_304, 50_257, causal=True))
    assert parameter_count(config, 50_304) == torch_count(layers)


@pytest.mark.parametrize(
    ("name", "factor", "samples", "warmup"), [("117M", 10, 6_584_834, 65_848), ("217M", 10, 3_741_565, 37_416)]
)
def test_published_budgets(name: str, factor: int, samples: int, warmup: int) -> None:
    budget = budget_from_flops(factor * 10**18, read_model_table()[name].parameters, 2048)
    assert (budget.train_samples, budget.warmup_samples) == (samples, warmup)


def test_published_epochs() -> None:
    budget = budget_from_epochs(read_token_table()["100M"], 500, 2048)
    assert (budget.tokens, budget.train_samples, budget.warmup_samples) == (49_976_199_500, 24_402_441, 244_024)


def test_budget_agrees_with_floating_point_scripts() -> None:
    """The published scripts compute in floating point: for every row and budget they come to the same samples."""
    for row in read_model_table().values():
        for factor in (6, 10, 30, 100):
            data = int((factor * 10**9 / 6) * (10**9 / row.parameters))
            samples = round(data / 2048)
            budget = budget_from_flops(factor * 10**18, row.parameters, 2048)
            assert budget.train_samples == samples
            assert budget.warmup_samples == max(round(samples / 100), 100)
            assert abs(training_flops(row.parameters, budget.tokens) / (factor * 1e18) - 1) < 1e-6


def test_rounding_of_the_two_kinds() -> None:
    # 6 N = 6 FLOPs a token: 2047 tokens are nearest to one sample of 2048 and hold no whole one.
    assert budget_from_flops(6 * 2047, 1, 2048).train_samples == 1
    assert budget_from_epochs(2047, 1, 2048).train_samples == 0
    assert budget_from_flops(6 * 1000 + 5, 1, 10).tokens == 1000
    assert budget_from_flops(6 * 15_000, 1, 1).warmup_samples == 150
    assert budget_from_flops(6 * 500, 1, 1).warmup_samples == 100
    assert budget_from_epochs(199, 1, 1).warmup_samples == 1
    assert budget_from_flops(Fraction("0.5") * 10**18, 10**9, 2048) == budget_from_flops(5 * 10**17, 10**9, 2048)


def test_flops_of_the_published_recipe() -> None:
    model = row_model("425M")
    matrices = 6 * (18 * (4 * 1280 * 1280 + 3 * 1280 * 3392) + 50_257 * 1280)
    attention = 12 * 18 * 1280 * 2048
    assert flops_per_token(model, 2048, 50_257, causal=False) == matrices + attention
    assert flops_per_token(model, 2048, 50_257, causal=True) == matrices + attention // 2
    # PERFORMANCE.md: 166,900 tokens/s are 52 % of an H100.
    assert 166_900 * (matrices + attention) / 989e12 == pytest.approx(0.52, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "causal"), [({}, False), ({"num_key_value_heads": 1, "kv_channels": 16, "swiglu": False}, False)]
)
def test_flops_equal_a_count_of_matrix_products(changes: dict[str, Any], causal: bool) -> None:
    """Forward products counted by torch on plain tensors; backward costs twice the forward."""
    from torch.utils.flop_counter import FlopCounterMode

    model, s, vocabulary = row_model("7M", **changes), 32, 500
    d, h, kv, f, hd = 128, model.num_attention_heads, model.num_kv_heads, model.ffn_size, model.head_size
    x = torch.zeros(s, d)
    with FlopCounterMode(display=False) as counter:
        for _ in range(model.num_layers):
            for width in (h * hd, kv * hd, kv * hd):
                _ = x @ torch.zeros(d, width)
            q = torch.zeros(h, s, hd)
            _ = (q @ q.transpose(1, 2)) @ q
            _ = torch.zeros(s, h * hd) @ torch.zeros(h * hd, d)
            for _ in range(2 if model.swiglu else 1):
                _ = x @ torch.zeros(d, f)
            _ = torch.zeros(s, f) @ torch.zeros(f, d)
        _ = x @ torch.zeros(d, vocabulary)
    assert s * flops_per_token(model, s, vocabulary, causal=causal) == 3 * counter.get_total_flops()


def test_formula_with_a_given_width() -> None:
    assert published_parameter_count(10, 2, ffn=7, vocabulary=100) == 4 * 2 * 100 + 3 * 2 * 10 * 7 + 6 * 2 * 10 + 1000


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H20", None),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_peak_flops(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


@pytest.mark.parametrize("row", ["PARAM_1M=(1 2 3 4)", "PARAM_1M=(1 2 3 4 0)", "PARAM_1M=1", "PARAM_1M=(a 2 3 4 5)"])
def test_bad_model_row_is_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "table.sh"
    path.write_text(f"# comment\nPARAM_7M=(128 512 32 4 3)  # fine\n{row}\n")
    with pytest.raises(UserError, match=r"table\.sh, line 3: PARAM_1M"):
        read_model_table(path)


def test_bad_token_row_and_missing_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens.sh"
    path.write_text("DATA_1M=many\n")
    with pytest.raises(UserError, match=r"tokens\.sh, line 1: DATA_1M"):
        read_token_table(path)
    with pytest.raises(UserError, match=r"none\.sh: cannot be read"):
        read_token_table(tmp_path / "none.sh")


def test_bash_reads_the_tables_alike() -> None:
    script = f"source {MODEL_TABLE}; source {TOKEN_TABLE}; echo ${{PARAM_117M[@]}} $DATA_7B6_20ep"
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["768", "3072", "64", "12", "12", "382715500"]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_days_follow_the_measured_speed(objective: str) -> None:
    """PERFORMANCE.md: 166,900 tokens/s of the 425M row, MDM, are 52 % of an H100: a day makes 14.4e9 tokens."""
    flops = flops_per_token(row_model("425M"), 2048, 50_257, causal=objective == "ar")
    days = training_days(flops * 166_900 * 86_400, gpus=1, mfu=0.52, peak=989e12)
    assert days == pytest.approx(1 if objective == "mdm" else 0.9, rel=0.015)
    assert training_days(4e18, gpus=8, mfu=0.5, peak=1e15) == 1e3 / 86_400


def test_rows_become_the_published_recipe() -> None:
    assert read_model_table()["20M"].model(2048) == row_model("20M")
    assert read_model_table()["20M"].model(2048, hidden_dropout=0.0).hidden_dropout == 0
