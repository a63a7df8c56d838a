"""What ranks do in the tests of context parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import GlobalBatch, in_batches
from megatron_progressive.engines.megatron.context import SequencePart
from megatron_progressive.engines.megatron.spec import CausalAttention
from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.runtime.layout import Layout
from tests.engines import on_ranks

LENGTH, SAMPLES, HEADS = 16, 3, 4


def attention_beside_torch(key_groups: int, width: int, value_width: int) -> list[float]:
    """The largest differences of the outputs and of each gradient of this rank's part from those of
    torch's attention over the whole sequence."""
    ranks = dist.get_world_size()
    groups = ProcessGroups(Layout(ranks, context=ranks))
    part = SequencePart.of(LENGTH, groups.context_rank, ranks)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(LENGTH, SAMPLES, *shape, generator=generator)

    whole = [drawn(HEADS, width), drawn(key_groups, width), drawn(key_groups, value_width)]
    weights = drawn(HEADS * value_width)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * width, num_attention_heads=HEADS,
        num_query_groups=key_groups, context_parallel_size=ranks,
    )  # fmt: skip
    cp = parallel_state.get_context_parallel_group()
    attention = CausalAttention(config, pg_collection=SimpleNamespace(cp=cp))
    rows = part.positions[0]
    local = [tensor[rows].requires_grad_() for tensor in whole]
    found = attention(*local, part.mask(torch.float32))
    (found * weights[rows]).sum().backward()

    leaves = [tensor.requires_grad_() for tensor in whole]
    heads_first = (tensor.permute(1, 2, 0, 3) for tensor in leaves)
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    expected = expected.permute(2, 0, 1, 3).flatten(2)
    (expected * weights).sum().backward()
    pairs = [(found, expected[rows])]
    pairs += [(a.grad, b.grad[rows]) for a, b in zip(local, leaves, strict=True)]
    groups.close()
    return [float((a - b).detach().abs().max()) for a, b in pairs]


def part_beside_megatrons() -> tuple[list[list[int]], list[list[int]], int]:
    """This rank's part of some samples; Megatron-core's; and how many pairs of tokens it has."""
    ranks = dist.get_world_size()
    groups = ProcessGroups(Layout(ranks, context=ranks))
    part = SequencePart.of(LENGTH, groups.context_rank, ranks)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    batch = {"tokens": tokens, "labels": None, "loss_mask": None, "position_ids": None}
    cp = parallel_state.get_context_parallel_group()
    theirs = get_batch_on_this_cp_rank(batch, False, cp_group=cp)
    groups.close()
    mask = part.mask(torch.float32)
    assert mask is not None
    return part.select(tokens).tolist(), theirs["tokens"].tolist(), int((mask == 0).sum())


def replicas(config: RunConfig) -> list[tuple[object, ...]]:
    """Of each of this rank's pieces: which one of the same box it is."""
    engine = on_ranks.start(config)
    found = [(piece.key, piece.box, piece.replica) for piece in engine.state().pieces]
    engine.close()
    return found


def trained_and_validated(config: RunConfig) -> list[float]:
    """The losses of two steps, and of a validation whose last batch is not full."""
    engine = on_ranks.start(config)
    losses = [
        engine.train_step(GlobalBatch(on_ranks.tokens, 8 * n, 8), 0.01).loss for n in range(2)
    ]
    losses.append(engine.evaluate(in_batches(on_ranks.tokens, 11, 8)))
    engine.close()
    return losses
