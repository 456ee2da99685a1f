"""Whole training runs for tests: a tiny corpus, and the real entry points in processes that start in no time.

Importing torch and DeepSpeed takes seconds, so a fork server imports them once; every run, and every rank of a run, is
a fresh child of it. A run can be given a ``fault``: a function of ``training_faults`` that the child calls first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron import initialize

REPOSITORY = Path(__file__).resolve().parents[1]
ENTRY_POINTS = {"ar": "pretrain_gpt.py", "mdm": "pretrain_diff_gpt.py"}
PATIENCE = 120.0
"""Seconds after which a run counts as hung. Runs here take one or two."""

MERGES = ["t h", "th e", "i n", "e r", "a n", "o u"]
WORDS = "the of and to in a is that for it was on are as with his they at be this from have or by one had not but what"
SEQ_LENGTH = 32

LLAMA = (
    "--use-rotary-position-embeddings --normalization rmsnorm --swiglu --disable-bias-linear --ffn-hidden-size 64"
)
GPT2 = "--normalization layernorm"
SHAPE = (
    f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ_LENGTH} "
    f"--max-position-embeddings {SEQ_LENGTH} --make-vocab-size-divisible-by 8 --init-method-std 0.1"
)
RECIPE = (
    "--micro-batch-size 4 --global-batch-size 8 --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine "
    "--lr-warmup-samples 16 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --log-interval 1 --num-workers 0"
)


@dataclass(frozen=True)
class Corpus:
    """Token files whose every token the test knows.

    Attributes:
        directory: where ``tokenizer.json``, ``train.bin/.idx`` and ``valid.bin/.idx`` lie.
        train, valid: the documents, each ending in ``eod``.
        eod: id of the end of a document.
        token_bytes: [tokens] UTF-8 bytes of each token, counted on its spelling.
    """

    directory: Path
    train: list[np.ndarray]
    valid: list[np.ndarray]
    eod: int
    token_bytes: np.ndarray

    def flags(self, *more: str, style: str = LLAMA, recipe: str = RECIPE, dropout: float = 0.0) -> list[str]:
        """A whole command line over these data; flags in ``more`` (each may be several words) come last and win."""
        data = (
            f"--tokenizer-type HFTokenizer --tokenizer-model {self.directory}/tokenizer.json "
            f"--train-data-path {self.directory}/train --valid-data-path {self.directory}/valid --eval-windows 12 "
            f"--attention-dropout {dropout} --hidden-dropout {dropout}"
        )
        return " ".join([SHAPE, style, recipe, data, *more]).split()


def write_tokenizer(path: Path) -> tuple[int, np.ndarray]:
    """Write a byte-level BPE with a handful of merges; return the id of the end of text and each token's bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|endoftext|>"])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(path))
    # A letter of the byte alphabet stands for one byte; the end of text for none.
    return len(pieces), np.array([*(len(piece) for piece in pieces), 0])


def write_documents(prefix: Path, documents: Sequence[np.ndarray]) -> None:
    """Write documents of token ids as ``prefix.bin/.idx``."""
    from megatron.data.indexed_dataset import IndexedDatasetWriter

    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)


