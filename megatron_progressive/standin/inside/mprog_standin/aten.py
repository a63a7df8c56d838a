"""Operations that the host's torch computes otherwise than CUDA's, or not at all."""

from __future__ import annotations

from typing import Any

import torch

from .checks import Refused

Tensor = torch.Tensor


def refuse_cpu_tensors(name: str, leaves: list[Any]) -> None:
    """NCCL takes tensors of the device.

    Raises:
        Refused: a process group without a backend for CPU tensors was handed one.
    """
    import torch.distributed as dist

    if not any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in leaves):
        return
    for leaf in leaves:
        if not isinstance(leaf, torch.ScriptObject):
            continue
        try:
            group = dist.ProcessGroup.unbox(leaf)
        except (RuntimeError, TypeError):  # a reduction, which is an object as well
            continue
        if torch.device("cpu") not in group._device_types:
            raise Refused(f"stand-in: c10d.{name} was handed a CPU tensor, and NCCL takes none")


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, float]:
    """Scaled products of queries and keys in fp32, of ``[batch, heads, length, width]``."""
    factor = q.size(-1) ** -0.5 if scale is None else scale
    scores = (q.float() @ k.float().mT) * factor
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, factor


def _for_each_head(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Keys and values of a group of query heads, once for each of them."""
    return [t.repeat_interleave(q.size(1) // t.size(1), 1) for t in others]


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of ``[batch, heads, length, width]``, and the logarithm of each row's sum."""
    keys, values = _for_each_head(q, k, v)
    scores, _ = _scores(q, keys, causal, scale)
    return (scores.softmax(-1) @ values.float()).to(q.dtype), scores.logsumexp(-1)


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention` for queries, keys and values."""
    keys, values = _for_each_head(q, k, v)
    scores, factor = _scores(q, keys, causal, scale)
    weights, grad = scores.softmax(-1), grad.float()
    d_values, d_weights = weights.mT @ grad, grad @ values.float().mT
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * factor
    d_keys = d_scores.mT @ q.float()
    group = q.size(1) // k.size(1)
    d_keys, d_values = (t.unflatten(1, (-1, group)).sum(2) for t in (d_keys, d_values))
    d_queries = d_scores @ keys.float()
    return d_queries.to(q.dtype), d_keys.to(k.dtype), d_values.to(v.dtype)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if bias is not None or dropout:
        raise Refused("stand-in: attention with a bias or dropout is not computed")
    seed = torch.zeros((), dtype=torch.int64)
    return *attention(q, k, v, causal, scale), seed, seed.clone()


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, seed: Any,
    offset: Any, dropout: float, mask: Any, causal: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return *attention_gradients(grad, q, k, v, causal, scale), None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    if dropout:
        raise Refused("stand-in: attention with dropout is not computed")
    state = torch.zeros(2, dtype=torch.int64)
    out, lse = attention(q, k, v, causal, scale)
    return out, lse, None, None, q.size(2), k.size(2), state, state.clone(), torch.zeros(0)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: Any, cum_k: Any,
    max_q: int, max_k: int, dropout: float, causal: bool, seed: Any, offset: Any, *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return attention_gradients(grad, q, k, v, causal, scale)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float = 0.0,
    causal: bool = False, debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    if bias is not None:
        raise Refused("stand-in: attention with a bias is not computed")
    return _flash(q, k, v, dropout, causal, scale=scale)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Any, offset: Any,
    bias: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout: float, causal: bool, *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return attention_gradients(grad, q, k, v, causal, scale)


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x²) + ε) · weight`` (arXiv:1910.07467) in fp32, and the factor."""
    dims = tuple(range(-len(shape), 0))
    wide = x.float()
    small = torch.finfo(x.dtype).eps if eps is None else eps
    factor = (wide.square().mean(dims, keepdim=True) + small).rsqrt()
    out = wide * factor
    return (out if weight is None else out * weight.float()).to(x.dtype), factor


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], factor: Tensor, weight: Tensor | None, mask: Any
) -> tuple[Tensor, Tensor | None]:
    dims = tuple(range(-len(shape), 0))
    normal, grad = x.float() * factor, grad.float()
    weighted = grad if weight is None else grad * weight.float()
    d_x = factor * (weighted - normal * (weighted * normal).mean(dims, keepdim=True))
    leading = tuple(range(x.dim() - len(shape)))
    d_weight = None if weight is None else (grad * normal).sum(leading).to(weight.dtype)
    return d_x.to(x.dtype), d_weight


INSTEAD = {
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
}
"""By name: what is computed on the twins in place of an operation that CPUs lack."""
