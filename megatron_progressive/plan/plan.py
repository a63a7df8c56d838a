"""The plan of a run, made before any of it runs: parameters, memory, steps, FLOPs and saving.

Nothing is allocated and neither torch nor Megatron-core is imported: planning a 7B run takes about
a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.cost import flops
from megatron_progressive.cost.activations import RankPeak, fullest_rank
from megatron_progressive.cost.cluster import Cluster
from megatron_progressive.cost.headroom import headroom_percent
from megatron_progressive.cost.memory import RankMemory, largest_rank
from megatron_progressive.cost.step_time import StepTime, step_time
from megatron_progressive.cost.tau_memory import tau_peak
from megatron_progressive.data import PartDraws, known_tokens, mix_warnings, part_draws
from megatron_progressive.models import (
    active_parameter_count,
    model_shape,
    parameter_count,
    tensor_table,
    transformer_shape,
)
from megatron_progressive.models.base import ModelShape, TransformerShape
from megatron_progressive.plan import controls, preflight
from megatron_progressive.plan.layout_search import Found, check_fits, search
from megatron_progressive.plan.reshard_bytes import ReshardBytes, reshard_bytes
from megatron_progressive.runtime.layout import Layout, make_layout

__all__ = [
    "ClusterPlan",
    "LrPhase",
    "Plan",
    "PlannedExpansion",
    "PlannedPhase",
    "make_plan",
]

_LINK_GB_PER_S = 25.0  # a 200 Gbit/s adapter for each rank


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of a run, and what it asks of the ranks."""

    phase: flops.Phase
    params_without_positions: int
    """Number of parameters without positions, as nanoGPT counts; with it the paper's 39M, 124M,
    0.15B and 7B come out."""
    active_params: int
    """Number of parameters that one token is computed with
    (:func:`.models.active_parameter_count`)."""
    layout: Layout
    memory: RankMemory
    """The memory of the fullest rank."""
    tokens: int


@dataclass(frozen=True)
class PlannedExpansion:
    """One expansion of the run."""

    step: int
    fraction: float
    """The step of the expansion over the number of steps of the run."""
    stable_steps: int
    """Number of steps at the peak learning rate that follow, in which the mixing time must fit."""
    lr_share: float
    """The sum of the learning rate up to the expansion over its whole sum. This is the first factor
    of the bound on the gap in arXiv 2511.04981, whose derivation is disputed, so it is no more than
    a guide."""
    reshard: ReshardBytes
    """What every rank sends and receives at the expansion."""
    peak_bytes: int
    """The most bytes of state that a rank holds at the expansion."""


@dataclass(frozen=True)
class LrPhase:
    """A stretch of the learning-rate schedule."""

    name: str
    first_step: int
    last_step: int


@dataclass(frozen=True)
class ClusterPlan:
    """What a cluster adds to a plan; a list has an element for each phase."""

    cluster: Cluster
    peaks: list[RankPeak]
    """The fullest rank of each phase."""
    times: list[StepTime]
    found: Found | None
    """What the search found; None where the layouts are the configuration's own."""
    words: list[str]
    """The ``key=value`` words that give the configuration the layouts that were found."""


@dataclass(frozen=True)
class Plan:
    """Everything that ``mprog plan`` says."""

    config: RunConfig
    world: int
    shape: ModelShape
    """The shape of the target."""
    phases: list[PlannedPhase]
    expansions: list[PlannedExpansion]
    lr_phases: list[LrPhase]
    step_tokens: int
    total_flops: int
    optimizer_flops_share: float
    """The share of Newton-Schulz in the total FLOPs."""
    fixed_flops: int | None
    """Total FLOPs of the fixed-size control; None without an expansion."""
    short_steps: int | None
    """Steps of the short control; None without an expansion."""
    never_grown: list[tuple[int, int]]
    """Layers and steps of each control that never grows."""
    controls: list[list[str]]
    """``key=value`` words that make each control of this config: fixed-size, short, never grown."""
    warnings: list[str]
    link_gb_per_s: float
    """The rate at which a rank sends and receives at an expansion, in 1e9 bytes per second each
    way."""
    on: ClusterPlan | None = None
    """What a cluster adds; None without one."""
    draws: list[PartDraws] = field(default_factory=list)
    """What the run draws of each part of its mixture."""

    @property
    def cores(self) -> int:
        """Processor cores of each rank: the cluster's, or one."""
        return 1 if self.on is None else self.on.cluster.cores

    @property
    def saving_percent(self) -> float | None:
        """The FLOPs that the run is predicted to save against fixed-size training, in %."""
        if self.fixed_flops is None:
            return None
        return 100 * (1 - self.total_flops / self.fixed_flops)

    @property
    def headroom_percent(self) -> float | None:
        """How much above fixed-size a short control of this run's FLOPs is expected to end, in %
        (:mod:`.cost.headroom`). None without an expansion, where nothing is saved, and for models
        that are not of language."""
        if self.fixed_flops is None or not isinstance(self.shape, TransformerShape):
            return None
        share = self.total_flops / self.fixed_flops
        tokens = self.config.last_step * self.step_tokens
        if share >= 1:
            return None
        return headroom_percent(self.phases[-1].active_params, tokens, share)