def make_corpus(directory: Path) -> Corpus:
    """About 6,000 training and 600 validation tokens of word salad, the same on every machine and with every numpy."""
    eod, token_bytes = write_tokenizer(directory / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw = np.random.Philox(key=7).random_raw(1 << 14)
    draws = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
    words = WORDS.split()
    documents = []
    for _ in range(110):
        length = 5 + int(draws.pop() * 25)
        text = " ".join(words[int(len(words) * draws.pop() ** 2)] for _ in range(length))
        documents.append(np.array([*library.encode(text).ids, eod]))
    corpus = Corpus(directory, documents[:100], documents[100:], eod, token_bytes)
    write_documents(directory / "train", corpus.train)
    write_documents(directory / "valid", corpus.valid)
    return corpus


@dataclass(frozen=True)
class Finished:
    """One process of a run, ended. ``code`` is its exit code, or minus the signal that killed it."""

    code: int
    stdout: str
    stderr: str


Fault = tuple[Callable[..., Callable[[], object] | None], tuple[Any, ...]]
"""A function and its arguments; what it returns is called at the end, if the process comes to one."""


class Launcher:
    """Starts runs in children of a fork server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._context = multiprocessing.get_context("forkserver")
        # The last is what deepspeed.initialize() imports, and with it torch's compiler.
        self._context.set_forkserver_preload(
            ["megatron.entry", "training_faults", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
        )

    def __call__(
        self, objective: str, argv: Sequence[str], *, fault: Fault | None = None, timeout: float = PATIENCE
    ) -> Finished:
        """Run one process to its end."""
        return self.ranks(objective, [argv], [fault], timeout)[0]

    def ranks(
        self, objective: str, argvs: Sequence[Sequence[str]], faults: Sequence[Fault | None], timeout: float = PATIENCE
    ) -> list[Finished]:
        """Run ``len(argvs)`` ranks of one run to their ends, each with its own command line and fault."""
        self._count += 1
        home = self._directory / f"run{self._count}"
        home.mkdir()
        processes = [
            self._context.Process(target=_child, args=(objective, list(argv), fault, home, rank, len(argvs)))
            for rank, (argv, fault) in enumerate(zip(argvs, faults, strict=True))
        ]
        with _paths():  # the fork server starts with the first child
            for process in processes:
                process.start()
        _wait(processes, timeout)
        return [
            Finished(
                process.exitcode or 0,
                (home / f"stdout{rank}").read_text(encoding="utf-8"),
                (home / f"stderr{rank}").read_text(encoding="utf-8"),
            )
            for rank, process in enumerate(processes)
        ]


@contextlib.contextmanager
def _paths() -> Iterator[None]:
    """The environment that the fork server, and so every child, begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def _wait(processes: Sequence[BaseProcess], timeout: float) -> None:
    """Wait for the end of all; those that hang are killed and fail the test. Nothing outlives this call."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        assert not hung, f"ranks {hung} did not end within {timeout:.0f} s"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # the child leads a group: its loader workers too
            process.join()


def _child(objective: str, argv: list[str], fault: Fault | None, home: Path, rank: int, ranks: int) -> None:
    """The body of a rank: an entry point as the shell would start it, its output in files."""
    multiprocessing.set_start_method("fork", force=True)  # for its loader workers, as in a process of a shell
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the fork server
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(home / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(home)
    if ranks > 1:
        import torch.distributed as dist

        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        store = dist.FileStore(str(home / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    after = None
    if fault is not None:
        function, arguments = fault
        after = function(*arguments)
    initialize.leave = sys.exit  # type: ignore[assignment]  # what comes after the run is still to come
    entry = str(REPOSITORY / ENTRY_POINTS[objective])
    sys.argv = [entry, *argv]
    try:
        runpy.run_path(entry, run_name="__main__")
    finally:
        if after is not None:
            after()


def events(save: Path, kind: str | None = None, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The events of a metrics file, by default that of a checkpoint directory."""
    found = [json.loads(line) for line in (save / file).read_text(encoding="utf-8").splitlines()]
    return [event for event in found if kind in (None, event["kind"])]


def curve(save: Path) -> dict[int, tuple[float, float, float]]:
    """iteration -> (loss, gradient norm, learning rate), of a run with ``--log-interval 1``."""
    return {e["iteration"]: (e["loss"], e["grad_norm"], e["lr"]) for e in events(save, "train")}


def tensors(checkpoint: Path, files: str = "*.pt") -> dict[str, Any]:
    """All tensors and numbers in the ``files`` of a checkpoint, by file and key: weights, optimizer, generators."""
    import torch

    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}/{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(f"{name}/{index}", item)
        elif isinstance(value, torch.Tensor | int | float):
            found[name] = value

    for path in sorted(checkpoint.glob(files)):
        collect(path.name, torch.load(path, weights_only=False))
    assert any("exp_avg_sq" in name for name in found) and any("module/layers" in name for name in found)
    return found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tiny corpus."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """``launch(objective, argv)`` runs an entry point and returns how it ended."""
    return Launcher(tmp_path_factory.mktemp("runs"))
