"""The coordinate check: activations and their updates against width and depth.

Models of several widths (at one depth) and depths (at one width) take a few optimizer steps on the
same tokens. On a fixed probe batch, before each step and after the last, the RMS of activations and
of their change since initialisation are measured at the embedding's output, the residual stream
before the final norm, and the logits. If one learning rate is to serve all sizes, each of these
must not depend on size: the check passes when the slope of log RMS against log size is small (Yang
and Hu 2021, arXiv 2011.14522, section H; Yang et al. 2022, arXiv 2203.03466, D.1).

There are some 16 steps because Muon's first updates have full rank: updates of different layers are
independent of each other, their sum over 2 L branches of 1 / (2 L) shrinks, and only after about
ten steps do they point the same way, which is what the depth scale is for.

Widths change the number of heads and not their width. The check runs in one process, with
Megatron's engine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_progressive import data
from megatron_progressive.config import ConfigError, ParallelSection, RunConfig
from megatron_progressive.config.accepted import BOUNDS
from megatron_progressive.config.values import shown
from megatron_progressive.cost.flops import step_flops
from megatron_progressive.models import transformer_shape
from megatron_progressive.plan.preflight import check_run
from megatron_progressive.runtime.progress import short_time

if TYPE_CHECKING:
    import torch

WIDTH, DEPTH = "width", "depth"
QUANTITIES = ("embedding", "branches", "stream", "logits")
"""The measured quantities: the embedding's output (with positions), the sum of all residual
branches, the residual stream after the last layer (the two together), and the logits."""
RMS, CHANGE = "rms", "change"
"""The two kinds of measurement: the RMS of initial activations, and that of their change from there
to the end of the last step."""
CHECKED = {RMS: ("embedding", "stream", "logits"), CHANGE: QUANTITIES}
"""The measurements whose slopes are checked. Initial branches are not among them: they may be any
small part of the stream, and are independent of each other, so that their sum shrinks with depth
where each is 1 / L."""
_LARGEST = int(BOUNDS["model.hidden_size"][1])
_ROWS = 256  # tokens of the probe that are kept

Read = Callable[[int, int], "torch.Tensor"]


@dataclass(frozen=True)
class Measurement:
    """One quantity of one model after ``step`` steps."""

    width: int
    depth: int
    step: int
    quantity: str
    rms: float
    change: float


@dataclass(frozen=True)
class Slope:
    """The slope of log RMS against log size, by least squares."""

    axis: str
    quantity: str
    kind: str
    slope: float
    passed: bool


@dataclass(frozen=True)
class CoordinateCheck:
    """The result of the check, as the JSON file has it."""

    tokens: str
    """What the models were trained on, in words."""
    limit: float
    """The largest absolute slope that passes."""
    slopes: list[Slope]
    measurements: list[Measurement]

    @property
    def passed(self) -> bool:
        return all(slope.passed for slope in self.slopes)

    def to_values(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def sizes_from_text(option: str, text: str | None, default: list[int]) -> list[int]:
    """The sizes of an option such as ``--widths 64,128``, in increasing order.

    Raises:
        ConfigError: they are not integers from 1, or there are fewer than two different ones.
    """
    if text is None:
        return default
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if len(sizes) < 2 or sizes[0] < 1 or sizes[-1] > _LARGEST:
        raise ConfigError(
            f"{option}: got {shown(text)}; accepted: two or more sizes from 1 to {_LARGEST}, as "
            "64,128"
        )
    return sizes


def sized(config: RunConfig, width: int, depth: int) -> RunConfig:
    """The configuration at another width and depth, on one rank and without expansions.

    Raises:
        ConfigError: no whole number of heads makes the width.
    """
    shape = transformer_shape(config, depth)
    base = shape.hidden_size

    def scaled(field: str, value: int) -> int:
        if value * width % base:
            raise ConfigError(
                f"--widths: got {width}; accepted: widths whose share {width}/{base} of "
                f"{field} {value} is whole"
            )
        return value * width // base

    model = replace(
        config.model,
        hidden_size=width,
        num_layers=depth,
        num_attention_heads=scaled("num_attention_heads", shape.num_attention_heads),
        ffn_hidden_size=scaled("ffn_hidden_size", shape.ffn_hidden_size),
    )
    if shape.mla is None:
        model = replace(
            model,
            num_query_groups=scaled("num_query_groups", shape.num_query_groups),
            head_dim=shape.head_dim,
        )
    parallel = ParallelSection(zero_stage=min(1, config.parallel.zero_stage))
    return replace(config, model=model, parallel=parallel, expansion=[])


def shapes_of(
    config: RunConfig, widths: list[int] | None, depths: list[int] | None
) -> list[tuple[str, int, int]]:
    """The axis, width and depth of every model: widths are taken at the middle depth, depths at the
    first width.

    None stands for 1, 2 and 4 times the configured width, and for 1, 2, 4 and 8 layers.
    """
    base = transformer_shape(config).hidden_size
    widths, depths = widths or [base, 2 * base, 4 * base], depths or [1, 2, 4, 8]
    fixed_depth, fixed_width = depths[(len(depths) - 1) // 2], widths[0]
    return [(WIDTH, width, fixed_depth) for width in widths] + [
        (DEPTH, fixed_width, depth) for depth in depths
    ]


def check_sizes(config: RunConfig, shapes: Sequence[tuple[str, int, int]]) -> None:
    """Raise :class:`ConfigError` where one of the models cannot be trained on one rank."""
    for _, width, depth in shapes:
        check_run(sized(config, width, depth), 1)


def tokens_of(config: RunConfig) -> tuple[Read, str]:
    """The source of samples: the prepared corpus, or random tokens where there is none.

    Raises:
        ConfigError: ``data.prepared`` names a folder that is no corpus, or one that does not fit.
    """
    if config.data.mix:
        if None not in data.known_tokens(config):
            return data.open_data(config).train_batch, "the mixture"
    elif config.data.prepared is not None or data.prepared_folder(config).exists():
        folder = data.prepared_folder(config)
        return data.open_data(config).train_batch, f"the corpus in {folder}"
    import torch

    shape = transformer_shape(config)

    def random(first: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(config.run.seed + 1 + first)
        size = (count, shape.sequence_length + 1)
        return torch.randint(0, shape.vocab_size, size, generator=generator)

    return random, "random tokens (the corpus is not prepared: `mprog data prepare`)"


@contextmanager
def _recorded(engine: Any, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Record the activations of forward passes inside of the context, fp32 [at most 256 tokens, n]
    by quantity."""
    found: dict[str, torch.Tensor] = {}
    model = engine.chunks[0]
    while hasattr(model, "module"):  # DDP, Float16Module
        model = model.module

    def keep(quantity: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            rows = tensor.detach().flatten(0, 1)
            rows = rows[:: max(1, rows.size(0) // _ROWS)]
            if quantity == "logits":  # the others are padding: -infinity
                rows = rows[:, :vocab_size]
            found[quantity] = rows.float().clone()

        return hook

    modules = {"embedding": model.embedding, "logits": model.output_layer}
    modules["stream"] = model.decoder.layers[-1]
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def measure(config: RunConfig, steps: int, read: Read) -> list[Measurement]:
    """Train one model for ``steps`` steps at ``optim.lr``, inside of the world group with one
    rank."""
    from megatron_progressive.engines.base import GlobalBatch
    from megatron_progressive.engines.megatron.engine import MegatronEngine
    from megatron_progressive.models import tensor_table
    from megatron_progressive.reshard.initial_values import initialise_all
    from megatron_progressive.runtime.layout import make_layout

    shape, size = transformer_shape(config), config.train.global_batch
    engine = MegatronEngine(config, shape, make_layout(config.parallel, 1))
    probe = GlobalBatch(read, 0, config.train.micro_batch)
    out: list[Measurement] = []
    first: dict[str, torch.Tensor] = {}
    try:
        initialise_all(engine.state(), tensor_table(shape), config.run.seed)
        engine.loaded()
        for step in range(steps + 1):
            with _recorded(engine, shape.vocab_size) as now:
                engine.evaluate([probe])
            now["branches"] = now["stream"] - now["embedding"]
            first = first or dict(now)
            for name in QUANTITIES:
                rms, change = (
                    float(t.square().mean().sqrt()) for t in (now[name], now[name] - first[name])
                )
                out.append(
                    Measurement(shape.hidden_size, shape.num_layers, step, name, rms, change)
                )
            if step < steps:
                engine.train_step(GlobalBatch(read, step * size, size), config.optim.lr)
    finally:
        engine.close()
    return out


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares slope of log ``values`` against log ``sizes``; NaN where a value is not a
    positive number."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def slopes_of(
    shapes: Sequence[tuple[str, int, int]], measurements: Sequence[Measurement], limit: float
) -> list[Slope]:
    """The slope of each axis, quantity and kind; a slope that is not a number fails."""
    last = max(m.step for m in measurements)
    found = []
    for axis in (WIDTH, DEPTH):
        places = [(w, d) for a, w, d in shapes if a == axis]
        sizes = [w if axis == WIDTH else d for w, d in places]
        for kind, step in ((RMS, 0), (CHANGE, last)):
            for quantity in CHECKED[kind]:
                value_of = {
                    (m.width, m.depth): getattr(m, kind)
                    for m in measurements
                    if m.quantity == quantity and m.step == step
                }
                value = slope(sizes, [value_of[place] for place in places])
                found.append(Slope(axis, quantity, kind, value, abs(value) <= limit))
    return found


def coordinate_check(
    config: RunConfig, shapes: Sequence[tuple[str, int, int]], steps: int, limit: float
) -> CoordinateCheck:
    """Measure every model once, inside of the world group with one rank; progress is shown on
    standard error.

    Raises:
        ConfigError: the corpus does not fit.
    """
    read, tokens = tokens_of(config)
    print(f"coordcheck: {steps} steps on {tokens}", file=sys.stderr, flush=True)
    models = {(w, d): sized(config, w, d) for _, w, d in shapes}
    costs = [step_flops(transformer_shape(model), model) for model in models.values()]
    measurements: list[Measurement] = []
    started = time.monotonic()
    for number, ((width, depth), model) in enumerate(models.items(), 1):
        measurements += measure(model, steps, read)
        left = (time.monotonic() - started) / sum(costs[:number]) * sum(costs[number:])
        print(
            f"coordcheck: {number}/{len(models)} models (width {width}, depth {depth}), "
            f"left {short_time(left)}",
            file=sys.stderr,
            flush=True,
        )
    return CoordinateCheck(tokens, limit, slopes_of(shapes, measurements, limit), measurements)
