"""What a residual network computes, in plain torch. The parameters have the names of the table."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from megatron_progressive.models.base import ResNetParts
from megatron_progressive.models.families.resnet import IMAGENET, Conv, ResNetShape, Stage


class ConvNorm(nn.Module):
    """A convolution and its norm, as in the stem and the transitions."""

    def __init__(self, one: Conv, parts: ResNetParts, epsilon: float) -> None:
        super().__init__()
        self.conv = _convolution(one)
        self.norm = nn.GroupNorm(parts.groups, one.n_out, epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.norm(self.conv(x)))


class Block(nn.Module):
    """The branch of a residual block: convolutions, each with its norm, and ReLUs between them."""

    def __init__(self, convolutions: list[Conv], parts: ResNetParts, epsilon: float) -> None:
        super().__init__()
        self.depth = len(convolutions)
        for place, one in enumerate(convolutions, 1):
            self.add_module(f"conv{place}", _convolution(one))
            self.add_module(f"norm{place}", nn.GroupNorm(parts.groups, one.n_out, epsilon))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in range(1, self.depth + 1):
            x = self.get_submodule(f"norm{place}")(self.get_submodule(f"conv{place}")(x))
            x = F.relu(x) if place < self.depth else x
        return x


class ResidualStage(nn.Module):
    """A stage, whose transition is the shortcut of its first block, or stands alone."""

    def __init__(self, stage: Stage, parts: ResNetParts, epsilon: float) -> None:
        super().__init__()
        made = stage.transition and ConvNorm(stage.transition, parts, epsilon)
        self.transition = made or None
        self.blocks = nn.ModuleList(Block(one, parts, epsilon) for one in stage.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.transition is None else self.transition(x)
        for block in self.blocks:
            x = shortcut = F.relu(shortcut + block(x))
        return shortcut if len(self.blocks) else F.relu(shortcut)


class ResNet(nn.Module):
    """A residual network.

    Args:
        shape: the sizes of the network. Its weights have torch's own initial values.
    """

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        parts, epsilon, stages = shape.resnet, shape.norm_epsilon, shape.layout()
        self.pooled = parts.stem == IMAGENET
        self.stem = ConvNorm(shape.stem, parts, epsilon)
        self.stages = nn.ModuleList(ResidualStage(stage, parts, epsilon) for stage in stages)
        self.head = nn.Linear(stages[-1].width, shape.num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The logits [n, classes] of pixels [n, 3, height, width]."""
        x = F.relu(self.stem(pixels))
        if self.pooled:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return cast(torch.Tensor, self.head(x.mean((2, 3))))


def _convolution(one: Conv) -> nn.Conv2d:
    return nn.Conv2d(one.n_in, one.n_out, one.kernel, one.stride, one.kernel // 2, bias=False)
