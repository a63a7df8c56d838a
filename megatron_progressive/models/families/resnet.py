"""ResNet: residual networks for images (He et al. 2015, arXiv 1512.03385), whose stages grow.

A stage begins with its first block, which halves the picture and widens it: its shortcut is a
projection (option B there; stride in the 3 x 3 convolution of bottlenecks, as everybody has it
since). That projection stands outside of the layers, as the *transition* into the stage, so that a
stage may have no blocks: a model of zero layers is stem, transitions and head. Where a first block
has a transition its first convolution has other inputs than those of the blocks behind it, so it
is a kind of its own (:meth:`.ModelShape.stacks`): copies of it take all but that convolution.

Norms are GroupNorm (Wu and He 2018, arXiv 1803.08494), not BatchNorm: its result depends on the
sample alone, so that neither the micro-batch nor the number of ranks decides what is computed, and
there are no running statistics that would belong to no layer's weights when layers are added.

Names are ``stem.conv.weight``, ``stages.S.transition.conv.weight``,
``stages.S.blocks.B.conv1.weight`` and so on; a convolution is stored as its matrix, outputs x
(inputs x window), which is what Muon orthogonalises. Nothing here needs torch;
:mod:`.resnet_module` computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models.base import (
    STAGE_PREFIX,
    ModelShape,
    ResNetParts,
    TensorSpec,
    spectral_std,
)
from megatron_progressive.models.family import Family

BASIC, BOTTLENECK = "basic", "bottleneck"
CIFAR, IMAGENET = "cifar", "imagenet"
FIRST, PLAIN = "first", "plain"
"""The kinds of blocks: ``FIRST`` has a transition beside it, ``PLAIN`` has a shortcut that changes
nothing."""
CHANNELS = 3
EXPANSION = 4
"""How many times as many outputs a bottleneck has as it is wide inside."""
HEAD_STD = 0.01
"""Standard deviation of the head's initial weights (Goyal et al. 2017, arXiv 1706.02677, section
5.1)."""


@dataclass(frozen=True)
class Conv:
    """One convolution, padded so that with stride 1 its output has the size of its input."""

    n_in: int
    n_out: int
    kernel: int
    stride: int
    size: int
    """The side of its output, in pixels."""


@dataclass(frozen=True)
class Stage:
    """One stage: its blocks, each of which is a list of convolutions, and the transition into
    it."""

    transition: Conv | None
    blocks: list[list[Conv]]
    width: int
    """The number of channels that leave the stage."""


@dataclass(frozen=True, kw_only=True)
class ResNetShape(ModelShape):
    """The sizes of one residual network.

    ``num_layers`` is the number of residual blocks of its longest stage; the others have theirs in
    the proportion of ``resnet.stages``, rounded up: 1 is one block in every stage, and ResNet-50
    (3-4-6-3) has 6. ``hidden_size`` is the width of the first stage; each further one doubles it.
    """

    image_size: int
    """The side of a picture, in pixels."""
    num_classes: int
    norm_epsilon: float
    resnet: ResNetParts

    unit: ClassVar[str] = "images"

    @property
    def stage_blocks(self) -> list[int]:
        """The number of blocks in each stage."""
        proportion = stages_of(self.resnet.stages)
        return [-(-n * self.num_layers // max(proportion)) for n in proportion]

    @property
    def stem(self) -> Conv:
        """The first convolution; in the ``imagenet`` stem a pooling of stride 2 follows it."""
        if self.resnet.stem == CIFAR:
            return Conv(CHANNELS, self.hidden_size, 3, 1, self.image_size)
        return Conv(CHANNELS, self.hidden_size, 7, 2, _halved(self.image_size))

    @property
    def halvings(self) -> int:
        """How many times the network halves a picture's side."""
        stages = len(stages_of(self.resnet.stages))
        return stages - 1 + (0 if self.resnet.stem == CIFAR else 2)

    def layout(self) -> list[Stage]:
        """The stages, in order."""
        pooled = self.resnet.stem == IMAGENET
        size = _halved(self.stem.size) if pooled else self.stem.size
        n_in, found = self.hidden_size, []
        bottleneck = self.resnet.block == BOTTLENECK
        for number, count in enumerate(self.stage_blocks):
            inner, stride = self.hidden_size * 2**number, 2 if number else 1
            n_out = inner * EXPANSION if bottleneck else inner
            before, size = size, _halved(size) if number else size
            needed = stride != 1 or n_in != n_out
            transition = Conv(n_in, n_out, 1, stride, size) if needed else None
            blocks = []
            for block in range(count):
                first = block == 0
                source, step = (n_in, stride) if first else (n_out, 1)
                blocks.append(
                    [
                        Conv(source, inner, 1, 1, before if first else size),
                        Conv(inner, inner, 3, step, size),
                        Conv(inner, n_out, 1, 1, size),
                    ]
                    if bottleneck
                    else [Conv(source, inner, 3, step, size), Conv(inner, n_out, 3, 1, size)]
                )
            found.append(Stage(transition, blocks, n_out))
            n_in = n_out
        return found

    def stacks(self) -> dict[str, list[str]]:
        return {
            f"{STAGE_PREFIX}{number}.blocks.": [
                FIRST if stage.transition is not None and block == 0 else PLAIN
                for block in range(len(stage.blocks))
            ]
            for number, stage in enumerate(self.layout())
        }


