"""The evaluation scripts: they measure the run that the training script of the same variables trains."""

from __future__ import annotations

from typing import Any

import pytest

from tools.evaluate import build_parser

FAMILIES = ("arm", "mdm")


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_of_the_run_that_the_training_script_names(family: str, sandbox: Any, parsed: Any) -> None:
    trained = sandbox.dry_run(f"{family}/example_training", "EPOCH_CNT=7")
    measured = sandbox.dry_run(f"{family}/example_evaluation", "EPOCH_CNT=7", NUM_MC="16")
    config = parsed(measured)
    assert measured.value("--load") == trained.value("--save")
    assert config.evaluation.skip_train and config.evaluation.eval_windows == "all"
    assert config.objective.num_mc == (16 if family == "mdm" else 1)


@pytest.mark.parametrize(
    ("family", "mode", "method", "only"),
    [
        ("arm", "auto", "auto", None), ("arm", "nll", "auto", "nll"), ("arm", "generate", "auto", "generate"),
        ("mdm", "auto", "auto", None), ("mdm", "mc", "mc", "nll"), ("mdm", "chain", "chain", "nll"),
        ("mdm", "generate", "auto", "generate"),
    ],
)
def test_downstream_modes(family: str, mode: str, method: str, only: str | None, sandbox: Any) -> None:
    script = f"examples_training/{family}/example_downstream.sh"
    draws = {"NUM_MC": "8"} if family == "mdm" else {}
    result = sandbox.bash(script, f"MODE={mode}", "LOAD=a run", "LIMIT=5", "NUM_GPUS=2", DRY_RUN="1", **draws)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    launch, flags = words[: words.index("tools/evaluate.py")], words[words.index("tools/evaluate.py") + 1 :]
    assert launch[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = build_parser().parse_args(flags)
    assert (found.load, found.eval_method, found.limit) == ("a run", method, 5)
    assert (found.only_nll, found.only_generate) == (only == "nll", only == "generate")
    assert found.tasks[0] == "arc_easy" and len(found.tasks) == 9 and found.num_fewshot == 0
    assert found.output == f"a run/downstream_{mode}.json"
    assert found.num_mc == (8 if family == "mdm" else 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_by_default_is_what_downstream_loads(family: str, sandbox: Any) -> None:
    trained = sandbox.dry_run(f"{family}/example_training")
    result = sandbox.bash(f"examples_training/{family}/example_downstream.sh", DRY_RUN="1")
    assert trained.value("--save") in result.stdout.splitlines()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smoke_test_takes_the_model_of_the_training_smoke_test(family: str, sandbox: Any) -> None:
    trained = sandbox.dry_run(f"{family}/example_training", SMOKE="1").value("--save")
    script = f"examples_training/{family}/example_downstream.sh"
    words = sandbox.bash(script, DRY_RUN="1", SMOKE="1").stdout.splitlines()
    assert words[words.index("--load") + 1] == trained
    assert words[words.index("--tasks") + 1] == f"{trained}/smoke_task.yaml"
    result = sandbox.bash(script, SMOKE="1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"SMOKE=1 bash examples_training/{family}/example_training.sh makes it" in result.stderr


@pytest.mark.parametrize(("family", "mode"), [("arm", "mc"), ("mdm", "nll"), ("mdm", "best")])
def test_other_modes_are_refused(family: str, mode: str, sandbox: Any) -> None:
    result = sandbox.bash(f"examples_training/{family}/example_downstream.sh", f"MODE={mode}", DRY_RUN="1")
    assert result.returncode == 2 and result.stderr.startswith(f"error: MODE={mode}") and result.stderr.count("\n") == 1
