"""Kernels of our own in Triton, for training on a GPU with ``--compile``. No other file knows Triton.

There is one where the compiler's code moves more bytes than it must (docs/performance.md has the times):

- ``swiglu_gradient``: it puts both halves of the gradient together element by element, and loads five numbers for two.
- ``split_heads_gradient``: the same of queries, keys and values.
- ``branch_gradient``: the gradients of a norm and of the residual connection beside it were added by another kernel.
- ``add_dropped``: it draws one random number at a time, and keeps a byte of each for the backward pass.
- ``softmax_terms``: it reads logits twice from memory, and writes to other memory.

The plain code that each stands for is beside its caller, and is what runs elsewhere: on CPUs, in double precision and
with ``--no-compile``. All compute in fp32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl

ALIGNMENT = 8
"""Logits at whose multiples rows start, so that loads are wide."""


def in_compiled_code(x: Tensor) -> bool:
    """Whether what is being done with ``x`` is being compiled for a GPU, and so may call ``torch.ops.megatron``."""
    return _takes(x) and torch.compiler.is_compiling()


def has_softmax_terms(logits: Tensor) -> bool:
    """Whether :func:`softmax_terms` takes these logits [n, c]."""
    return _takes(logits) and logits.is_contiguous() and logits.shape[1] % ALIGNMENT == 0


def _takes(x: Tensor) -> bool:
    return TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def softmax_terms(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What :func:`megatron.model.cross_entropy.chunk_terms` says of the same arguments: nll [n] fp32, and softmax *
    weight [n, c], which here takes the place of the logits. ``weights`` are fp32."""
    rows, columns = logits.shape
    nll = torch.empty_like(weights)
    # A program reads its row twice, the second time from the GPU's cache if few rows are under way: two rows of 50,304
    # a processor are 26 MB of the 50 that an H100's holds. Three were slower, one too.
    programs = min(rows, 2 * torch.cuda.get_device_properties(logits.device).multi_processor_count)
    _softmax_kernel[(programs,)](
        logits, targets, weights, nll, rows, columns // ALIGNMENT, num_tokens, ALIGNMENT, 8192, num_warps=8
    )
    return nll, logits


