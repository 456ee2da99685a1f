"""GPT-2's byte-level BPE from its two files (Radford et al. 2019), as Megatron's ``GPT2BPETokenizer``."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.config import FETCH_GPT2
from megatron.errors import UserError
from megatron.tokenizer.fast import FastTokenizer

END_OF_TEXT = "<|endoftext|>"


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token to id, from a GPT-2 ``vocab.json``.

    Raises:
        UserError: the file is missing, is not a JSON object of ids, or has no ``<|endoftext|>``.
    """
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--vocab-file {path}: {error.strerror}; {FETCH_GPT2}") from error
    except ValueError as error:
        raise UserError(f"--vocab-file {path}: not a JSON file ({error}); {FETCH_GPT2}") from error
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise UserError(f"--vocab-file {path}: must be a JSON object that maps tokens to ids, as GPT-2's vocab.json")
    if END_OF_TEXT not in vocabulary:
        raise UserError(f"--vocab-file {path}: has no {END_OF_TEXT}, the token that ends a document")
    return vocabulary


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Merges in order of priority, from a GPT-2 ``merges.txt``.

    Raises:
        UserError: the file is missing or a line is not two pieces separated by a space.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(), whose other separators merges may hold
    except OSError as error:
        raise UserError(f"--merge-file {path}: {error.strerror}; {FETCH_GPT2}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--merge-file {path}: not UTF-8 text ({error}); {FETCH_GPT2}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.split(" ")
        if len(pieces) != 2:
            raise UserError(f"--merge-file {path}, line {number}: expected two pieces with one space; {FETCH_GPT2}")
        merges.append((pieces[0], pieces[1]))
    return merges


class GPT2BPETokenizer(FastTokenizer):
    """Byte-level BPE whose ids equal GPT-2's; documents end with ``<|endoftext|>``."""

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        vocabulary = read_vocabulary(Path(vocab_file))
        merges = read_merges(Path(merge_file))
        try:
            library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"--merge-file {merge_file} does not fit --vocab-file {vocab_file}: {error}") from error
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        # <|endoftext|> is not registered as a special token: in a text it is thirteen ordinary characters.
        super().__init__(library, vocabulary[END_OF_TEXT])
