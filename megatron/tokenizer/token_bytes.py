"""Bytes of text per token, read from the strings of a `tokenizers` tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character


def component_types(part: Any) -> set[str]:
    """Names of the steps of a decoder or pre-tokenizer, those inside a ``Sequence`` included."""
    if part is None:
        return set()
    state = json.loads(part.__getstate__())
    steps = state.get("decoders") or state.get("pretokenizers") or [state]
    return {step["type"] for step in steps}


def _byte_level(token: str) -> int:
    """One character of a byte-level token is one byte."""
    return len(token)


def _word_piece(token: str) -> int:
    """A piece that begins a word also stands for the space before it."""
    return len(token.removeprefix("##").encode()) + (0 if token.startswith("##") else 1)


def _sentence_piece(token: str) -> int:
    """Letters as they are, the space mark as one byte, a byte-fallback token as one byte."""
    return 1 if BYTE_FALLBACK.fullmatch(token) else len(token.replace(SPACE_MARK, " ").encode())


def _measure(tokenizer: tokenizers.Tokenizer) -> Callable[[str], int]:
    decoders = component_types(tokenizer.decoder)
    if "ByteLevel" in decoders | component_types(tokenizer.pre_tokenizer):
        return _byte_level
    if suffix := getattr(tokenizer.model, "end_of_word_suffix", None):
        # A piece that ends a word also stands for the space behind it.
        return lambda token: len(token.removesuffix(suffix).encode()) + token.endswith(suffix)
    return _word_piece if "WordPiece" in decoders else _sentence_piece


def count_token_bytes(tokenizer: tokenizers.Tokenizer, eod: int, vocab_size: int) -> np.ndarray:
    """Bytes each token stands for.

    Returns:
        int64 [vocab_size], exact for byte-level tokenizers, else the approximation that ``Tokenizer`` documents.
    """
    measure = _measure(tokenizer)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    unknown = getattr(tokenizer.model, "unk_token", None)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        extra = added.get(index)
        if index == eod or token == unknown or (extra is not None and extra.special):
            continue
        # An added token stands for its literal characters, which may lie outside the byte alphabet.
        literal = extra is not None and not set(token) <= alphabet
        counts[index] = len(token.encode()) if literal else measure(token)
    return counts
