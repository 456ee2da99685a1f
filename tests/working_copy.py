"""A working copy of the repository made of links, so that scripts under test write nothing into the real one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# What a user's shell may hold and a test must not inherit.
_CLEARED = re.compile(r"(SLURM|SBATCH|NCCL|TORCHELASTIC|MASTER|OMP)_|NNODES|NODE_RANK|NUM_GPUS|LAUNCHER|CUDA_VISIBLE")
_CLEARED_NAMES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK DRY_RUN SMOKE PYTHON OUTPUT_DIR VARIANT DS_ACCELERATOR".split()
)


def make_working_copy(path: Path, repository: Path) -> None:
    """Make ``path`` look like the repository root to the experiment scripts, on a machine without GPUs."""
    path.mkdir()
    for name in ("examples_training", "utils", "megatron", "tools"):
        (path / name).symlink_to(repository / name)
    for file in repository.glob("pretrain_*.py"):
        (path / file.name).symlink_to(file)
    # No GPU, whatever machine this is; tests that need some put an nvidia-smi of their own before this one.
    (path / "no_gpu").mkdir()
    (path / "no_gpu" / "nvidia-smi").write_text("#!/bin/sh\n", encoding="utf-8")
    (path / "no_gpu" / "nvidia-smi").chmod(0o755)


def script_environment(working_copy: Path, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without launchers' variables, with this Python, and ``settings``."""
    kept = {k: v for k, v in os.environ.items() if not _CLEARED.match(k) and k not in _CLEARED_NAMES}
    search = f"{working_copy / 'no_gpu'}:{os.environ['PATH']}"
    return {**kept, "PATH": search, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(settings or {})}
