"""The plain torch engine: losses on any number of ranks, state, updates, and expansions that equal
the reference bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from megatron_progressive.data import open_data
from megatron_progressive.engines.partitions import pieces_of_rank
from megatron_progressive.engines.torch.resnet_module import ResNet
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.reshard.boxes import whole
from megatron_progressive.reshard.initial_values import initial_values
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks, resnet_on_ranks
from tests.engines.test_property import SAMPLES
from tests.pool import Pool

DEEP = ["model.num_layers=3"]


@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
def test_same_losses_on_any_number_of_ranks(pool: Pool, optimizer: str) -> None:
    words = [*DEEP, f"optim.name={optimizer}", "optim.clip_grad=0.5"]
    found = {}
    for world, stage, micro in ((1, 0, 12), (1, 1, 3), (2, 0, 2), (2, 1, 3), (3, 1, 2)):
        changes = [f"parallel.zero_stage={stage}", f"train.micro_batch={micro}"]
        config = resnet_on_ranks.small_config([*words, *changes])
        every = pool.run(world, resnet_on_ranks.losses_and_norms, config, 5)
        assert all(one == every[0] for one in every)
        found[world, stage] = every[0]
    for values in found.values():
        for mine, first in zip(values, found[1, 0], strict=True):
            assert mine == pytest.approx(first, rel=3e-5)


def test_first_step_is_that_of_torch(pool: Pool) -> None:
    """AdamW's first update of every tensor, from gradients of the plain module."""
    config = resnet_on_ranks.small_config([*DEEP, "optim.name=adamw", "train.micro_batch=3"])
    shape = model_shape(config)
    model, table = ResNet(shape), tensor_table(shape)
    for name, parameter in model.named_parameters():
        values = initial_values(config.run.seed, 0, name, table[name], whole(table[name].shape))
        parameter.data.copy_(values.view(parameter.shape))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optim = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps,
    )  # fmt: skip
    pixels, labels = open_data(config).train_batch(0, SAMPLES)
    F.cross_entropy(model(pixels), labels).backward()
    optim.step()
    after = pool.run(2, resnet_on_ranks.updates, config, 1)[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # where a gradient is nearly 0 its sign, which is AdamW's first step, is rounding
        size = parameter.grad.abs()
        sure = size > 1e-3 * size.max()
        assert sure.float().mean() > 0.9, name
        apart = (after[name].view(parameter.shape) - parameter.data).abs()
        assert (apart[sure] < 1e-5).all(), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_random_expansions_equal_the_reference(pool: Pool, world: int) -> None:
    cases_each = {1: 10, 2: 8, 3: 4}[world]
    seeds = range(100 * world, 100 * world + cases_each)
    configs = [resnet_on_ranks.random_case(seed, world) for seed in seeds]
    results = pool.run(world, resnet_on_ranks.differences, configs)[0]
    for config, wrong in zip(configs, results, strict=True):
        assert not wrong, (config.model, config.parallel, config.expansion, config.optim, wrong)


@pytest.mark.parametrize(("source", "init"), [(0, "zero"), (1, "copying_zeroL"), (2, "zero")])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_branches_keep_the_loss(pool: Pool, source: int, init: str, block: str) -> None:
    words = [f"model.num_layers={source}", f"model.resnet.block={block}"]
    config = resnet_on_ranks.small_config(words, {"at": 3, "to_layers": 6, "init": init})
    event = pool.run(1, resnet_on_ranks.event_of_expansion, config)[0]
    assert event.loss_after == pytest.approx(event.loss_before, rel=1e-6)
    changed = resnet_on_ranks.small_config(words, {"at": 3, "to_layers": 6, "init": "random"})
    event = pool.run(1, resnet_on_ranks.event_of_expansion, changed)[0]
    assert abs(event.loss_after / event.loss_before - 1) > 1e-5


def test_what_ranks_hold_is_predicted(pool: Pool) -> None:
    configs = [
        resnet_on_ranks.small_config(
            [f"optim.name={name}", "optim.embeddings=adamw", f"parallel.zero_stage={stage}",
             f"train.precision={precision}", "model.num_layers=2"]
        )
        for name in ("muon_nsgd", "adamw") for stage in (0, 1) for precision in ("fp32", "bf16")
    ]  # fmt: skip
    held = pool.run(3, on_ranks.held_pieces_of, configs)
    for index, config in enumerate(configs):
        shape, layout = model_shape(config), make_layout(config.parallel, 3)
        for rank in range(3):
            pieces = pieces_of_rank(shape, config.optim, config.train.precision, layout, rank)
            assert Counter(held[rank][index]) == Counter(pieces)
