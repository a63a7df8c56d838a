"""The search for layouts of every phase of a run that fit a cluster's memory, the quickest first.

All layouts of the Megatron engine with its distributed optimizer that :mod:`.preflight` lets run
are tried: tensor parallelism within a node, pipeline stages with up to eight chunks, experts over
any divisor of them, sequences over powers of two that leave each rank 4,096 tokens. Where one does
not fit although its state does, norms, up-projections of latent attention, activations of experts
and shared experts are computed anew, and then whole layers. Layouts whose state alone is too large
are dropped before their time is estimated (:mod:`.step_time`). All phases of a run have one
micro-batch, as in the configuration; the one with the shortest run wins, and of several as quick
ones the smallest. Estimates within 5 % of the quickest cannot be told apart by this model of time;
among such layouts the one that divides the model least wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_progressive.config import ConfigError, ParallelSection, RunConfig
from megatron_progressive.cost import flops
from megatron_progressive.cost.activations import RankPeak, stage_activations
from megatron_progressive.cost.cluster import RESERVE, Cluster
from megatron_progressive.cost.step_time import StepTime, stage_states, step_time
from megatron_progressive.models import transformer_shape
from megatron_progressive.models.base import MOE, TransformerShape
from megatron_progressive.plan import preflight
from megatron_progressive.plan.shell_words import field_word
from megatron_progressive.runtime.layout import Layout, make_layout

_CHUNKS = (1, 2, 4, 8)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_KEPT = 16
"""How many of the best layouts of each phase are kept to find those whose states fit together."""
_CLOSE = 1.05
_SHORTEST_PART = 4096
"""The fewest tokens of a sequence that a context-parallel rank has in layouts that are tried."""
_GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A layout of one phase, with what it costs."""

    parallel: ParallelSection
    layout: Layout
    peak: RankPeak
    time: StepTime


