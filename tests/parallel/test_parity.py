"""Parallelism changes nothing but speed: every split of a run has the curve of one process.

Real runs of the entry points over gloo in fp32: 20 steps with clipping active and weight decay on, losses, gradient
norms and validation losses within 1e-5 of one process. Dropout is off: its masks are what a split may change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from training_runs import GPT2, LLAMA, Corpus, Launcher, curve, events

pytestmark = pytest.mark.slow

STEPS = 20
CLIP = 0.5
TOLERANCE = 1e-5  # relative, fp32: sums are taken in another order
TP = "--tensor-model-parallel-size 2"
SEQUENCE = f"{TP} --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"

GROUPED = f"{LLAMA} --num-key-value-heads 1"
UNTIED = f"{GPT2} --max-position-embeddings 48 --untie-embeddings-and-output-weights"
PREFIXES = "--ar-ratio 0.5 --mask-sampler exact --eod-mask-loss"
DOCUMENTS = "--reset-attention-mask --reset-position-ids"
ORDERS = "--use-order-list --num-order-list 4"
RANDOM_MASKS = "--randmask-ratio 0.5"
RAMP = "--train-samples 120 --rampup-batch-size 4 4 40"  # 10 steps of 4 samples, 10 of 8
LOW_NOISE = "--low-noise-start --low-noise-iter 5 --low-noise-ratio 0.4"
BLOCKS = "--recompute-granularity full --recompute-method block"


@dataclass(frozen=True)
class Split:
    """A way to run: ``ranks`` processes with ``flags``."""

    name: str
    ranks: int
    flags: str = ""


SPLITS = [
    Split("dp2", 2),
    Split("tp2", 2, TP),
    Split("tp2 sequence", 2, SEQUENCE),
    Split("tp2 dp2", 4, TP),
    Split("pp2", 2, PP),
    Split("pp2 dp2", 4, PP),
    Split("pp2 tp2", 4, f"{PP} {TP}"),
    Split("pp2 tp2 sequence", 4, f"{PP} {SEQUENCE}"),
    Split("zero 0", 2, "--zero-stage 0"),
    Split("zero 2", 2, "--zero-stage 2"),
    Split("zero 3", 2, "--zero-stage 3 --deepspeed_config divide.json"),
    Split("zero 1 offload", 2, "--zero-stage 1 --cpu-optimizer"),
    Split("zero 2 offload", 2, "--zero-stage 2 --cpu-optimizer"),
    Split("zero 3 offload", 2, "--zero-stage 3 --deepspeed_config offload.json"),
    Split("zero 2 tp2", 4, f"--zero-stage 2 {TP}"),
    Split("zero 3 tp2 sequence", 4, f"--zero-stage 3 --deepspeed_config divide.json {SEQUENCE}"),
    Split("pp2 offload", 2, f"{PP} --cpu-optimizer"),
    Split("compiled tp2", 2, f"--compile {TP}"),
    Split("compiled tp2 sequence", 2, f"--compile {SEQUENCE}"),
    Split("compiled pp2", 2, f"--compile {PP}"),
    Split("compiled zero 3", 2, "--compile --zero-stage 3 --deepspeed_config divide.json"),
]
FOUR_STAGES = Split("pp4", 4, "--pipeline-model-parallel-size 4")
# Small parameters stay whole unless told otherwise, and everything is small here.
DIVIDE = {"stage3_param_persistence_threshold": 0}
JSONS = {
    "divide.json": DIVIDE,
    "offload.json": DIVIDE | {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
}
# Runs that carry more than tokens, or have other layers: (objective, architecture, flags) on the splits named.
KINDS = [
    ("ar", UNTIED, ORDERS, "tp2 sequence"),
    ("ar", GROUPED, f"{RANDOM_MASKS} --checkpoint-activations", "tp2"),
    ("mdm", UNTIED, f"{DOCUMENTS} {PREFIXES}", "tp2"),
    ("mdm", GROUPED, f"{PREFIXES} --recompute-granularity selective", "tp2 sequence"),
    ("ar", UNTIED, f"{ORDERS} {RAMP}", "pp2"),
    ("ar", GROUPED, f"{RANDOM_MASKS} --checkpoint-activations", "pp2 tp2"),
    ("mdm", UNTIED, f"{DOCUMENTS} {PREFIXES} --recompute-granularity selective", "pp2 dp2"),
    ("mdm", GROUPED, f"{DOCUMENTS} {BLOCKS}", "pp2"),
    ("ar", UNTIED, f"{RANDOM_MASKS} --checkpoint-activations", "zero 3"),
    ("mdm", GROUPED, f"{DOCUMENTS} --checkpoint-activations", "zero 3 tp2 sequence"),
    ("mdm", UNTIED, f"{PREFIXES} --recompute-granularity selective", "zero 3 offload"),
    ("ar", GROUPED, f"{ORDERS} {RAMP}", "zero 2"),
    ("ar", f"{LLAMA} --num-layers 5", "", "pp4"),
    ("mdm", f"{UNTIED} --num-layers 4", f"{DOCUMENTS} {LOW_NOISE}", "pp4"),
]

Curve = tuple[dict[int, tuple[float, float, float]], list[float]]
Run = Callable[..., Curve]


@pytest.fixture(scope="module")
def run(corpus: Corpus, launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(objective, style, flags, split)``: the curve and validation losses of a run; one process runs once."""
    seen: dict[tuple[str, ...], Curve] = {}

    def train(objective: str, style: str, flags: str, split: Split) -> Curve:
        key = (objective, style, flags, split.name)
        if key not in seen:
            save = tmp_path_factory.mktemp("run") / "save"
            length = "" if "--train-samples" in flags else f"--train-iters {STEPS}"
            more = f"{length} --clip-grad {CLIP} --micro-batch-size 2 --eval-interval 10 --save {save}"
            home = tmp_path_factory.mktemp("json")
            for name, zero in JSONS.items():
                (home / name).write_text(json.dumps({"zero_optimization": zero}))
            argv = corpus.flags(more, flags, split.flags.replace("config ", f"config {home}/"), style=style)
            finished = launch.ranks(objective, [argv] * split.ranks, [None] * split.ranks)
            assert [one.code for one in finished] == [0] * split.ranks, finished[0].stderr + finished[-1].stderr
            seen[key] = curve(save), [event["loss"] for event in events(save, "valid")]
        return seen[key]

    return train


