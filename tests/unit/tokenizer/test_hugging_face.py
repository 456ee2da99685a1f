"""HFTokenizer: what it loads, which token ends a document, and what it says when it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.tokenizer import Tokenizer, build_tokenizer, load_hf_tokenizer

Train = Callable[[int, list[str]], tokenizers.Tokenizer]
SPECIALS = ["<|endoftext|>", "</s>", "<s>"]


@pytest.fixture
def directory(byte_level: Train, tmp_path: Path) -> Path:
    """A directory with a byte-level tokenizer.json of 300 tokens, the special ones first."""
    byte_level(300, SPECIALS).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def declare(path: Path, end: Any) -> None:
    path.write_text(json.dumps({"eos_token": end}), encoding="utf-8")


def test_file_and_directory_are_the_same(directory: Path) -> None:
    config = TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(directory / "tokenizer.json"))
    by_file, by_directory = build_tokenizer(config), load_hf_tokenizer(str(directory))
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "the quick <brown> fox 🙂"
    assert by_file.encode(text) == by_directory.encode(text) == library.encode(text).ids
    assert by_file.encode_batch([text, "", "x"]) == [library.encode(t).ids for t in (text, "", "x")]
    assert by_file.decode(by_file.encode(text)) == text
    assert (by_file.vocab_size, by_file.eod) == (300, 0)


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [
        ("</s>", None, 1),
        ({"content": "</s>", "lstrip": False}, None, 1),
        (None, "</s>", 1),
        ("<s>", "</s>", 2),  # the configuration is asked first
        ("<absent>", "</s>", 1),  # a declared token that the vocabulary lacks is passed over
        (None, None, 0),  # <|endoftext|> by name
    ],
)
def test_end_of_document(directory: Path, config: Any, special_map: Any, expected: int) -> None:
    declare(directory / "tokenizer_config.json", config)
    declare(directory / "special_tokens_map.json", special_map)
    assert load_hf_tokenizer(str(directory)).eod == expected


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_end_of_document_by_name(byte_level: Train, tmp_path: Path, name: str) -> None:
    byte_level(280, ["<pad>", name]).save(str(tmp_path / "tokenizer.json"))
    assert load_hf_tokenizer(str(tmp_path)).eod == 1


def test_no_end_of_document(byte_level: Train, tmp_path: Path) -> None:
    byte_level(280, ["<pad>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end-of-document token.*</s>.*eos_token in a tokenizer_config.json"):
        load_hf_tokenizer(str(tmp_path))


def test_ids_depend_on_the_text_alone(directory: Path) -> None:
    """Truncation, padding, BOS and BPE dropout of the file are off; special tokens in a text are characters."""
    path = str(directory / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(path)
    plain = load_hf_tokenizer(path)
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    library.model.dropout = 0.5
    library.save(path)
    changed = load_hf_tokenizer(path)
    text = "the quick brown fox </s> jumps <|endoftext|> over the lazy dog " * 5
    assert changed.encode(text) == plain.encode(text) == changed.encode_batch([text])[0]
    assert not set(plain.encode(text)) & {0, 1, 2}
    assert plain.decode(plain.encode(text)) == text


def test_bytes_of_a_byte_level_tokenizer_with_added_tokens(directory: Path) -> None:
    """Added tokens that are text (GPT-NeoX's runs of spaces) count their characters, special ones nothing."""
    path = str(directory / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(path)
    library.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    library.add_special_tokens(["<|pad|>"])
    library.save(path)
    tokenizer = load_hf_tokenizer(path)
    counts, text = tokenizer.token_bytes(), "a    b é🙂"
    assert (tokenizer.vocab_size, counts[300], counts[301]) == (302, 4, 0)
    assert 300 in tokenizer.encode(text)
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())


def test_bytes_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Approximate, as documented: exact but for the space that is put before a text."""
    words = ["<unk>", "</s>", "<0xC3>", "<0xA9>", "\u2581", "\u2581caf", "\u2581new", "e", "s"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_hf_tokenizer(str(tmp_path)).token_bytes().tolist() == [0, 0, 1, 1, 1, 4, 4, 1, 1]


def test_bytes_of_a_wordpiece_tokenizer(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "new": 1, "##est": 2, "<eos>": 3}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_hf_tokenizer(str(tmp_path)).token_bytes().tolist() == [0, 4, 3, 0]


def test_bytes_of_pieces_that_mark_the_end_of_a_word(tmp_path: Path) -> None:
    """As GPT-1's and CLIP's: "</w>" is no text, but the space that follows."""
    words = ["new", "caf\u00e9</w>", "est</w>", "<eos>"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], end_of_word_suffix="</w>")
    library = tokenizers.Tokenizer(model)
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    library.add_special_tokens(["<eos>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_hf_tokenizer(str(tmp_path)).token_bytes().tolist() == [3, 6, 4, 0]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, told not to look anything up."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return transformers


def test_python_tokenizer_through_transformers(offline: Any, tmp_path: Path) -> None:
    """ByT5 has no tokenizer.json and no `tokenizers` backend: id = byte + 3, end of document </s> = 1."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}', encoding="utf-8")
    tokenizer: Tokenizer = load_hf_tokenizer(str(tmp_path))
    text = "hé</s>"
    assert tokenizer.encode(text) == [byte + 3 for byte in text.encode()]
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]
    assert (tokenizer.eod, tokenizer.vocab_size) == (1, 384)
    assert tokenizer.decode([*tokenizer.encode("hé"), tokenizer.vocab_size]) == "hé"
    counts = tokenizer.token_bytes()
    assert counts[tokenizer.encode("plain text")].sum() == 10 and counts[1] == 0


def test_fast_tokenizer_through_transformers(offline: Any, tiny_gpt2: tuple[Path, Path], tmp_path: Path) -> None:
    """A directory with GPT-2's two files and no tokenizer.json."""
    (tmp_path / "vocab.json").write_bytes(tiny_gpt2[0].read_bytes())
    (tmp_path / "merges.txt").write_bytes(tiny_gpt2[1].read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    tokenizer = load_hf_tokenizer(str(tmp_path))
    text = "the quick <|endoftext|> fox"
    config = TokenizerConfig(vocab_file=str(tiny_gpt2[0]), merge_file=str(tiny_gpt2[1]))
    assert tokenizer.encode(text) == build_tokenizer(config).encode(text)
    assert (tokenizer.eod, tokenizer.vocab_size) == (350, 351)


def test_nothing_loadable(offline: Any, tmp_path: Path) -> None:
    for name in (str(tmp_path), "no-such-organisation/no-such-tokenizer"):
        with pytest.raises(UserError, match=r"--tokenizer-model .*nor loadable by transformers: .+") as caught:
            load_hf_tokenizer(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/tokenizer.json", "absent.json", "~/absent-tokenizer"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        load_hf_tokenizer(name)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"--tokenizer-model .*tokenizer.json: not a tokenizer.json \("):
        load_hf_tokenizer(str(path))


def test_a_configuration_that_is_no_json(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("eos_token = </s>", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        load_hf_tokenizer(str(directory))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="transformers, which may load it, is not installed: pip install transformers"):
        load_hf_tokenizer(str(tmp_path))
