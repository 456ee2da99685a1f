"""``--fp8`` through the entry points under every kind of split, on gloo and in 8-bit floats that a CPU multiplies.

Splits change what a factor's scale is made of, or in which order bf16 sums are taken, so curves agree within fp8's
rounding; the first step, where neither differs, agrees to the last digits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_faults import allow_fp8_on_a_cpu
from training_runs import Corpus, Launcher, events

pytestmark = pytest.mark.slow

STEPS = 6
SPLITS = {
    "two replicas": (2, "--zero-stage 2"),
    "zero 3": (2, "--zero-stage 3"),
    "compiled zero 3": (2, "--zero-stage 3 --compile"),
    "pipeline": (2, "--pipeline-model-parallel-size 2"),
    "tensor": (2, "--tensor-model-parallel-size 2"),
}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(corpus: Corpus, launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``train(flags, ranks)``: the directory of a run in bf16 with those flags, made once."""
    known: dict[str, Path] = {}

    def run(flags: str, ranks: int = 1) -> Path:
        if flags not in known:
            save = tmp_path_factory.mktemp("fp8") / "save"
            argv = corpus.flags(f"--bf16 --train-iters {STEPS} --eval-interval {STEPS} --micro-batch-size 2", flags,
                                f"--save {save} --metrics-file {save}.jsonl")  # fmt: skip
            finished = launch.ranks("mdm", [argv] * ranks, [(allow_fp8_on_a_cpu, ())] * ranks)
            assert [one.code for one in finished] == [0] * ranks, finished[0].stderr
            known[flags] = save
        return known[flags]

    return run


def losses(save: Path) -> list[float]:
    """The loss of each step."""
    return [event["loss"] for event in metrics(save, "train")]


def metrics(save: Path, kind: str) -> list[dict[str, float]]:
    return events(save.parent, kind, f"{save.name}.jsonl")


@pytest.mark.parametrize("split", list(SPLITS))
def test_a_split_has_the_curve_of_one_process(train: Train, split: str) -> None:
    ranks, flags = SPLITS[split]
    alone, found, bf16 = train("--fp8"), train(f"--fp8 {flags}", ranks), train("")
    assert losses(alone) != losses(bf16) and losses(alone) == pytest.approx(losses(bf16), rel=0.03)
    assert losses(found) == pytest.approx(losses(alone), rel=0.03)
    exact = split not in ("tensor", "compiled zero 3")
    assert losses(found)[0] == pytest.approx(losses(alone)[0], rel=1e-5 if exact else 0.01)


def test_checkpoints_and_validation_are_those_of_bf16(train: Train, corpus: Corpus, launch: Launcher) -> None:
    """What training in fp8 measured of its last weights, a bf16 run measures of its checkpoint, and continues."""
    save = train("--fp8")
    argv = corpus.flags("--bf16 --micro-batch-size 2", f"--load {save} --metrics-file {save}.bf16")
    finished = launch("mdm", [*argv, "--skip-train"])
    assert finished.code == 0, finished.stderr
    (during,), (after,) = metrics(save, "valid"), events(save.parent, "valid", f"{save.name}.bf16")
    assert after["loss"] == during["loss"] and after["iteration"] == STEPS
    finished = launch("mdm", [*argv, "--train-iters", str(STEPS + 2)])
    assert finished.code == 0, finished.stderr
    assert f"changed since global_step{STEPS}: --fp8 True -> False" in finished.stdout
