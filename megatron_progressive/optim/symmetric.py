"""alpha X X^T + beta C for symmetric C, in Triton: half of the tiles, mirrored.

It serves Newton-Schulz on CUDA from a size at which it is measured to pay
(``optim.ns_kernel_from``; cuBLAS is faster up to 2048, pytorch issue 184886). It was written
against Triton's interpreter and has not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE, DEPTH = 128, 64
"""The number of rows and columns of a tile of the result, and of columns of X that are multiplied
at a time."""

WARPS = 8
"""Of a block, of 32 threads each. A tile of 128 x 128 sums takes 236 registers of each thread with
4 warps, so that two blocks do not fit, and 126 with 8 (compiled for Hopper)."""


# fmt: off
@triton.jit  # type: ignore[untyped-decorator]
def _lower_triangle(  # type: ignore[no-untyped-def]
    x_pointer, added_pointer, out_pointer,
    rows, columns, x_batch, x_row, x_column, scale, added_scale,
    ADDS: tl.constexpr, UPCASTS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):
    # fmt: on
    """Compute one tile of the lower triangle and its mirror image. The grid is (tiles of the
    triangle, batch). The result and the matrix that is added are contiguous [batch, rows, rows].

    The result and what is added are contiguous [batch, rows, rows].
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # tile number -> (i, j) with j <= i; the root is rounded, so it is set right by one
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    low = i * TILE + tl.arange(0, TILE)
    high = j * TILE + tl.arange(0, TILE)
    x_pointer += batch * x_batch
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k[None, :] < columns
        left = tl.load(
            x_pointer + low[:, None] * x_row + k[None, :] * x_column,
            mask=(low[:, None] < rows) & inside, other=0.0,
        )  # fmt: skip
        right = tl.load(
            x_pointer + high[:, None] * x_row + k[None, :] * x_column,
            mask=(high[:, None] < rows) & inside, other=0.0,
        )  # fmt: skip
        if UPCASTS:  # the interpreter's product of bf16 tiles is wrong
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    total *= scale
    square = batch * rows * rows
    here = low[:, None] * rows + high[None, :]
    valid = (low[:, None] < rows) & (high[None, :] < rows)
    if ADDS:
        added = tl.load(added_pointer + square + here, mask=valid, other=0.0)
        total += added_scale * added.to(tl.float32)
    # the interpreter's products are numpy's, whose sums are in any order: a tile across the
    # diagonal is symmetric on a device alone
    if UPCASTS:  # noqa: SIM102  (known when it is compiled, the other not)
        if i == j:
            total = tl.where(low[:, None] >= high[None, :], total, tl.trans(total))
    result = total.to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + square + here, result, mask=valid)
    if i > j:
        mirrored = high[:, None] * rows + low[None, :]
        transposed = (high[:, None] < rows) & (low[None, :] < rows)
        tl.store(out_pointer + square + mirrored, tl.trans(result), mask=transposed)


def symmetric_product(
    x: torch.Tensor,
    *,
    scale: float = 1.0,
    added: torch.Tensor | None = None,
    added_scale: float = 0.0,
    tile: int = TILE,
    depth: int = DEPTH,
    upcasts: bool = False,
) -> torch.Tensor:
    """``scale`` X X^T + ``added_scale`` C, exactly symmetric, with sums in fp32.

    Args:
        x: [batch, rows, columns] in fp32, bf16 or fp16, with any strides.
        added: the symmetric C, contiguous [batch, rows, rows]; only its lower triangle is read.
        tile, depth: powers of two from 16.
        upcasts: whether to multiply in fp32 whatever the type (for Triton's interpreter).

    Returns: A tensor [batch, rows, rows] of the type of x.

    Raises:
        ValueError: a tensor has another shape.
    """
    if x.dim() != 3:
        raise ValueError(f"x of shape {tuple(x.shape)}; accepted: [batch, rows, columns]")
    batch, rows, columns = x.shape
    if added is not None and (added.shape != (batch, rows, rows) or not added.is_contiguous()):
        raise ValueError(f"added of shape {tuple(added.shape)}; accepted: {(batch, rows, rows)}")
    out = x.new_empty(batch, rows, rows)
    tiles = triton.cdiv(rows, tile)
    grid: Any = (tiles * (tiles + 1) // 2, batch)
    _lower_triangle[grid](
        x, x if added is None else added, out, rows, columns, *x.stride(), scale, added_scale,
        ADDS=added is not None, UPCASTS=upcasts, TILE=tile, DEPTH=depth, num_warps=WARPS,
    )  # fmt: skip
    return out
