"""Transformer Engine 2.11's calls into C++, computed in torch: its Python layers are the real ones.

The calls are those that training in bf16 or fp32 makes (``transformer_engine_torch`` is a pybind
module, which no dispatcher sees): products, norms, rotary angles and attention; and the Triton
kernels that permute tokens for experts. Sums are in fp32 and results are rounded once, as there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from . import aten
from .checks import Refused

Tensor = torch.Tensor


def _only(name: str, condition: bool) -> None:
    if not condition:
        raise Refused(f"stand-in: {name} of Transformer Engine was asked for what is not computed")


def _dtype(chosen: Any, otherwise: torch.dtype) -> torch.dtype:
    """A type of the C++ side, by the table of the Python side."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return otherwise if chosen is None else TE_DType_To_Torch[chosen]


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> Tensor:
    """``op(B) · op(A)`` in fp32: the arguments are column-major ones of cuBLAS."""
    left = b.reshape(-1, b.shape[-1]).float()
    right = a.reshape(-1, a.shape[-1]).float()
    return (left.T if transpose_b else left) @ (right.T if transpose_a else right)


def _put(into: Tensor, value: Tensor, accumulate: bool) -> None:
    value = value.view(into.shape)
    if accumulate:
        into.add_(value)
    else:
        into.copy_(value)


def generic_gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, quantizer: Any,
    out_dtype: Any, bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool,
    workspace: Any, workspace_size: int, accumulate: bool, split_accumulator: bool,
    comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Any]:  # fmt: skip
    """A product with a bias, or the gradient of one (then the bias's gradient too)."""
    _only("generic_gemm", quantizer is None and not gelu and comm_overlap is None and alpha == 1.0)
    value, bias_gradient = _product(a, transa, b, transb), None
    if bias is not None and grad:
        bias_gradient = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        value = value + bias.float()
    if out is not None:
        _put(out, value, accumulate)
    else:
        shape = value.shape if transb else (*b.shape[:-1], value.shape[-1])
        out = value.to(_dtype(out_dtype, a.dtype)).view(shape)
    return out, bias_gradient, None, extra_output


def te_general_grouped_gemm(
    a: list[Tensor], transa: bool, b: list[Tensor], transb: bool, out: list[Tensor],
    out_dtype: Any, m_splits: list[int], bias: list[Tensor], bias_dtype: Any, single_output: bool,
    pre_gelu_out: Any, grad: bool, workspaces: Any, workspace_size: int, accumulate: bool,
    split_accumulator: bool, multiprocessors: int,
) -> list[Tensor]:  # fmt: skip
    """One product for each expert, into rows of one tensor or into one tensor each."""
    start = 0
    for index, (one_a, one_b) in enumerate(zip(a, b, strict=True)):
        value = _product(one_a, transa, one_b, transb)
        biased = bool(bias) and bias[index].numel() > 0
        if biased and grad:
            bias[index].copy_(one_b.float().sum(0))
        elif biased:
            value = value + bias[index].float()
        if single_output:
            target = out[0][start : start + m_splits[index]]
            start += m_splits[index]
        else:
            target = out[index]
        if target.numel():
            _put(target, value, accumulate)
    return bias


