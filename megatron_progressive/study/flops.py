"""Training FLOPs of a run, counted from the tables of global tensors.

What is counted, a multiply-add being two FLOPs:

- every linear, 2 n_out n_in a token, the LM head with its padded vocabulary included (the
  lookup of embeddings and positions has no matrix product: 0);
- attention scores and values, on the **full** S x S square: 4 S h a token and layer, although
  the mask is causal. It is the convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
  appendix B) and of torch's ``FlopCounterMode``, which the tests compare with; a flash kernel
  that skips masked blocks does up to half of it;
- the backward pass, twice the forward pass. Recomputed activations are not counted: the number
  belongs to the model, not to the kernel or the memory budget;
- Muon's Newton-Schulz, once a matrix and step, also where ranks repeat it.

Ignored because they are a vanishing share: elementwise work (norms, activations, softmax, bias,
cross-entropy, momentum, AdamW, NSGD). Validation is not training and is not counted either.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.models import model_shape, parameter_count, tensor_table
from megatron_progressive.models.base import ModelShape, TensorSpec

_LINEARS = ("qkv", "proj", "fc1", "fc2", "head")
_EMBEDDINGS = ("embedding", "position", "head")
_BACKWARD = 2  # gradients of inputs and of weights cost one forward pass each


@dataclass(frozen=True)
class Phase:
    """The steps between two expansions."""

    first_step: int
    """1-based, inclusive."""
    last_step: int
    """Inclusive; an expansion that ends the phase happens after it."""
    num_layers: int
    params: int
    flops: int
    """Of the whole phase."""

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


def forward_flops_per_token(shape: ModelShape) -> int:
    """FLOPs of one token's forward pass in a sequence of ``shape.sequence_length`` tokens."""
    table = tensor_table(shape)
    linears = sum(2 * spec.numel for spec in table.values() if spec.role in _LINEARS)
    if shape.tie_embeddings:  # the head multiplies by the embedding's weight
        linears += sum(2 * spec.numel for spec in table.values() if spec.role == "embedding")
    attention = 4 * shape.sequence_length * shape.hidden_size * shape.num_layers
    return linears + attention


def muon_matrices(spec: TensorSpec, optim: OptimSection) -> list[tuple[int, int]]:
    """(n_out, n_in) of each matrix of a tensor that Muon orthogonalises; empty for other rules.

    Query, key and value are matrices of their own (``row_blocks``). Embeddings, positions and
    the head count where ``optim.embeddings`` is ``muon``.
    """
    if optim.name != "muon_nsgd" or len(spec.shape) != 2:
        return []
    if spec.role in _EMBEDDINGS and optim.embeddings != "muon":
        return []
    n_out, n_in = spec.shape
    if not spec.row_blocks:
        return [(n_out, n_in)]
    groups = n_out // sum(spec.row_blocks)
    return [(groups * rows, n_in) for rows in spec.row_blocks]


def newton_schulz_flops(n_out: int, n_in: int, ns_steps: int) -> int:
    """FLOPs to orthogonalise one matrix.

    Each iteration X <- a X + (b A + c A A) X with A = X X^T has three products on the shorter
    side n and the longer one m: X X^T (2 n^2 m), A A (2 n^3) and B X (2 n^2 m).
    """
    n, m = min(n_out, n_in), max(n_out, n_in)
    return ns_steps * (4 * n * n * m + 2 * n**3)


def optimizer_flops(shape: ModelShape, optim: OptimSection) -> int:
    """FLOPs of one optimizer step: Newton-Schulz of every Muon matrix, 0 for AdamW."""
    return sum(
        newton_schulz_flops(n_out, n_in, optim.ns_steps)
        for spec in tensor_table(shape).values()
        for n_out, n_in in muon_matrices(spec, optim)
    )


def step_tokens(shape: ModelShape, config: RunConfig) -> int:
    """Tokens of one optimizer step."""
    return config.train.global_batch * shape.sequence_length


def step_flops(shape: ModelShape, config: RunConfig) -> int:
    """FLOPs of one training step of ``shape``: forward, backward and optimizer."""
    tokens = step_tokens(shape, config)
    model = (1 + _BACKWARD) * forward_flops_per_token(shape) * tokens
    return model + optimizer_flops(shape, config.optim)


def phases(config: RunConfig) -> list[Phase]:
    """The phases of a run, in order: one more than it has expansions."""
    depths = [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]
    ends = [*config.expansion_steps(), config.train.steps]
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
