"""Text from trained models: autoregressive sampling with a KV cache, and filling of masked positions.

Both take and return lists of token ids; the same call with the same seed on the same device gives the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.inference.forward import final_hidden, head_logits, kernels_for_any_shape, padding_mask
from megatron.inference.hub.unmasking import OnStep, Unmasking, draw, unmask
from megatron.inference.kv_cache import CachedModel
from megatron.inference.loading import LoadedModel

Tokens = Sequence[int]
Finished = Callable[[list[int]], bool]
"""Whether a row's new tokens so far (masked ones left out) end it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token of an AR model is drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: only the k most probable tokens; None: all.
        top_p: only the most probable tokens that together reach this probability (nucleus; Holtzman et al., arXiv
            1904.09751, section 3.1), after temperature and top_k; 1: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature} is not a finite number of 0 or more; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k {self.top_k} leaves no token: give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is out of range: it must be above 0 and at most 1")


def unmasking_settings(**settings: Any) -> Unmasking:
    """:class:`Unmasking`, whose file travels with models and knows no UserError, for what a user typed."""
    try:
        return Unmasking(**settings)
    except ValueError as error:
        raise UserError(f"unmasking: {error}") from error


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [n, V] with -inf at every token that ``top_k`` and ``top_p`` exclude; the most probable always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1 and sampling.temperature > 0:
        ordered, index = logits.sort(dim=-1, descending=True)
        share = (ordered.double() / sampling.temperature).softmax(dim=-1)
        beyond = share.cumsum(dim=-1) - share >= sampling.top_p  # the mass before it already suffices
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, index, beyond), -torch.inf)
    return logits


@torch.no_grad()
def generate_autoregressive(
    loaded: LoadedModel,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    finished: Finished | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_new_tokens`` tokens; returns the new tokens of each.

    A row ends after the end-of-document id (which is left out), when ``finished`` says so, or when the model's
    ``seq_length`` is full; an empty prompt starts a document. ``on_token(row, token)`` is called as tokens come.

    Raises:
        UserError: a prompt leaves no room for a token.
    """
    assert loaded.causal, "masked-diffusion models fill masks"
    eod = loaded.tokenizer.eod if loaded.tokenizer is not None else -1
    rows = [list(prompt) or [_start(loaded)] for prompt in prompts]
    width = max((len(row) for row in rows), default=0)
    room = loaded.seq_length - width
    if room < 1:
        raise UserError(f"a prompt of {width} tokens leaves no room in {loaded.seq_length}: shorten it")
    steps = min(max_new_tokens, room)
    device = loaded.device
    generator = torch.Generator(device).manual_seed(seed)
    # Prompts end in the same column, so that all rows write to the same one from there on.
    inputs = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    shift = torch.tensor([[width - len(row)] for row in rows], device=device)
    positions = torch.arange(width, device=device) - shift
    cache = CachedModel(loaded.model, len(rows), width + steps)
    hidden = cache.read(inputs, positions.clamp_min(0), positions >= 0)[:, -1]
    produced: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for step in range(steps):
        logits = filter_logits(head_logits(loaded.model, hidden).float(), sampling)
        drawn = draw(logits, sampling.temperature, generator)
        kept = []
        for place, (row, token) in enumerate(zip(alive, drawn.tolist(), strict=True)):
            if token == eod:
                continue
            produced[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if finished is None or not finished(produced[row]):
                kept.append(place)
        if not kept or step + 1 == steps:
            break
        if len(kept) < len(alive):
            keep = torch.tensor(kept, device=device)
            cache.keep(keep)
            drawn, shift, alive = drawn[keep], shift[keep], [alive[place] for place in kept]
        ones = torch.ones(len(alive), 1, dtype=torch.bool, device=device)
        hidden = cache.read(drawn.unsqueeze(1), width + step - shift, ones)[:, -1]
    return produced


@torch.no_grad()
def fill_masks(
    loaded: LoadedModel,
    rows: Sequence[Tokens],
    settings: Unmasking,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """Fill every mask id in ``rows`` and return whole rows; rows of any lengths together.

    Padding lies outside attention and is never a mask: no step is spent on it.

    Raises:
        UserError: a row is longer than the model's ``seq_length``.
    """
    assert not loaded.causal, "autoregressive models have no mask"
    mask_id = loaded.vocabulary.mask_id
    longest = max((len(row) for row in rows), default=0)
    if longest > loaded.seq_length:
        raise UserError(f"{longest} tokens do not fit into the {loaded.seq_length} of the model: shorten the text")
    if longest == 0:
        return [[] for _ in rows]
    device, padding = loaded.device, _start(loaded)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
    inside = torch.arange(longest, device=device) < lengths.unsqueeze(1)  # [b, s]
    masked = (tokens == mask_id) & inside
    positions = torch.arange(longest, device=device).expand(tokens.shape)
    attention = None if bool(inside.all()) else padding_mask(lengths, longest)

    def predict(current: Tensor, where: Tensor) -> Tensor:
        with kernels_for_any_shape():
            hidden = final_hidden(loaded.model, current, positions, attention)
        return head_logits(loaded.model, hidden.flatten(0, 1).index_select(0, where))

    generator = torch.Generator(device).manual_seed(seed)
    filled = unmask(predict, tokens, masked, mask_id, settings, generator, ~masked & inside, on_step)
    return [line[: len(row)] for line, row in zip(filled.tolist(), rows, strict=True)]


@torch.no_grad()
def generate_masked(
    loaded: LoadedModel,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    settings: Unmasking,
    seed: int = 0,
    finished: Finished | None = None,
) -> list[list[int]]:
    """Continue every prompt by ``max_new_tokens`` masked positions, filled; returns the new tokens of each row, cut
    before the first end-of-document id. A row that this id or ``finished`` ends is not filled any further.

    Raises:
        UserError: prompt and new tokens are longer than the model's ``seq_length``.
    """
    mask_id = loaded.vocabulary.mask_id
    eod = loaded.tokenizer.eod if loaded.tokenizer is not None else -1
    starts = [list(prompt) or [_start(loaded)] for prompt in prompts]

    def settled(row: Tokens, start: Tokens) -> list[int]:
        """The new tokens before the first masked position: nothing will change there."""
        return _until(row[len(start) : len(start) + max_new_tokens], mask_id)

    def on_step(tokens: Tensor, remaining: Tensor) -> Tensor:
        ended = []
        for row, start in zip(tokens.tolist(), starts, strict=True):
            new = settled(row, start)
            ended.append(eod in new or (finished is not None and finished(new)))
        return torch.tensor(ended, device=tokens.device)

    rows = [start + [mask_id] * max_new_tokens for start in starts]
    filled = fill_masks(loaded, rows, settings, seed, on_step)
    return [_until(settled(row, start), eod) for row, start in zip(filled, starts, strict=True)]


def _until(tokens: Tokens, end: int) -> list[int]:
    """Tokens before the first ``end``."""
    listed = list(tokens)
    return listed[: listed.index(end)] if end in listed else listed


def _start(loaded: LoadedModel) -> int:
    """What an empty prompt stands for: the end of the document before it. Also a harmless padding token."""
    return loaded.tokenizer.eod if loaded.tokenizer is not None else loaded.vocabulary.num_tokens - 1
