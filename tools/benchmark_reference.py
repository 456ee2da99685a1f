"""What the entry points are compared with: plain PyTorch loops of the same shape over the same tokens.

Started by ``tools/benchmark_training.py`` in a process of its own. ``bare`` is a model of a hundred lines;
``transformers`` is its ``LlamaForCausalLM`` with SDPA. Both are compiled whole, compute all logits and take PyTorch's
cross entropy of them, and both are trained by the same loop: weights and activations in bf16, gradients added up in
fp32 over the micro-batches, clipping, fused AdamW on fp32 master weights. That is the arithmetic of the entry points.
(Autocast over fp32 weights would cast them in every pass; adding gradients up in bf16 would be faster, and worse.)
No DeepSpeed, no loader processes, no logging, no checkpoints.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.budget import GPT2_VOCABULARY, ModelRow, flops_per_token, peak_flops
from megatron.errors import UserError
from tools.benchmark_runs import table_row

PADDED_VOCABULARY = -(-(GPT2_VOCABULARY + 1) // 128) * 128
EPSILON = 1e-3
"""Lowest masking probability of the diffusion objective."""


class BareBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, row: ModelRow, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = row.heads, causal, dropout
        width = row.heads * row.head_size
        self.attention_norm = nn.RMSNorm(row.d_model, eps=1e-5)
        self.qkv = nn.Linear(row.d_model, 3 * width, bias=False)
        self.out = nn.Linear(width, row.d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(row.d_model, eps=1e-5)
        self.gate_up = nn.Linear(row.d_model, 2 * row.ffn, bias=False)
        self.down = nn.Linear(row.ffn, row.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, d] -> [b, s, d]; cos, sin [s, 1, head_size / 2]."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.unbind(2)  # each [b, s, heads, head_size]
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=self.causal)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), drop)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # each [b, s, ffn]
        return x + F.dropout(self.down(F.silu(gate) * up), drop)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves of a head as pairs: x [b, s, heads, head_size]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class BareGPT(nn.Module):
    """Tied embedding and head around the blocks; the forward pass returns the loss."""

    def __init__(self, row: ModelRow, vocabulary: int, seq_length: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, row.d_model)
        self.blocks = nn.ModuleList(BareBlock(row, causal, dropout) for _ in range(row.layers))
        self.norm = nn.RMSNorm(row.d_model, eps=1e-5)
        frequencies = 10_000.0 ** -(torch.arange(0, row.head_size, 2) / row.head_size)
        self.angles = torch.outer(torch.arange(seq_length), frequencies)[:, None]  # [s, 1, head_size / 2] fp32
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Mean cross entropy, or ``sum(nll * weights)``; inputs, targets [b, s] int64, weights [b, s] fp32."""
        x = F.dropout(self.embedding(inputs), self.dropout if self.training else 0.0)
        cos, sin = self.angles.cos(), self.angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedding.weight).flatten(0, 1).float()  # [b s, V]
        if weights is None:
            return F.cross_entropy(logits, targets.flatten())
        return (F.cross_entropy(logits, targets.flatten(), reduction="none") * weights.flatten()).sum()

    def to_device(self, device: torch.device) -> BareGPT:
        """Move everything; the angles stay fp32 whatever the weights become."""
        self.angles = self.angles.to(device)
        return self.to(device)


Loss = Callable[[Tensor], Tensor]
"""Loss of a micro-batch of tokens [b, s + 1]."""


def bare_loss(row: ModelRow, arguments: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Loss]:
    """The plain model, and its loss; noise of the diffusion objective is drawn on the device."""
    causal = arguments.objective == "ar"
    model = BareGPT(row, PADDED_VOCABULARY, arguments.seq_length, causal, arguments.dropout).to_device(device)
    model.to(dtype_of(arguments))
    compiled = _compiled(model, arguments, device)

    def loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:]
        if causal:
            return compiled(tokens[:, :-1], targets, None)
        batch, length = targets.shape
        p = (1 - EPSILON) * torch.rand(batch, 1, device=device) + EPSILON
        hidden = torch.rand(batch, length, device=device) < p
        inputs = torch.where(hidden, GPT2_VOCABULARY, targets)
        return compiled(inputs, targets, hidden / (p * batch * length))

    return model, loss