def _in_place_of(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None, quantizer: Any,
    dtype: Any, margin: int, zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of ``[tokens, width]``; returns the means and the factors as well."""
    _only("layernorm_fwd", quantizer is None and not zero_centered)
    wide = x.float()
    mean = wide.mean(-1)
    centred = wide - mean[:, None]
    factor = (centred.square().mean(-1) + eps).rsqrt()
    value = centred * factor[:, None] * weight.float() + bias.float()
    return _in_place_of(out, value.to(_dtype(dtype, x.dtype))), mean, factor


def layernorm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, factor: Tensor, weight: Tensor, margin: int,
    zero_centered: bool, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input, the weight and the bias."""
    normal = (x.float() - mean[:, None]) * factor[:, None]
    wide = grad.float().reshape(x.shape)
    weighted = wide * weight.float()
    inner = normal * (weighted * normal).mean(-1, keepdim=True)
    d_x = factor[:, None] * (weighted - weighted.mean(-1, keepdim=True) - inner)
    return d_x.to(x.dtype), (wide * normal).sum(0).to(weight.dtype), wide.sum(0).to(weight.dtype)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any,
    margin: int, zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    """Of ``[tokens, width]``; returns the factors as well."""
    _only("rmsnorm_fwd", quantizer is None and not zero_centered)
    wide = x.float()
    factor = (wide.square().mean(-1) + eps).rsqrt()
    value = wide * factor[:, None] * weight.float()
    return _in_place_of(out, value.to(_dtype(dtype, x.dtype))), None, factor


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, factor: Tensor, weight: Tensor, margin: int, zero_centered: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the input and the weight."""
    normal = x.float() * factor[:, None]
    wide = grad.float().reshape(x.shape)
    weighted = wide * weight.float()
    d_x = factor[:, None] * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (wide * normal).sum(0).to(weight.dtype)


def _rotated(t: Tensor, angles: Tensor, sign: int) -> Tensor:
    """The first elements of each head, turned by angles of ``[length, 1, 1, width]``; with sign -1
    the transpose of that, which is the gradient."""
    width = angles.shape[-1]
    half, kept = width // 2, t[..., width:]
    angle = angles[: t.shape[0]].float()
    x = t[..., :width].float()
    along, across = x * angle.cos(), x * angle.sin()
    if sign > 0:
        crossed = torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()
    else:
        crossed = torch.cat([across[..., half:], -across[..., :half]], -1)
    return torch.cat([(along + crossed).to(t.dtype), kept], -1)


def _segments(cumulative: Tensor) -> Iterator[slice]:
    """The rows of each sequence of packed ones, from where they begin and end."""
    bounds: list[int] = cumulative.tolist()
    return (slice(begin, end) for begin, end in pairwise(bounds) if begin < end)


def _turned(t: Tensor, freqs: Tensor, ends: Tensor | None, sign: int) -> Tensor:
    """Of ``[length, batch, heads, width]``, or of packed sequences ``[tokens, heads, width]``."""
    if ends is None:
        return _rotated(t, freqs, sign)
    parts = [_rotated(t[rows].unsqueeze(1), freqs, sign).squeeze(1) for rows in _segments(ends)]
    return torch.cat(parts)


def fused_rope_forward(
    t: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool,
    ends: Tensor | None = None, *rest: Any,
) -> Tensor:  # fmt: skip
    """Rotary position embedding (arXiv:2104.09864)."""
    _only("fused_rope_forward", not interleaved)
    return _turned(t, freqs, ends, 1)


def fused_rope_backward(
    t: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool,
    ends: Tensor | None = None, *rest: Any,
) -> Tensor:  # fmt: skip
    """Its gradient."""
    return _turned(t, freqs, ends, -1)


def _each_sequence(ends: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """The parts of tensors of packed tokens ``[tokens, heads, width]``, a sequence at a time, as
    ``[1, heads, length, width]``."""
    return ([t[rows].transpose(0, 1)[None] for t in tensors] for rows in _segments(ends))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.permute(1, 2, 0, 3) for t in tensors]


def _packed(name: str, layout: Any, mask: Any, cu_q: Tensor, cu_kv: Tensor) -> bool:
    """Whether sequences are packed; of them queries are those of the keys. Parts of a sequence that
    is divided over ranks have causal masks or none."""
    packed = str(layout).rsplit("_", 1)[-1].startswith("T")  # THD, T3HD, TH3D, …
    known = "CAUSAL" in str(mask) or (not packed and "NO_MASK" in str(mask))
    known = known and (packed or "SB" in str(layout))
    _only(name, known and (not packed or torch.equal(cu_q, cu_kv)))
    return packed


def fused_attn_fwd(
    max_q: int, max_kv: int, training: bool, scale: float, dropout: float, fill: bool,
    layout: Any, bias: Any, mask: Any, softmax: Any, window: Any, cu_q: Any, cu_kv: Any,
    q: Tensor, k: Tensor, v: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Causal attention of ``[length, batch, heads, width]``, or of packed sequences."""
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    if _packed("fused_attn_fwd", layout, mask, cu_q, cu_kv):
        each = _each_sequence(cu_q, q, k, v)
        parts = [aten.attention(a, b, c, True, scale) for a, b, c in each]
        value = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
        lse = torch.cat([one[0].transpose(0, 1) for _, one in parts])
    else:
        queries, keys, values = _heads_first(q, k, v)
        out, lse = aten.attention(queries, keys, values, "CAUSAL" in str(mask), scale)
        value = out.permute(2, 0, 1, 3).contiguous()
    return [value, lse.unsqueeze(-1), state]  # in an evaluation, too


def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, fill: bool, layout: Any, bias: Any,
    mask: Any, softmax: Any, window: Any, deterministic: bool, cu_q: Any, cu_kv: Any, q: Tensor,
    k: Tensor, v: Tensor, out: Tensor, grad: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    grad = grad.view(out.shape)
    if _packed("fused_attn_bwd", layout, mask, cu_q, cu_kv):
        each = _each_sequence(cu_q, grad, q, k, v)
        parts = [aten.attention_gradients(d, a, b, c, True, scale) for d, a, b, c in each]
        back = [torch.cat([t[0].transpose(0, 1) for t in ts]) for ts in zip(*parts, strict=True)]
    else:
        d, *heads = _heads_first(grad, q, k, v)
        causal = "CAUSAL" in str(mask)
        gradients = aten.attention_gradients(d, heads[0], heads[1], heads[2], causal, scale)
        back = [t.permute(2, 0, 1, 3).contiguous() for t in gradients]
    none = torch.empty(0, device=q.device)
    return [*back, none, none]


CALLS: tuple[Callable[..., Any], ...] = (
    generic_gemm, te_general_grouped_gemm, layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd,
    fused_rope_forward, fused_rope_backward, fused_attn_fwd, fused_attn_bwd,
)  # fmt: skip


def _holders(name: str) -> Iterator[ModuleType]:
    """Modules of Transformer Engine that have the C++ function of this name."""
    for key, module in list(sys.modules.items()):
        found = vars(module).get(name) if key.startswith("transformer_engine") else None
        if type(found).__name__ in ("builtin_function_or_method", "PyCapsule") or (
            found is not None and "pybind" in type(found).__name__
        ):
            yield module


def replace_calls(calls: Iterable[Callable[..., Any]]) -> None:
    """Puts calls in the place of C++ functions of their names, once Transformer Engine is
    imported."""
    for call in calls:
        for module in _holders(call.__name__):
            setattr(module, call.__name__, call)


def _order(row_id_map: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by expert, and the map as booleans of ``[tokens, experts]``."""
    routed = row_id_map.bool()
    tokens = torch.arange(routed.size(0), device=routed.device)
    by_expert = routed.T.contiguous()
    return tokens.expand(routed.size(1), -1).masked_select(by_expert), by_expert


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """The routing map itself: the other functions read it."""
    return routing_map.to(torch.int32)


def permute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: Any, num_tokens: int,
    num_experts: int, num_out_tokens: int, hidden_size: int, scale_hidden_dim: Any,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    """Rows of tokens in the order of experts."""
    order, by_expert = _order(row_id_map)
    _only("permute_with_mask_map", order.numel() == num_out_tokens)
    permuted = None if probs is None else probs.T.contiguous().masked_select(by_expert)
    return inp.index_select(0, order), None, permuted


def unpermute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, merging_probs: Any, permuted_probs: Tensor | None,
    num_tokens: int, num_experts: int, hidden_size: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums of the rows of each token, in fp32."""
    _only("unpermute_with_mask_map", merging_probs is None)
    order, by_expert = _order(row_id_map)
    total = torch.zeros(num_tokens, hidden_size, dtype=torch.float32, device=inp.device)
    total.index_add_(0, order, inp.float())
    probs = None
    if permuted_probs is not None:
        spread = torch.zeros(by_expert.shape, dtype=permuted_probs.dtype, device=inp.device)
        probs = spread.masked_scatter(by_expert, permuted_probs).T.contiguous()
    return total.to(inp.dtype), probs


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """For each row of the sorted chunks the row that it comes from."""
    sizes: list[int] = split_sizes.tolist()
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    rows = [
        row
        for index in sorted_indices.tolist()
        for row in range(starts[index], starts[index] + sizes[index])
    ]
    return torch.tensor(rows, dtype=torch.int64).to(split_sizes.device)


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Chunks of rows in another order, or back."""

    def moved(t: Tensor) -> Tensor:
        if is_forward:
            return t.index_select(0, row_id_map)
        return torch.empty_like(t).index_copy_(0, row_id_map, t)

    return moved(inp), None if probs is None else moved(probs)


PERMUTATION: tuple[Callable[..., Any], ...] = (
    make_row_id_map, permute_with_mask_map, unpermute_with_mask_map, make_chunk_sort_map,
    sort_chunks_by_map,
)  # fmt: skip
"""In the place of Triton kernels."""


def replace_permutation(module: ModuleType, calls: Iterable[Callable[..., Any]]) -> None:
    """Called once the module of Triton kernels is imported, before others take its functions."""
    for call in calls:
        setattr(module, call.__name__, call)
