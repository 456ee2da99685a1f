"""The command line of generation, and what a terminal shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.inference.infilling import encode_with_holes
from megatron.inference.loading import save_weights
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.sharding import SequentialGPT
from megatron.tokenizer import Tokenizer, build_tokenizer, build_vocabulary
from tools.generate import main
from tools.live_text import MASK, LiveText, wrap


@pytest.fixture(scope="module")
def config(byte_tokenizer: Path) -> TokenizerConfig:
    return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(byte_tokenizer))


@pytest.fixture(scope="module")
def tokenizer(config: TokenizerConfig) -> Tokenizer:
    return build_tokenizer(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, config: TokenizerConfig) -> Callable[[str], str]:
    """``checkpoint(objective)``: a random model over bytes."""
    made: dict[str, str] = {}

    def make(objective: str) -> str:
        if objective not in made:
            model = ModelConfig(
                num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=64, ffn_hidden_size=24,
                normalization="rmsnorm", use_rotary_position_embeddings=True, swiglu=True, disable_bias_linear=True,
                init_method_std=0.3,
            )
            layers = build_layers(model, 264, 257, causal=True)
            initialize_weights(layers, model, seed=1)
            path = tmp_path_factory.mktemp(objective) / "run"
            save_weights(
                path, dict(SequentialGPT(layers, model).named_parameters()), model=model, objective=objective,
                vocabulary=build_vocabulary(257, 8), seq_length=64, tokenizer=config, source="test",
            )
            made[objective] = str(path)
        return made[objective]

    return make


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_same_flags_same_text(
    checkpoint: Callable[[str], str], capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    flags = ["--load", checkpoint(objective), "--prompt", "abc", "--max-new-tokens", "12"]
    texts = []
    for extra in ([], [], ["--seed", "5"], ["--temperature", "0"]):
        assert main([*flags, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(set(texts)) == 3 and all(text.startswith("abc") for text in texts)


def test_several_prompts_and_samples(
    checkpoint: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    flags = ["--load", checkpoint("ar"), "--max-new-tokens", "4", "--num-samples", "2", "--prompt-file", str(file)]
    assert main([*flags, "--top-k", "9", "--top-p", "0.9"]) == 0
    texts = capsys.readouterr().out.split("\n---\n")
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]


def test_infilling_keeps_what_is_given(checkpoint: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--order", "left-to-right", "--tokens-per-step", "2", "--block-length", "4", "--guidance", "0.5"]
    assert main(["--load", checkpoint("mdm"), "--prompt", "ab<|mask:3|>cd<|mask|>.", "--temperature", "0", *flags]) == 0
    text = capsys.readouterr().out
    assert re.match(r"ab.*cd.*\.", text, re.DOTALL) and "<|mask" not in text


def test_a_block_longer_than_any_text_is_one_block(
    checkpoint: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for flags in ([], ["--block-length", "64"], ["--block-length", "9" * 20]):
        assert main(["--load", checkpoint("mdm"), "--prompt", "ab", "--max-new-tokens", "8", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_holes(tokenizer: Tokenizer) -> None:
    assert encode_with_holes("a<|mask:2|>b<|mask|>", tokenizer, 999) == [97, 999, 999, 98, 999]
    # A space before a hole belongs to it; one behind it is text.
    assert encode_with_holes("a <|mask|> b\n<|mask|>", tokenizer, 999) == [97, 999, 32, 98, 10, 999]
    assert encode_with_holes("a  <|mask|>", tokenizer, 999) == [97, 32, 999]
    with pytest.raises(UserError, match="hole of no token"):
        encode_with_holes("<|mask:0|>", tokenizer, 999)


@pytest.mark.parametrize(
    ("objective", "flags", "message"),
    [
        ("ar", ["--prompt", "a", "--order", "random"], "--order is for masked-diffusion models"),
        ("ar", ["--prompt", "a<|mask|>"], "holes"),
        ("mdm", ["--prompt", "a", "--top-p", "0.5"], "--top-p is for autoregressive models"),
        ("mdm", ["--prompt", "a", "--tokens-per-step", "0"], "tokens_per_step"),
        ("mdm", ["--prompt", "a<|mask:64|>"], "do not fit into the 64"),
        ("mdm", ["--prompt", "a" * 64], "leaves no room"),
        ("ar", ["--prompt", "a" * 64], "leaves no room"),
        ("ar", ["--prompt", "a", "--temperature", "-1"], "--temperature"),
        ("ar", ["--prompt", "a", "--temperature", "nan"], "--temperature nan is not a finite number"),
        ("ar", ["--prompt", "a", "--temperature", "inf"], "--temperature inf is not a finite number"),
        ("ar", ["--prompt", "a", "--top-p", "nan"], "--top-p nan"),
        ("mdm", ["--prompt", "a", "--temperature", "nan"], "temperature nan is not a finite number"),
        ("mdm", ["--prompt", "a", "--guidance", "nan"], "guidance nan is not a finite number"),
        ("mdm", ["--prompt", "a", "--guidance", "inf"], "guidance inf is not a finite number"),
        ("mdm", ["--prompt", "a", "--guidance", "-1"], "guidance -1.0 is not a finite number"),
        ("ar", ["--prompt", "a", "--num-samples", "0"], "--num-samples"),
        ("ar", ["--prompt-file", "none.txt"], "none.txt"),
        ("ar", ["--prompt", "a", "--prompt-file", "none.txt"], "--prompt-file is not read where --prompt is given"),
        ("ar", ["--prompt", "a", "--seed", "9" * 23], f"--seed {'9' * 23} is out of range"),
        ("mdm", ["--prompt", "a", "--seed", str(-(2**63) - 1)], "--seed -9223372036854775809 is out of range"),
        ("mdm", ["--prompt", "a<|mask:99999999999999999|>"], "<|mask:99999999999999999|>: the tokens up to its end do"),
        ("mdm", ["--prompt", f"a<|mask:{'9' * 5000}|>"], "9|>: the tokens up to its end do not fit into the 64"),
        ("mdm", ["--prompt", "a<|mask:40|>b<|mask:40|>"], "<|mask:40|>: the tokens up to its end do not fit"),
        ("ar", ["--prompt", "a\udcff"], r"--prompt: 'a\udcff' is not UTF-8"),
        ("mdm", ["--prompt", "a\udcff"], r"--prompt: 'a\udcff' is not UTF-8"),
    ],
)
def test_wrong_input_ends_with_one_line(
    checkpoint: Callable[[str], str], capsys: pytest.CaptureFixture[str], objective: str, flags: list[str], message: str
) -> None:
    assert main(["--load", checkpoint(objective), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("source", ["file", "strict input", "lenient input"])
def test_prompts_that_are_not_utf8(
    checkpoint: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, source: str,
) -> None:
    data = b"one\n\ntwo \xe9\nthree \xe9\n"
    (file := tmp_path / "prompts.txt").write_bytes(data)
    errors = "strict" if source == "strict input" else "surrogateescape"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))
    assert main(["--load", checkpoint("ar"), *(["--prompt-file", str(file)] if source == "file" else [])]) == 2
    assert capsys.readouterr().err == {
        "file": f"error: --prompt-file {file}: line 3 is not UTF-8\n",
        "strict input": "error: standard input is not UTF-8\n",
        "lenient input": "error: standard input: 'two \\udce9' is not UTF-8\n",
    }[source]


# ---- on a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(stream: str) -> str:
    """What a terminal shows after ``stream``: cursor moves and erasing carried out, styles dropped."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", re.sub(r"\x1b\[[\d;]*m", "", stream)):
        move = re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", part)
        if move:
            lines = [*lines[: len(lines) - 1 - int(move[1])], ""]
        elif part == "\n":
            lines.append("")
        else:
            lines[-1] += part
    return "\n".join(lines)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_terminal_shows_the_text_grow_and_ends_with_it(
    checkpoint: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    objective: str,
) -> None:
    flags = ["--load", checkpoint(objective), "--prompt", "abc", "--max-new-tokens", "8", "--temperature", "0"]
    assert main(flags) == 0
    plain = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(flags) == 0
    shown = terminal.getvalue()
    assert screen(shown).replace("\n", "") == plain.replace("\n", "").replace("\r", "")
    assert (MASK in shown) is (objective == "mdm")
    if objective == "mdm":
        assert shown.count("\x1b[J") == 9  # eight steps and the end
        terminal.truncate(0)
        assert main([*flags, "--no-live"]) == 0
        assert "\x1b" not in terminal.getvalue()


def test_masks_new_tokens_and_given_ones_look_different(tokenizer: Tokenizer) -> None:
    out = io.StringIO()
    live = LiveText(tokenizer, 999, out, width=10)
    live.start([97, 999, 999, 98])
    assert screen(out.getvalue()) == f"a{MASK}{MASK}b\n"
    live.show([97, 999, 99, 98])
    assert screen(out.getvalue()) == f"a{MASK}cb\n" and "\x1b[1;32mc" in out.getvalue()
    live.finish([97, 100, 99, 98])
    assert screen(out.getvalue()) == "adcb\n" and "\x1b[1;32md" not in out.getvalue()
    accented = list("é".encode())
    live = LiveText(tokenizer, 999, out := io.StringIO(), width=10)
    live.start([999, 999])
    live.show(accented)
    assert screen(out.getvalue()) == "é\n"


def test_wrapping_counts_characters_and_not_styles() -> None:
    lines = wrap([("\x1b[2m", "abcde"), ("\x1b[0m", "fg\nh")], 4)
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines] == ["abcd", "efg", "h"]
    assert wrap([], 4) == [""]
