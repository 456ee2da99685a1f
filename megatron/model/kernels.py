"""Kernels of our own in Triton, for training on a GPU with ``--compile``. Those of the head are in
``head_kernels``; no other file knows Triton.

There is one where the compiler's code moves more bytes than it must (docs/performance.md has the times):

- ``swiglu_gradient``: it puts both halves of the gradient together element by element, and loads five numbers for two.
- ``rotate_heads_``: it keeps queries and keys as they were beside the rotated ones, since values are next to them.
- ``split_heads_gradient``: it puts gradients of queries, keys and values together element by element.
- ``row_norm``: it takes up to twice as long as reading and writing every number once. The norm before the head, which
  is not compiled, is computed by it, too.
- ``branch_gradient``: the gradients of a norm and of the residual connection beside it were added by another kernel,
  and what the norm reads was kept beside what it makes.
- ``add_dropped``: it draws one random number at a time, and keeps a byte of each for the backward pass.
- ``add_to``, ``scaled``: PyTorch's sums and products of different dtypes load and store number by number.

The plain code that each stands for is beside its caller (``add_to`` and ``scaled`` have it), and is what runs
elsewhere: on CPUs, in double precision and with ``--no-compile``. All compute in fp32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl


SMALLEST_GAIN = 2.0**-60
"""What a norm's gain nearer to 0 counts as: a factor that is not seen in any sum with others, and that can be divided
by."""


def in_compiled_code(x: Tensor) -> bool:
    """Whether what is being done with ``x`` is being compiled for a GPU, and so may call ``torch.ops.megatron``."""
    return takes(x) and torch.compiler.is_compiling()


def takes(x: Tensor) -> bool:
    """Whether kernels can be had for ``x``, by its device and dtype."""
    return TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def add_to(total: Tensor, x: Tensor) -> None:
    """``total += x`` of the same shape and any dtypes; PyTorch's own sum to the bit."""
    if not _worth_a_launch(total, x):
        total.add_(x)
        return
    _add_kernel[(triton.cdiv(x.numel(), _BLOCK),)](total, x, x.numel(), _BLOCK, num_warps=8)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype, kernel: bool = True) -> Tensor:
    """``x * scale`` [1], multiplied in the wider dtype of both and rounded once to ``dtype``; PyTorch's to the bit.

    ``kernel`` False: by PyTorch, as without ``--compile``.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not kernel or scale.dtype != torch.float32 or not _worth_a_launch(out, x):
        return torch.mul(x, scale, out=out)
    _scale_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, scale, out, x.numel(), _BLOCK, num_warps=8)
    return out


_BLOCK = 4096


def _worth_a_launch(out: Tensor, x: Tensor) -> bool:
    """Whether a kernel from ``x`` to ``out`` can be had and gains more than its launch from Python takes."""
    return x.numel() >= 2**21 and takes(x) and takes(out) and x.is_contiguous() and out.is_contiguous()


if TRITON:

    @triton.jit
    def _add_kernel(total, x, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Numbers ``program_id(0) * block`` and following."""
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < size
        value = tl.load(total + at, inside).to(tl.float32) + tl.load(x + at, inside).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), inside)

    @triton.jit
    def _scale_kernel(x, scale, out, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Numbers ``program_id(0) * block`` and following."""
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < size
        value = tl.load(x + at, inside).to(tl.float32) * tl.load(scale)
        tl.store(out + at, value.to(out.dtype.element_ty), inside)

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
        warps = max(1, block // 512)
        torch.library.wrap_triton(_swiglu_gradient_kernel)[grid](inner, grad, out, width, block, num_warps=warps)
        return out

    @triton.jit
    def _turn_back(grad, out, cos, sin, inside, half: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pairs of features, at ``grad`` and ``half`` further, turned by minus their angles to ``out``: the gradient of
        their rotation. All are [positions, heads, pairs] or can be made so."""
        first = tl.load(grad, inside).to(tl.float32)
        second = tl.load(grad + half, inside).to(tl.float32)
        dtype: tl.constexpr = out.dtype.scalar.element_ty
        tl.store(out, (first * cos + second * sin).to(dtype), inside)
        tl.store(out + half, (second * cos - first * sin).to(dtype), inside)

    @triton.jit
    def _rotate_heads_kernel(  # type: ignore[no-untyped-def]
        heads, table, positions, count: tl.constexpr, back: tl.constexpr, total: tl.constexpr, half: tl.constexpr,
        at_once: tl.constexpr, count_block: tl.constexpr, half_block: tl.constexpr,
    ):
        """``at_once`` positions: the first ``count`` heads of ``total``, in their place, turned forth or ``back``."""
        position = (tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once))[:, None, None]
        head = tl.arange(0, count_block)[None, :, None]
        feature = tl.arange(0, half_block)[None, None, :]
        inside = (position < positions) & (feature < half)
        angle = table + position * (2 * half) + feature
        cos, sin = tl.load(angle, inside), tl.load(angle + half, inside)
        at = heads + position * (total * 2 * half) + head * (2 * half) + feature
        _turn_back(at, at, cos, sin if back else -sin, inside & (head < count), half)

    @torch.library.triton_op("megatron::rotate_heads_", mutates_args={"heads"})
    def _rotate_heads(heads: Tensor, count: int, table: Tensor, back: bool) -> None:
        """Rotate the first ``count`` heads of [b, s, n, head_size], contiguous, by the angles of ``table``, or by minus
        these angles (``back``)."""
        assert heads.is_contiguous()
        batch, length, total, size = heads.shape
        blocks = [triton.next_power_of_2(n) for n in (count, size // 2)]
        at_once = max(1, 1024 // (blocks[0] * blocks[1]))
        positions = batch * length
        torch.library.wrap_triton(_rotate_heads_kernel)[(triton.cdiv(positions, at_once),)](
            heads, table.contiguous(), positions, count, back, total, size // 2, at_once, *blocks
        )

    @triton.jit
    def _split_heads_gradient_kernel(  # type: ignore[no-untyped-def]
        query, key, value, table, out, positions, length,
        query_row, query_place, query_head, key_row, key_place, key_head, value_row, value_place, value_head,
        queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr, at_once: tl.constexpr,
        query_block: tl.constexpr, key_block: tl.constexpr, half_block: tl.constexpr, size_block: tl.constexpr,
    ):
        """``at_once`` positions: their queries and keys turned back, their values copied."""
        position = (tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once))[:, None, None]
        row, place = position // length, position % length
        feature = tl.arange(0, half_block)[None, None, :]
        inside = (position < positions) & (feature < half)
        angle = table + position * (2 * half) + feature
        cos, sin = tl.load(angle, inside), tl.load(angle + half, inside)
        out += position * ((queries + 2 * keys) * (2 * half))
        head = tl.arange(0, query_block)[None, :, None]
        at = query + row * query_row + place * query_place + head * query_head + feature
        _turn_back(at, out + head * (2 * half) + feature, cos, sin, inside & (head < queries), half)
        out += queries * (2 * half)
        head = tl.arange(0, key_block)[None, :, None]
        at = key + row * key_row + place * key_place + head * key_head + feature
        _turn_back(at, out + head * (2 * half) + feature, cos, sin, inside & (head < keys), half)
        out += keys * (2 * half)
        whole = tl.arange(0, size_block)[None, None, :]
        inside = (position < positions) & (head < keys) & (whole < 2 * half)
        at = value + row * value_row + place * value_place + head * value_head + whole
        tl.store(out + head * (2 * half) + whole, tl.load(at, inside), inside)

    @torch.library.triton_op("megatron::split_heads_gradient", mutates_args=())
    def _split_heads_gradient(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        """Gradient of ``split_heads``' heads [b, s, q + 2 kv, head_size] from those of its results."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        table = table.contiguous()
        batch, length, queries, size = query.shape
        keys = key.shape[2]
        out = query.new_empty(batch, length, queries + 2 * keys, size)
        blocks = [triton.next_power_of_2(n) for n in (queries, keys, size // 2, size)]
        at_once = max(1, 1024 // (blocks[0] * blocks[2]))
        positions = batch * length
        torch.library.wrap_triton(_split_heads_gradient_kernel)[(triton.cdiv(positions, at_once),)](
            query, key, value, table, out, positions, length,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], queries, keys, size // 2, at_once, *blocks,
        )
        return out

    def _row_tiles(width: int) -> tuple[int, int, int]:
        """For rows of ``width`` numbers: the columns of a tile, its rows, and the warps that work on it."""
        block = triton.next_power_of_2(width)
        at_once = max(1, 2048 // block)
        return block, at_once, min(16, max(1, at_once * block // 512))

    @triton.jit
    def _row_norm_kernel(  # type: ignore[no-untyped-def]
        hidden, gain, normal, scales, rows, eps,
        width: tl.constexpr, block: tl.constexpr, at_once: tl.constexpr, smallest: tl.constexpr,
    ):
        """``at_once`` rows."""
        row = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)
        column = tl.arange(0, block)
        g = tl.load(gain + column, column < width, 1.0).to(tl.float32)
        g = tl.where(tl.abs(g) < smallest, smallest, g)[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        x = tl.load(hidden + at, inside, 0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        tl.store(normal + at, (x * scale[:, None] * g).to(normal.dtype.element_ty), inside)
        tl.store(scales + row, scale, row < rows)

    @torch.library.triton_op("megatron::row_norm", mutates_args=())
    def _row_norm(hidden: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of hidden [..., h], whose gain [h] counts as ``branch_gradient`` wants it, and its scale [..., 1] in
        fp32."""
        hidden = hidden.contiguous()
        normal = torch.empty_like(hidden)
        scale = torch.empty(*hidden.shape[:-1], 1, dtype=torch.float32, device=hidden.device)
        width = hidden.shape[-1]
        rows = hidden.numel() // width
        block, at_once, warps = _row_tiles(width)
        torch.library.wrap_triton(_row_norm_kernel)[(triton.cdiv(rows, at_once),)](
            hidden, gain, normal, scale, rows, eps, width, block, at_once, SMALLEST_GAIN, num_warps=warps
        )
        return normal, scale

    @triton.jit
    def _branch_gradient_kernel(  # type: ignore[no-untyped-def]
        normal, gain, scales, grad_kept, grad_normal, out, partial, rows,
        width: tl.constexpr, block: tl.constexpr, at_once: tl.constexpr, stages: tl.constexpr, smallest: tl.constexpr,
    ):
        """``at_once`` rows after the other: tile ``program_id(0)``, and on in steps of the number of programs; of them,
        the gain's gradient too."""
        column = tl.arange(0, block)
        g = tl.load(gain + column, column < width, 1.0).to(tl.float32)
        g = tl.where(tl.abs(g) < smallest, smallest, g)[None, :]
        grad_gain = tl.zeros((at_once, block), tl.float32)
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, at_once), tl.num_programs(0), num_stages=stages):
            row = tl.cast(tile, tl.int64) * at_once + tl.arange(0, at_once)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            at = row[:, None] * width + column[None, :]
            y = tl.load(normal + at, inside, 0.0).to(tl.float32)
            dy = tl.load(grad_normal + at, inside, 0.0).to(tl.float32)
            along = tl.sum(dy * y, 1)[:, None] / width  # of the gradient, along the normalised row
            x = y / g
            grad_gain += dy * x
            grad = tl.load(scales + row, row < rows, 0.0)[:, None] * (dy * g - x * along)
            if grad_kept is not None:
                grad += tl.load(grad_kept + at, inside, 0.0).to(tl.float32)
            tl.store(out + at, grad.to(out.dtype.element_ty), inside)
        tl.store(partial + tl.program_id(0) * width + column, tl.sum(grad_gain, 0), column < width)

    @torch.library.triton_op("megatron::branch_gradient", mutates_args=())
    def _branch_gradient(
        normal: Tensor, gain: Tensor, scale: Tensor, grad_kept: Tensor | None, grad_normal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of hidden [..., h], and of the gain in parts [programs, h] fp32 that are yet to be summed.

        normal [..., h] is hidden * scale [..., 1] * gain [h], scale in fp32, where entries of the gain nearer to 0 than
        ``SMALLEST_GAIN`` count as that. Without ``grad_kept`` hidden is read by the norm alone.
        """
        normal, scale, grad_normal = (x.contiguous() for x in (normal, scale, grad_normal))
        grad_kept = None if grad_kept is None else grad_kept.contiguous()
        out = torch.empty_like(normal)
        width = normal.shape[-1]
        rows = normal.numel() // width
        # Four programs a processor keep the memory busy if each loads rows ahead. Shared memory, 100 kB on the smallest
        # GPUs, has room for three of three tensors' rows of up to 8 kB.
        programs = 4 * torch.cuda.get_device_properties(normal.device).multi_processor_count
        partial = torch.empty(programs, width, dtype=torch.float32, device=normal.device)
        block, at_once, warps = _row_tiles(width)
        stages = 3 if at_once * block * normal.element_size() <= 2**13 else 1
        torch.library.wrap_triton(_branch_gradient_kernel)[(programs,)](
            normal, gain, scale, grad_kept, grad_normal, out, partial, rows, width, block, at_once, stages,
            SMALLEST_GAIN, num_warps=warps,
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
