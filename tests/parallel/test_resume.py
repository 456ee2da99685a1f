"""Checkpoints under parallelism: the same split continues to the bit, any other one within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import Corpus, Launcher, curve, events

from megatron.inference.loading import load_model, save_weights
from megatron.inference.weights import full_weights

pytestmark = pytest.mark.slow

TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
DIVIDE = "--deepspeed_config divide.json"  # small parameters stay whole unless told otherwise
# name -> (ranks, flags)
SPLITS = {
    "tp2 sequence": (2, f"{TP} --sequence-parallel"),
    "pp2": (2, PP),
    "pp2 tp2": (4, f"{PP} {TP} --untie-embeddings-and-output-weights"),
    "zero 2": (2, "--zero-stage 2 --bf16"),
    "zero 3": (2, f"--zero-stage 3 {DIVIDE}"),
    "offload": (2, "--zero-stage 1 --cpu-optimizer --bf16"),
    "zero 3 offload": (2, f"--zero-stage 3 {DIVIDE} --cpu-optimizer --bf16"),
}


class Trainer:
    """Runs over the corpus, each split of them into a directory of its own."""

    def __init__(self, corpus: Corpus, launch: Launcher) -> None:
        self._corpus, self._launch = corpus, launch

    def __call__(self, objective: str, ranks: int, save: Path, *flags: str, dropout: float = 0.0) -> None:
        """Train six steps, validate every third, save at the end and wherever ``flags`` say; they win."""
        divide = save.parent / "divide.json"
        divide.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        argv = self._corpus.flags(
            f"--train-iters 6 --eval-interval 3 --micro-batch-size 2 --save {save} --load {save}",
            *(text.replace("divide.json", str(divide)) for text in flags),
            dropout=dropout,
        )
        finished = self._launch.ranks(objective, [argv] * ranks, [None] * ranks)
        assert [one.code for one in finished] == [0] * ranks, finished[0].stderr + finished[-1].stderr


@pytest.fixture
def train(corpus: Corpus, launch: Launcher) -> Trainer:
    """``train(objective, ranks, save, *flags)``."""
    return Trainer(corpus, launch)


@pytest.mark.parametrize(("objective", "name"), [*(("ar", name) for name in SPLITS), ("mdm", "pp2")])
def test_the_same_split_resumes_to_the_bit(train: Trainer, tmp_path: Path, objective: str, name: str) -> None:
    """Six steps at once equal three, a stop, and three more: dropout, optimizer state and validation included.

    What lies between is written in the background, from a copy.
    """
    ranks, flags = SPLITS[name]
    train(objective, ranks, tmp_path / "once", flags, dropout=0.1)
    for interval in ("3", "6"):
        more = f"--exit-interval {interval} --save-interval 3 --async-save"
        train(objective, ranks, tmp_path / "twice", flags, more, dropout=0.1)
    assert len(curve(tmp_path / "once")) == 6
    assert curve(tmp_path / "twice") == curve(tmp_path / "once")
    losses = [[event["loss"] for event in events(tmp_path / run, "valid")] for run in ("once", "twice")]
    assert losses[0] == losses[1]
    assert [event["iteration"] for event in events(tmp_path / "twice", "train")] == [1, 2, 3, 4, 5, 6]


# One run, handed from split to split. Every kind of file is written once and read once.
CHAIN = [
    (1, ""),
    (2, f"{TP} --sequence-parallel"),
    (2, PP),
    (2, f"--zero-stage 3 {DIVIDE}"),
    (4, f"{PP} {TP}"),
    (2, "--zero-stage 2"),
    (4, f"--zero-stage 3 {TP} {DIVIDE} --cpu-optimizer"),
    (1, "--zero-stage 1 --cpu-optimizer"),
    (4, PP),
    (2, "--zero-stage 1"),
]
MODELS = {
    "ar": "--untie-embeddings-and-output-weights --num-key-value-heads 1",
    "mdm": "--normalization layernorm --num-key-value-heads 2",
}


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_run_handed_from_split_to_split_has_the_curve_of_one_process(
    train: Trainer, tmp_path: Path, objective: str
) -> None:
    """Two steps under each split, in fp32: weights, both moments and the step count travel, or the curve would show."""
    links = CHAIN if objective == "ar" else CHAIN[::-1]
    length = f"{MODELS[objective]} --train-iters {2 * len(links)} --eval-interval 100"
    train(objective, 1, tmp_path / "whole", length)
    for count, (ranks, flags) in enumerate(links, start=1):
        train(objective, ranks, tmp_path / "handed", length, flags, f"--exit-interval {2 * count}")
    handed, whole = curve(tmp_path / "handed"), curve(tmp_path / "whole")
    assert list(handed) == list(whole)
    for step in whole:
        assert handed[step] == pytest.approx(whole[step], rel=1e-5), f"step {step}: {links[(step - 1) // 2]}"


@pytest.mark.parametrize(
    ("first", "second"),
    [("--zero-stage 1", "--zero-stage 3"), ("--zero-stage 2 --cpu-optimizer", PP), (TP, "--zero-stage 1")],
)
def test_half_precision_runs_keep_their_fp32_weights(train: Trainer, tmp_path: Path, first: str, second: str) -> None:
    """Half way the split changes. bf16 rounds sums that other splits take in another order."""
    train("mdm", 2, tmp_path / "one", first, "--bf16")
    train("mdm", 2, tmp_path / "two", first, "--bf16", "--exit-interval 3")
    train("mdm", 2, tmp_path / "two", second, "--bf16")
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=5e-3), step
    assert all(two[step] == one[step] for step in (1, 2, 3))


def test_weights_alone_come_from_any_split(train: Trainer, tmp_path: Path) -> None:
    """--no-load-optim and --finetune, in a precision that the checkpoint was not trained in."""
    train("ar", 4, tmp_path / "save", f"{PP} {TP} --bf16")
    losses = []
    splits = [(1, ""), (2, f"--zero-stage 3 {DIVIDE}"), (2, f"{TP} --sequence-parallel")]
    for number, (ranks, flags) in enumerate(splits):
        for how in ("--finetune", "--no-load-optim --train-iters 8"):
            target = tmp_path / f"{number}{how[:3]}"
            train("ar", ranks, target, flags, how, f"--load {tmp_path / 'save'}")
            losses.append((how, next(iter(curve(target).values()))[0]))
    loaded = load_model(tmp_path / "save")
    save_weights(
        tmp_path / "weights", full_weights(loaded.description.path), model=loaded.description.model, objective="ar",
        vocabulary=loaded.vocabulary, seq_length=loaded.seq_length, tokenizer=None, source="this test",
    )
    train("ar", 2, tmp_path / "exported", PP, "--finetune", f"--load {tmp_path / 'weights'}")
    losses.append(("--finetune", next(iter(curve(tmp_path / "exported").values()))[0]))
    with pytest.raises(AssertionError, match=r"error: --load: .* --finetune to start from its weights"):
        train("ar", 2, tmp_path / "refused", PP, f"--load {tmp_path / 'weights'}")
    for how in {how for how, _ in losses}:
        first, *others = (loss for found, loss in losses if found == how)
        assert others == pytest.approx([first] * len(others), rel=1e-6)