def transformers_loss(row: ModelRow, arguments: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Loss]:
    """transformers' Llama, and the loss it computes from ``labels``."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("--compare transformers needs the package transformers: pip install transformers") from error
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY, hidden_size=row.d_model, intermediate_size=row.ffn,
        num_hidden_layers=row.layers, num_attention_heads=row.heads, head_dim=row.head_size,
        max_position_embeddings=arguments.seq_length, rms_norm_eps=1e-5, tie_word_embeddings=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config)
    model.to(dtype_of(arguments)).train()
    compiled = _compiled(model, arguments, device)

    def loss(tokens: Tensor) -> Tensor:
        inputs = tokens[:, :-1].contiguous()
        found: Tensor = compiled(input_ids=inputs, labels=inputs).loss
        return found

    return model, loss


def _compiled(model: nn.Module, arguments: argparse.Namespace, device: torch.device) -> Callable[..., Any]:
    wanted = device.type == "cuda" if arguments.compile is None else arguments.compile
    compiled: Callable[..., Any] = torch.compile(model) if wanted else model
    return compiled


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """Format of weights and activations."""
    return torch.bfloat16 if arguments.precision == "bf16" else torch.float32


class MasterWeights:
    """fp32 weights and gradients behind a half-precision model; of an fp32 model, its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = list(model.parameters())
        self.half = self.model[0].dtype != torch.float32
        self.master = [p.detach().float().requires_grad_() for p in self.model] if self.half else self.model
        groups = [[p for p in self.master if p.ndim > 1], [p for p in self.master if p.ndim == 1]]
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
            lr=2e-4, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip

    def accumulate(self) -> None:
        """Add the model's gradients to the fp32 sums."""
        if not self.half:
            return  # they are summed where they are
        for master, p in zip(self.master, self.model):
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update, and round into the model."""
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.half:
            for p, master in zip(self.model, self.master):
                p.copy_(master)


def micro_batches(arguments: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Tokens [b, s + 1] int64 on the device: windows of the file, one after the other, without end."""
    tokens = np.memmap(arguments.data, dtype=np.uint16, mode="r")
    rows, length = arguments.micro_batch_size, arguments.seq_length
    windows = (len(tokens) - 1) // length
    start = 0
    while True:
        starts = [(start + row) % windows * length for row in range(rows)]
        batch = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
        yield (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
        start += rows


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train ``arguments.steps`` steps and return the figures of the steps after the warm-up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1234)
    row = table_row(arguments.model)
    model, loss = (bare_loss if kind == "bare" else transformers_loss)(row, arguments, device)
    weights, batches = MasterWeights(model), micro_batches(arguments, device)
    count = arguments.global_batch_size // arguments.micro_batch_size
    seconds, losses, first_step_at = [], [], 0.0
    for _step in range(arguments.steps):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for _ in range(count):
            value = loss(next(batches)) / count
            value.backward()
            weights.accumulate()
            total += value.detach()
        weights.step()
        losses.append(total.item())  # waits for the device
        seconds.append(time.perf_counter() - began)
        first_step_at = first_step_at or time.time()
    tokens = arguments.global_batch_size * arguments.seq_length
    median = statistics.median(seconds[arguments.warmup :] or seconds[-1:])
    config = row.model(
        arguments.seq_length, attention_dropout=arguments.dropout, hidden_dropout=arguments.dropout
    )
    causal = arguments.objective == "ar"
    flops = flops_per_token(config, arguments.seq_length, GPT2_VOCABULARY, causal=causal) * tokens / median
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": tokens / median,
        "tflops": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "first_step_at": first_step_at,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line that ``benchmark_training`` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("bare", "transformers"))
    parser.add_argument("--data", required=True, help="tokens, uint16: the .bin file of the compared run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", required=True)
    parser.add_argument("--objective", choices=("ar", "mdm"), required=True)
    for name in ("micro-batch-size", "global-batch-size", "seq-length", "steps", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        figures = measure(arguments.kind, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
