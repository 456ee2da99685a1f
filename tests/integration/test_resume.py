"""Resume is exact: training 2n steps equals training n, stopping in any way, and training the other n, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_faults import die_at_file_event, hold_writes, raise_after_step, record_file_events, signal_after_step
from training_runs import Corpus, Fault, Launcher, curve, events, tensors

pytestmark = pytest.mark.slow

STEPS = 8
FLAGS = f"--train-iters {STEPS} --eval-interval 2 --save-interval 4 --keep-last 2 --keep-best 1"


def flags(corpus: Corpus, save: Path, *more: str) -> list[str]:
    """A run of eight steps with dropout that goes on from whatever lies in ``save``."""
    return corpus.flags(FLAGS, f"--save {save} --load {save}", *more, dropout=0.1)


def held(fault: Fault | None, background: bool) -> Fault | None:
    """``fault``, with writes in the ``background`` held back as long as they can be."""
    return (hold_writes, (fault,)) if background else fault


def assert_same_state(ours: Path, theirs: Path) -> None:
    """Two checkpoints hold the same weights, optimizer state and generators, to the last bit."""
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def measurements(save: Path) -> dict[int, tuple[float, float, bool]]:
    """iteration -> (validation loss, standard error, best so far)."""
    return {e["iteration"]: (e["loss"], e["stderr"], e.get("is_best", False)) for e in events(save, "valid")}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two checkpoint directories hold the same run: curves, measurements, what is kept, the best, the last state."""
    assert curve(ours) == curve(theirs) and len(curve(ours)) == STEPS
    assert measurements(ours) == measurements(theirs) and len(measurements(ours)) == STEPS // 2
    assert names(ours) == names(theirs)
    assert (ours / "best.json").read_text() == (theirs / "best.json").read_text()
    assert (ours / "latest").read_text() == f"global_step{STEPS}"
    assert_same_state(ours / f"global_step{STEPS}", theirs / f"global_step{STEPS}")


def names(save: Path) -> set[str]:
    """What lies in a checkpoint directory, but for records of events that a crash made void."""
    return {path.name for path in save.iterdir()} - {"metrics.superseded.jsonl"}


