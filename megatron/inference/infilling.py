"""Texts with holes: ``<|mask:5|>`` stands for five masked tokens."""

from __future__ import annotations

import re
from typing import Final

from megatron.errors import UserError
from megatron.tokenizer import Tokenizer

HOLE: Final = re.compile(r"<\|mask(?::(\d+))?\|>")


def encode_with_holes(text: str, tokenizer: Tokenizer, mask_id: int) -> list[int]:
    """Ids of ``text``, every hole replaced by its number of mask ids (``<|mask|>`` is one).

    A space before a hole is left to the hole: tokens of running text begin with theirs, and a lone one before a word is
    what a model has never seen.

    Raises:
        UserError: a hole of no token.
    """
    ids: list[int] = []
    start = 0
    for hole in HOLE.finditer(text):
        count = 1 if hole[1] is None else int(hole[1])
        if count < 1:
            raise UserError(f"{hole[0]} is a hole of no token: give a number of 1 or more")
        ids += tokenizer.encode(text[start : hole.start()].removesuffix(" ")) + [mask_id] * count
        start = hole.end()
    return ids + tokenizer.encode(text[start:])