def assert_same(split: Curve, whole: Curve) -> None:
    """Losses and gradient norms of all steps, and validation losses, within ``TOLERANCE``; and clipping was active."""
    steps, wanted = split[0], whole[0]
    assert list(steps) == list(wanted) == list(range(1, STEPS + 1))
    for iteration in wanted:
        assert steps[iteration] == pytest.approx(wanted[iteration], rel=TOLERANCE), iteration
    assert min(norm for _, norm, _ in wanted.values()) > CLIP, "clipping must be active"
    assert len(whole[1]) == 2 and split[1] == pytest.approx(whole[1], rel=TOLERANCE)


# What is combined of splits that are tried with both objectives is tried with one.
ONE_OBJECTIVE = {
    "pp2 tp2": "mdm", "pp2 tp2 sequence": "ar", "zero 2 tp2": "ar", "zero 3 tp2 sequence": "ar",
    "compiled tp2": "ar", "compiled tp2 sequence": "mdm", "compiled pp2": "ar", "compiled zero 3": "mdm",
}  # fmt: skip
CASES = [(objective, split) for objective in ("ar", "mdm") for split in SPLITS
         if ONE_OBJECTIVE.get(split.name, objective) == objective]  # fmt: skip


@pytest.mark.parametrize(("objective", "split"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_split_has_the_curve_of_one_process(run: Run, objective: str, split: Split) -> None:
    assert_same(run(objective, LLAMA, "", split), run(objective, LLAMA, "", Split("alone", 1)))


@pytest.mark.parametrize(("objective", "style", "flags", "name"), KINDS, ids=lambda text: text.split(" --")[-1])
def test_whatever_a_batch_carries(run: Run, objective: str, style: str, flags: str, name: str) -> None:
    """Ablations, documents, other layers, recomputation: on the splits where they could go wrong."""
    split = next(split for split in (*SPLITS, FOUR_STAGES) if split.name == name)
    assert_same(run(objective, style, flags, split), run(objective, style, flags, Split("alone", 1)))
    # The flags did something: their curve is not that of the plain run.
    plain = run(objective, LLAMA, "", Split("alone", 1))
    assert not math.isclose(run(objective, style, flags, split)[0][1][0], plain[0][1][0])