@dataclass(frozen=True)
class Found:
    """The layouts that were chosen."""

    micro_batch: int
    phases: list[Candidate]
    tried: int
    """The number of layouts, over all phases and micro-batches, whose memory was computed."""
    fitting: int
    """The number of those that fit."""

    def words(self, config: RunConfig) -> list[str]:
        """The ``key=value`` words that give ``config`` these layouts."""
        words = []
        if self.micro_batch != config.train.micro_batch:
            words.append(f"train.micro_batch={self.micro_batch}")
        for index, candidate in enumerate(self.phases):
            # what the phase would have with the words so far
            base: object = config.parallel
            prefix = "parallel"
            if index:
                prefix = f"expansion[{index - 1}].parallel"
                base = self.phases[index - 1].parallel
            own = config.expansion[index - 1].parallel if index else None
            for key in _KEYS:
                value, given = getattr(candidate.parallel, key), getattr(own, key, None)
                if value != (getattr(base, key) if given is None else given):
                    words.append(field_word(f"{prefix}.{key}", value))
        return words

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration ``config`` with these layouts."""
        expansions = [
            replace(
                expansion,
                parallel=replace(
                    expansion.parallel, **{key: getattr(c.parallel, key) for key in _KEYS}
                ),
            )
            for expansion, c in zip(config.expansion, self.phases[1:], strict=True)
        ]
        return replace(
            config,
            train=replace(config.train, micro_batch=self.micro_batch),
            parallel=self.phases[0].parallel,
            expansion=expansions,
        )


_KEYS = ("engine", "tensor", "pipeline", "virtual_pipeline", "context", "uneven", "expert",
         "expert_tensor", "zero_stage", "sequence", "recompute", "recompute_modules",
         "recompute_layers")  # fmt: skip


def phase_peak(shape: TransformerShape, config: RunConfig, layout: Layout) -> RankPeak:
    """The fullest rank of a phase, on CUDA with Transformer Engine."""
    states = stage_states(shape, config, layout)
    activations = stage_activations(shape, config, layout, fused=True)
    peaks = (RankPeak(*pair) for pair in zip(states, activations, strict=True))
    return max(peaks, key=lambda peak: peak.total)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _contexts(sequence_length: int) -> list[int]:
    """The numbers of ranks that may divide a sequence: powers of two that leave each a part of some
    length, below which other layouts serve as well."""
    found = [1]
    while sequence_length // (2 * found[-1]) >= _SHORTEST_PART:
        found.append(2 * found[-1])
    return found


def _sections(
    base: ParallelSection, shape: TransformerShape, world: int, cluster: Cluster
) -> Iterator[ParallelSection]:
    """The ways to divide a model, whether they can run or not."""
    kinds = shape.layer_kinds()
    experts = shape.moe.num_experts if shape.moe is not None and MOE in kinds else 1
    tensors = _divisors(world, cluster.gpus_per_node)
    stages = _divisors(world, max(1, len(kinds)))
    contexts = _contexts(shape.sequence_length)
    for tensor, pipeline, chunks, context in itertools.product(tensors, stages, _CHUNKS, contexts):
        if world % (tensor * pipeline * context) or chunks * pipeline > max(1, len(kinds)):
            continue
        if chunks > 1 and pipeline == 1:
            continue
        for expert in _divisors(experts, world // pipeline):
            for expert_tensor in {1, tensor} if experts > 1 else {tensor}:
                yield replace(
                    base, engine="megatron", tensor=tensor, pipeline=pipeline,
                    virtual_pipeline=chunks, context=context, expert=expert, zero_stage=1,
                    uneven=bool(kinds) and len(kinds) % (pipeline * chunks) != 0,
                    expert_tensor=expert_tensor if shape.moe is not None else None,
                    sequence=None, recompute="none", recompute_layers=None,
                    recompute_modules=ParallelSection().recompute_modules,
                )  # fmt: skip


_CHEAP = {"layernorm", "mla_up_proj", "moe_act", "shared_experts"}
"""Parts of a layer that take little time to compute anew for the memory that they keep."""


def _recomputing(section: ParallelSection, shape: TransformerShape) -> Iterator[ParallelSection]:
    """A layout, and the same one with more and more computed anew."""
    yield section
    if cheap := sorted(_CHEAP & shape.recomputable()):
        yield replace(section, recompute="selective", recompute_modules=cheap)
    if shape.num_layers:
        yield replace(section, recompute="full")


def _ordered(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates in order, the best one first."""
    quickest = min((c.time.total for c in candidates), default=0.0)

    def order(candidate: Candidate) -> tuple[float, ...]:
        layout, seconds = candidate.layout, candidate.time.total
        divided = layout.tensor * layout.pipeline * layout.virtual_pipeline * layout.expert
        divided *= layout.context
        close = seconds <= _CLOSE * quickest
        return (0.0, divided, seconds) if close else (1.0, seconds, divided)

    return sorted(candidates, key=order)


