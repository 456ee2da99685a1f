"""Text to token files: bytes by hand, the same bytes for every worker count, and every bad input by its message."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from waiting import wait_until

from megatron.data.indexed_dataset import IndexedDataset
from tools.preprocess_data import main

WriteJsonl = Callable[[str, Sequence[Any]], Path]
EOD = 256


class Runner:
    """Runs the tool in this process and reads back what it wrote."""

    def __init__(self, directory: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.flags, self.capsys = directory, flags, capsys

    def __call__(self, *arguments: str | Path, code: int = 0, workers: int = 1) -> str:
        """Everything printed; ``--output-prefix`` is ``<directory>/out``."""
        prefix = ["--output-prefix", str(self.directory / "out"), "--workers", str(workers)]
        assert main([*map(str, arguments), *prefix, *self.flags]) == code
        printed = self.capsys.readouterr()
        return printed.out + printed.err

    def documents(self, key: str = "text") -> list[bytes]:
        """Documents as bytes (the ids are bytes), the end of document as '|'."""
        data = IndexedDataset(self.directory / f"out_{key}_document")
        return [b"".join(b"|" if i == EOD else bytes([i]) for i in data.document(d)) for d in range(len(data))]

    def hashes(self, key: str = "text") -> list[str]:
        """SHA-256 of .bin and .idx."""
        paths = [self.directory / f"out_{key}_document{suffix}" for suffix in (".bin", ".idx")]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def left(self) -> list[str]:
        """Names of everything that lies at or beside the output."""
        return sorted(path.name for path in self.directory.glob("out*"))


@pytest.fixture
def run(tmp_path: Path, tokenizer_flags: list[str], capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, tokenizer_flags, capsys)


def test_golden_bytes(run: Runner, write_jsonl: WriteJsonl) -> None:
    """The format as INTERFACE states it, byte by byte."""
    printed = run("--input", write_jsonl("a.jsonl", ["Hi", "", "é"]), "--append-eod")
    tokens = struct.pack("<6H", 0x48, 0x69, 256, 0xC3, 0xA9, 256)
    assert (run.directory / "out_text_document.bin").read_bytes() == tokens
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 3, 0, 6, 0, 1, 2)
    assert (run.directory / "out_text_document.idx").read_bytes() == index
    assert "2 documents, 6 tokens (uint16), 1 empty documents dropped" in printed
    assert run.left() == ["out_text_document.bin", "out_text_document.idx"]


def test_without_append_eod(run: Runner, write_jsonl: WriteJsonl) -> None:
    printed = run("--input", write_jsonl("a.jsonl", ["one", "two"]))
    assert run.documents() == [b"one", b"two"]
    assert "note: without --append-eod nothing separates the documents" in printed


def test_the_same_for_every_worker_count(run: Runner, write_jsonl: WriteJsonl, many_texts: list[str]) -> None:
    """Bytes on disk do not depend on --workers or --chunk-size; they are what one loop over the texts gives."""
    path = write_jsonl("a.jsonl", many_texts)
    expected = [text.encode() + b"|" for text in many_texts if text]
    found = set()
    for workers, chunk in ((1, 1000), (2, 7), (4, 64)):
        run("--input", path, "--append-eod", "--chunk-size", str(chunk), workers=workers)
        found.add(tuple(run.hashes()))
    assert len(found) == 1
    data = IndexedDataset(run.directory / "out_text_document")
    assert data.tokens.tolist() == [EOD if i == "|" else i for text in expected for i in (*text[:-1], "|")]
    assert data.sizes.tolist() == [len(text) for text in expected]


def compressed(data: bytes) -> dict[str, bytes]:
    """``data`` in each compression, each as two streams that follow one another."""
    half = len(data) // 2
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
    }  # fmt: skip
    return {suffix: f(data[:half]) + f(data[half:]) for suffix, f in pack.items()}


def test_compressed_inputs(run: Runner, write_jsonl: WriteJsonl, many_texts: list[str], tmp_path: Path) -> None:
    plain = write_jsonl("a.jsonl", many_texts)
    run("--input", plain, "--append-eod")
    expected = run.hashes()
    for suffix, data in compressed(plain.read_bytes()).items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(data)
        run("--input", path, "--append-eod")
        assert run.hashes() == expected, suffix


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_standard_input(run: Runner, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    data = write_jsonl("a.jsonl", ["one", "two"]).read_bytes()
    piped = compressed(data)[suffix] if suffix else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    run("--input", "-", "--append-eod")
    assert run.documents() == [b"one|", b"two|"]


def test_several_inputs_and_globs(run: Runner, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    """In the order given; a glob's matches sorted; a name with brackets that exists is a name."""
    for name in ("b2.jsonl", "b1.jsonl", "z.jsonl", "a[1].jsonl"):
        write_jsonl(name, [name])
    run("--input", tmp_path / "z.jsonl", tmp_path / "b*.jsonl", tmp_path / "a[1].jsonl")
    assert run.documents() == [b"z.jsonl", b"b1.jsonl", b"b2.jsonl", b"a[1].jsonl"]


