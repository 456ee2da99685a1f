"""Texts with holes: ``<|mask:5|>`` stands for five masked tokens."""

from __future__ import annotations

import re
import sys
from typing import Final

from megatron.errors import UserError
from megatron.tokenizer import Tokenizer

HOLE: Final = re.compile(r"<\|mask(?::(\d+))?\|>")


def encode_with_holes(text: str, tokenizer: Tokenizer, mask_id: int, longest: int | None = None) -> list[int]:
    """Ids of ``text``, every hole replaced by its number of mask ids (``<|mask|>`` is one).

    A space before a hole is left to the hole: tokens of running text begin with theirs, and a lone one before a word is
    what a model has never seen.

    Raises:
        UserError: a hole of no token, or one that reaches beyond ``longest`` tokens.
    """
    ids: list[int] = []
    start = 0
    for hole in HOLE.finditer(text):
        digits = hole[1] or "1"
        count = int(digits) if len(digits) < 19 else sys.maxsize
        if count < 1:
            raise UserError(f"{hole[0]} is a hole of no token: give a number of 1 or more")
        ids += tokenizer.encode(text[start : hole.start()].removesuffix(" "))
        if longest is not None and len(ids) + count > longest:
            raise UserError(f"{hole[0]}: the tokens up to its end do not fit into the {longest} of the model")
        ids += [mask_id] * count
        start = hole.end()
    return ids + tokenizer.encode(text[start:])
