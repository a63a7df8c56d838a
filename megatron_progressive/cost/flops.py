"""Training FLOPs of a run, counted from the tables of global tensors.

What is counted, a multiply-add being two FLOPs:

- every linear, 2 n_out n_in a token, the LM head with its padded vocabulary included (the
  lookup of embeddings and positions has no matrix product: 0). Of the routed experts a token
  pays for its ``top_k``, and for the router;
- of models of images, where an image takes the place of a token, every convolution: 2 n_out n_in
  for each place of its output, n_in being its inputs times its window;
- attention scores and values, on the **full** S x S square: 2 S (q + v) a token, layer and query
  head with queries of width q and values of width v, although the mask is causal. It is the
  convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) and of torch's
  ``FlopCounterMode``, which the tests compare with; a flash kernel that skips masked blocks does
  up to half of it. Fewer heads of keys and values (grouped queries) change nothing here;
- multi-token prediction: each module's layer, its projection of two inputs, and the LM head once
  more (DeepSeek-V3, arXiv 2412.19437, section 2.2);
- the backward pass, twice the forward pass, but for the first convolution of an image, whose
  input has no gradient. Recomputed activations are not counted: the number
  belongs to the model, not to the kernel or the memory budget;
- Muon's Newton-Schulz, once a matrix and step, also where ranks repeat it. Every expert's
  matrices count: they all step, whatever tokens they saw.

Ignored because they are a vanishing share: elementwise work (norms, activations, softmax, bias,
rotation, cross-entropy, momentum, AdamW, NSGD), and moving tokens to their experts. Validation
is not training and is not counted either.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.models import model_shape, parameter_count, tensor_table
from megatron_progressive.models.base import ModelShape, TensorSpec, TransformerShape
from megatron_progressive.optim.coefficients import ns_steps
from megatron_progressive.optim.rules import MUON, rule_of

_LOOKUPS = ("embedding", "position")
_BACKWARD = 2  # gradients of inputs and of weights cost one forward pass each


@dataclass(frozen=True)
class Phase:
    """The steps of a run between two expansions."""

    first_step: int
    """The first step, counted from 1."""
    last_step: int
    """The last step, which belongs to the phase; an expansion that ends the phase happens after
    it."""
    num_layers: int
    params: int
    flops: int
    """The FLOPs of the whole phase."""

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


def _multiplies(spec: TensorSpec) -> bool:
    """Whether tokens are multiplied by a tensor."""
    return (
        spec.trainable and len(spec.shape) > 1 and spec.role != "bias" and spec.role not in _LOOKUPS
    )


def linear_flops(spec: TensorSpec, shape: TransformerShape) -> int:
    """FLOPs of one token's product with a tensor; for a routed expert they are multiplied by its
    share of the tokens."""
    if not _multiplies(spec):
        return 0
    if spec.expert is None or shape.moe is None:
        return 2 * spec.numel
    return 2 * spec.numel * shape.moe.top_k // shape.moe.num_experts


def attention_flops(shape: TransformerShape) -> int:
    """FLOPs of one token's scores and values in one layer."""
    widths = 2 * shape.head_dim
    if shape.mla is not None:
        widths = shape.mla.qk_head_dim + shape.mla.v_head_dim
    return 2 * shape.sequence_length * shape.num_attention_heads * widths


@lru_cache(maxsize=64)
def forward_flops_per_token(shape: ModelShape) -> int:
    """FLOPs of one token's forward pass in a sequence of ``shape.sequence_length`` tokens; for
    models of images, of one image's."""
    linears = [spec for spec in tensor_table(shape).values() if _multiplies(spec)]
    if not isinstance(shape, TransformerShape):
        return 2 * sum(spec.numel * spec.products for spec in linears)
    routed = sum(spec.numel for spec in linears if spec.expert is not None)
    numel = sum(spec.numel for spec in linears) - routed
    if shape.moe is not None:
        numel += routed * shape.moe.top_k // shape.moe.num_experts
    # a tied head multiplies by the embedding's weight; each prediction module has the head again
    heads = int(shape.tie_embeddings) + shape.mtp_depth
    numel += heads * shape.padded_vocab_size * shape.hidden_size
    layers = shape.num_layers + shape.mtp_depth
    return 2 * numel + attention_flops(shape) * layers


