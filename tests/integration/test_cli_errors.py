"""Wrong input to the real entry points: one line on stderr that names the thing, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_faults import call_main_twice
from training_runs import ENTRY_POINTS, REPOSITORY, Corpus, Finished, Launcher, curve, write_documents

from megatron.arguments import parse_arguments
from megatron.data import build_dataset

pytestmark = pytest.mark.slow

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index


def assert_refused(finished: Finished, *words: str) -> None:
    """Exit code 2, one line on stderr with ``words``, no traceback anywhere, nothing trained."""
    assert finished.code == 2, finished
    assert re.fullmatch(r"error: [^\n]+\n", finished.stderr), finished.stderr
    assert "Traceback" not in finished.stdout and "iteration        1/" not in finished.stdout
    for word in words:
        assert word in finished.stderr, f"{word!r} is not in {finished.stderr!r}"


def without(argv: list[str], *flags: str) -> list[str]:
    """``argv`` without these flags and the value of each."""
    for flag in flags:
        start = argv.index(flag)
        argv = argv[:start] + argv[start + 2 :]
    return argv


def copied(corpus: Corpus, directory: Path) -> Path:
    """A copy of the training files to damage; returns their prefix."""
    for end in ("bin", "idx"):
        shutil.copy(corpus.directory / f"train.{end}", directory / f"damaged.{end}")
    return directory / "damaged"


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "truncated bin": (lambda p: truncate(p.with_suffix(".bin"), 1001), ".bin", ("1001",)),
    "truncated idx": (lambda p: truncate(p.with_suffix(".idx"), 333), ".idx", ("333",)),
    "idx cut in its header": (lambda p: truncate(p.with_suffix(".idx"), 20), ".idx", ("cut off",)),
    "other version": (lambda p: overwrite(p.with_suffix(".idx"), 9, struct.pack("<Q", 2)), ".idx", ("version 2",)),
    "wrong magic": (lambda p: overwrite(p.with_suffix(".idx"), 0, b"TNTIDX"), ".idx", ("MMIDIDX",)),
    "unknown dtype": (lambda p: overwrite(p.with_suffix(".idx"), 17, b"\x63"), ".idx", ("dtype code 99",)),
    "empty idx": (lambda p: truncate(p.with_suffix(".idx"), 0), ".idx", ("empty",)),
    "empty bin": (lambda p: truncate(p.with_suffix(".bin"), 0), ".bin", ()),
    "no bin": (lambda p: p.with_suffix(".bin").unlink(), ".bin", ("missing",)),
    "no documents": (
        lambda p: p.with_suffix(".idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 1) + struct.pack("<q", 0)),
        ".idx", ("no documents",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_token_files(damage: str, corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    prefix = copied(corpus, tmp_path)
    spoil, file, words = DAMAGES[damage]
    spoil(prefix)
    save = tmp_path / "save"
    argv = corpus.flags(f"--train-iters 4 --train-data-path {prefix} --save {save}")
    assert_refused(launch("ar", argv), str(prefix) + file, *words)
    assert not save.exists()
    # The same files for validation.
    argv = corpus.flags(f"--train-iters 4 --valid-data-path {prefix} --save {save}")
    assert_refused(launch("mdm", argv), str(prefix) + file, *words)
    assert not save.exists()


COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown flag": ("--learning-rate 3", ("--learning-rate",)),
    "misspelt flag": ("--micro-batchsize 4", ("--micro-batchsize", "--micro-batch-size")),
    "abbreviated flag": ("--train-it 4", ("--train-it",)),
    "Megatron's flag that is not ours": ("--use-flash-attn", ("--use-flash-attn", "drop it")),
    "boolean flag with a value": ("--swiglu true", ("--swiglu takes no value", "true")),
    "boolean flag with =": ("--bf16=False", ("--bf16 takes no value",)),
    "no number": ("--lr fast", ("--lr", "fast")),
    "no whole number": ("--seq-length 32.5", ("--seq-length", "32.5")),
    "out of range": ("--hidden-dropout 1.5", ("--hidden-dropout 1.5",)),
    "the other objective's flag": ("--num-mc 4", ("--num-mc", "pretrain_diff_gpt.py")),
    "heads do not divide": ("--num-attention-heads 5", ("--num-attention-heads 5", "--hidden-size 32")),
    "batch does not divide": ("--global-batch-size 10", ("--global-batch-size 10", "--micro-batch-size 4")),
    "both lengths": ("--train-samples 64", ("--train-samples", "--train-iters")),
    "missing vocabulary": ("--tokenizer-model {tmp}/nowhere.json", ("--tokenizer-model", "nowhere.json")),
    "vocabulary that is none": ("--tokenizer-model {tmp}/text", ("--tokenizer-model", "text")),
    "vocabulary of another type": ("--tokenizer-type GPT2BPETokenizer", ("GPT2BPETokenizer needs --vocab-file",)),
    "missing data": ("--train-data-path {tmp}/nowhere", ("nowhere",)),
    "data named twice": ("--valid-data-path-file {tmp}/text", ("--valid-data-path", "exclude each other")),
    "bad JSON": ("--deepspeed_config {tmp}/text", ("--deepspeed_config", "text, line 1", "not valid JSON")),
    "missing JSON": ("--deepspeed_config {tmp}/nowhere", ("--deepspeed_config", "nowhere")),
    "JSON list": ("--deepspeed_config {tmp}/list.json", ("list.json", "one JSON object")),
    "JSON against a flag": (
        "--deepspeed_config {tmp}/clip.json", ("clip.json", "gradient_clipping is 0.5", "--clip-grad says 1.0")
    ),
    "JSON with an optimizer": ("--deepspeed_config {tmp}/optimizer.json", ("optimizer.json", "'optimizer'")),
    "JSON that is no text": ("--deepspeed_config {tmp}/binary.json", ("binary.json: not valid JSON",)),
    "JSON with a wrong section": ("--deepspeed_config {tmp}/section.json", ("section.json: bf16 must be an object",)),
    "JSON with a wrong interval": ("--deepspeed_config {tmp}/steps.json", ("steps.json: steps_per_print must be",)),
    "JSON it refuses": ("--deepspeed_config {tmp}/zero.json", ("zero.json: DeepSpeed refuses it", "nonsense")),
    "metrics file that is another file": (
        "--metrics-file {tmp}/corpus.jsonl", ("corpus.jsonl, line 1: not an event of metrics.jsonl",)
    ),
    "kill switch that is a file of its own": ("--kill-switch-file {tmp}/text", ("text is there and no empty file",)),
    "nothing to finetune": ("--load {tmp}/nowhere --finetune", ("nowhere holds no checkpoint", "--finetune needs one")),
    "a checkpoint instead of its directory": (
        "--load {tmp}/global_step2", ("global_step2 is a checkpoint: give --load", "--load-tag global_step2")
    ),
    "save below a file": ("--save {tmp}/text/save", ("--save", "text/save")),
    "save is a file": ("--save {tmp}/text", ("--save", "text is a file")),
    "save not writable": ("--save /proc/save", ("--save /proc/save cannot be written",)),
    "load is a file": ("--load {tmp}/text", ("--load", "text is a file")),
    "save and load are a file": ("--save {tmp}/text --load {tmp}/text", ("--load", "text is a file")),
    "metrics not writable": ("--metrics-file {tmp}/text/metrics.jsonl", ("--metrics-file",)),
    "TensorBoard not writable": ("--tensorboard-dir {tmp}/text", ("--tensorboard-dir",)),
    "too little to train on": ("--train-iters 0 --train-samples 4", ("--train-iters 0",)),
    "fp8 without a GPU": ("--bf16 --fp8", ("--fp8 needs a GPU: leave it out",)),
    "fp8 without bf16": ("--fp8", ("--fp8 needs --bf16",)),
    "FlashAttention without a GPU": (
        "--attention-backend flash", ("--attention-backend flash: it needs a GPU; or use --attention-backend auto",)
    ),
    "no such attention": ("--attention-backend unfused", ("--attention-backend", "unfused", "auto", "flash", "fused")),
    "seed beyond NumPy's": ("--epoch-rule megatron --seed 4294967296", ("--epoch-rule megatron", "below 2^32")),
    "sequence too long": ("--seq-length 64", ("--seq-length 64", "--max-position-embeddings")),
    "flag without its value": ("--save", ("--save",)),
    "empty flag": ("--save=", ("--save is empty",)),
    "stray word": ("--lr 1e-3 4", ("--lr", "'4'")),
}  # fmt: skip


@pytest.mark.parametrize("case", list(COMMANDS))
def test_wrong_command_lines(case: str, corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "text").write_text("no JSON\n")
    (given / "list.json").write_text("[1]")
    (given / "clip.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    (given / "optimizer.json").write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    (given / "binary.json").write_bytes(b"\xff\xfe")
    (given / "section.json").write_text('{"bf16": true}')
    (given / "steps.json").write_text('{"steps_per_print": 0}')
    (given / "zero.json").write_text('{"zero_optimization": {"nonsense": 1}}')
    (given / "corpus.jsonl").write_text('{"text": "my only document"}')
    (given / "global_step2").mkdir()
    (given / "global_step2" / "run.json").write_text("{}")
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    extra, words = COMMANDS[case]
    argv = corpus.flags("--train-iters 4", extra.format(tmp=given))
    assert_refused(launch("ar", argv), *words)
    assert {path: path.read_bytes() for path in given.rglob("*") if path.is_file()} == before


def test_the_checkpoints_of_another_model_are_not_overwritten(
    corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    argv = corpus.flags("--train-iters 1 --lr-warmup-samples 4", f"--save {save}")
    assert launch("ar", argv).code == 0
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    assert_refused(launch("mdm", argv), f"--save {save} holds checkpoints of another model", "objective ar -> mdm")
    assert {path: path.read_bytes() for path in save.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("name", "words"), [
    ("mp_rank_*_model_states.pt", ("is damaged (", "use another")),
    ("*optim_states.pt", ("is damaged (", "use another")),
    ("rng_rank_0.pt", ("rng_rank_0.pt is damaged (", "--no-load-rng")),
    ("best.json", ("best.json is damaged (", "remove it")),
])  # fmt: skip
def test_a_damaged_checkpoint_is_named(
    name: str, words: tuple[str, ...], corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    """Of the right size, as a disk that fails leaves it."""
    save = tmp_path / "run"
    argv = corpus.flags("--lr-warmup-samples 4", f"--save {save}")
    assert launch("ar", [*argv, "--train-iters", "1"]).code == 0
    (path,) = save.rglob(name) if "json" not in name else [save / name]
    path.write_bytes(b'{"tag": 5, "iteration": "x", "loss": []}' if "json" in name else bytes(path.stat().st_size))
    assert_refused(launch("ar", [*argv, "--train-iters", "2", "--load", str(save)]), *words)


def test_a_missing_gpt2_vocabulary(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    argv = without(corpus.flags("--train-iters 4"), "--tokenizer-type", "--tokenizer-model")
    argv += f"--vocab-file {tmp_path}/nowhere.json --merge-file {tmp_path}/merges.txt".split()
    assert_refused(launch("mdm", argv), f"--vocab-file {tmp_path}/nowhere.json")


def test_flags_that_are_missing(launch: Launcher) -> None:
    assert_refused(launch("ar", []), "--num-layers", "--micro-batch-size", "are required")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1.0 {train}\nhalf {train}\n", ("paths.txt", "weight")),
        ('1.0 {train}\n\n"0.5 {train}\n', ("paths.txt, line 3",)),
        ("1.0 {train}\n-1 {train}\n", ("paths.txt, line 2", "-1")),
        ("1.0 {train} 0.5\n", ("paths.txt, line 1", "pairs")),
        ("1.0 {train}\n{train}\n", ("paths.txt", "weight")),
        ("# nothing\n", ("paths.txt", "no data")),
        ("1.0 /nowhere\n", ("/nowhere",)),
        (None, ("--train-data-path-file: cannot read", "paths.txt")),
    ],
)
def test_data_path_files(
    content: str | None, words: tuple[str, ...], corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    file = tmp_path / "paths.txt"
    if content is not None:
        file.write_text(content.format(train=corpus.directory / "train"))
    argv = without(corpus.flags("--train-iters 4", f"--save {tmp_path}/save"), "--train-data-path")
    argv += ["--train-data-path-file", str(file)]
    assert_refused(launch("ar", argv), *words)
    assert not (tmp_path / "save").exists()


def test_too_little_validation_data(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    write_documents(tmp_path / "short", [np.arange(32)])
    argv = corpus.flags("--train-iters 4", f"--valid-data-path {tmp_path}/short --save {tmp_path}/save")
    assert_refused(launch("ar", argv), f"{tmp_path}/short.bin: 32 tokens", "33", "--seq-length")
    assert not (tmp_path / "save").exists()


# ---- two ranks: both end with code 2, one of them says why ---------------------------------------


def assert_both_refused(both: list[Finished], *words: str) -> None:
    assert [process.code for process in both] == [2, 2], both
    assert_refused(both[0], *words)
    # torch warns of its own deprecated names there.
    assert not re.search("error|Traceback", both[1].stderr), both[1].stderr


@pytest.mark.parametrize("blind", [0, 1])
def test_two_ranks_of_which_one_does_not_see_a_file(
    blind: int, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    save = f"--save {tmp_path}/save"
    for flag, there in (
        ("--train-data-path", corpus.directory / "train"),
        ("--valid-data-path", corpus.directory / "valid"),
        ("--tokenizer-model", corpus.directory / "tokenizer.json"),
        ("--deepspeed_config", tmp_path / "empty.json"),
    ):
        argvs = [corpus.flags(f"--train-iters 4 {save} {flag} {there}") for _ in range(2)]
        argvs[blind][-1] = str(tmp_path / "nowhere")
        assert_both_refused(launch.ranks("ar", argvs, [None, None]), "nowhere")
        assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--no-such-flag 1", ("--no-such-flag",)),
        ("--global-batch-size 12", ("--global-batch-size 12", "x 2 data-parallel ranks")),
        ("--save /proc/save", ("--save /proc/save cannot be written",)),
        ("--load {tmp}/file", ("--load", "is a file")),
    ],
)
def test_two_ranks_with_the_same_mistake(
    flags: str, words: tuple[str, ...], corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    argv = corpus.flags("--train-iters 4", flags.format(tmp=tmp_path))
    assert_both_refused(launch.ranks("mdm", [argv] * 2, [None, None]), *words)


@pytest.mark.parametrize(("victim", "workers"), [(0, 0), (1, 0), (1, 1)])
def test_a_token_that_only_one_ranks_samples_hold(
    victim: int, workers: int, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    """Data of another tokenizer: found at the step that reads it, on the rank that reads it, and the end of both."""
    argv = corpus.flags(
        "--train-samples 16 --lr-warmup-samples 0 --micro-batch-size 2 --global-batch-size 4",
        f"--train-data-path {tmp_path}/foreign --save {tmp_path}/save --num-workers {workers}",
    )
    # One epoch of documents as long as a window's stride: each is one sample's, but for its first token.
    write_documents(tmp_path / "foreign", [np.full(32, number) for number in range(17)])
    dataset = build_dataset(parse_arguments("ar", argv).data, "train", 16, 32, 1234)
    wrong = next(int(dataset[j][1]) for j in range(4, 16) if j // 2 % 2 == victim)
    documents = [np.full(32, number) for number in range(17)]
    documents[wrong][1:] = 300
    write_documents(tmp_path / "foreign", documents)
    both = launch.ranks("ar", [argv] * 2, [None, None])
    assert [process.code for process in both] == [2, 2], both
    said = [line for line in both[0].stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"{tmp_path}/foreign.bin holds token id 300" in said[0] and "263 tokens" in said[0]
    assert not any("Traceback" in process.stderr or "error" in both[1].stderr for process in both), both
    assert not list((tmp_path / "save").glob("global_step*")) and not list((tmp_path / "save").glob(".*"))
    # And in a window of the validation, after steps that went well.
    argv = corpus.flags(f"--train-iters 4 --valid-data-path {tmp_path}/foreign --eval-interval 3")
    both = launch.ranks("mdm", [argv] * 2, [None, None])
    assert [process.code for process in both] == [2, 2], both
    assert both[0].stderr.count("error: ") == 1 and "foreign.bin holds token id 300" in both[0].stderr


def test_ctrl_c_is_one_line(corpus: Corpus, tmp_path: Path) -> None:
    argv = corpus.flags("--train-iters 1000000 --lr-warmup-samples 4 --num-workers 1", f"--save {tmp_path}/save")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / ENTRY_POINTS["ar"]), *argv], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"iteration +\d+/", line):
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if not line.startswith("[")] == ["error: interrupted (Ctrl-C)"]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [("--train-data-path {tmp}/nowhere", "no data at prefix '{tmp}/nowhere'"), ("--swiglu yes", "takes no value")],
)
def test_torchrun_prints_one_line(mistake: str, words: str, corpus: Corpus, tmp_path: Path) -> None:
    """The same through a launcher: it reports exit code 2 and the two ranks said one line between them."""
    argv = corpus.flags("--train-iters 4", mistake.format(tmp=tmp_path), f"--save {tmp_path}/save")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, str(REPOSITORY / ENTRY_POINTS["ar"]), *argv],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words.format(tmp=tmp_path) in said[0], finished.stderr
    # torchrun may end one rank when it sees the end of the other.
    *others, root_cause = re.findall(r"exitcode\s*:\s*(-?\d+)", finished.stderr)
    assert root_cause == "2" and set(others) <= {"2", "-15"}, finished.stderr
    assert not (tmp_path / "save").exists()


def test_main_can_be_called_again_in_one_process(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    """After a refusal and after a run: no process group, handler, generator or file of the first call is in the way."""
    argvs = [corpus.flags("--train-iters 4", f"--save {tmp_path}/{name}", dropout=0.1) for name in ("one", "two")]
    finished = launch("ar", argvs[0], fault=(call_main_twice, ("ar", argvs[0], argvs[1])))
    assert finished.code == 0, finished
    assert finished.stderr == "error: --num-layers, --hidden-size, --num-attention-heads, --max-position-embeddings, " \
        "--micro-batch-size, --seq-length are required: see --help\n"
    assert curve(tmp_path / "one") == curve(tmp_path / "two") and len(curve(tmp_path / "one")) == 4
