"""Parameters <-> FLOPs <-> tokens <-> samples <-> epochs: pure and exact arithmetic.

Sources: the parameter formula and C = 6 N D of 2507.15857; its released scripts' roundings; model FLOPs as in PaLM
(2204.02311, appendix B). ``python -m megatron.budget --help`` (``megatron.budget_cli``) offers the same to scripts and
people.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron.config import ModelConfig
from megatron.errors import UserError

GPT2_VOCABULARY = 50_257
_UTILS = Path(__file__).resolve().parent.parent / "utils"
MODEL_TABLE = _UTILS / "model_params.sh"
TOKEN_TABLE = _UTILS / "epoch_tokens.sh"

# Dense bf16 FLOP/s without sparsity, from the vendors' data sheets; the first name that occurs in the device's counts.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
)


@dataclass(frozen=True)
class ModelRow:
    """One row of ``utils/model_params.sh``: its second column ``table_ffn`` is not the MLP width that is trained."""

    name: str
    d_model: int
    table_ffn: int
    head_size: int
    heads: int
    layers: int

    @property
    def ffn(self) -> int:
        """The MLP width that is trained."""
        return swiglu_ffn(self.d_model)

    @property
    def parameters(self) -> int:
        """Published parameter count of this row."""
        return published_parameter_count(self.d_model, self.layers)

    def model(self, seq_length: int, **changes: Any) -> ModelConfig:
        """The model that the scripts train for this row; see :func:`published_model`."""
        return published_model(self.layers, self.d_model, self.heads, self.head_size, seq_length, **changes)


@dataclass(frozen=True)
class SampleBudget:
    """Length of a run: ``tokens`` is the data count behind it, before rounding to whole samples."""

    tokens: int
    train_samples: int
    warmup_samples: int


def swiglu_ffn(d_model: int) -> int:
    """Return int((4 d 2/3) / 64) * 64, the SwiGLU width of Megatron-DeepSpeed, in whole numbers."""
    return 8 * d_model // 3 // 64 * 64


def published_parameter_count(
    d_model: int, layers: int, *, ffn: int | None = None, vocabulary: int = GPT2_VOCABULARY
) -> int:
    """Return 4 L d^2 + 3 L d f + 6 L d + V d, the N of the FLOP budgets of 2507.15857, with f = ``swiglu_ffn`` if None.

    That is (4 L - 1) d more than a model without biases has, and assumes that all heads together are as wide as d.
    """
    f = swiglu_ffn(d_model) if ffn is None else ffn
    return layers * d_model * (4 * d_model + 3 * f + 6) + vocabulary * d_model


def parameter_count(model: ModelConfig, vocabulary: int) -> int:
    """Return the exact number of parameters of ``model`` with ``vocabulary`` embedding rows (padding included)."""
    d, ffn = model.hidden_size, model.ffn_size
    queries, keys = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    bias = not model.disable_bias_linear
    norm = 2 * d if model.normalization == "layernorm" else d
    attention = 2 * d * queries + 2 * d * keys + bias * (queries + 2 * keys + d)
    inner = 2 * ffn if model.swiglu else ffn
    mlp = d * inner + ffn * d + bias * (inner + d)
    positions = 0 if model.use_rotary_position_embeddings else model.max_position_embeddings * d
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * (attention + mlp + 2 * norm) + norm + matrices * vocabulary * d + positions


def flops_per_token(model: ModelConfig, seq_length: int, vocabulary: int, *, causal: bool) -> int:
    """Return the model FLOPs of one token, forward and backward, recomputation not counted.

    6 per weight of a matrix product (the head counts as V d, the embedding not at all), plus 12 L d s for attention
    over s = ``seq_length`` tokens, where d stands for heads x head size; a causal model needs half of that.
    """
    d = model.hidden_size
    queries, keys = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    weights = model.num_layers * (2 * d * (queries + keys) + (3 if model.swiglu else 2) * d * model.ffn_size)
    attention = 12 * model.num_layers * queries * seq_length
    return 6 * (weights + vocabulary * d) + (attention // 2 if causal else attention)


def published_model(
    layers: int, d_model: int, heads: int, head_size: int, seq_length: int, **changes: Any
) -> ModelConfig:
    """Return a model of this shape by the recipe of 2507.15857; ``changes`` are fields of ModelConfig."""
    fields: dict[str, Any] = {
        "num_layers": layers, "hidden_size": d_model, "num_attention_heads": heads, "kv_channels": head_size,
        "max_position_embeddings": seq_length, "use_rotary_position_embeddings": True, "normalization": "rmsnorm",
        "swiglu": True, "disable_bias_linear": True,
    }  # fmt: skip
    return ModelConfig(**fields | changes)


def training_flops(parameters: int, tokens: int) -> int:
    """Return C = 6 N D."""
    return 6 * parameters * tokens


def budget_from_flops(flops: int | Fraction, parameters: int, seq_length: int) -> SampleBudget:
    """Return the run that spends ``flops`` = 6 N D on a model of ``parameters``.

    Tokens are rounded down, samples to the nearest (a tie to the even one), and the warm-up is the nearest to 1 %, but
    at least 100 samples: the published budget scripts.
    """
    tokens = int(Fraction(flops) / (6 * parameters))
    samples = round(Fraction(tokens, seq_length))
    return SampleBudget(tokens, samples, max(round(Fraction(samples, 100)), 100))


def budget_from_epochs(tokens_per_epoch: int, epochs: int, seq_length: int) -> SampleBudget:
    """Return the run of ``epochs`` epochs, samples and the 1 % of warm-up rounded down: the published epoch scripts."""
    tokens = tokens_per_epoch * epochs
    return SampleBudget(tokens, tokens // seq_length, tokens // seq_length // 100)


def training_days(flops: float, *, gpus: int, mfu: float, peak: float) -> float:
    """Return the days that ``flops`` take on GPUs of ``peak`` FLOP/s each, of which training reaches the share ``mfu``.

    The MFU of ``metrics.jsonl`` counts :func:`flops_per_token`: at such an MFU, ``flops`` must be counted so too.
    """
    return flops / (gpus * mfu * peak) / 86_400


def checkpoint_bytes(parameters: int, *, half: bool = True) -> int:
    """Return the size of a checkpoint to continue from: weights as trained (``half``: bf16 or fp16, else fp32), fp32
    weights and both moments of Adam. Split over processes it is as large.
    """
    return ((2 if half else 4) + 12) * parameters


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name as torch reports it, or None where it is not known."""
    words = f" {device_name} ".lower()
    for name, flops in _PEAK_FLOPS:
        if re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", words):
            return flops
    return None


