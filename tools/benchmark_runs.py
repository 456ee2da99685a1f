"""Runs to measure: random inputs, the published recipe as a command line, and what a run's own metrics say.

Shared by ``tools/benchmark.py train`` and ``parallel``, which start the real entry points in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron.budget import GPT2_VOCABULARY, ModelRow, read_model_table
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.errors import UserError
from megatron.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = {"ar": "pretrain_gpt.py", "mdm": "pretrain_diff_gpt.py"}
MEAN_TOKENS = 480
"""Mean length of a random document, about that of C4."""


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer.json with as many tokens as GPT-2 has; what they spell is of no account for speed."""
    vocabulary = {f"t{i}": i for i in range(GPT2_VOCABULARY - 1)} | {"<|endoftext|>": GPT2_VOCABULARY - 1}
    special = {"id": GPT2_VOCABULARY - 1, "content": "<|endoftext|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [special | flags],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def write_random_data(
    prefix: Path, documents: int, mean_tokens: float, seed: int = 0, distinct: int = GPT2_VOCABULARY - 1
) -> int:
    """Write documents of random tokens below ``distinct`` with exponential lengths; return the number of tokens."""
    rng = np.random.default_rng(seed)
    sizes = 1 + rng.exponential(mean_tokens - 1, documents).astype(np.int64)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for part in np.array_split(sizes, max(1, documents // 4096)):
            tokens = rng.integers(0, distinct, int(part.sum()), dtype=np.uint16)
            tokens[np.cumsum(part) - 1] = GPT2_VOCABULARY - 1
            writer.add_documents(tokens, part)
    return int(sizes.sum())


def write_inputs(directory: Path, tokens: int, distinct: int = GPT2_VOCABULARY - 1) -> None:
    """Write ``tokenizer.json`` and ``data.bin/.idx`` of about ``tokens`` random tokens, ``distinct`` of them."""
    write_tokenizer(directory / "tokenizer.json")
    write_random_data(directory / "data", max(64, tokens // MEAN_TOKENS), MEAN_TOKENS, distinct=distinct)


def table_row(name: str) -> ModelRow:
    """The row ``name`` of the model table.

    Raises:
        UserError: there is none.
    """
    table = read_model_table()
    if name not in table:
        raise UserError(f"--model {name}: no such row in utils/model_params.sh; rows are {', '.join(table)}")
    return table[name]


def recipe_flags(row: ModelRow, directory: Path, seq_length: int, dropout: float) -> list[str]:
    """The published recipe on a row of the table, over the inputs in ``directory``; no batch sizes, no parallelism."""
    flags = (
        f"--num-layers {row.layers} --hidden-size {row.d_model} --num-attention-heads {row.heads} "
        f"--kv-channels {row.head_size} --seq-length {seq_length} --max-position-embeddings {seq_length} "
        "--use-rotary-position-embeddings --normalization rmsnorm --swiglu --disable-bias-linear "
        f"--attention-dropout {dropout} --hidden-dropout {dropout} --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine "
        "--adam-beta2 0.95 --weight-decay 0.1 --log-interval 1"
    ).split()
    return [
        *flags, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(directory / "tokenizer.json"),
        "--train-data-path", str(directory / "data"),
    ]  # fmt: skip


def batch_flags(arguments: argparse.Namespace, steps: int) -> list[str]:
    """Flags of ``steps`` steps with the micro-batch, global batch and loader workers of ``arguments``."""
    batch = arguments.global_batch_size
    return (
        f"--micro-batch-size {arguments.micro_batch_size} --global-batch-size {batch} --train-samples {batch * steps} "
        f"--num-workers {arguments.num_workers}"
    ).split()


def profile_flags(directory: Path, first: int, steps: int) -> list[str]:
    """Flags that profile ``steps`` steps from step ``first`` on."""
    return [
        *f"--profile --profile-step-start {first} --profile-step-end {first + steps} --profile-dir".split(),
        str(directory / "profile"),
    ]


@dataclass(frozen=True)
class Finished:
    """A run that ended. ``began`` and ``ended`` are Unix times; ``output`` is what it printed."""

    code: int
    output: str
    began: float
    ended: float

    @property
    def last_words(self) -> str:
        """The end of its output as one line: its own error if it said one."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return " | ".join(errors[:1] or lines[-4:])


def run_to_end(
    command: Sequence[str], log: Path, timeout: float | None = None, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run ``command`` in the repository's root, its output in ``log``.

    Raises:
        UserError: it did not end within ``timeout`` seconds; it is killed, with all that it started.
    """
    began = time.time()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"{Path(command[1]).name} did not end within {timeout:.0f} s; see {log}") from None
        finally:
            end_session(process)
    return Finished(code, log.read_text(encoding="utf-8", errors="replace"), began, time.time())


def end_session(process: subprocess.Popen[Any], *others: psutil.Process) -> None:
    """Kill ``process`` and what it started, and ``others``; it was started with ``start_new_session``.

    Ranks of torchrun lead sessions of their own, so they are looked for while their launcher lives.
    """
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in (*started, *others):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def profiled(metrics: Path) -> dict[str, Any] | None:
    """What a run's profile said (``shares``, ``collectives``, ``seconds``), None where there was none."""
    found = [event for event in read_metrics(metrics, "meta") if event["event"] == "profiled"]
    return found[-1] if found else None


def medians(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Speed of the measured steps: tokens/s of all devices together, TFLOP/s and MFU of one device."""
    speeds = [step["tokens_per_second"] for step in steps]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tflops": statistics.median(step["tflops"] for step in steps),
        "mfu": None if steps[0]["mfu"] is None else statistics.median(step["mfu"] for step in steps),
        "memory_gb": steps[-1]["memory"],
    }


def python(*words: str) -> list[str]:
    """A command line of this interpreter."""
    return [sys.executable, *words]
