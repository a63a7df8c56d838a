"""Transformer Engine 2.11's calls into C++ and Triton where nothing is computed: each allocates
what the real one returns, of the same shape and type, and no more. Its Python layers are the real
ones, so that what they keep for the backward pass is what they keep on a GPU.

Workspaces that a call allocates and frees within itself are left out, but cuBLAS's, which the
Python side holds. Signatures are those of :mod:`.transformer_engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .transformer_engine import _dtype

Tensor = torch.Tensor
_FP32 = torch.float32


def _like(tensor: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    shape = tensor.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)


def generic_gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, quantizer: Any,
    out_dtype: Any, bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool,
    *rest: Any, extra_output: Any = None, **others: Any,
) -> tuple[Tensor, Tensor | None, None, Any]:  # fmt: skip
    """A product, and in a backward pass the gradient of a bias."""
    width = a.shape[-1] if not transa else a.numel() // a.shape[-1]
    if out is None:
        rows = (b.shape[-1],) if transb else b.shape[:-1]
        out = _like(b, (*rows, width), _dtype(out_dtype, a.dtype))
    d_bias = _like(bias, (b.shape[-1],)) if bias is not None and grad else None
    return out, d_bias, None, extra_output


def te_general_grouped_gemm(
    a: list[Tensor], transa: bool, b: list[Tensor], transb: bool, out: list[Tensor],
    out_dtype: Any, m_splits: list[int], bias: list[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Into tensors that are there."""
    return bias


def _norm_out(x: Tensor, out: Tensor | None, dtype: Any) -> Tensor:
    return _like(x, dtype=_dtype(dtype, x.dtype)) if out is None else out


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None, quantizer: Any,
    dtype: Any, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The values, the means and the factors."""
    mean, factor = _like(x, x.shape[:-1], _FP32), _like(x, x.shape[:-1], _FP32)
    return _norm_out(x, out, dtype), mean, factor


def layernorm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, factor: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias."""
    return _like(x), _like(weight), _like(weight)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any,
    *rest: Any,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    """The values and the factors."""
    return _norm_out(x, out, dtype), None, _like(x, x.shape[:-1], _FP32)


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, factor: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the weight."""
    return _like(x), _like(weight)


def fused_rope_forward(t: Tensor, *rest: Any) -> Tensor:
    """Heads that are turned."""
    return _like(t)


def fused_rope_backward(t: Tensor, *rest: Any) -> Tensor:
    """Their gradient."""
    return _like(t)


def fused_attn_fwd(
    max_q: int, max_kv: int, training: bool, scale: float, dropout: float, fill: bool,
    layout: Any, bias: Any, mask: Any, softmax: Any, window: Any, cu_q: Any, cu_kv: Any,
    q: Tensor, k: Tensor, v: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """The values, one logarithm for each query and head, and the state of the random numbers."""
    length, batch, heads, _ = q.shape
    value = _like(q, (length, batch, heads, v.shape[-1]))
    lse = _like(q, (batch, heads, length, 1), _FP32)
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return [value, lse, state]  # in an evaluation, too


def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, fill: bool, layout: Any, bias: Any,
    mask: Any, softmax: Any, window: Any, deterministic: bool, cu_q: Any, cu_kv: Any, q: Tensor,
    k: Tensor, v: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    none = torch.empty(0, device=q.device)
    return [_like(q), _like(k), _like(v), none, none]


CALLS: tuple[Callable[..., Any], ...] = (
    generic_gemm, te_general_grouped_gemm, layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd,
    fused_rope_forward, fused_rope_backward, fused_attn_fwd, fused_attn_bwd,
)  # fmt: skip


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Two indices and a count for each token and expert."""
    return _like(routing_map, (num_tokens, num_experts * 2 + 1), torch.int32)


def permute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: Any, num_tokens: int,
    num_experts: int, num_out_tokens: int, hidden_size: int, scale_hidden_dim: Any,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    """Rows of tokens in the order of experts."""
    permuted = None if probs is None else _like(probs, (num_out_tokens,))
    return _like(inp, (num_out_tokens, hidden_size)), None, permuted


def unpermute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, merging_probs: Any, permuted_probs: Tensor | None,
    num_tokens: int, num_experts: int, hidden_size: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums of the rows of each token."""
    probs = None if permuted_probs is None else _like(permuted_probs, (num_tokens, num_experts))
    return _like(inp, (num_tokens, hidden_size)), probs


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """A row for each row."""
    return _like(split_sizes, (num_tokens,), torch.int32)


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunks of rows in another order, or back."""
    return _like(inp), None if probs is None else _like(probs)


PERMUTATION: tuple[Callable[..., Any], ...] = (
    make_row_id_map, permute_with_mask_map, unpermute_with_mask_map, make_chunk_sort_map,
    sort_chunks_by_map,
)  # fmt: skip
"""In the place of Triton kernels."""