def _phase(
    config: RunConfig, index: int, world: int, cluster: Cluster, micro_batch: int
) -> tuple[list[Candidate], list[Candidate]]:
    """The layouts of a phase that fit, and the others, whose time is not estimated."""
    depth = config.expansion[index - 1].to_layers if index else None
    shape = transformer_shape(config, depth)
    train = replace(config.train, micro_batch=micro_batch)
    nothing = StepTime(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    fitting, others = [], []
    for section in _sections(config.parallel_after(index), shape, world, cluster):
        alone = replace(
            config,
            train=train,
            parallel=section,
            model=replace(config.model, num_layers=shape.num_layers),
            expansion=[],
        )
        try:
            preflight.check_phase(alone, 0, world)
        except ConfigError:
            continue
        for one in _recomputing(section, shape):
            layout = make_layout(one, world)
            peak = phase_peak(shape, alone, layout)
            if peak.total <= cluster.usable_bytes:
                seconds = step_time(shape, alone, layout, cluster, peak.state)
                fitting.append(Candidate(one, layout, peak, seconds))
                break
            others.append(Candidate(one, layout, peak, nothing))
            if peak.state.total > cluster.usable_bytes:
                break
    return _ordered(fitting), others


def search(config: RunConfig, world: int, cluster: Cluster) -> Found:
    """The layouts and the micro-batch that make ``config`` shortest on ``world`` GPUs.

    Raises:
        ConfigError: no layout of a phase can run, or none fits; the message then says how much
            memory the best one lacks.
    """
    preflight.check_schedule(config)
    steps = [phase.steps for phase in flops.phases(config)]
    best: tuple[float, int, tuple[Candidate, ...]] | None = None
    tried = fitted = 0
    # of each phase what lacks least memory, of any micro-batch
    closest: list[Candidate | None] = [None] * len(steps)
    fits = [False] * len(steps)
    together: float | None = None
    for micro_batch in _MICRO_BATCHES:
        kept: list[list[Candidate]] = []
        for index in range(len(steps)):
            fitting, others = _phase(config, index, world, cluster, micro_batch)
            tried, fitted = tried + len(fitting) + len(others), fitted + len(fitting)
            known = closest[index]
            closest[index] = min(
                [*others, *([known] if known else [])],
                key=lambda candidate: candidate.peak.total,
                default=None,
            )
            fits[index] = fits[index] or bool(fitting)
            kept.append(fitting[:_KEPT] if len(steps) <= 3 else fitting[:3])
        for chosen in itertools.product(*kept):
            most = _at_expansion(chosen)
            if most > cluster.usable_bytes:
                together = min(together or most, most)
                continue
            seconds = sum(n * c.time.total for n, c in zip(steps, chosen, strict=True))
            if best is None or seconds * _CLOSE < best[0]:
                best = (seconds, micro_batch, chosen)
            break
    if best is not None:
        return Found(best[1], list(best[2]), tried, fitted)
    for index, fit in enumerate(fits):
        if not fit:
            raise ConfigError(_refusal(closest[index], index, world, cluster))
    if together is None:
        raise ConfigError(
            f"--nproc: got {world}; accepted: ranks on which all phases fit with one micro_batch"
        )
    raise ConfigError(
        f"--nproc: got {world}; at an expansion the old and the new state need "
        f"{_missing(together, cluster)}; accepted: more ranks, or more memory"
    )


def _at_expansion(chosen: tuple[Candidate, ...]) -> int:
    """The most bytes of state before and after an expansion together, on one rank."""
    return max(
        (a.peak.state.total + b.peak.state.total for a, b in itertools.pairwise(chosen)), default=0
    )


def _missing(size: float, cluster: Cluster) -> str:
    lacks = (size - cluster.usable_bytes) / _GIB
    return (
        f"{size / _GIB:.1f} GiB on the fullest rank of {cluster.usable_bytes / _GIB:.1f} "
        f"({100 * (1 - RESERVE):.0f} % of {cluster.gpu} {cluster.memory_gib:g}): "
        f"{lacks:.1f} GiB too much"
    )


def _refusal(closest: Candidate | None, index: int, world: int, cluster: Cluster) -> str:
    if closest is None:
        return (
            f"--nproc: got {world}; no layout of phase {index + 1} can run on that many ranks; "
            f"accepted: ranks that train.global_batch and the model's sizes divide into"
        )
    return (
        f"--nproc: got {world}; no layout of phase {index + 1} fits: the closest, "
        f"{closest.layout}, needs {_missing(closest.peak.total, cluster)}; "
        f"accepted: more ranks, or more memory"
    )


def check_fits(
    config: RunConfig, layouts: list[Layout], peaks: list[RankPeak], cluster: Cluster
) -> None:
    """Refuse layouts that do not fit the cluster's memory.

    Raises:
        ConfigError: a phase does not fit; the message says which one, and how much it lacks.
    """
    for index, (layout, peak) in enumerate(zip(layouts, peaks, strict=True)):
        if peak.total > cluster.usable_bytes:
            prefix = f"expansion[{index - 1}]." if index else ""
            raise ConfigError(
                f"{prefix}parallel: phase {index + 1}, {layout} with micro_batch "
                f"{config.train.micro_batch}, needs {_missing(peak.total, cluster)}; "
                f"accepted: a layout that fits (--search looks for one)"
            )
    states = [peak.state.total for peak in peaks]
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        if before + after > cluster.usable_bytes:
            raise ConfigError(
                f"expansion[{index}].parallel: the old and the new state together need "
                f"{_missing(before + after, cluster)}; accepted: a layout that fits"
            )
