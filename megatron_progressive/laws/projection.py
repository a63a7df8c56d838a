"""A second, independent solver of the laws, by variable projection.

With exponents given, ``E + sum of A_i / X_i^alpha_i`` is linear in E and the coefficients: what is
left to search has one dimension an exponent (Golub and Pereyra 1973). It minimises the squares of
the relative difference of losses, with E and the coefficients not below 0; it has neither a Huber
loss, nor a logarithm of the loss, nor a gradient. Where it disagrees with :mod:`.solver`, the law
rests on the method, as with an outlier or a valley of equally good laws.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import minimize, nnls

from megatron_progressive.laws.solver import LARGEST_EXPONENT, Array

_GRID = np.geomspace(0.02, 2.5, 16)
_STARTS = 3
"""How many of the best points of the grid a simplex search starts from."""


def project(logs: Array, losses: Array) -> Array:
    """The law that fits these cells, as [2 k + 1] coefficients, exponents and E, with inputs
    centred as in ``logs``.

    Args:
        logs: the centred natural logarithms of the inputs, [cells, k].
        losses: the final losses in nats per token, [cells].
    """
    count = logs.shape[1]

    def linear(exponents: Array) -> tuple[Array, float]:
        """The coefficients and E, and the norm of the relative residual."""
        terms = np.column_stack([np.exp(-exponents * logs), np.ones(len(logs))])
        found, norm = nnls(terms / losses[:, None], np.ones(len(logs)))
        return np.asarray(found), float(norm)

    def cost(exponents: Array) -> float:
        outside = np.clip(exponents, 0, LARGEST_EXPONENT)
        far = float(np.abs(exponents - outside).sum())
        return linear(outside)[1] * (1 + far) + far

    grid = sorted(map(np.array, itertools.product(_GRID, repeat=count)), key=cost)
    searched = [
        minimize(cost, at, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14})
        for at in grid[:_STARTS]
    ]
    best = np.clip(min(searched, key=lambda result: result.fun).x, 0, LARGEST_EXPONENT)
    coefficients = linear(best)[0]
    return np.concatenate([coefficients[:count], best, coefficients[count:]])
