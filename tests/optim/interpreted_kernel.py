"""The symmetric kernel under Triton's interpreter, which must be chosen before Triton's import: a
program of its own. Prints one JSON list: [error / norm, symmetric, ...] a case."""

from __future__ import annotations

import json

import torch

CASES = [
    ("float32", 1, 32, 48, False),
    ("float32", 2, 33, 50, True),
    ("bfloat16", 2, 40, 16, False),
    ("float16", 1, 65, 20, True),
]


def measured(dtype: str, batch: int, rows: int, columns: int, strided: bool) -> list[float]:
    """Relative errors of X X^T and of 2.03 A A - 4.8 A, and whether each is symmetric."""
    from megatron_progressive.optim.symmetric import symmetric_product

    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(batch, rows, columns, generator=generator).to(getattr(torch, dtype))
    if strided:
        x = x.mT.contiguous().mT
    gram = symmetric_product(x, tile=16, depth=16, upcasts=True)
    poly = symmetric_product(
        gram, scale=2.03, added=gram, added_scale=-4.8, tile=16, depth=16, upcasts=True
    )
    found = []
    for result, exact in (
        (gram, x.double() @ x.double().mT),
        (poly, 2.03 * gram.double() @ gram.double() - 4.8 * gram.double()),
    ):
        error = (result.double() - exact).norm() / exact.norm()
        found += [float(error), float(torch.equal(result, result.mT))]
    return found


if __name__ == "__main__":
    print(json.dumps([measured(*case) for case in CASES]))
