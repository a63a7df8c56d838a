"""Residual networks: published sizes, depth by stage, the forward pass, FLOPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.cost.flops import optimizer_flops, step_flops
from megatron_progressive.engines.torch.resnet_module import ResNet
from megatron_progressive.expansion.depth_map import depth_map
from megatron_progressive.models import model_shape, parameter_count, tensor_table

# what torchvision prints; table 6 of the paper for CIFAR (0.27M, 0.46M, 0.85M, 1.7M)
PUBLISHED = {"18": 11_689_512, "34": 21_797_672, "50": 25_557_032, "101": 44_549_160,
             "152": 60_192_808}  # fmt: skip
CIFAR = {"20": 0.27e6, "32": 0.46e6, "56": 0.85e6, "110": 1.7e6}


def configured(**model: object) -> RunConfig:
    return from_dict({"model": {"family": "resnet", **model}})


def test_parameters_are_the_published_ones() -> None:
    for preset, count in PUBLISHED.items():
        assert parameter_count(model_shape(configured(preset=f"resnet{preset}"))) == count
    for preset, count in CIFAR.items():
        assert parameter_count(model_shape(configured(preset=f"resnet{preset}"))) == pytest.approx(
            count, rel=0.03
        )


def test_depth_is_shared_out_over_the_stages() -> None:
    def blocks(depth: int, preset: str) -> list[int]:
        shape = model_shape(configured(preset=f"resnet{preset}"), depth)
        return [len(kinds) for kinds in shape.stacks().values()]

    assert blocks(0, "50") == [0, 0, 0, 0]
    assert blocks(1, "50") == [1, 1, 1, 1]
    assert blocks(6, "50") == [3, 4, 6, 3]
    assert blocks(3, "50") == [2, 2, 3, 2]
    assert blocks(23, "101") == [3, 4, 23, 3]
    for depth in range(23):  # no stage ever shrinks
        assert all(
            a <= b for a, b in zip(blocks(depth, "101"), blocks(depth + 1, "101"), strict=True)
        )


def test_one_block_a_stage_is_copied_but_for_what_its_shortcut_changes() -> None:
    config = configured(preset="resnet50")
    rules = depth_map(model_shape(config, 1), model_shape(config, 6), "copying")
    copied = {name: rule.source for name, rule in rules.items() if rule.weights == "copy"}
    first = "stages.2.blocks.0"
    assert copied[f"{first}.conv1.weight"] == f"{first}.conv1.weight"
    assert copied["stages.2.blocks.5.conv2.weight"] == f"{first}.conv2.weight"
    assert copied["stages.2.blocks.5.norm1.bias"] == f"{first}.norm1.bias"
    new = {name.split(".", 3)[3] for name, rule in rules.items() if rule.weights == "init"}
    assert new == {f"{block}.conv1.weight" for block in "12345"}
    rules = depth_map(model_shape(config, 2), model_shape(config, 6), "copying")
    assert not [name for name, rule in rules.items()
                if rule.weights == "init" and name.startswith("stages.2.")]  # fmt: skip


class PlainBasic(nn.Module):
    """Figure 2 of the paper, with GroupNorm, from tensors by name."""

    def __init__(self, weights: dict[str, torch.Tensor], groups: int) -> None:
        super().__init__()
        self.weights, self.groups = weights, groups

    def conv_norm(
        self, x: torch.Tensor, conv: str, norm: str, stride: int, kernel: int
    ) -> torch.Tensor:
        weight = self.weights[f"{conv}.weight"]
        weight = weight.view(weight.size(0), -1, kernel, kernel)
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
        return F.group_norm(
            x, self.groups, self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"]
        )

    def forward(self, x: torch.Tensor, blocks: list[int]) -> torch.Tensor:
        x = F.relu(self.conv_norm(x, "stem.conv", "stem.norm", 1, 3))
        for stage, count in enumerate(blocks):
            for block in range(count):
                name, stride = f"stages.{stage}.blocks.{block}", 2 if stage and not block else 1
                branch = F.relu(self.conv_norm(x, f"{name}.conv1", f"{name}.norm1", stride, 3))
                branch = self.conv_norm(branch, f"{name}.conv2", f"{name}.norm2", 1, 3)
                if stride == 2:
                    place = f"stages.{stage}.transition"
                    x = self.conv_norm(x, f"{place}.conv", f"{place}.norm", 2, 1)
                x = F.relu(x + branch)
        return F.linear(x.mean((2, 3)), self.weights["head.weight"], self.weights["head.bias"])


def randomised(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1


def test_forward_is_the_published_network() -> None:
    shape = model_shape(configured(preset="resnet20", resnet={"stages": "2-1-3"}))
    model = ResNet(shape)
    randomised(model)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = PlainBasic(dict(model.named_parameters()), 4)
    torch.testing.assert_close(model(pixels), plain(pixels, [2, 1, 3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["18", "50"])
def test_forward_equals_torchvision(preset: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    make = getattr(torchvision.models, f"resnet{preset}")
    theirs = make(norm_layer=lambda width: nn.GroupNorm(32, width))
    ours = ResNet(model_shape(configured(preset=f"resnet{preset}")))
    randomised(ours)
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(mine[our_name(name)])
    pixels = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    assert len(mine) == len(dict(theirs.named_parameters()))
    torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=1e-4, atol=1e-4)


def our_name(name: str) -> str:
    """Of a tensor of torchvision's."""
    parts = name.split(".")
    if parts[0] == "fc":
        return f"head.{parts[1]}"
    if parts[0] in ("conv1", "bn1"):
        return f"stem.{'conv' if parts[0] == 'conv1' else 'norm'}.{parts[1]}"
    stage = f"stages.{int(parts[0][-1]) - 1}"
    if parts[2] == "downsample":
        return f"{stage}.transition.{'conv' if parts[3] == '0' else 'norm'}.{parts[4]}"
    return f"{stage}.blocks.{parts[1]}.{parts[2].replace('bn', 'norm')}.{parts[3]}"


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("preset", ["tiny", "resnet18", "resnet50"])
def test_flops_are_those_that_torch_counts(preset: str, depth: int) -> None:
    small = {"hidden_size": 16, "resnet": {"groups": 4}}
    config = from_dict({
        "model": {"family": "resnet", "preset": preset, **small}, "data": {"image_size": 33},
        "train": {"global_batch": 2},
    })  # fmt: skip
    shape = model_shape(config, depth)
    model = ResNet(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 33, 33)).sum().backward()
    counted = step_flops(shape, config) - optimizer_flops(shape, config.optim)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_table_is_what_the_module_has() -> None:
    for preset, depth in (("20", 0), ("18", 2), ("50", 1)):
        shape = model_shape(configured(preset=f"resnet{preset}"), depth)
        with torch.device("meta"):
            built = {n: p.numel() for n, p in ResNet(shape).named_parameters()}
        assert built == {name: spec.numel for name, spec in tensor_table(shape).items()}
