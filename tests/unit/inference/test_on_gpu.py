"""What only a GPU shows: checkpoints trained in fp16, and batches scored in bf16, without waiting for the device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import ENTRY_POINTS, REPOSITORY, Corpus, make_corpus

from megatron.inference.generation import Sampling, generate_autoregressive, generate_masked
from megatron.inference.hub.unmasking import Unmasking
from megatron.inference.likelihood import Estimation, Request, likelihoods
from megatron.inference.loading import LoadedModel, load_model
from megatron.inference.safe_load import load_file
from megatron.inference.scoring import Row, Scorer
from megatron.inference.weights import find_state, full_weights, read_safetensors
from tools import convert_checkpoint, generate

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "init_method_std": 0.05}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tiny corpus."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def fp16_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``fp16_run(objective, stage)``: a run of a few steps in fp16 through the entry point; its checkpoint."""
    made: dict[tuple[str, str], Path] = {}

    def run(objective: str, stage: str) -> Path:
        if (objective, stage) not in made:
            save = tmp_path_factory.mktemp(f"{objective}{stage}") / "run"
            flags = corpus.flags(f"--fp16 --loss-scale 128 --zero-stage {stage} --train-iters 2 "
                                 f"--lr-warmup-samples 4 --save {save}")
            command = [sys.executable, str(REPOSITORY / ENTRY_POINTS[objective]), *flags, "--no-compile"]
            environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            made[objective, stage] = save / "global_step2"
        return made[objective, stage]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "stage"), [("ar", "1"), ("mdm", "1"), ("ar", "3")])
def test_fp16_checkpoint_is_read_by_name_exported_and_used(
    fp16_run: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, stage: str
) -> None:
    checkpoint = fp16_run(objective, stage)
    weights = full_weights(checkpoint)
    module = load_file(next(checkpoint.glob("*mp_rank_00_model_states.pt")))["module"]
    assert {value.dtype for value in module.values()} == {torch.float16}
    if stage == "1":  # stage 3 keeps no weights there
        assert all(torch.equal(weights[name].half(), module[name].cpu()) for name in weights)
        assert any(not torch.equal(weights[name], module[name].cpu().float()) for name in weights)
    assert find_state(checkpoint, weights, load_optimizer=True).step == 2
    exported = tmp_path / "hf"
    assert convert_checkpoint.main(["to-hf", "--input", str(checkpoint), "--output", str(exported)]) == 0
    embedding = "model.embed_tokens.weight" if objective == "ar" else "layers.0.word_embeddings.weight"
    found = read_safetensors(exported / "model.safetensors")[embedding]
    assert torch.equal(found, weights["layers.0.word_embeddings.weight"][: len(found)])
    loaded = load_model(checkpoint, device="cuda", dtype=torch.bfloat16)
    scorer = Scorer(loaded.model, loaded.causal, loaded.needs_tokenizer().eod, 4096)
    request = Request(tuple(loaded.needs_tokenizer().encode("the of")), (3, 5, 4), 0)
    (result,) = likelihoods(scorer, [request], Estimation(), loaded.vocabulary.mask_id)
    assert -40 < result.log_prob < -3
    capsys.readouterr()
    flags = ["--load", str(checkpoint), "--prompt", "the of", "--max-new-tokens", "6", "--no-live"]
    assert generate.main(flags) == 0 and capsys.readouterr().out.startswith("the of")


def rows() -> list[Row]:
    """Rows of several lengths, so that most batches are padded."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(60):
        length = int(random.integers(3, 30))
        where = np.sort(random.choice(length, size=int(random.integers(1, length)), replace=False))
        made.append(Row(random.integers(0, 50, length), where, random.integers(0, 50, len(where))))
    return made


def on_gpu(loaded: LoadedModel, dtype: torch.dtype) -> Any:
    """The same model there, as far as a scorer looks at it."""
    return loaded.model.to("cuda", dtype)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_padded_batches_score_as_on_the_cpu(
    loaded_model: Callable[..., LoadedModel], config: Callable[..., Any], objective: str, kv_heads: int
) -> None:
    shape = config(**WIDE | {"num_key_value_heads": kv_heads})
    loaded = loaded_model(objective, 50, shape, torch.float32)
    expected = Scorer(loaded.model, loaded.causal, 0, 256).score(rows())
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        found = Scorer(on_gpu(loaded, dtype), loaded.causal, 0, 256).score(rows())
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.nll, other.nll, atol=tolerance)


def test_scoring_waits_for_the_device_once(
    loaded_model: Callable[..., LoadedModel], config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(on_gpu(loaded_model("mdm", 50, config(**WIDE)), torch.bfloat16), False, 0, 256)
    scorer.score(rows())  # libraries start
    forward, batches = scorer._forward, []

    def watched(chosen: Any) -> torch.Tensor:
        batches.append(len(chosen))
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(chosen)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(scorer, "_forward", watched)
    scorer.score(rows())
    assert len(batches) > 3 and sum(batches) == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_on_the_gpu(
    loaded_model: Callable[..., LoadedModel], config: Callable[..., Any], dtype: torch.dtype
) -> None:
    """Greedy fp32 text is that of the CPU; sampled text is the same for the same seed."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    for objective in ("ar", "mdm"):
        loaded = loaded_model(objective, 50, config(**WIDE), torch.float32)
        run: Callable[..., list[list[int]]] = generate_autoregressive if objective == "ar" else generate_masked
        greedy: Any = Sampling() if objective == "ar" else Unmasking()
        sampled: Any = Sampling(temperature=1.0) if objective == "ar" else Unmasking(temperature=1.0)
        expected = run(loaded, prompts, 8, greedy)
        on_gpu(loaded, dtype)
        if dtype == torch.float32:
            assert run(loaded, prompts, 8, greedy) == expected
        assert run(loaded, prompts, 8, sampled, seed=3) == run(loaded, prompts, 8, sampled, seed=3)
        assert run(loaded, prompts, 8, sampled, seed=3) != run(loaded, prompts, 8, sampled, seed=4)
