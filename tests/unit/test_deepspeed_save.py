"""Saving through the real DeepSpeed on two processes: a rank that cannot write hangs nobody and leaves no dirt.

The ranks are this file, started as a program: forks of the tests' process would have the process groups that DeepSpeed
keeps of whatever test ran there before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.async_save import HostCopies
from megatron.checkpointing import CheckpointStore
from megatron.deepspeed_save import save_engine
from megatron.distributed.topology import build_topology
from megatron.run_metadata import CheckpointMetadata


def metadata(iteration: int) -> CheckpointMetadata:
    return CheckpointMetadata(
        iteration=iteration, consumed_samples=0, consumed_tokens=0, seed=0, objective="ar", vocabulary={}, shape={},
        data_order={}, config={}, world={}, versions={},
    )  # fmt: skip


def build_engine() -> Any:
    """A ZeRO 1 engine over one linear layer."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    model = torch.nn.Linear(8, 8)
    config = {
        "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1}, "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    return engine


def run_rank(rank: int, folder: Path, background: bool) -> None:
    """One rank: save, load, fail to save; what it saw goes to ``report{rank}.json``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    topology = build_topology(1, 1, torch.device("cpu"))
    engine = build_engine()
    checkpoints = CheckpointStore(folder / "out")
    checkpoints.prepare(topology)
    copies = HostCopies(torch.device("cpu")) if background else None

    def save(directory: Path, tag: str) -> Callable[[], None] | None:
        return save_engine(engine, directory, tag, copies=copies)

    weights = engine.module.weight.detach().clone()
    pending = checkpoints.start_save(save, metadata(1), topology)
    if background:
        engine.module.weight.data.zero_()  # long before the files are complete, for all that they know
    checkpoints.finish_save(pending, topology)
    engine.module.weight.data.zero_()
    engine.load_checkpoint(str(folder / "out"), tag="global_step1")
    report: list[object] = [torch.equal(engine.module.weight, weights)]

    inner = engine.checkpoint_engine
    for failing, name in ((1, "optim_states"), (0, "model_states"), (0, "makedirs")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                make_fail(patch, engine, name)
            try:
                checkpoints.save(save, metadata(2), topology)
            except RuntimeError as error:
                report.append(str(error))
        assert engine.checkpoint_engine is inner
    (folder / f"report{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    os._exit(0)


def make_fail(patch: pytest.MonkeyPatch, engine: Any, name: str) -> None:
    """Let this rank fail to write what ``name`` says."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if name == "makedirs":
        patch.setattr(engine.checkpoint_engine, "makedirs", full)
        return
    original = engine.checkpoint_engine.save

    def save(state_dict: Any, path: str) -> None:
        if name in path:
            full()
        original(state_dict, path)

    patch.setattr(engine.checkpoint_engine, "save", save)


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_rank_fails_both_and_keeps_the_last_checkpoint(tmp_path: Path, background: bool) -> None:
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path), str(int(background))],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(150) for process in ranks] == [0, 0], "a rank crashed"
    finally:
        for process in ranks:
            process.kill()
    reports = {rank: json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in range(2)}
    expected = [
        f"cannot save {tmp_path}/out/global_step2: rank {failing}: No space left on device (errno 28); "
        "earlier checkpoints are untouched"
        for failing in (1, 0, 0)
    ]
    assert reports == {0: [True, *expected], 1: [True, *expected]}
    store = CheckpointStore(tmp_path / "out")
    assert store.resolve() == "global_step1"
    # Not zero_to_fp32.py and zero_to_torch.py either.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"global_step1", "latest"}
    files = store.metadata("global_step1").files
    assert {"rng_rank_0.pt", "rng_rank_1.pt", "mp_rank_00_model_states.pt"} <= files.keys()
    assert sum(name.endswith("optim_states.pt") for name in files) == 2


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1")