@lru_cache(maxsize=64)
def _training_flops_per_token(shape: ModelShape) -> int:
    """FLOPs of the forward and the backward pass of one token or image."""
    linears = [spec for spec in tensor_table(shape).values() if _multiplies(spec)]
    of_data = sum(2 * spec.numel * spec.products for spec in linears if spec.on_data)
    return (1 + _BACKWARD) * forward_flops_per_token(shape) - of_data


def muon_matrices(spec: TensorSpec, optim: OptimSection) -> list[tuple[int, int]]:
    """The size (n_out, n_in) of each matrix of a tensor that Muon orthogonalises; none for tensors
    with other rules.

    Blocks of rows (query, key and value) are matrices of their own, and so are gate and up.
    Embeddings, positions and the head count where ``optim.embeddings`` is ``muon``.
    """
    if not spec.trainable or rule_of(spec, optim) != MUON:
        return []
    *stack, n_out, n_in = spec.shape
    if not spec.row_blocks:
        return [(n_out, n_in)] * math.prod(stack)
    groups = n_out // sum(spec.row_blocks)
    return [(groups * rows, n_in) for rows in spec.row_blocks]


def newton_schulz_flops(n_out: int, n_in: int, steps: int) -> int:
    """FLOPs of orthogonalising one matrix.

    Each iteration X <- a X + (b A + c A A) X with A = X X^T has three products on the shorter side
    n and the longer one m: X X^T (2 n^2 m), A A (2 n^3) and B X (2 n^2 m).
    """
    n, m = min(n_out, n_in), max(n_out, n_in)
    return steps * (4 * n * n * m + 2 * n**3)


@lru_cache(maxsize=64)
def optimizer_flops(shape: ModelShape, optim: OptimSection) -> int:
    """FLOPs of one optimizer step: those of Newton-Schulz for every Muon matrix; 0 for AdamW."""
    steps = ns_steps(optim)
    counts = Counter(
        matrix for spec in tensor_table(shape).values() for matrix in muon_matrices(spec, optim)
    )
    return sum(
        count * newton_schulz_flops(n_out, n_in, steps) for (n_out, n_in), count in counts.items()
    )


@lru_cache(maxsize=64)
def largest_matrix_flops(shape: ModelShape, optim: OptimSection) -> int:
    """FLOPs of Newton-Schulz for the most expensive matrix; 0 for AdamW."""
    steps = ns_steps(optim)
    matrices = {m for spec in tensor_table(shape).values() for m in muon_matrices(spec, optim)}
    return max((newton_schulz_flops(*matrix, steps) for matrix in matrices), default=0)


def step_tokens(shape: ModelShape, config: RunConfig) -> int:
    """The number of tokens in one optimizer step; for models of images, of images."""
    return config.train.global_batch * shape.sample_units


def step_flops(shape: ModelShape, config: RunConfig) -> int:
    """FLOPs of one training step of ``shape``: forward, backward and optimizer."""
    tokens = step_tokens(shape, config)
    return _training_flops_per_token(shape) * tokens + optimizer_flops(shape, config.optim)


def phases(config: RunConfig) -> list[Phase]:
    """The phases of a run in order, of which there is one more than there are expansions."""
    depths = [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]
    ends = [*config.expansion_steps(), config.last_step]
    found, first = [], 1
    for depth, last in zip(depths, ends, strict=True):
        shape = model_shape(config, depth)
        flops = (last - first + 1) * step_flops(shape, config)
        found.append(Phase(first, last, depth, parameter_count(shape), flops))
        first = last + 1
    return found


def total_flops(config: RunConfig) -> int:
    """Training FLOPs of a whole run."""
    return sum(phase.flops for phase in phases(config))


def steps_within(config: RunConfig, flops: float) -> int:
    """The greatest number of steps with which a run costs no more than ``flops``; 0 where one step
    costs more. An expansion at a fraction of the steps moves with them, so that of more steps no
    run costs less; a run misses ``flops`` by less than one step of its full depth."""

    def cost(steps: int) -> int:
        return total_flops(replace(config, train=replace(config.train, steps=steps)))

    config = replace(config, train=replace(config.train, stop_after=None))
    enough = 1
    while cost(enough) <= flops:
        enough *= 2
    low, high = enough // 2, enough  # cost(low) <= flops < cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= flops else (low, middle)
    return low
