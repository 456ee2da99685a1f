"""Filling masked positions by a masked-diffusion model. Pure PyTorch: this file also travels with exported models.

A step asks the model for all masked positions at once and keeps the best-placed few; the others are asked again in
the next step, when they see what was kept. One token a step in random order draws from the model's any-order joint
distribution exactly (Hoogeboom et al., arXiv 2110.02037, section 2); several tokens a step are drawn independently of
each other, which is faster and less faithful. Confidence order is that of MaskGIT (Chang et al., arXiv 2202.04200,
section 3.2), semi-autoregressive blocks those of LLaDA (Nie et al., arXiv 2502.09992, appendix B.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("confidence", "random", "left-to-right")

Predict = Callable[[Tensor, Tensor], Tensor]
"""(tokens [b, s], flat indices into b*s [n]) -> logits [n, V] at these positions, -inf at ids that are no token."""

OnStep = Callable[[Tensor, Tensor], "Tensor | None"]
"""Called after each step with (tokens [b, s], still masked [b, s] bool); may return rows [b] bool to give up on."""


@dataclass(frozen=True)
class Unmasking:
    """How masked positions are filled.

    Attributes:
        order: which positions are kept first: "confidence" (those whose drawn token is most probable), "random", or
            "left-to-right".
        tokens_per_step: positions kept in each step, in every row.
        block_length: semi-autoregressive: the masked positions of a row are cut into blocks of this many, and a block
            is begun when the one before it is full. None: one block.
        temperature: of the drawn tokens; 0 takes the most probable one.
        guidance: classifier-free guidance w: logits (1 + w) * given the prompt - w * without it (Nie et al., arXiv
            2410.18514, section 3.2). 0: off, at half the cost.
    """

    order: str = "confidence"
    tokens_per_step: int = 1
    block_length: int | None = None
    temperature: float = 0.0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is not one of {', '.join(ORDERS)}")
        if self.tokens_per_step < 1 or (self.block_length is not None and self.block_length < 1):
            raise ValueError("tokens_per_step and block_length start at 1")
        for name, value in (("temperature", self.temperature), ("guidance", self.guidance)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value} is not a finite number of 0 or more")


@torch.no_grad()
def unmask(
    predict: Predict,
    tokens: Tensor,
    masked: Tensor,
    mask_id: int,
    settings: Unmasking,
    generator: torch.Generator | None = None,
    hidden_prompt: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill the positions of ``tokens`` [b, s] int64 where ``masked`` [b, s] is True; everything else stays.

    ``generator`` (on the device of ``tokens``) makes the result repeatable. ``hidden_prompt`` [b, s] bool are the
    positions that guidance hides from the unconditional prediction (None: all given positions).
    """
    tokens = torch.where(masked, mask_id, tokens)
    remaining = masked.clone()
    place = torch.cumsum(masked, dim=1) - 1  # [b, s]: how many masked positions of the row come before
    block = place // min(settings.block_length or tokens.shape[1], tokens.shape[1])
    priority = _priority(settings.order, tokens, generator)
    prompt = ~masked if hidden_prompt is None else hidden_prompt
    while bool(remaining.any()):
        current = torch.where(remaining, block, block.max() + 1).amin(dim=1, keepdim=True)
        active = remaining & (block == current)  # [b, s]
        # An order known beforehand needs predictions only where it is about to keep them.
        asked = active if priority is None else _best(priority, active, settings.tokens_per_step)
        where = asked.flatten().nonzero().squeeze(1)  # [n]
        logits = _logits(predict, tokens, where, prompt, mask_id, settings.guidance)  # [n, V]
        drawn = draw(logits, settings.temperature, generator)  # [n]
        proposal = tokens.clone()
        proposal.view(-1)[where] = drawn
        kept = asked
        if priority is None:
            confidence = torch.full(tokens.shape, -torch.inf, device=tokens.device)
            own = torch.log_softmax(logits, dim=-1).gather(1, drawn.unsqueeze(1)).squeeze(1)
            confidence.view(-1)[where] = own
            kept = _best(confidence, active, settings.tokens_per_step)
        tokens = torch.where(kept, proposal, tokens)
        remaining = remaining & ~kept
        given_up = None if on_step is None else on_step(tokens, remaining)
        if given_up is not None:
            remaining = remaining & ~given_up.unsqueeze(1)
    return tokens


def _logits(
    predict: Predict, tokens: Tensor, where: Tensor, prompt: Tensor, mask_id: int, guidance: float
) -> Tensor:
    """Logits [n, V] fp32 at ``where``, with classifier-free guidance; no token that was excluded comes back."""
    logits = predict(tokens, where).float()
    if guidance == 0:
        return logits
    blind = predict(torch.where(prompt, mask_id, tokens), where).float()
    guided = (1 + guidance) * logits - guidance * blind
    return guided.masked_fill(logits == -torch.inf, -torch.inf)


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Sample from softmax(logits / temperature), logits [n, V] -> [n]; the mode if ``temperature`` is 0.

    The Gumbel-max trick with noise in fp64: in fp32 the largest Gumbel number is cut off, which acts like a lower
    temperature (Zheng et al., arXiv 2409.02908, section 4).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
    return (logits.double() / temperature + gumbel).argmax(dim=-1)


def _priority(order: str, tokens: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Scores [b, s] fixed from the start; None where the model's confidence decides."""
    if order == "confidence":
        return None
    if order == "random":
        return torch.rand(tokens.shape, device=tokens.device, generator=generator)
    return -torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device).expand(tokens.shape).contiguous()


def _best(score: Tensor, active: Tensor, count: int) -> Tensor:
    """The ``count`` active positions of highest score in each row (all, where there are fewer): [b, s] bool."""
    best = score.masked_fill(~active, -torch.inf).topk(min(count, score.shape[1]), dim=1).indices
    return torch.zeros_like(active).scatter_(1, best, True) & active