def make_plan(
    config: RunConfig,
    world: int | None = None,
    link_gb_per_s: float | None = None,
    cluster: Cluster | None = None,
    search_layouts: bool = False,
) -> Plan:
    """Plan ``config`` on ``world`` ranks (default: the fewest that fit every phase's layout).

    Args:
        link_gb_per_s: the rate of one rank, in 1e9 bytes per second each way (default: the speed of
            the cluster's network, or 25).
        cluster: the GPUs to plan for; the plan then has activations and time, and must fit their
            memory.
        search_layouts: whether to search for layouts and a micro-batch in place of those of
            ``config``.

    Raises:
        ConfigError: a phase cannot run (see :func:`.preflight.check_run`) or does not fit, the link
            speed is no number above 0, or there is a search without a cluster or a number of ranks.
    """
    found, words = None, []
    if cluster is not None and not isinstance(model_shape(config), TransformerShape):
        raise ConfigError(
            f"--gpu: got one for family {config.model.family}; accepted: none (activations and "
            "time are predicted for language models alone)"
        )
    if search_layouts:
        if cluster is None or world is None:
            raise ConfigError("--search: got no cluster; accepted: with --gpu and --nproc")
        found = search(config, world, cluster)
        words = found.words(config)
        config = found.applied(config)
    if link_gb_per_s is None:
        link_gb_per_s = cluster.network_gb_per_s if cluster else _LINK_GB_PER_S
    if not link_gb_per_s > 0:
        raise ConfigError(f"--link-gb-per-s: got {link_gb_per_s:g}; accepted: a number above 0")
    world = world if world is not None else preflight.smallest_world(config)
    warnings = preflight.check_run(config, world)
    planned, optimizer = [], 0
    for index, phase in enumerate(flops.phases(config)):
        shape = model_shape(config, phase.num_layers)
        layout = make_layout(config.parallel_after(index), world)
        positions = sum(s.numel for s in tensor_table(shape).values() if s.role == "position")
        planned.append(
            PlannedPhase(
                phase=phase,
                params_without_positions=parameter_count(shape) - positions,
                active_params=active_parameter_count(shape),
                layout=layout,
                memory=largest_rank(shape, config, layout),
                tokens=phase.steps * flops.step_tokens(shape, config),
            )
        )
        optimizer += phase.steps * flops.optimizer_flops(shape, config.optim)
    draws: list[PartDraws] = []
    if config.data.mix:
        tokens = known_tokens(config)
        draws = part_draws(config, tokens, config.last_step * config.train.global_batch)
        warnings += mix_warnings(config, tokens)
    on = _on_cluster(config, planned, cluster, found, words) if cluster is not None else None
    total = sum(p.phase.flops for p in planned)
    made = controls.all_controls(config) if config.expansion else []
    fixed, short = (made[0], made[1]) if made else (None, None)
    return Plan(
        config=config,
        world=world,
        shape=shape,
        phases=planned,
        expansions=_expansions(config, world),
        lr_phases=_lr_phases(config),
        step_tokens=flops.step_tokens(shape, config),
        total_flops=total,
        optimizer_flops_share=optimizer / total,
        fixed_flops=flops.total_flops(fixed) if fixed else None,
        short_steps=short.train.steps if short else None,
        never_grown=[(model_shape(c).num_layers, c.train.steps) for c in made[2:]],
        controls=[controls.control_words(config, control) for control in made],
        warnings=warnings,
        link_gb_per_s=link_gb_per_s,
        on=on,
        draws=draws,
    )


def _on_cluster(
    config: RunConfig,
    planned: list[PlannedPhase],
    cluster: Cluster,
    found: Found | None,
    words: list[str],
) -> ClusterPlan:
    shapes = [transformer_shape(config, p.phase.num_layers) for p in planned]
    layouts = [p.layout for p in planned]
    pairs = list(zip(shapes, layouts, strict=True))
    peaks = [fullest_rank(shape, config, layout, fused=True) for shape, layout in pairs]
    check_fits(config, layouts, peaks, cluster)
    times = [
        step_time(shape, config, layout, cluster, peak.state)
        for (shape, layout), peak in zip(pairs, peaks, strict=True)
    ]
    return ClusterPlan(cluster, peaks, times, found, words)


def _lr_phases(config: RunConfig) -> list[LrPhase]:
    from megatron_progressive.optim.schedule import decay_steps, warmup_steps

    warmup, end, total = warmup_steps(config), decay_steps(config), config.train.steps
    wsd = config.schedule.name == "wsd"
    found = [
        LrPhase("warmup", 1, warmup),
        LrPhase("stable" if wsd else config.schedule.name, warmup + 1, total - end),
        LrPhase("decay", total - end + 1, total),
    ]
    return [phase for phase in found if phase.last_step >= phase.first_step]


def _expansions(config: RunConfig, world: int) -> list[PlannedExpansion]:
    from megatron_progressive.optim.schedule import decay_steps, learning_rate

    steps = config.expansion_steps()
    if not steps:
        return []
    sums, running, marks = [], 0.0, set(steps)
    for step in range(1, config.train.steps + 1):
        running += learning_rate(config, step)
        if step in marks:
            sums.append(running)
    last_stable = config.train.steps - decay_steps(config) if config.schedule.name == "wsd" else 0
    return [
        PlannedExpansion(
            step=step,
            fraction=step / config.train.steps,
            stable_steps=max(0, last_stable - step),
            lr_share=before / running if running else 0.0,
            reshard=moved,
            peak_bytes=tau_peak(config, index, world, _staged(config, index, moved)),
        )
        for index, (step, before) in enumerate(zip(steps, sums, strict=True))
        for moved in (reshard_bytes(config, index, world),)
    ]


def _staged(config: RunConfig, index: int, moved: ReshardBytes) -> int:
    staging = config.parallel_after(index + 1).staging_mib << 20
    return min(staging, int((moved.sent + moved.received).max()))