def test_a_file_without_a_last_line_end_a_byte_order_mark_and_windows_lines(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    run("--input", path)
    assert run.documents() == [b"one", b"two"]


def test_a_line_longer_than_any_block(run: Runner, write_jsonl: WriteJsonl) -> None:
    run("--input", write_jsonl("a.jsonl", ["x", "y" * 300_000, "z"]))
    assert [len(document) for document in run.documents()] == [1, 300_000, 1]


def test_several_keys(run: Runner, write_jsonl: WriteJsonl) -> None:
    """A pair of files a key; an empty text is dropped under its own key only."""
    records = [{"title": "A", "text": "a"}, {"title": "", "text": "b"}, {"title": "C", "text": "c", "more": 1}]
    run("--input", write_jsonl("a.jsonl", records), "--json-keys", "text", "title", "--append-eod")
    assert run.documents("text") == [b"a|", b"b|", b"c|"]
    assert run.documents("title") == [b"A|", b"C|"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (["--max-documents", "2"], [b"a|", b"bb|"]),
        (["--max-documents", "9"], [b"a|", b"bb|", b"ccc|", b"d|"]),
        (["--max-tokens", "5"], [b"a|", b"bb|"]),  # exactly 5
        (["--max-tokens", "8"], [b"a|", b"bb|"]),  # the third would make 9; the fourth is not let past it
        (["--max-tokens", "9"], [b"a|", b"bb|", b"ccc|"]),
        (["--max-tokens", "9", "--max-documents", "1"], [b"a|"]),
    ],
)
def test_limits(run: Runner, write_jsonl: WriteJsonl, limits: list[str], expected: list[bytes]) -> None:
    path = write_jsonl("a.jsonl", ["a", "", "bb", "ccc", "d"])
    run("--input", path, "--append-eod", "--chunk-size", "2", *limits)
    assert run.documents() == expected


