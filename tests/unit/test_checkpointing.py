"""Checkpoints: complete or absent after a crash or an error at every single step, on one rank and on two."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpointing import CheckpointError, CheckpointStore, EngineSave, restore_rng
from megatron.distributed.topology import Grid, Topology, build_topology, single_process_topology
from megatron.errors import UserError
from megatron.rng_state import rng_state, set_rng_state
from megatron.run_metadata import CheckpointMetadata, Validation

ALONE = single_process_topology()
CHANGES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def metadata(iteration: int, loss: float | None = None, note: str = "") -> CheckpointMetadata:
    return CheckpointMetadata(
        iteration=iteration, consumed_samples=8 * iteration, consumed_tokens=512 * iteration, seed=1234, objective="ar",
        vocabulary={"num_tokens": 10, "padded_size": 128}, shape={}, data_order={}, config={}, world={}, versions={},
        validation=None if loss is None else Validation(loss, 0.01), extra={"note": note},
    )  # fmt: skip


def engine_save(content: str, background: bool = False) -> EngineSave:
    """Write two files, as an engine does, one of them in a folder; with ``background`` on the thread."""

    def write(directory: Path, tag: str) -> None:
        (directory / tag / "model.pt").write_text(content)
        (directory / tag / "optimizer").mkdir(exist_ok=True)
        (directory / tag / "optimizer" / "states.pt").write_text(content * 100)

    def save(directory: Path, tag: str) -> Callable[[], None] | None:
        if background:
            return partial(write, directory, tag)
        write(directory, tag)
        return None

    return save


def save(
    store: CheckpointStore, iteration: int, content: str = "x", loss: float | None = None, background: bool = False
) -> Path:
    return store.save(engine_save(content, background), metadata(iteration, loss, content), ALONE)


def content(store: CheckpointStore, tag: str) -> str:
    """The content a checkpoint was saved with; all of its parts must agree."""
    path = store.directory / tag
    text = (path / "model.pt").read_text()
    assert (path / "optimizer" / "states.pt").read_text() == text * 100
    assert store.metadata(tag).extra == {"note": text}
    return text


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def tags(store: CheckpointStore) -> list[str]:
    return [found.tag for found in store.checkpoints()]


# ---- one save


def test_a_save_is_described_named_and_listed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "checkpoints")
    store.prepare(ALONE)
    assert store.latest_tag() is None and store.resolve() is None and store.checkpoints() == []
    path = save(store, 10, loss=3.5)
    assert path == store.directory / "global_step10"
    assert (store.directory / "latest").read_text() == "global_step10", "what DeepSpeed and Megatron read"
    described = json.loads((path / "run.json").read_text())
    assert described["tag"] == "global_step10" and described["consumed_samples"] == 80 and described["sequence"] == 1
    assert described["validation"] == {"loss": 3.5, "stderr": 0.01}
    others = [p for p in path.rglob("*") if p.is_file() and p.name != "run.json"]
    sizes = {str(p.relative_to(path)): p.stat().st_size for p in others}
    assert described["files"] == sizes and set(sizes) == {"model.pt", "optimizer/states.pt", "rng_rank_0.pt"}
    save(store, 5)  # a run that went back: the order is that of writing
    assert tags(store) == ["global_step10", "global_step5"] and store.resolve() == "global_step5"
    assert store.metadata("global_step10") == replace(
        metadata(10, 3.5, "x"), sequence=1, saved_at=described["saved_at"], files=sizes
    )
    assert hidden(store.directory) == []


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(engine_save("x"), replace(metadata(1), extra={"loss": float("nan")}), ALONE)
    assert store.metadata("global_step1").extra == {"loss": None}


# ---- crashes and errors at every step


@contextmanager
def interrupted(at: int, action: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``action`` instead of the ``at``-th change of the file system (from 0); yields the names of those begun."""
    begun: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def hook(name: str) -> None:
            original = getattr(os, name)

            def call(*arguments: Any, **options: Any) -> Any:
                begun.append(name)
                if len(begun) == at + 1:
                    action(name)
                return original(*arguments, **options)

            patch.setattr(os, name, call)

        for name in CHANGES:
            hook(name)
        yield begun


