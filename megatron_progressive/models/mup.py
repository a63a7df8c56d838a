"""muP in its spectral form, over width and depth: one table of how each tensor scales.

Width: every matrix has a spectral norm of about sqrt(n_out / n_in), and so has its update (Yang,
Simon and Bernstein 2023, arXiv 2310.17813, condition 1). A table that is only looked up has
one-hot inputs, so each of its rows is a matrix of n_in = 1: entries of RMS 1, updates of RMS lr.

Depth: a model of L layers adds 2 L branches to the residual stream. Their initial outputs are
independent and their updates are not, so the sum keeps its size when a branch's initial output
scales with (2 L)^-1/2 and the change of its output with (2 L)^-1 (Yang, Yu, Zhu and Hayou 2023,
arXiv 2310.02244). What is multiplied into the branch's last linear takes the rest of the factor
from that linear's values, hence :data:`BRANCHES`.

Nothing is multiplied in the forward pass: everything lies in initial values and in factors of the
learning rate, so that checkpoints and exports are of the plain architecture. A tied table is both
lookup (RMS 1) and head (RMS 1 / sqrt(h)): the gain of the norm before the head, 1 / sqrt(h) at the
start, stands between the two.
"""

from __future__ import annotations

import dataclasses

from megatron_progressive.models.base import (
    LAYER_PREFIX,
    MATRIX,
    ROWS,
    TIED_ROWS,
    VECTOR,
    ModelShape,
    Scaling,
    TensorSpec,
    spectral_std,
)

FORMS: dict[str, str] = {
    "embedding": ROWS,
    "position": ROWS,
    "head": MATRIX,
    "qkv": MATRIX,
    "proj": MATRIX,
    "q_proj": MATRIX,
    "q_down": MATRIX,
    "q_up": MATRIX,
    "kv_down": MATRIX,
    "kv_up": MATRIX,
    "fc1": MATRIX,
    "fc2": MATRIX,
    "router": MATRIX,
    "mtp_proj": MATRIX,
    "bias": VECTOR,
    "norm_gain": VECTOR,
    "norm_bias": VECTOR,
}
"""Which norm a role is measured in; roles that the optimizer does not have are left out."""

OUTSIDE, INNER, LAST = "outside", "inner", "last"
"""Where a tensor stands: outside the residual branches, inside one, or at its end."""

import os
_A = float(os.environ.get("MUP_ALPHA", "1.0"))
BRANCHES: dict[str, tuple[float, float]] = {
    OUTSIDE: (0.0, 0.0),
    INNER: (0.0, -(1-_A)),
    LAST: (-_A, -1.0),
}
"""Exponents of 2 L in a tensor's initial values and in its updates."""


def place_of(name: str, spec: TensorSpec) -> str:
    """``outside``, ``inner`` or ``last``: where a tensor stands in the residual stream."""
    if not name.startswith(LAYER_PREFIX) and ".mtp_model_layer." not in name:
        return OUTSIDE
    return LAST if spec.last_linear else INNER


def with_mup(table: dict[str, TensorSpec], shape: ModelShape) -> dict[str, TensorSpec]:
    """The family's table with muP's initial values and :class:`.base.Scaling`."""
    return {name: _scaled(name, spec, shape) for name, spec in table.items()}


def _scaled(name: str, spec: TensorSpec, shape: ModelShape) -> TensorSpec:
    if spec.role not in FORMS:
        return spec
    form = FORMS[spec.role]
    init, update = (
        float(2 * max(1, shape.num_layers)) ** exponent
        for exponent in BRANCHES[place_of(name, spec)]
    )
    if form == ROWS:
        tied = shape.tie_embeddings and spec.role == "embedding"
        scaling = Scaling(TIED_ROWS if tied else ROWS, update)
        return dataclasses.replace(spec, std=init * float(os.environ.get("MUP_EMB", "1")), scaling=scaling)
    if form == MATRIX:
        std = init * spectral_std(*spec.shape[-2:])
        return dataclasses.replace(spec, std=std, scaling=Scaling(MATRIX, update))
    gain = 1.0
    if shape.tie_embeddings and ".".join(name.split(".")[-2:-1]) == "final_layernorm":
        gain = shape.hidden_size**-0.5
    return dataclasses.replace(spec, gain=gain, scaling=Scaling(VECTOR, update * gain))
