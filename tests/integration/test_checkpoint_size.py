"""The disk that ``python -m megatron.budget run`` foretells is what a run writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import Corpus, Launcher, events

from megatron.budget import checkpoint_bytes, parameter_count, published_model

SHAPE = "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512"


@pytest.mark.parametrize(("precision", "ranks"), [("--bf16", 1), ("--bf16", 2), ("", 1)])
def test_a_checkpoint_is_as_large_as_foretold(
    precision: str, ranks: int, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    """All files of one step, of all ranks. Beside the tensors lie some kilobytes: hence 1 %."""
    save = tmp_path / "run"
    argv = corpus.flags(f"{SHAPE} --train-iters 3 --save {save} {precision}")
    assert [done.code for done in launch.ranks("ar", [argv] * ranks, [None] * ranks)] == [0] * ranks
    parameters = events(save, "meta")[0]["parameters"]
    model = published_model(2, 256, 4, 64, 32, ffn_hidden_size=512)
    assert parameters == parameter_count(model, 264)  # 263 tokens and the mask
    written = sum(path.stat().st_size for path in (save / "global_step3").rglob("*"))
    assert written == pytest.approx(checkpoint_bytes(parameters, half=bool(precision)), rel=0.01)
