"""Newton-Schulz orthogonalisation, batched over matrices of one shape."""

from __future__ import annotations

import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.coefficients import Coefficients, ns_coefficients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types to compute in, by their names in ``optim.ns_dtype``."""


def compute_dtype(optim: OptimSection, device: torch.device) -> torch.dtype:
    """The type that a run's iteration computes in: ``optim.ns_dtype``, or fp16 on CUDA and fp32
    elsewhere.

    The default is fp16 and not bf16: after the division by the Frobenius norm nothing is above
    about 25, so the three additional bits of the mantissa count and the range does not. It has not
    run on a GPU yet.
    """
    if optim.ns_dtype is not None:
        return DTYPES[optim.ns_dtype]
    return torch.float16 if device.type == "cuda" else torch.float32


def newton_schulz(
    matrices: torch.Tensor,
    steps: int | None = None,
    eps: float = 1e-7,
    *,
    coefficients: str = "jordan",
    dtype: torch.dtype = torch.float32,
    kernel_from: int | None = None,
) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices U V^T, approximately.

    Args:
        matrices: fp32 [..., n_out, n_in], with any leading batch axes.
        steps: the number of iterations of X <- a X + (b A + c A A) X with A = X X^T; None for the
            set's own.
        eps: added to the Frobenius norm, so that a zero matrix stays zero.
        coefficients: the name of a set in :data:`.coefficients.SETS`.
        dtype: the type of the iteration; the norm is fp32.
        kernel_from: the least n of the n x n products that the symmetric kernel computes on CUDA;
            None lets it compute none.

    Returns: A new fp32 tensor of the same shape.

    Raises:
        KeyError: there is no set of this name.
    """
    plan = ns_coefficients(coefficients, steps)
    shape = matrices.shape
    tall = shape[-2] > shape[-1]
    x = matrices.reshape(-1, *shape[-2:])
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)).to(dtype)
    if kernel_from is not None and x.is_cuda and min(shape[-2:]) >= kernel_from:
        x = _with_symmetric_kernel(x.mT, plan).mT if tall else _with_symmetric_kernel(x, plan)
    else:
        for a, b, c in plan:
            # on the shorter side: X^T X of a tall matrix, which is then multiplied from the right
            gram = x.mT @ x if tall else x @ x.mT
            # products that add: no pass over the matrices between them
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x.to(torch.float32).view(shape)


def _with_symmetric_kernel(x: torch.Tensor, plan: tuple[Coefficients, ...]) -> torch.Tensor:
    """The same iteration with the symmetric kernel, which halves the cost of two of its
    products."""
    from megatron_progressive.optim.symmetric import symmetric_product

    x = x.contiguous()
    for a, b, c in plan:
        gram = symmetric_product(x)
        poly = symmetric_product(gram, scale=c, added=gram, added_scale=b)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x