@pytest.fixture(scope="module")
def straight(corpus: Corpus, launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint directory of an uninterrupted run, made once for each objective and number of ranks."""
    known: dict[tuple[str, int], Path] = {}

    def get(objective: str, ranks: int = 1) -> Path:
        if (objective, ranks) not in known:
            save = tmp_path_factory.mktemp("straight") / "save"
            argv = flags(corpus, save)
            assert [p.code for p in launch.ranks(objective, [argv] * ranks, [None] * ranks)] == [0] * ranks
            known[objective, ranks] = save
        return known[objective, ranks]

    return get


def test_the_reference_is_not_trivial(straight: Callable[..., Path]) -> None:
    for objective in ("ar", "mdm"):
        losses = [loss for loss, _, _ in curve(straight(objective)).values()]
        assert len(set(losses)) == STEPS and losses[-1] < losses[0]
        state = tensors(straight(objective) / f"global_step{STEPS}")
        assert any(name.endswith("rng/cpu") for name in state)


@pytest.mark.parametrize(
    ("objective", "workers", "how", "background"),
    [
        ("ar", 2, "exit interval", False),
        ("ar", 0, "SIGTERM", False),
        ("mdm", 2, "SIGUSR1", False),
        ("mdm", 0, "kill switch", False),
        ("ar", 2, "SIGKILL", False),
        ("mdm", 0, "SIGKILL", False),
        ("mdm", 2, "exit interval", True),
        ("mdm", 0, "SIGTERM", True),
        ("ar", 0, "SIGKILL", True),
    ],
)
def test_stop_and_resume(
    objective: str, workers: int, how: str, background: bool, corpus: Corpus, launch: Launcher, tmp_path: Path,
    straight: Callable[..., Path],
) -> None:  # fmt: skip
    save, switch = tmp_path / "save", tmp_path / "kill-switch"
    argv = flags(corpus, save, f"--num-workers {workers}", *(["--async-save"] if background else []))
    if how == "exit interval":
        stopped, at = launch(objective, [*argv, "--exit-interval", "5"], fault=held(None, background)), 5
    elif how == "kill switch":
        switch.touch()
        stopped, at = launch(objective, [*argv, "--kill-switch-file", str(switch)]), 1
        assert not switch.exists()  # the requeued job goes on
    elif how == "SIGKILL":  # between two saves, or while one is written: what was done since the last is done again
        fault = held((signal_after_step, (7, signal.SIGKILL)), background)
        stopped, at = launch(objective, argv, fault=fault), 4 if background else 6
        assert stopped.code == -signal.SIGKILL and max(curve(save)) == 6
    else:
        number = signal.Signals[how]
        fault = held((signal_after_step, (3, number)), background)
        stopped, at = launch(objective, [*argv, "--exit-signal-handler"], fault=fault), 3
        assert f"stopped after iteration 3: received {how}" in stopped.stdout
    if how != "SIGKILL":
        assert stopped.code == 0, stopped
        assert sorted(curve(save)) == list(range(1, at + 1))
    assert (save / "latest").read_text() == f"global_step{at}"
    resumed = launch(objective, argv)
    assert resumed.code == 0, resumed
    # The stop added a checkpoint; of those, two stay.
    assert_same_run(save, straight(objective))


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_training_goes_on_while_a_checkpoint_is_written(
    objective: str, corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """The run with --async-save is the run without, files included, though each write comes two steps late."""
    finished = launch(objective, flags(corpus, tmp_path, "--async-save"), fault=held(None, True))
    assert finished.code == 0 and "checkpoints are written in the background" in finished.stdout, finished
    assert_same_run(tmp_path, straight(objective))
    assert_same_state(tmp_path / "global_step6", straight(objective) / "global_step6")
    early, late = tensors(tmp_path / "global_step6"), tensors(tmp_path / "global_step8")
    weights = [name for name in early if "module/layers" in name and early[name].numel() > 1]
    assert len(weights) > 10 and not any(torch.equal(early[name], late[name]) for name in weights)
    order = [(e.get("event", e["kind"]), e["iteration"]) for e in events(tmp_path) if e["kind"] in ("train", "meta")]
    for step in (2, 4, 6):
        assert order.index(("train", step + 2)) < order.index(("saved", step)) < order.index(("saved", step + 2))
    assert order[-2:] == [("saved", 8), ("finished", 8)]
    for event in events(tmp_path, "meta"):
        if event["event"] == "saved":
            assert event["seconds"] > 0 and event["write_seconds"] > 0
    alone = launch(objective, flags(corpus, tmp_path / "other"))
    assert "checkpoints are written while training waits" in alone.stdout


def test_a_defect_does_not_cost_the_checkpoint_that_is_being_written(
    corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path, "--async-save")
    finished = launch("ar", argv, fault=held((raise_after_step, (7,)), True))
    assert finished.code == 1 and finished.stderr.rstrip().endswith("ZeroDivisionError: a defect")
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert launch("ar", argv).code == 0
    assert_same_run(tmp_path, straight("ar"))


@pytest.mark.parametrize("background", [False, True])
def test_a_signal_to_one_of_two_ranks_stops_both(
    background: bool, corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path, "--exit-signal-handler", *(["--async-save"] if background else []))
    faults = [held(None, background), held((signal_after_step, (3, signal.SIGTERM)), background)]
    assert [p.code for p in launch.ranks("mdm", [argv] * 2, faults)] == [0, 0]
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert [p.code for p in launch.ranks("mdm", [argv] * 2, [None] * 2)] == [0, 0]
    assert_same_run(tmp_path, straight("mdm", 2))


def saving_events(corpus: Corpus, launch: Launcher, tmp_path: Path, background: bool, *more: str) -> list[str]:
    """The operations on files of a whole run, in order."""
    log = tmp_path / "log"
    save = tmp_path / "recorded"
    fault = held((record_file_events, (f"{save}/", log)), background)
    assert launch("ar", flags(corpus, save, *more), fault=fault).code == 0
    return log.read_text().splitlines()


@pytest.mark.parametrize("background", [False, True])
def test_sigkill_inside_a_save(
    background: bool, corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """The process dies before the n-th operation on the files of its save directory, for n all over the later saves."""
    more = ["--async-save"] if background else []
    recorded = saving_events(corpus, launch, tmp_path, background, *more)
    start = next(i for i, event in enumerate(recorded) if event.startswith("os.mkdir") and "step6" in event)
    renames = [i for i in range(start, len(recorded)) if recorded[i].startswith("os.rename")]
    # When the temporary directory is new, before each rename, and after the last one. (Every single operation is tried
    # in tests/unit/test_checkpointing.py, with a stand-in for the engine.)
    moments = [start + 1, *renames, renames[-1] + 1]
    assert len(moments) > 8
    if background:  # and where the thread flushes a file; fewer of the rest, which is the same
        thread = next(i for i in range(start, len(recorded)) if "step6/rng_rank_0" in recorded[i])
        moments = [start + 1, thread, *renames[:3], renames[-1] + 1]
    tags = set()
    for number, moment in enumerate(moments):
        save = tmp_path / f"save{number}"
        fault = held((die_at_file_event, (f"{save}/", moment + 1)), background)
        assert launch("ar", flags(corpus, save, *more), fault=fault).code == -signal.SIGKILL, recorded[moment]
        tags.add((save / "latest").read_text())
        resumed = launch("ar", flags(corpus, save, *more))
        assert resumed.code == 0, (recorded[moment], resumed)
        assert_same_run(save, straight("ar"))
        shutil.rmtree(save)
    assert tags == {"global_step4", "global_step6", "global_step8"}  # old and new ones were resumed from


@pytest.mark.parametrize("more", ["", "--async-save"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks_dies_inside_a_save(
    victim: int, more: str, corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path, more)
    faults: list[Fault | None] = [None, None]
    faults[victim] = (die_at_file_event, (f".tmp-global_step6/rng_rank_{victim}", 1))
    codes = [process.code for process in launch.ranks("mdm", [argv] * 2, faults)]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 2)  # the other does not wait for ever
    assert (tmp_path / "latest").read_text() == "global_step4"
    assert [process.code for process in launch.ranks("mdm", [argv] * 2, [None] * 2)] == [0, 0]
    assert_same_run(tmp_path, straight("mdm", 2))


def test_the_last_step_can_be_the_best(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    """Saves and measurements fall on different steps, but the last one is measured before it is saved."""
    argv = corpus.flags("--train-iters 6 --save-interval 3 --eval-interval 4", f"--save {tmp_path}")
    assert launch("ar", argv).code == 0
    losses = {iteration: loss for iteration, (loss, _, _) in measurements(tmp_path).items()}
    assert list(losses) == [4, 6] and losses[6] < losses[4]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["tag"] == "global_step6" and best["loss"] == losses[6]
    run = json.loads((tmp_path / "global_step6" / "run.json").read_text())
    assert run["validation"]["loss"] == losses[6] and run["consumed_samples"] == 48


@pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 1), (2, 2), (1, 0), (0, 1)])
def test_what_stays_on_disk(
    keep_last: int, keep_best: int, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    # The learning rate grows until training falls apart, so the best measurement is not the last.
    argv = corpus.flags(
        "--train-iters 8 --save-interval 1 --eval-interval 1 --lr 0.5 --lr-warmup-samples 60 --lr-decay-style constant",
        f"--save {tmp_path} --keep-last {keep_last} --keep-best {keep_best}",
    )
    finished = launch("ar", argv)
    assert finished.code == 0, finished
    losses = {iteration: loss for iteration, (loss, _, _) in measurements(tmp_path).items()}
    ranked = sorted(losses, key=lambda iteration: losses[iteration])
    assert ranked[0] not in (1, 7, 8)
    kept = {*range(9 - keep_last, 9), *ranked[:keep_best]} if keep_last else set(range(1, 9))
    assert {path.name for path in tmp_path.glob("global_step*")} == {f"global_step{iteration}" for iteration in kept}
    assert json.loads((tmp_path / "best.json").read_text())["iteration"] == ranked[0]
    said = {i for i, (_, _, best) in measurements(tmp_path).items() if best}
    lowest = itertools.accumulate(losses.values(), min)
    assert said == {i for (i, loss), low in zip(losses.items(), lowest) if loss == low}


def test_load_tag_goes_back(
    corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    save = tmp_path / "save"
    shutil.copytree(straight("mdm"), save)
    resumed = launch("mdm", flags(corpus, save, "--load-tag global_step6"))
    assert resumed.code == 0 and "global_step6" in resumed.stdout, resumed
    superseded = (save / "metrics.superseded.jsonl").read_text()
    assert superseded.count('"kind": "train"') == 2
    assert_same_run(save, straight("mdm"))
    missing = launch("mdm", flags(corpus, save, "--load-tag global_step5"))
    assert missing.code == 2 and missing.stderr.startswith("error: --load-tag global_step5: there is no such")


@pytest.mark.parametrize("left", [".tmp-", ".trash-"])
def test_a_step_that_was_being_saved_over_itself_is_gone_on_from(
    left: str, corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    """Between two renames ``latest`` names what is not there: the same command must find it."""
    save = tmp_path / "save"
    shutil.copytree(straight("ar"), save)
    (save / "global_step8").rename(save / f"{left}global_step8")
    read_only = launch("ar", corpus.flags("--train-iters 9", f"--load {save}", dropout=0.1))
    assert read_only.code == 2 and "no such checkpoint" in read_only.stderr, "another run moves nothing here"
    resumed = launch("ar", flags(corpus, save))
    assert resumed.code == 0, resumed
    assert_same_run(save, straight("ar"))


def test_finetune_takes_the_weights_alone(
    corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    # The first step of a warm-up has learning rate 0: the weights stay what was loaded.
    argv = corpus.flags(f"--train-iters 1 --lr-warmup-samples 4 --save {tmp_path} --load {straight('ar')} --finetune")
    finished = launch("ar", argv)
    assert finished.code == 0, finished
    assert list(curve(tmp_path)) == [1]
    ours, source = tensors(tmp_path / "global_step1"), tensors(straight("ar") / f"global_step{STEPS}")
    for name, value in source.items():
        if "module/layers" in name:
            assert torch.equal(ours[name], value), name
        if name.endswith("/step"):
            assert float(value) == STEPS and float(ours[name]) == 1
    assert json.loads((tmp_path / "global_step1" / "run.json").read_text())["consumed_samples"] == 8
    assert launch("mdm", argv[: argv.index("--save")] + f"--load {straight('ar')} --finetune".split()).code == 0


def test_no_load_optim_goes_on_with_a_fresh_optimizer(
    corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path, f"--load {straight('ar')} --load-tag global_step6 --no-load-optim")
    assert launch("ar", argv).code == 0
    found, expected = curve(tmp_path), curve(straight("ar"))
    assert list(found) == [7, 8]
    assert found[7] == expected[7]  # the loss before the first update: weights, samples and dropout are the same
    assert found[8] != expected[8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--hidden-size 48", ["holds another model", "--hidden-size 32 -> 48"]),
        ("--num-layers 3 --untie-embeddings-and-output-weights", ["--num-layers 2 -> 3", "--untie"]),
        ("--seed 4", ["--seed 1234 -> 4", "--finetune"]),
        ("--seq-length 16", ["--seq-length 32 -> 16"]),
        ("--unique-tokens 3000", ["--unique-tokens None -> 3000"]),
    ],
)
def test_a_checkpoint_of_something_else_is_one_clear_error(
    change: str, words: list[str], corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path / "save", f"--load {straight('ar')}", change)
    finished = launch("ar", argv)
    assert finished.code == 2
    assert finished.stderr.startswith("error: --load: checkpoint global_step8") and finished.stderr.count("\n") == 1
    assert all(word in finished.stderr for word in words), finished.stderr
    assert not (tmp_path / "save").exists()


def test_another_objective_is_one_clear_error(
    corpus: Corpus, launch: Launcher, tmp_path: Path, straight: Callable[..., Path]
) -> None:
    argv = flags(corpus, tmp_path, f"--load {straight('ar')}")
    finished = launch("mdm", argv)
    assert finished.code == 2 and "objective ar -> mdm" in finished.stderr and finished.stderr.count("\n") == 1
