"""muP in its spectral form, over width and depth: one table of how each tensor scales.

Width: every matrix has a spectral norm of about sqrt(n_out / n_in), and so has its update (Yang,
Simon and Bernstein 2023, arXiv 2310.17813, condition 1). A table that is only looked up has
one-hot inputs, so each of its rows is a matrix of n_in = 1: entries of RMS 1, updates of RMS lr.

Depth: a model of L layers adds 2 L branches to the residual stream. Their updates point the same
way, so the change of each branch's output scales with 1 / (2 L). That factor lies in the last
linear of the branch, initial values and updates alike; what is inside the branch then moves as
it does at any depth, and no layer is left to lazy learning (Dey et al. 2025, arXiv 2505.01618,
alpha = 1; the 1 / sqrt(L) of Yang, Yu, Zhu and Hayou 2023, arXiv 2310.02244, is alpha = 1/2).

Nothing is multiplied in the forward pass: everything lies in initial values and in factors of the
learning rate, so that checkpoints and exports are of the plain architecture. A tied table is both
lookup (rows of RMS 1) and head (RMS 1 / sqrt(h)): the gain of the norm before the head, 1 / sqrt(h)
at the start, stands between the two.

Heads should keep their width when a model gets wider (more heads): scores are divided by the root
of a head's width as everywhere, not by the width.

Expansion: from step tau on, every tensor has the target's factors. New layers are drawn with the
target's depth; survivors keep their weights, and their last linears, drawn and trained for the
source's L, now move 1 / L_target as far a step. That is what keeps the sum over branches at the
learning rate; momentum is stored before the factor, so it carries over. A survivor's branch stays
larger than a new one's at first by the ratio of the depths.
"""

from __future__ import annotations

import dataclasses

from megatron_progressive.models.base import (
    LAYER_PREFIX,
    MATRIX,
    ROWS,
    TIED_ROWS,
    VECTOR,
    Scaling,
    TensorSpec,
    TransformerShape,
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
"""The norm in which the size of a role's tensors counts; roles that the optimizer does not update
are left out."""

OUTSIDE, INNER, LAST = "outside", "inner", "last"
"""Where a tensor stands: outside of the residual branches, inside a branch, or at the end of
one."""

BRANCHES: dict[str, tuple[float, float]] = {
    OUTSIDE: (0.0, 0.0),
    INNER: (0.0, 0.0),
    LAST: (-1.0, -1.0),
}
"""The exponents of 2 L in a tensor's initial values and in its updates."""


LOOKUP_STD = 0.25
"""Initial RMS of a looked-up row, at every width. Constants are free; with 1 a tiny model learned
slower, since an update of RMS lr turns a large row less."""


def place_of(name: str, spec: TensorSpec) -> str:
    """Where a tensor stands in the residual stream: ``outside``, ``inner`` or ``last``."""
    if not name.startswith(LAYER_PREFIX) and ".mtp_model_layer." not in name:
        return OUTSIDE
    return LAST if spec.last_linear else INNER


def with_mup(table: dict[str, TensorSpec], shape: TransformerShape) -> dict[str, TensorSpec]:
    """The family's table with the initial values of muP and with a :class:`.base.Scaling` for each
    tensor."""
    return {name: _scaled(name, spec, shape) for name, spec in table.items()}


def _scaled(name: str, spec: TensorSpec, shape: TransformerShape) -> TensorSpec:
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
        return dataclasses.replace(spec, std=init * LOOKUP_STD, scaling=scaling)
    if form == MATRIX:
        std = init * spectral_std(*spec.shape[-2:])
        return dataclasses.replace(spec, std=std, scaling=Scaling(MATRIX, update))
    gain = 1.0
    if shape.tie_embeddings and ".final_layernorm." in name:  # also a prediction module's
        gain = shape.hidden_size**-0.5
    return dataclasses.replace(spec, gain=gain, scaling=Scaling(VECTOR, update * gain))