def read_model_table(path: Path = MODEL_TABLE) -> dict[str, ModelRow]:
    """Return the rows ``PARAM_<name>=(d_model ffw kv heads layers)`` of ``path`` by name.

    Raises UserError, naming file and line, for a row that does not hold five positive numbers.
    """
    table = {}
    for number, name, value in _assignments(path, "PARAM_"):
        numbers = re.fullmatch(r"\(\s*(\d+(?:\s+\d+){4})\s*\)", value)
        sizes = [int(word) for word in numbers[1].split()] if numbers else []
        if not sizes or min(sizes) < 1:
            raise UserError(f"{path}, line {number}: PARAM_{name} must be (d_model ffw kv heads layers)")
        table[name] = ModelRow(name, *sizes)
    return table


def read_token_table(path: Path = TOKEN_TABLE) -> dict[str, int]:
    """Return the tokens per epoch ``DATA_<name>=<tokens>`` of ``path`` by name; UserError names file and line."""
    table = {}
    for number, name, value in _assignments(path, "DATA_"):
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{path}, line {number}: DATA_{name} must be a number of tokens")
        table[name] = int(value)
    return table


def _assignments(path: Path, prefix: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, name without ``prefix``, value) of the assignments in a bash file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(rf"{prefix}(\w+)=(.*?)\s*(?:#.*)?", line)
        if match:
            yield number, match[1], match[2]


if __name__ == "__main__":
    from megatron.budget_cli import main

    sys.exit(main())