def test_a_bad_line_behind_the_limit_is_never_met(run: Runner, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl("a.jsonl", ["a", "b", b"{", "c"])
    for workers in (1, 3):
        run("--input", path, "--max-documents", "2", "--chunk-size", "1", workers=workers)
        assert run.documents() == [b"a", b"b"]


BAD_LINES = [
    (b'{"text": "a"', "line 3: not JSON (Expecting ',' delimiter at character 13)"),
    (b"plain text", "line 3: not JSON (Expecting value at character 1)"),
    (b'{"text": "\xff"}', "line 3: not UTF-8 (invalid start byte at byte 11)"),
    (b'["text"]', "line 3: a JSON list, not an object with the key 'text'"),
    (b'{"body": "a", "id": 1}', "line 3: no key 'text' (it has: body, id); see --json-keys"),
    (b'{"text": null}', "line 3: the value of 'text' is not text but null"),
    (b'{"text": ["a", "b"]}', "line 3: the value of 'text' is not text but [\"a\", \"b\"]"),
    (b'{"text": "a\\ud83d"}', "line 3: 'text' has half a surrogate pair at character 2"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 3: not usable JSON (Exceeds the limit"),
    (b"[" * 100_000, "line 3: not usable JSON ("),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line(run: Runner, write_jsonl: WriteJsonl, line: bytes, message: str) -> None:
    path = write_jsonl("a.jsonl", ["one", "", line, "four"])
    printed = run("--input", path, "--append-eod", code=2)
    assert f"error: {path}, {message}" in printed and "--skip-bad-lines" in printed
    assert "Traceback" not in printed and run.left() == []
    printed = run("--input", path, "--append-eod", "--skip-bad-lines")
    assert run.documents() == [b"one|", b"four|"]
    assert f"left out: {path}, {message}" in printed and "1 bad lines left out" in printed


def test_the_first_bad_line_is_reported(run: Runner, write_jsonl: WriteJsonl) -> None:
    """Whichever worker finds one first; lines are counted through blank ones and within each file."""
    good = write_jsonl("a.jsonl", ["x"] * 10)
    bad = write_jsonl("b.jsonl", ["x"] * 50 + [b""] + [b"{bad"] + ["x" * 10] * 20 + [b"{worse"])
    for workers in (1, 4):
        printed = run("--input", good, bad, "--chunk-size", "3", code=2, workers=workers)
        assert f"error: {bad}, line 52: not JSON" in printed


def test_many_bad_lines_are_counted_not_all_shown(run: Runner, write_jsonl: WriteJsonl) -> None:
    printed = run("--input", write_jsonl("a.jsonl", ["x", *[b"{"] * 30]), "--skip-bad-lines")
    assert printed.count("left out: ") == 10 and "30 bad lines left out" in printed


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_and_truncated_compression(run: Runner, many_texts: list[str], tmp_path: Path, suffix: str) -> None:
    """zstd's own stream reader ends silently where a file is cut off; ours must not."""
    data = compressed(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in many_texts))[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: len(data) - 20])
    assert f"error: {path}: its " in run("--input", path, code=2)
    middle = len(data) // 3
    path.write_bytes(data[:middle] + b"\x00\xff" * 40 + data[middle + 80 :])
    printed = run("--input", path, code=2)
    assert f"error: {path}" in printed and "Traceback" not in printed
    assert run.left() == []


def test_input_that_is_not_there(run: Runner, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", ["one"])
    assert f"error: --input {tmp_path}/no.jsonl: no such file" in run("--input", tmp_path / "no.jsonl", code=2)
    assert "matches no file" in run("--input", tmp_path / "no*.jsonl", code=2)
    assert "is a directory; give files or a glob" in run("--input", tmp_path, code=2)
    assert "named twice" in run("--input", path, tmp_path / "*.jsonl", code=2)
    assert run.left() == []


def test_input_without_documents(run: Runner, write_jsonl: WriteJsonl) -> None:
    for name, records in (("empty.jsonl", []), ("blank.jsonl", ["", ""])):
        assert "no documents, so" in run("--input", write_jsonl(name, records), code=2)
    path = write_jsonl("a.jsonl", ["long text"])
    printed = run("--input", path, "--max-tokens", "3", code=2)
    assert "--max-tokens 3 is less than the first document (9 tokens)" in printed
    assert run.left() == []


def test_flags(run: Runner, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_jsonl("a.jsonl", ["one"]))
    run("--input", path, "--dataset-impl", "mmap", "--log-interval", "1")
    assert "names a key twice" in run("--input", path, "--json-keys", "text", "text", code=2)
    for wrong in (["--workers", "0"], ["--dataset-impl", "lazy"], ["--max-documents", "-1"], ["--unknown"]):
        with pytest.raises(SystemExit) as ended:
            main(["--input", path, "--output-prefix", "x", *run.flags, *wrong])
        assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_wrong_tokenizer_flags(tmp_path: Path, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--input", str(write_jsonl("a.jsonl", ["one"])), "--output-prefix", str(tmp_path / "out")]
    assert main([*common, "--vocab-file", str(tmp_path / "v.json")]) == 2
    assert "--merge-file" in capsys.readouterr().err
    assert main([*common, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tmp_path / "t.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made(tmp_path: Path, write_jsonl: WriteJsonl, tokenizer_flags: list[str]) -> None:
    path = write_jsonl("a.jsonl", ["one"])
    nested = tmp_path / "new" / "directories" / "out"
    assert main(["--input", str(path), "--output-prefix", str(nested), *tokenizer_flags]) == 0
    assert nested.with_name("out_text_document.bin").stat().st_size == 6
    assert main(["--input", str(path), "--output-prefix", str(path / "out"), *tokenizer_flags]) == 1


def script(*arguments: str | Path, repository: Path) -> list[str]:
    """The command as a user types it."""
    return [sys.executable, str(repository / "tools" / "preprocess_data.py"), *map(str, arguments)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_midway(tmp_path: Path, tokenizer_flags: list[str], repository: Path, number: int) -> None:
    """No file at the final names, and no process left; the next run is not disturbed by what a SIGKILL leaves."""
    command = script("--input", "-", "--output-prefix", tmp_path / "out", "--append-eod", "--workers", "2",
                     "--chunk-size", "1", *tokenizer_flags, repository=repository)  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        # The input is an open pipe: the run cannot end by itself.
        process.stdin.write(b'{"text": "some words"}\n' * 20_000)
        process.stdin.flush()
        started = psutil.Process(process.pid)
        wait_until(lambda: len(started.children()) >= 2 and list(tmp_path.glob("out*.partial-*")), 60)
        children = started.children()
        process.send_signal(number)
        code = process.wait(60)
    assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(number)]
    assert not list(tmp_path.glob("out*.bin")) and not list(tmp_path.glob("out*.idx"))
    if number != signal.SIGKILL:
        assert not list(tmp_path.iterdir())
    wait_until(lambda: not any(child.is_running() for child in children), 60)
    done = subprocess.run(command, input=b'{"text": "ab"}\n', capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.fromfile(tmp_path / "out_text_document.bin", "<u2").tolist() == [97, 98, 256]


def test_a_worker_that_is_killed_is_noticed(tmp_path: Path, tokenizer_flags: list[str], repository: Path) -> None:
    command = script("--input", "-", "--output-prefix", tmp_path / "out", "--workers", "2", "--chunk-size", "1",
                     *tokenizer_flags, repository=repository)  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write('{"text": "some words"}\n' * 5_000)
        process.stdin.flush()

        def workers() -> list[psutil.Process]:
            return [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]

        wait_until(lambda: len(workers()) == 2, 60)
        workers()[0].kill()
        process.stdin.write('{"text": "some words"}\n' * 5_000)
        process.stdin.close()
        process.stdin = None
        message = process.stderr.read()
        assert process.wait(60) == 1
    assert "error: a worker process was killed (out of memory?)" in message
    assert not list(tmp_path.iterdir())


def test_disk_full(tmp_path: Path, write_jsonl: WriteJsonl, tokenizer_flags: list[str], repository: Path) -> None:
    """A limit on file sizes stands in for a full disk: the same write fails, with another reason."""
    path = write_jsonl("a.jsonl", ["x" * 1000] * 2000)
    command = script("--input", path, "--output-prefix", tmp_path / "out", "--workers", "1", *tokenizer_flags,
                     repository=repository)  # fmt: skip
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"error: cannot write {tmp_path}/out_text_document.bin: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