def _halved(size: int) -> int:
    return -(-size // 2)


def stages_of(text: str) -> list[int]:
    """The numbers in a text like ``3-4-6-3``; empty where the text is anything else."""
    return [int(n) for n in text.split("-")] if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", text) else []


@dataclass(frozen=True, kw_only=True)
class ResNetFamily(Family):
    """The family of residual networks."""

    shape_type = ResNetShape
    engines = ("torch",)
    data_sizes = ("image_size", "num_classes")
    data_keys = frozenset({"corpus", "image_size", "num_classes"})

    def shape(self, config: RunConfig, num_layers: int | None) -> ResNetShape:
        sizes = {**self.presets[config.model.preset], **self._sizes(config, num_layers)}
        shape = ResNetShape(family=config.model.family, **sizes)
        if not stages_of(shape.resnet.stages):
            raise ConfigError(
                f"model.resnet.stages: got {shape.resnet.stages!r}; accepted: blocks of each "
                "stage, as 3-4-6-3"
            )
        if shape.hidden_size % shape.resnet.groups:
            raise ConfigError(
                f"model.resnet.groups: got {shape.resnet.groups}; accepted: a divisor of "
                f"hidden_size {shape.hidden_size}"
            )
        least = 2 ** (shape.halvings - 1) + 1
        if shape.image_size < least:
            # and torch 2.13 has wrong bf16 gradients of a strided convolution of one pixel on CPU
            raise ConfigError(
                f"data.image_size: got {shape.image_size}; accepted: from {least} (the network "
                f"halves it {shape.halvings} times)"
            )
        if shape.mup:
            raise ConfigError(
                f"model.mup: got true; accepted: false (its factors are of language models, not of "
                f"family {shape.family})"
            )
        return shape

    def table(self, shape: ResNetShape) -> dict[str, TensorSpec]:
        table: dict[str, TensorSpec] = {}

        def norm(name: str, width: int, last: bool = False) -> None:
            for part, role, init in (
                ("weight", "norm_gain", "ones"),
                ("bias", "norm_bias", "zeros"),
            ):
                table[f"{name}.{part}"] = TensorSpec((width,), role, init, last_linear=last)

        def conv(name: str, one: Conv, on_data: bool = False) -> None:
            n_in = one.n_in * one.kernel**2
            table[f"{name}.weight"] = TensorSpec(
                (one.n_out, n_in), "conv", "normal", spectral_std(one.n_out, n_in),
                products=one.size**2, on_data=on_data,
            )  # fmt: skip

        conv("stem.conv", shape.stem, on_data=True)
        norm("stem.norm", shape.hidden_size)
        stages = shape.layout()
        for number, stage in enumerate(stages):
            prefix = f"{STAGE_PREFIX}{number}"
            if stage.transition is not None:
                conv(f"{prefix}.transition.conv", stage.transition)
                norm(f"{prefix}.transition.norm", stage.width)
            for index, convolutions in enumerate(stage.blocks):
                for place, one in enumerate(convolutions, 1):
                    block = f"{prefix}.blocks.{index}"
                    conv(f"{block}.conv{place}", one)
                    # The affine map of the last norm ends the branch. Zeroed, it makes the branch
                    # nothing and still has a gradient (Goyal et al. 2017, section 5.1); behind a
                    # zero convolution its bias would be left.
                    norm(f"{block}.norm{place}", one.n_out, last=place == len(convolutions))
        width = stages[-1].width
        table["head.weight"] = TensorSpec((shape.num_classes, width), "head", "normal", HEAD_STD)
        table["head.bias"] = TensorSpec((shape.num_classes,), "bias", "zeros")
        return table


def _cifar(blocks: int) -> dict[str, object]:
    """The ResNets of section 4.2 of He et al.: three stages of equally many basic blocks, 6 n + 2
    layers."""
    return dict(
        num_layers=blocks, hidden_size=16, image_size=32, num_classes=10, norm_epsilon=1e-5,
        resnet=dict(block=BASIC, stages=f"{blocks}-{blocks}-{blocks}", stem=CIFAR, groups=4),
    )  # fmt: skip


def _imagenet(block: str, stages: str) -> dict[str, object]:
    """The ResNets of table 1 of He et al."""
    return dict(
        num_layers=max(stages_of(stages)), hidden_size=64, image_size=224, num_classes=1000,
        norm_epsilon=1e-5, resnet=dict(block=block, stages=stages, stem=IMAGENET, groups=32),
    )  # fmt: skip


FAMILY = ResNetFamily(
    sections=frozenset({"resnet"}),
    presets={
        "tiny": {**_cifar(3), "image_size": 16},
        "resnet20": _cifar(3),
        "resnet32": _cifar(5),
        "resnet56": _cifar(9),
        "resnet110": _cifar(18),
        "resnet18": _imagenet(BASIC, "2-2-2-2"),
        "resnet34": _imagenet(BASIC, "3-4-6-3"),
        "resnet50": _imagenet(BOTTLENECK, "3-4-6-3"),
        "resnet101": _imagenet(BOTTLENECK, "3-4-23-3"),
        "resnet152": _imagenet(BOTTLENECK, "3-8-36-3"),
    },
)
