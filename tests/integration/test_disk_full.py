"""A disk that fills up while a run saves: one clear error, exit code 1, and every checkpoint before it as it was."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from training_faults import small_disk, small_files_after_step
from training_runs import Corpus, Fault, Finished, Launcher, curve, tensors

pytestmark = pytest.mark.slow

STEPS = 8
FLAGS = f"--train-iters {STEPS} --save-interval 1 --keep-last 0 --eval-interval 4"


def assert_stopped(finished: list[Finished], *words: str) -> None:
    """Exit code 1 everywhere and one line between all ranks."""
    assert [process.code for process in finished] == [1] * len(finished), finished
    said = [line for process in finished for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and not any("Traceback" in process.stderr for process in finished), finished
    for word in words:
        assert word in said[0]


def assert_goes_on(save: Path, straight: Path, launch: Launcher, argv: list[str], ranks: int = 1) -> None:
    """With room again, the run continues from its last checkpoint to the same end."""
    assert [process.code for process in launch.ranks("mdm", [argv] * ranks, [None] * ranks)] == [0] * ranks
    assert curve(save) == curve(straight) and len(curve(save)) == STEPS
    found, expected = (tensors(directory / f"global_step{STEPS}", "*states.pt") for directory in (save, straight))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected if hasattr(expected[name], "shape"))


def may_mount(directory: Path) -> bool:
    """Whether a process here may have a disk of its own."""
    process = multiprocessing.get_context("fork").Process(target=small_disk, args=(directory, 4096, directory / "copy"))
    process.start()
    process.join()
    return process.exitcode == 0


def test_a_disk_that_fills_up(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    if not may_mount(disk):
        pytest.skip("mounting is not permitted")
    straight = tmp_path / "straight"
    assert launch("mdm", corpus.flags(FLAGS, f"--save {straight}", dropout=0.1)).code == 0
    size = sum(path.stat().st_size for path in (straight / "global_step1").iterdir())
    argv = corpus.flags(FLAGS, f"--save {disk}", dropout=0.1)
    # Room for three and a half, and for the metrics.
    finished = launch("mdm", argv, fault=(small_disk, (disk, size * 7 // 2 + 64 * 1024, copy)))
    assert_stopped([finished], f"cannot save {disk}/global_step4: No space left on device", "earlier checkpoints")
    assert {path.name for path in copy.iterdir()} == {
        "global_step1", "global_step2", "global_step3", "latest", "metrics.jsonl"
    }  # fmt: skip
    assert (copy / "latest").read_text() == "global_step3"
    assert_goes_on(copy, straight, launch, corpus.flags(FLAGS, f"--save {copy} --load {copy}", dropout=0.1))


@pytest.mark.parametrize("more", ["", "--async-save"])
@pytest.mark.parametrize("failing", [[0], [0, 1], [1]])
def test_a_rank_that_cannot_write(
    failing: list[int], more: str, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    """The system refuses large files from step 5 on, on some ranks (EFBIG, which needs no privilege to provoke)."""
    ranks = len(failing) if failing == [0] else 2
    straight, save = tmp_path / "straight", tmp_path / "save"
    argv = corpus.flags(FLAGS, f"--save {straight}", dropout=0.1)
    assert [process.code for process in launch.ranks("mdm", [argv] * ranks, [None] * ranks)] == [0] * ranks
    argv = corpus.flags(FLAGS, f"--save {save} --load {save}", more, dropout=0.1)
    fault: Fault = (small_files_after_step, (5, 50_000))
    finished = launch.ranks("mdm", [argv] * ranks, [fault if rank in failing else None for rank in range(ranks)])
    assert_stopped(finished, f"cannot save {save}/global_step5", "earlier checkpoints are untouched")
    kept = {"global_step1", "global_step2", "global_step3", "global_step4", "latest", "best.json", "metrics.jsonl"}
    assert {path.name for path in save.iterdir()} == kept
    assert (save / "latest").read_text() == "global_step4"
    assert_goes_on(save, straight, launch, argv, ranks)


def test_metrics_that_cannot_be_written(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not may_mount(disk):
        pytest.skip("mounting is not permitted")
    argv = corpus.flags(f"--train-iters 30 --metrics-file {disk}/metrics.jsonl")
    message = f"cannot write {disk}/metrics.jsonl: No space left on device"
    assert_stopped([launch("mdm", argv, fault=(small_disk, (disk, 8192, tmp_path / "copy1")))], message)
    first, second = launch.ranks("mdm", [argv] * 2, [(small_disk, (disk, 8192, tmp_path / "copy2")), None])
    assert_stopped([first], message)
    assert second.code == 1  # it does not wait for ever
