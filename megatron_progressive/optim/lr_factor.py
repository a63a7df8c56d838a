"""The factor of each tensor's learning rate, where muP asks for one. Needs no torch."""

from __future__ import annotations

import math

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import MATRIX, ROWS, VECTOR, TensorSpec
from megatron_progressive.optim.rules import MUON, NSGD, rule_of

ADAMW_WIDTH = 64
"""The width at which AdamW under muP has the plain learning rate for its matrices."""


def lr_factor(spec: TensorSpec, optim: OptimSection) -> float:
    """The number by which the learning rate of one tensor is multiplied; 1 where it has no scaling.

    The factor brings the update of the tensor's rule to ``spec.scaling``. The rules' own updates
    are:

    - Muon with ``scale: out_in``: spectral norm sqrt(n_out / n_in), which is the ``matrix`` norm.
      Its entries' RMS is sqrt(n_out / n_in) / sqrt(max(n_out, n_in)): rows are multiplied up to 1.
    - NSGD: an RMS of 1.
    - AdamW: entries of about 1, in step where gradients are: a spectral norm up to
      sqrt(n_out n_in). The spectral condition then asks for 1 / n_in (:data:`ADAMW_WIDTH` / n_in,
      so that learning rates keep their usual size; Yang et al. 2022, arXiv 2203.03466, table 8). A
      tied table moves the logits by its update's RMS x h x the norm's gain, h^-1/2 in all: the
      head's bound wins, and the lookup learns slower at greater widths.
    """
    scaling = spec.scaling
    if scaling is None or not spec.trainable:
        return 1.0
    rule = rule_of(spec, optim)
    if scaling.form == VECTOR or rule == NSGD:
        return scaling.update
    n_out, n_in = spec.shape[-2:]
    if rule == MUON:
        if scaling.form == MATRIX:
            return scaling.update
        return scaling.update * math.sqrt(max(n_out, n_in) * n_in / n_out)
    if scaling.form == MATRIX:
        return scaling.update * ADAMW_WIDTH / n_in
    if scaling.form == ROWS:
        return scaling.update
    return scaling.update * math.sqrt(ADAMW_WIDTH / n_in)
