"""Newton-Schulz orthogonalisation, batched over matrices of one shape."""

from __future__ import annotations

import torch

# Keller Jordan's quintic, five steps (kellerjordan.github.io/posts/muon, December 2024):
# singular values end between about 0.7 and 1.2, which is as good for Muon as exactly 1.
JORDAN = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices U V^T, approximately.

    Args:
        matrices: [..., n_out, n_in], any leading batch axes, fp32.
        steps: iterations of X <- a X + (b A + c A A) X with A = X X^T.
        eps: added to the Frobenius norm, so that a zero matrix stays zero.

    Returns: a new tensor of the same shape.
    """
    a, b, c = JORDAN
    x: torch.Tensor = matrices
    tall = x.size(-2) > x.size(-1)
    if tall:  # A = X X^T on the shorter side
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