def dies(work: Callable[[], object], at: int) -> bool:
    """Run ``work`` in a process that ends, like SIGKILL, at its ``at``-th change; False if it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with interrupted(at, lambda name: os._exit(137)):
                work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 137)
    return code == 137


def tear(directory: Path, tag: str) -> None:
    """An engine that dies with one file written."""
    (directory / tag / "model.pt").write_text("torn")
    os._exit(137)


@pytest.mark.parametrize("background", [False, True])
def test_a_crash_anywhere_in_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, background: bool) -> None:
    outcomes = []
    for at in itertools.count():
        directory = tmp_path / str(at)
        store = CheckpointStore(directory)
        store.prepare(ALONE)
        save(store, 1, "old", loss=4.0)
        died = dies(partial(save, store, 2, "new", loss=3.0, background=background), at)
        after = CheckpointStore(directory)
        # Already before anybody cleans up, `latest` names a complete checkpoint.
        tag = after.resolve()
        assert tag in ("global_step1", "global_step2")
        assert content(after, tag) == {"global_step1": "old", "global_step2": "new"}[tag]
        after.prepare(ALONE)
        assert hidden(directory) == [] and after.resolve() == tag
        after.begin(after.metadata(tag).iteration, ALONE)
        best = after.best()
        assert best is not None and best.tag == tag, "best.json follows, also when the crash came before it was written"
        save(after, 2, "again", loss=2.0)
        assert content(after, "global_step2") == "again" and after.resolve() == "global_step2"
        if not died:
            break
        outcomes.append(tag)
    assert len(outcomes) >= 10 and outcomes[0] == "global_step1" and outcomes[-1] == "global_step2"
    assert outcomes == sorted(outcomes)


def test_a_crash_while_a_step_is_saved_over_itself_loses_nothing(tmp_path: Path) -> None:
    contents = []
    for at in itertools.count():
        directory = tmp_path / str(at)
        store = CheckpointStore(directory)
        store.prepare(ALONE)
        save(store, 1, "old")
        died = dies(partial(save, store, 1, "new"), at)
        after = CheckpointStore(directory)
        after.prepare(ALONE)
        assert hidden(directory) == [] and after.resolve() == "global_step1"
        contents.append(content(after, "global_step1"))
        if not died:
            break
    assert contents[0] == "old" and contents[-1] == "new" and contents == sorted(contents, reverse=True)


@pytest.mark.parametrize("prefix", [".tmp-", ".trash-"])
def test_the_only_copy_of_what_latest_names_is_put_back(tmp_path: Path, prefix: str) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 1, "only")
    path.rename(tmp_path / f"{prefix}global_step1")
    store.prepare(ALONE)
    assert store.resolve() == "global_step1" and content(store, "global_step1") == "only" and hidden(tmp_path) == []


def test_a_crash_inside_the_engine_leaves_no_trace(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, "old")
    assert dies(partial(store.save, tear, metadata(2), ALONE), at=10**6)
    assert hidden(tmp_path) == [".tmp-global_step2"] and store.resolve() == "global_step1"
    store.prepare(ALONE)
    assert hidden(tmp_path) == [] and tags(store) == ["global_step1"]


def test_a_crash_anywhere_in_retention_keeps_what_must_stay(tmp_path: Path) -> None:
    for at in itertools.count():
        directory = tmp_path / str(at)
        store = CheckpointStore(directory)
        store.prepare(ALONE)
        for iteration, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0)):
            save(store, iteration, loss=loss)
        died = dies(partial(store.retain, 1, 1, ALONE), at)
        assert sorted(tags(store)) == sorted(path.name for path in directory.glob("global_step*"))
        store.prepare(ALONE)
        assert hidden(directory) == [] and {"global_step2", "global_step4"} <= set(tags(store))
        if not died:
            assert tags(store) == ["global_step2", "global_step4"]
            break
    assert at > 5


def disk_full(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("iteration", [1, 2], ids=["over itself", "a new step"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_at_any_step_is_one_clear_error_and_costs_no_checkpoint(
    tmp_path: Path, iteration: int, background: bool
) -> None:
    failures = 0
    for at in itertools.count():
        directory = tmp_path / str(at)
        store = CheckpointStore(directory)
        store.prepare(ALONE)
        save(store, 1, "old")
        with interrupted(at, disk_full) as begun:
            try:
                save(store, iteration, "new", background=background)
            except CheckpointError as error:
                failures += 1
                assert str(error) == (
                    f"cannot save {directory}/global_step{iteration}: No space left on device (errno 28); "
                    "earlier checkpoints are untouched"
                )
        assert hidden(directory) in ([], [f".trash-global_step{iteration}"]), "only a deletion may be left"
        tag = store.resolve()
        assert tag is not None and content(store, tag) in ("old", "new")
        save(store, iteration, "again")
        assert content(store, f"global_step{iteration}") == "again"
        if len(begun) <= at:
            break
    assert failures >= 8


def test_an_engine_that_cannot_write_is_a_checkpoint_error(tmp_path: Path) -> None:
    def to_a_full_disk(directory: Path, tag: str) -> None:
        (directory / tag / "model.pt").symlink_to("/dev/full")
        torch.save({"weights": torch.zeros(100_000)}, directory / tag / "model.pt")

    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match=rf"cannot save {tmp_path}/global_step2: .+; earlier checkpoints are unt"):
        store.save(to_a_full_disk, metadata(2), ALONE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=r"No space left .*\(errno 28\)"):
        # torch says "file write failed": the file system is asked for the reason.
        patch.setattr(os, "fsync", lambda descriptor: disk_full("fsync"))
        store.save(to_a_full_disk, metadata(2), ALONE)
    assert hidden(tmp_path) == [] and tags(store) == ["global_step1"] and store.resolve() == "global_step1"


def test_a_defect_in_the_engine_keeps_its_traceback(tmp_path: Path) -> None:
    def defect(directory: Path, tag: str) -> None:
        raise KeyError("no such tensor")

    with pytest.raises(KeyError, match="no such tensor"):
        CheckpointStore(tmp_path).save(defect, metadata(2), ALONE)
    assert list(tmp_path.iterdir()) == []


# ---- a save in the background


def test_a_save_in_the_background_is_nothing_until_it_is_finished(tmp_path: Path) -> None:
    may_write = threading.Event()

    def copy(directory: Path, tag: str) -> Callable[[], None]:
        def write() -> None:
            assert may_write.wait(60)
            (directory / tag / "model.pt").write_text("at the save")

        return write

    store = CheckpointStore(tmp_path)
    save(store, 1, "old", loss=4.0)
    torch.manual_seed(5)
    pending = store.start_save(copy, metadata(2, loss=3.0), ALONE)
    drawn = torch.rand(4)  # training goes on
    assert not pending.written and store.resolve() == "global_step1" and tags(store) == ["global_step1"]
    assert hidden(tmp_path) == [".tmp-global_step2"] and list((tmp_path / ".tmp-global_step2").iterdir()) == []
    may_write.set()
    path = store.finish_save(pending, ALONE)
    assert pending.written and pending.seconds > 0
    assert tags(store) == ["global_step1", "global_step2"] and store.resolve() == "global_step2"
    assert (path / "model.pt").read_text() == "at the save"
    best = store.best()
    assert best is not None and best.tag == "global_step2" and hidden(tmp_path) == []
    assert restore_rng(path, ALONE, seed=0) is None, "the generators are those of the save, not of its end"
    assert torch.equal(torch.rand(4), drawn)


def test_a_defect_on_the_thread_keeps_its_traceback(tmp_path: Path) -> None:
    def copy(directory: Path, tag: str) -> Callable[[], None]:
        return partial({}.pop, "no such tensor")

    store = CheckpointStore(tmp_path)
    pending = store.start_save(copy, metadata(2), ALONE)
    with pytest.raises(KeyError, match="no such tensor"):
        store.finish_save(pending, ALONE)
    assert list(tmp_path.iterdir()) == []


# ---- start


def test_a_save_directory_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--save .*file is a file: name a directory"):
        CheckpointStore(tmp_path / "file").prepare(ALONE)
    with pytest.raises(UserError, match=r"--save .*file/inside cannot be written: Not a directory \(errno 20\)"):
        CheckpointStore(tmp_path / "file" / "inside").prepare(ALONE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"cannot be written: .* \(errno 13\)"):
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        CheckpointStore(tmp_path).prepare(ALONE)


def test_preparing_removes_only_our_own_leftovers(tmp_path: Path) -> None:
    ours = (".tmp-global_step7", ".trash-global_step3", ".tmp-latest", ".tmp-best.json", f".probe-{'a' * 32}")
    others = (".tmp-notes", ".git", "metrics.jsonl", "global_step9", ".tmp-global_stepx")
    for name in (*ours[:2], *others[-2:-1]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (*ours[2:], others[0], others[1], others[2], others[4]):
        (tmp_path / name).touch()
    CheckpointStore(tmp_path).prepare(ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# ---- loading


def test_latest_is_believed_and_its_absence_is_not_the_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for iteration in (1, 2, 3):
        save(store, iteration)
    (tmp_path / "latest").write_text("global_step2\n")  # a user goes back by hand
    assert store.resolve() == "global_step2" and store.resolve("global_step1") == "global_step1"
    (tmp_path / "latest").unlink()
    assert store.resolve() == "global_step3"
    assert CheckpointStore(tmp_path / "absent").resolve() is None


@pytest.mark.parametrize(
    ("damage", "tag", "message"),
    [
        ("", "global_step7", "--load-tag global_step7: there is no such checkpoint in {d}; --load-tag can be {a}"),
        ("", "../escape", "--load-tag ../escape: there is no such checkpoint"),
        ("latest", None, "{d}/latest names 'global_step8': there is no such checkpoint in {d}; --load-tag"),
        ("torn latest", None, "{d}/latest names '': there is no such checkpoint"),
        ("binary latest", None, "{d}/latest names '\ufffd"),
        ("binary run.json", None, "{d}/global_step2/run.json is damaged ("),
        ("missing", None, "{d}/global_step2 is incomplete: model.pt is missing; --load-tag can be one of: global_st"),
        ("short", None, "checkpoint {d}/global_step2 is incomplete: model.pt has 0 bytes instead of 1; "),
        ("rank", "global_step2", "is incomplete: rng_rank_0.pt is missing"),
        ("no run.json", None, "run.json is missing: {d}/global_step2 is no checkpoint of this program"),
        ("torn run.json", None, "{d}/global_step2/run.json is damaged ("),
        ("strange run.json", None, "{d}/global_step2/run.json is damaged ("),
        ("list as shape", None, "{d}/global_step2/run.json is damaged (shape is no object)"),
        ("negative iteration", None, "{d}/global_step2/run.json is damaged (iteration is -5)"),
        ("text as sequence", None, "{d}/global_step2/run.json is damaged (sequence is 'a')"),
        ("deep run.json", None, "{d}/global_step2/run.json is damaged ("),
        ("format", None, "{d}/global_step2/run.json is not of format 1: load it with the version that wrote it"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, damage: str, tag: str | None, message: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    last = save(store, 2)
    description = json.loads((last / "run.json").read_text())
    actions: dict[str, Callable[[], object]] = {
        "": lambda: None,
        "latest": lambda: (tmp_path / "latest").write_text("global_step8"),
        "torn latest": lambda: (tmp_path / "latest").write_text(""),
        "binary latest": lambda: (tmp_path / "latest").write_bytes(b"\xff\x00\xfe"),
        "binary run.json": lambda: (last / "run.json").write_bytes(b"\xff\x00\xfe"),
        "missing": (last / "model.pt").unlink,
        "short": lambda: (last / "model.pt").write_text(""),
        "rank": (last / "rng_rank_0.pt").unlink,
        "no run.json": (last / "run.json").unlink,
        "torn run.json": lambda: (last / "run.json").write_text('{"format": 1, '),
        "strange run.json": lambda: (last / "run.json").write_text("[1]"),
        "list as shape": lambda: (last / "run.json").write_text(json.dumps(description | {"shape": []})),
        "negative iteration": lambda: (last / "run.json").write_text(json.dumps(description | {"iteration": -5})),
        "text as sequence": lambda: (last / "run.json").write_text(json.dumps(description | {"sequence": "a"})),
        "deep run.json": lambda: (last / "run.json").write_text("[" * 100_000),
        "format": lambda: (last / "run.json").write_text(json.dumps(description | {"format": 2})),
    }
    actions[damage]()
    with pytest.raises(UserError) as caught:
        store.resolve(tag)
    assert message.format(d=tmp_path, a="one of: global_step1, global_step2") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--load .*file is a file"):
        CheckpointStore(tmp_path / "file").resolve()
    with pytest.raises(UserError, match="it holds no complete checkpoint"):
        CheckpointStore(tmp_path / "absent").resolve("global_step1")


# ---- retention and the best checkpoint


def expected_to_stay(losses: list[float | None], keep_last: int, keep_best: int) -> set[int]:
    """By enumeration: which of the steps 1..n stay."""
    steps = range(1, len(losses) + 1)
    if keep_last == 0:
        return set(steps)
    measured = sorted((loss, step) for step, loss in zip(steps, losses) if loss is not None)
    return set(list(steps)[-keep_last:]) | {step for _, step in measured[:keep_best]}


@pytest.mark.parametrize("keep_last", [0, 1, 2, 4])
@pytest.mark.parametrize("keep_best", [0, 1, 3])
def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, keep_last: int, keep_best: int) -> None:
    generator = random.Random(7)
    for case in range(3):
        losses = [generator.choice([None, 1.0, 2.0, 3.0, 4.0]) for _ in range(6)]
        store = CheckpointStore(tmp_path / str(case))
        store.prepare(ALONE)
        for step, loss in enumerate(losses, start=1):
            save(store, step, loss=loss)
        deleted = store.retain(keep_last, keep_best, ALONE)
        stay = {f"global_step{step}" for step in expected_to_stay(losses, keep_last, keep_best)}
        assert set(tags(store)) == stay and set(deleted) == {f"global_step{s}" for s in range(1, 7)} - stay
        assert hidden(store.directory) == []


def test_retention_after_every_save_never_loses_the_best_so_far(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.5, 2.0, 6.0, 7.0], start=1):
        save(store, step, loss=loss)
        store.retain(2, 1, ALONE)
    assert tags(store) == ["global_step5", "global_step6", "global_step7"]
    best = store.best()
    assert best is not None and (best.tag, best.iteration, best.loss, best.stderr) == ("global_step5", 5, 2.0, 0.01)


def test_the_checkpoint_that_latest_names_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 5):
        save(store, step)
    (tmp_path / "latest").write_text("global_step1")
    assert store.retain(1, 0, ALONE) == ["global_step2", "global_step3"]
    assert tags(store) == ["global_step1", "global_step4"]


def test_only_rank_0_deletes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 4):
        save(store, step)
    assert store.retain(1, 0, Topology(Grid(1, 2, 1), 1, ALONE.device)) == [] and len(tags(store)) == 3


def test_a_fresh_run_leaves_an_older_runs_checkpoints_alone(tmp_path: Path) -> None:
    old = CheckpointStore(tmp_path)
    for step, loss in ((10, 1.0), (20, 1.5), (30, 1.2)):
        save(old, step, "old run", loss=loss)
    store = CheckpointStore(tmp_path)
    remark = store.begin(None, ALONE)
    assert remark is not None and "already holds global_step10, global_step20, global_step30: kept" in remark
    assert store.best() is None
    for step, loss in ((10, 9.0), (15, 8.0), (25, 8.5), (35, 8.7)):
        save(store, step, "new run", loss=loss)
        store.retain(1, 1, ALONE)
    best = store.best()
    assert best is not None and best.tag == "global_step15"
    assert tags(store) == ["global_step20", "global_step30", "global_step15", "global_step35"]
    assert content(store, "global_step20") == "old run" and store.resolve() == "global_step35"


def test_a_run_that_goes_back_forgets_the_best_it_left(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 1.0)):
        save(store, step, loss=loss)
    again = CheckpointStore(tmp_path)
    assert again.begin(3, ALONE) is None
    assert (best := again.best()) is not None and best.tag == "global_step3"
    remark = again.begin(2, ALONE)
    assert remark is not None and "global_step3" in remark and "global_step2" not in remark
    assert (best := again.best()) is not None and (best.tag, best.loss) == ("global_step2", 2.5)


def test_a_damaged_best_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(UserError, match=r"best.json is damaged .*: remove it"):
        CheckpointStore(tmp_path).best()


# ---- random number generators


def test_generators_go_on_where_they_were_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    torch.manual_seed(3)
    torch.rand(5)
    path = save(store, 1)
    following = torch.nn.functional.dropout(torch.ones(64), 0.5)
    torch.manual_seed(99)
    assert restore_rng(path, ALONE, seed=0) is None
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64), 0.5), following)
    state = rng_state(ALONE.device)
    first = torch.rand(3)
    set_rng_state(state, ALONE.device)
    assert torch.equal(torch.rand(3), first)


def test_generators_that_do_not_fit_are_seeded_and_that_is_said(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    remark = restore_rng(path, Topology(Grid(1, 2, 1), 0, ALONE.device), seed=42)
    assert remark == (
        "dropout generators of global_step1 not restored, seeded anew: "
        "saved by 1 (1 x 1 x 1) processes, now 2 (2 x 1 x 1)"
    )
    drawn = torch.rand(4)
    torch.manual_seed(42)
    assert torch.equal(drawn, torch.rand(4))
    (path / "rng_rank_0.pt").unlink()
    assert "rng_rank_0.pt is missing" in (restore_rng(path, ALONE, seed=1) or "")


@pytest.mark.gpu
def test_gpu_generators_go_on_where_they_were_saved(tmp_path: Path) -> None:
    topology = single_process_topology("cuda:0")
    path = CheckpointStore(tmp_path).save(engine_save("x"), metadata(1), topology)
    following = torch.rand(8, device="cuda:0")
    torch.manual_seed(99)
    assert restore_rng(path, topology, seed=0) is None
    assert torch.equal(torch.rand(8, device="cuda:0"), following)
    assert "another kind of device" in (restore_rng(path, ALONE, seed=0) or "")


# ---- two ranks


def on_two_ranks(work: Callable[[Topology, Path], object], folder: Path) -> list[str]:
    """Run ``work`` on two gloo processes; what each returned or raised, as text."""
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def rank(number: int) -> None:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=number, world_size=2)
        topology = build_topology(1, 1, torch.device("cpu"))
        try:
            answer = str(work(topology, folder))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        answers.put((number, answer))
        dist.barrier()
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a rank waits for ever"
    return [answer for _, answer in sorted(answers.get() for _ in processes)]


def test_two_ranks_save_one_checkpoint(tmp_path: Path) -> None:
    def work(topology: Topology, folder: Path) -> object:
        def files(directory: Path, tag: str) -> None:
            (directory / tag / f"rank{topology.rank}.pt").write_text("x" * (topology.rank + 1))

        store = CheckpointStore(folder / "out")
        store.prepare(topology)
        store.save(files, metadata(4), topology)
        return restore_rng(store.directory / "global_step4", topology, 0)

    assert on_two_ranks(work, tmp_path) == ["None", "None"]
    files = CheckpointStore(tmp_path / "out").metadata("global_step4").files
    assert files.keys() == {"rank0.pt", "rank1.pt", "rng_rank_0.pt", "rng_rank_1.pt"} and files["rank1.pt"] == 2
    assert CheckpointStore(tmp_path / "out").resolve() == "global_step4" and hidden(tmp_path / "out") == []


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_is_an_error_on_both(tmp_path: Path, failing: int, background: bool) -> None:
    def work(topology: Topology, folder: Path) -> object:
        def write(directory: Path, tag: str) -> None:
            (directory / tag / f"rank{topology.rank}.pt").write_text("x")
            if topology.rank == failing:
                disk_full("write")

        def files(directory: Path, tag: str) -> Callable[[], None] | None:
            if background:
                return partial(write, directory, tag)
            write(directory, tag)
            return None

        store = CheckpointStore(folder / "out")
        store.prepare(topology)
        return store.save(files, metadata(4), topology)

    message = (
        f"CheckpointError: cannot save {tmp_path}/out/global_step4: rank {failing}: "
        "No space left on device (errno 28); earlier checkpoints are untouched"
    )
    assert on_two_ranks(work, tmp_path) == [message, message]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_that_nodes_do_not_share_is_refused_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.checkpointing._PATIENCE", 0.1)

    def work(topology: Topology, folder: Path) -> None:
        CheckpointStore(folder / f"node{topology.rank}").prepare(topology)

    (tmp_path / "node1").mkdir()
    first, second = on_two_ranks(work, tmp_path)
    assert first == second and first.startswith(f"UserError: --save {tmp_path}/node1 is not shared by all nodes")
    assert list((tmp_path / "node0").iterdir()) == []