if TRITON:

    @triton.jit
    def _swiglu_gradient_kernel(inner, grad, out, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row's columns ``program_id(1) * block`` and following, of both halves."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        gate_at = row * (2 * width) + column
        gate = tl.load(inner + gate_at, inside).to(tl.float32)
        up = tl.load(inner + gate_at + width, inside).to(tl.float32)
        g = tl.load(grad + row * width + column, inside).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        tl.store(out + gate_at, (g * up * sigmoid * (1 + gate * (1 - sigmoid))).to(out.dtype.element_ty), inside)
        tl.store(out + gate_at + width, (g * gate * sigmoid).to(out.dtype.element_ty), inside)

    @torch.library.triton_op("megatron::swiglu_gradient", mutates_args=())
    def _swiglu_gradient(inner: Tensor, grad: Tensor) -> Tensor:
        """Gradient of ``swiglu``'s inner [..., 2 ffn] from the one of its result, ``grad`` [..., ffn]."""
        inner, grad = inner.contiguous(), grad.contiguous()
        out = torch.empty_like(inner)
        width = grad.shape[-1]
        block = min(triton.next_power_of_2(width), 4096)
        grid = (grad.numel() // width, triton.cdiv(width, block))
        torch.library.wrap_triton(_swiglu_gradient_kernel)[grid](inner, grad, out, width, block, num_warps=8)
        return out

    @triton.jit
    def _turn_back(  # type: ignore[no-untyped-def]
        grad, out, cos, sin, head, feature, stride, count: tl.constexpr, half: tl.constexpr
    ):
        """Gradient of the heads of one position before their rotation."""
        inside = (head[:, None] < count) & (feature[None, :] < half)
        at = grad + head[:, None] * stride + feature[None, :]
        first = tl.load(at, inside).to(tl.float32)
        second = tl.load(at + half, inside).to(tl.float32)
        to = out + head[:, None] * (2 * half) + feature[None, :]
        tl.store(to, (first * cos + second * sin).to(out.dtype.element_ty), inside)
        tl.store(to + half, (second * cos - first * sin).to(out.dtype.element_ty), inside)

    @triton.jit
    def _split_heads_gradient_kernel(  # type: ignore[no-untyped-def]
        query, key, value, table, out, length,
        query_row, query_place, query_head, key_row, key_place, key_head, value_row, value_place, value_head,
        queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr,
        query_block: tl.constexpr, key_block: tl.constexpr, half_block: tl.constexpr, size_block: tl.constexpr,
    ):
        """One position: its queries and keys turned back, its values copied."""
        position = tl.program_id(0).to(tl.int64)
        row, place = position // length, position % length
        feature = tl.arange(0, half_block)
        cos = tl.load(table + position * (2 * half) + feature, feature < half)[None, :]
        sin = tl.load(table + position * (2 * half) + half + feature, feature < half)[None, :]
        out += position * ((queries + 2 * keys) * (2 * half))
        head = tl.arange(0, query_block)
        query += row * query_row + place * query_place
        _turn_back(query, out, cos, sin, head, feature, query_head, queries, half)
        out += queries * (2 * half)
        head = tl.arange(0, key_block)
        key += row * key_row + place * key_place
        _turn_back(key, out, cos, sin, head, feature, key_head, keys, half)
        out += keys * (2 * half)
        whole = tl.arange(0, size_block)
        inside = (head[:, None] < keys) & (whole[None, :] < 2 * half)
        at = value + row * value_row + place * value_place + head[:, None] * value_head + whole[None, :]
        tl.store(out + head[:, None] * (2 * half) + whole[None, :], tl.load(at, inside), inside)

    @torch.library.triton_op("megatron::split_heads_gradient", mutates_args=())
    def _split_heads_gradient(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        """Gradient of ``split_heads``' heads [b, s, q + 2 kv, head_size] from those of its results."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        table = table.contiguous()
        batch, length, queries, size = query.shape
        keys = key.shape[2]
        out = query.new_empty(batch, length, queries + 2 * keys, size)
        blocks = (triton.next_power_of_2(n) for n in (queries, keys, size // 2, size))
        torch.library.wrap_triton(_split_heads_gradient_kernel)[(batch * length,)](
            query, key, value, table, out, length,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], queries, keys, size // 2, *blocks,
        )
        return out

    @triton.jit
    def _branch_gradient_kernel(  # type: ignore[no-untyped-def]
        hidden, gain, grad_kept, grad_normal, out, partial, rows,
        eps: tl.constexpr, width: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs; of them, the gain's gradient too."""
        column = tl.arange(0, block)
        inside = column < width
        g = tl.load(gain + column, inside, 0.0).to(tl.float32)
        grad_gain = tl.zeros((block,), tl.float32)
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=stages):
            at = tl.cast(row, tl.int64) * width + column
            x = tl.load(hidden + at, inside, 0.0).to(tl.float32)
            dy = tl.load(grad_normal + at, inside, 0.0).to(tl.float32)
            kept = tl.load(grad_kept + at, inside, 0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
            along = tl.sum(dy * g * x, 0) * scale / width  # of the gradient, along the normalised row
            normal = x * scale
            grad_gain += dy * normal
            grad = kept + scale * (dy * g - normal * along)
            tl.store(out + at, grad.to(out.dtype.element_ty), inside)
        tl.store(partial + tl.program_id(0) * width + column, grad_gain, inside)

    @torch.library.triton_op("megatron::branch_gradient", mutates_args=())
    def _branch_gradient(
        hidden: Tensor, gain: Tensor, grad_kept: Tensor, grad_normal: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Gradient of hidden [..., h], and of the gain in parts [programs, h] fp32 that are yet to be summed."""
        hidden, grad_kept, grad_normal = (x.contiguous() for x in (hidden, grad_kept, grad_normal))
        out = torch.empty_like(hidden)
        width = hidden.shape[-1]
        rows = hidden.numel() // width
        # Four programs a processor keep the memory busy if each loads rows ahead. Shared memory, 100 kB on the smallest
        # GPUs, has room for three of three tensors' rows of up to 8 kB.
        programs = 4 * torch.cuda.get_device_properties(hidden.device).multi_processor_count
        partial = torch.empty(programs, width, dtype=torch.float32, device=hidden.device)
        block = triton.next_power_of_2(width)
        stages = 3 if block * hidden.element_size() <= 2**13 else 1
        torch.library.wrap_triton(_branch_gradient_kernel)[(programs,)](
            hidden, gain, grad_kept, grad_normal, out, partial, rows, eps, width, block, stages,
            num_warps=min(16, max(1, block // 512)),
        )
        return out, partial

    @triton.jit
    def _add_dropped_kernel(  # type: ignore[no-untyped-def]
        hidden, x, seed, out, size, probability: tl.constexpr, block: tl.constexpr
    ):
        """Four times ``block`` numbers: a place of the generator serves one in each quarter."""
        offset = tl.arange(0, block)
        draws = tl.rand4x(tl.load(seed), tl.program_id(0) * block + offset)
        at = tl.program_id(0).to(tl.int64) * (4 * block) + offset
        for part in tl.static_range(4):
            inside = at < size
            value = tl.load(x + at, inside).to(tl.float32)
            value = tl.where(draws[part] >= probability, value * (1 / (1 - probability)), 0.0)
            if hidden is not None:
                value += tl.load(hidden + at, inside).to(tl.float32)
            tl.store(out + at, value.to(out.dtype.element_ty), inside)
            at += block

    @torch.library.triton_op("megatron::add_dropped", mutates_args=())
    def _add_dropped(hidden: Tensor | None, x: Tensor, seed: Tensor, probability: float) -> Tensor:
        """``hidden + dropout(x)``, or the latter alone. The same ``seed`` [1] int64 drops the same numbers."""
        x = x.contiguous()
        hidden = None if hidden is None else hidden.contiguous()
        out = torch.empty_like(x)
        block = 512
        torch.library.wrap_triton(_add_dropped_kernel)[(triton.cdiv(x.numel(), 4 * block),)](
            hidden, x, seed, out, x.numel(), probability, block
        )
        return out

    @triton.jit
    def _softmax_kernel(  # type: ignore[no-untyped-def]
        logits, targets, weights, nll, rows, groups, tokens, alignment: tl.constexpr, block: tl.constexpr
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs. Exponentials are powers of two."""
        log2_e: tl.constexpr = 1.4426950408889634
        offset = tl.arange(0, block)
        columns = groups * alignment
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = logits + tl.cast(row, tl.int64) * groups * alignment
            target = tl.load(targets + row)
            logit = tl.load(at + target, target < tokens, -float("inf")).to(tl.float32)
            weight = tl.load(weights + row)
            top = -float("inf")
            total = tl.zeros((block,), tl.float32)
            for start in range(0, tokens, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                higher = tl.maximum(top, tl.max(x, 0))
                total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
                top = higher
            normalizer = top + tl.log2(tl.sum(total, 0))
            tl.store(nll + row, normalizer / log2_e - logit)
            tl.debug_barrier()  # every thread has read the target's logit
            for start in range(0, columns, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                p = tl.exp2(x - normalizer) * weight
                tl.store(at + column, p.to(logits.dtype.element_ty), column < columns)
