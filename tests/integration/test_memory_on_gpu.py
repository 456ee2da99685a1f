"""The memory estimate is within ten percent of what a GPU's allocator measures, in runs of the real entry points."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron import budget
from megatron.memory import Split, estimate
from megatron.model.gated_products import gated_obstacle
from megatron.tokenizer import build_vocabulary
from tools import benchmark

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SEQ_LENGTH, MICRO_BATCHES = 2048, 2


@dataclass(frozen=True)
class Case:
    """A run of one GPU in bf16."""

    model: str
    micro_batch: int
    objective: str = "mdm"
    zero_stage: int = 1
    offload: bool = False
    recompute: bool = False
    dropout: float = 0.0
    fp8: bool = False

    @property
    def name(self) -> str:
        words = [self.model, self.objective, f"micro-batch {self.micro_batch}", f"zero {self.zero_stage}"]
        words += ["offload"] * self.offload + ["recompute"] * self.recompute + ["dropout"] * (self.dropout > 0)
        words += ["fp8"] * self.fp8
        return " ".join(words)


CASES = [
    Case("117M", 8),
    Case("117M", 8, "ar"),
    Case("425M", 4),
    Case("425M", 4, "ar", dropout=0.1),
    Case("425M", 4, recompute=True),
    Case("425M", 4, offload=True),
    Case("425M", 4, zero_stage=3),
    Case("2298M", 4, offload=True),
    Case("425M", 8, fp8=True),
    Case("425M", 8, fp8=True, recompute=True),
]


def measured(case: Case, directory: Path) -> float:
    """Peak of the allocator in 1e9 bytes after four steps; Adam's state is there from the first one's end."""
    extra = ["--checkpoint-activations"] * case.recompute + ["--cpu-optimizer"] * case.offload
    extra += ["--fp8"] * case.fp8
    figures = directory / "figures.jsonl"
    code = benchmark.main([
        *f"train --model {case.model} --objective {case.objective} --micro-batch-size {case.micro_batch} "
        f"--global-batch-size {MICRO_BATCHES * case.micro_batch} --seq-length {SEQ_LENGTH} --steps 4 --warmup 1 "
        f"--dropout {case.dropout} --zero-stage {case.zero_stage} --json {figures} --extra".split(),
        *extra, "--seed", "1",
    ])  # fmt: skip
    assert code == 0
    memory: float = json.loads(figures.read_text())["memory_gb"]
    return memory


def estimated(case: Case) -> float:
    """The same by ``megatron.memory``."""
    model = budget.read_model_table()[case.model].model(
        SEQ_LENGTH, hidden_dropout=case.dropout, attention_dropout=case.dropout, checkpoint_activations=case.recompute
    )
    gated = gated_obstacle(
        device=torch.device("cuda"), half_precision=True, hidden_size=model.hidden_size, ffn_size=model.ffn_size
    )
    found = estimate(
        model,
        Split(gpus=1, zero_stage=case.zero_stage, offload=case.offload, fp8=case.fp8, gated=gated is None),
        vocabulary=build_vocabulary(budget.GPT2_VOCABULARY, 128).padded_size, micro_batch_size=case.micro_batch,
        seq_length=SEQ_LENGTH, micro_batches=MICRO_BATCHES,
    )  # fmt: skip
    return found.gpu / 1e9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_estimate_is_within_ten_percent(case: Case, tmp_path: Path) -> None:
    expected, found = estimated(case), measured(case, tmp_path)
    print(f"{case.name}: estimated {expected:.2f} GB, measured {found:.2f} GB, ratio {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=0.1)
