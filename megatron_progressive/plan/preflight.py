"""Checks of a whole run, in every phase, before anything is created.

Errors name the field; warnings name the failure signature (arXiv 2511.04981) that the configuration
is likely to show.
"""

from __future__ import annotations

import itertools
import math

from megatron_progressive.config import ConfigError, ExpansionSection, ParallelSection, RunConfig
from megatron_progressive.data import check_keys
from megatron_progressive.engines.megatron.kernel_checks import check_possible
from megatron_progressive.expansion.depth_map import check_growth
from megatron_progressive.expansion.placing import survivors
from megatron_progressive.models import FAMILIES, model_shape
from megatron_progressive.models.base import DENSE, MOE, ModelShape, TransformerShape
from megatron_progressive.plan.layout_checks import check_context, check_recompute, check_sequence
from megatron_progressive.runtime.layout import Layout, make_layout

_LATEST_WSD = 0.8
"""The fraction of the steps after which an expansion under WSD no longer lets a run catch up (arXiv
2511.04981)."""
_DATA_PARALLEL = ("deepspeed", "torch")
"""The engines that can only be data parallel."""
_DIVIDING = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
"""The keys of other parallelism."""
_LATEST_OTHER = 0.5
"""The same fraction for GPT under cosine; linear has no stable phase either."""


def check_run(config: RunConfig, world: int) -> list[str]:
    """Check that each phase of ``config`` can run on ``world`` ranks.

    Returns: The warnings, one line each.

    Raises:
        ConfigError: a phase cannot run; one line names the field, its value and what is accepted.
    """
    if world < 1:
        raise ConfigError(f"--nproc: got {world}; accepted: from 1")
    check_schedule(config)
    check_keys(config)
    _check_expansions(config)
    _check_rewarm(config)
    _check_stop(config)
    _check_mup(config)
    for index in range(len(config.expansion) + 1):
        check_phase(config, index, world)
    check_recompute(config)
    _check_kernels(config, world)
    return _warnings(config)


def smallest_world(config: RunConfig) -> int:
    """The fewest ranks that every phase's tensor x pipeline x context divides, and the product of
    its experts."""
    sections = [config.parallel_after(i) for i in range(len(config.expansion) + 1)]
    return math.lcm(
        *(
            ranks * section.pipeline
            for section in sections
            for ranks in (
                section.tensor * section.context,
                (section.expert_tensor or section.tensor) * section.expert,
            )
        )
    )


def check_schedule(config: RunConfig) -> None:
    warmup, decay = config.schedule.warmup, config.schedule.decay
    if config.schedule.name == "wsd" and warmup + decay > 1 + 1e-9:  # 0.7 + 0.3 is not quite 1
        raise ConfigError(
            f"schedule.decay: got {decay} after warmup {warmup}; accepted: warmup + decay up to 1"
        )
    for name in ("rewarm_from", "rewarm_layers"):
        value = getattr(config.schedule, name)
        if value is not None and config.schedule.rewarm is None:
            raise ConfigError(
                f"schedule.{name}: got {value} without schedule.rewarm; accepted: with it, or null"
            )


def _check_rewarm(config: RunConfig) -> None:
    from megatron_progressive.optim.schedule import rewarm_steps

    climb, taus, total = rewarm_steps(config), config.expansion_steps(), config.train.steps
    for tau, end in itertools.pairwise([*taus, total]):
        if tau + climb > end:
            what = "the next expansion" if end < total else "the end"
            raise ConfigError(
                f"schedule.rewarm: got {config.schedule.rewarm}, which is {climb} steps; accepted: "
                f"up to the {end - tau} from the expansion after step {tau} to {what}"
            )


def _check_mup(config: RunConfig) -> None:
    if model_shape(config).mup and config.optim.scale != "out_in":
        raise ConfigError(
            f"optim.scale: got {config.optim.scale!r} with model.mup; accepted: out_in (its own "
            "scale)"
        )


def transformer_phases(config: RunConfig, world: int) -> list[tuple[TransformerShape, Layout]]:
    """The model and the layout of each phase of a run; none of those that are no language models.

    Raises:
        ConfigError: a layout that the ranks do not divide into.
    """
    depths = [None, *(expansion.to_layers for expansion in config.expansion)]
    shapes = [model_shape(config, depth) for depth in depths]
    return [
        (shape, make_layout(config.parallel_after(index), world))
        for index, shape in enumerate(shapes)
        if isinstance(shape, TransformerShape)
    ]


def _check_kernels(config: RunConfig, world: int) -> None:
    if isinstance(model_shape(config), TransformerShape):
        check_possible(config, transformer_phases(config, world))
        return
    for name, value in vars(config.kernels).items():
        if value is not None:
            raise ConfigError(
                f"kernels.{name}: got {value!r} for family {config.model.family}; accepted: "
                "nothing (these are of language models)"
            )


def _check_expansions(config: RunConfig) -> None:
    steps, depth, before = config.train.steps, model_shape(config).num_layers, 0
    for index, expansion in enumerate(config.expansion):
        field = f"expansion[{index}]"
        step = _expansion_step(f"{field}.at", expansion.at, steps)
        if step <= before and index:
            raise ConfigError(
                f"{field}.at: got {expansion.at} (step {step}) after one at step {before}; "
                f"accepted: expansions in increasing order of step"
            )
        shapes = model_shape(config, depth), model_shape(config, expansion.to_layers)
        check_growth(expansion, *shapes, field, "before it")
        before, depth = step, expansion.to_layers


def _check_stop(config: RunConfig) -> None:
    stop, least = config.train.stop_after, 1 + max(config.expansion_steps(), default=0)
    if stop is not None and not least <= stop <= config.train.steps:
        raise ConfigError(
            f"train.stop_after: got {stop}; accepted: from {least} (a step follows every "
            f"expansion) to train.steps {config.train.steps}"
        )


def _expansion_step(field: str, at: float, steps: int) -> int:
    """The expansion ``at`` as a step that at least one other step follows."""
    accepted = f"accepted: a fraction below 1, or a step from 1 to {steps - 1}"
    if not math.isfinite(at) or at > steps or (at > 1 and at != int(at)):
        raise ConfigError(f"{field}: got {at}; {accepted}")
    step = int(at) if at >= 1 else round(at * steps)
    if not 1 <= step < steps:
        raise ConfigError(f"{field}: got {at}, which is step {step} of {steps}; {accepted}")
    return step


def check_phase(config: RunConfig, index: int, world: int) -> None:
    """Check phase ``index``, before which that many expansions have happened."""
    parallel = config.parallel_after(index)
    prefix = f"expansion[{index - 1}]." if index else ""
    depth = config.expansion[index - 1].to_layers if index else None
    shape = model_shape(config, depth)
    _check_experts(shape, parallel, prefix, world)
    try:
        layout = make_layout(parallel, world)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
    _check_engine(shape, parallel, prefix)
    _check_tensor(shape, parallel, prefix)
    check_sequence(shape, parallel, prefix)
    check_context(shape, parallel, prefix, config.data.attention)
    _check_pipeline(shape, parallel, prefix)
    train, ranks = config.train, layout.data
    # the interleaved schedule runs micro-batches through its chunks in groups of one a stage
    grouped = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    unit = train.micro_batch * ranks * grouped
    if train.global_batch % unit:
        where = f"after expansion[{index - 1}]" if index else "at the start"
        stages = f"{grouped} stages of virtual pipelines x " if grouped > 1 else ""
        raise ConfigError(
            f"train.global_batch: got {train.global_batch}; accepted: a multiple of {unit} "
            f"(micro_batch {train.micro_batch} x {stages}{ranks} data-parallel ranks {where}, "
            f"{layout})"
        )


def _check_engine(shape: ModelShape, parallel: ParallelSection, prefix: str) -> None:
    engines = FAMILIES[shape.family].engines
    if parallel.engine not in engines:
        raise ConfigError(
            f"{prefix}parallel.engine: got {parallel.engine!r} for family {shape.family}; "
            f"accepted: {', '.join(engines)}"
        )
    if parallel.engine in _DATA_PARALLEL:
        for name in _DIVIDING:
            if getattr(parallel, name) not in (1, None):
                raise ConfigError(
                    f"{prefix}parallel.{name}: got {getattr(parallel, name)} with engine "
                    f"{parallel.engine}, which is data parallel only; accepted: 1"
                )
    if parallel.engine == "deepspeed" and isinstance(shape, TransformerShape):
        if parallel.zero_stage == 3 and shape.mtp_depth and shape.tie_embeddings:
            # stage 3 drops the embedding after its use as the head, of which there are several
            raise ConfigError(
                f"{prefix}parallel.zero_stage: got 3 with model.mtp_layers {shape.mtp_layers} and "
                f"a tied embedding; accepted: 0, 1, 2, or model.tie_embeddings: false"
            )
    elif parallel.zero_stage > 1:
        raise ConfigError(
            f"{prefix}parallel.zero_stage: got {parallel.zero_stage} with engine "
            f"{parallel.engine}; accepted: 0, 1 (engine deepspeed has 2 and 3)"
        )


def _check_pipeline(shape: ModelShape, parallel: ParallelSection, prefix: str) -> None:
    stages, chunks, layers = parallel.pipeline, parallel.virtual_pipeline, shape.num_layers
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"{prefix}parallel.virtual_pipeline: got {chunks} with pipeline 1; accepted: 1, or "
            f"pipeline above 1"
        )
    if layers >= stages * chunks and layers % (stages * chunks) and not parallel.uneven:
        got = f"pipeline: got {stages}"
        if chunks > 1:
            got = f"virtual_pipeline: got {chunks} x pipeline {stages} = {stages * chunks} stages"
        raise ConfigError(
            f"{prefix}parallel.{got}; accepted: stages that divide the {layers} layers, more "
            f"stages than layers, or {prefix}parallel.uneven: true"
        )


def _check_experts(shape: ModelShape, parallel: ParallelSection, prefix: str, world: int) -> None:
    """Check the experts of a phase. A phase whose model has no expert layers yet may have the
    layout of one that has them."""
    moe = shape.moe if isinstance(shape, TransformerShape) else None
    if moe is None:
        for name, none in (("expert", 1), ("expert_tensor", None)):
            if getattr(parallel, name) != none:
                raise ConfigError(
                    f"{prefix}parallel.{name}: got {getattr(parallel, name)}; accepted: "
                    f"{none or 'none'} (family {shape.family} has no experts)"
                )
    elif moe.num_experts % parallel.expert:
        others = world // parallel.pipeline // (parallel.expert_tensor or parallel.tensor)
        raise ConfigError(
            f"{prefix}parallel.expert: got {parallel.expert}; accepted: a divisor of "
            f"{math.gcd(moe.num_experts, others)} (model.moe.num_experts is {moe.num_experts})"
        )


def _tensor_cuts(shape: TransformerShape) -> dict[str, int]:
    """The numbers that tensor parallelism divides, by name."""
    mla, moe, kinds = shape.mla, shape.moe, shape.layer_kinds()
    cuts = {"num_attention_heads": shape.num_attention_heads}
    if mla is None:
        cuts["num_query_groups"] = shape.num_query_groups
    elif kinds:
        # the local layer spec cuts the down-projections; Transformer Engine's does not
        cuts["mla.q_lora_rank"] = mla.q_lora_rank
        cuts["mla.kv_lora_rank + qk_rope_head_dim"] = mla.kv_lora_rank + mla.qk_rope_head_dim
    if DENSE in kinds or moe is None:
        cuts["ffn_hidden_size"] = shape.ffn_hidden_size
    if moe is not None and MOE in kinds:
        cuts["moe.shared_experts x ffn_hidden_size"] = moe.shared_experts * moe.ffn_hidden_size
        # sequence parallelism, without which Megatron-core has no experts under tensor parallelism
        cuts["sequence_length"] = shape.sequence_length
    cuts["the padded vocabulary"] = shape.padded_vocab_size
    return cuts


def _check_tensor(shape: ModelShape, parallel: ParallelSection, prefix: str) -> None:
    if not isinstance(shape, TransformerShape):
        return
    for name, size in _tensor_cuts(shape).items():
        if size % parallel.tensor:
            raise ConfigError(
                f"{prefix}parallel.tensor: got {parallel.tensor}; accepted: a divisor of "
                f"{name} {size}"
            )
    ranks, moe = parallel.expert_tensor or parallel.tensor, shape.moe
    if moe is not None and MOE in shape.layer_kinds() and moe.ffn_hidden_size % ranks:
        name = "expert_tensor" if parallel.expert_tensor else "tensor"
        raise ConfigError(
            f"{prefix}parallel.{name}: got {ranks}; accepted: a divisor of moe.ffn_hidden_size "
            f"{moe.ffn_hidden_size}"
        )


def _lands_above(source: ModelShape, target: ModelShape, expansion: ExpansionSection) -> bool:
    """Whether layers that are no copies come to lie above trained layers of their stack. That is so
    on insertion at the top, and where the new layers are of a kind that stands above that of the
    trained ones (experts, or blocks behind the first of a stage)."""
    before = source.stacks()
    for stack, kinds in target.stacks().items():
        trained = survivors(before[stack], kinds, expansion.order, expansion.insert, False)
        new = set(range(len(kinds))) - set(trained)
        # in the middle some trained layers lie below on purpose: those at the head are what counts
        above = max(trained, default=0) if expansion.insert == "middle" else min(trained, default=0)
        if trained and new and max(new) > above:
            return True
    return False


def _warnings(config: RunConfig) -> list[str]:
    from megatron_progressive.optim.schedule import decay_steps

    total, depth, found = config.train.steps, model_shape(config).num_layers, []
    wsd = config.schedule.name == "wsd"
    last_stable = total - decay_steps(config)
    for index, (step, expansion) in enumerate(
        zip(config.expansion_steps(), config.expansion, strict=True)
    ):
        field = f"expansion[{index}]"
        if wsd and step >= last_stable:
            found.append(
                f"{field}.at: step {step} leaves no stable step before the decay from step "
                f"{last_stable + 1}: loss spike > 2x at expansion; "
                f"likely cause: expansion during decay"
            )
        # half a step of slack: a fraction becomes a step by rounding
        if wsd and step > _LATEST_WSD * total + 0.5:
            found.append(
                f"{field}.at: step {step} is {step / total:.2f} of the run: final loss >= 5 % "
                f"worse than fixed-size; likely cause: tau > {_LATEST_WSD} T"
            )
        if not wsd and step + 0.5 >= _LATEST_OTHER * total:
            found.append(
                f"{field}.at: step {step} is {step / total:.2f} of the run under "
                f"{config.schedule.name}: final loss >= 5 % worse than fixed-size; likely cause: "
                f"{config.schedule.name} schedule with tau >= {_LATEST_OTHER} T"
            )
        if expansion.init == "zero":
            found.append(
                f"{field}.init: zero kills the gradient of the new layers: "
                f"loss spike > 2x at expansion; likely cause: zero init"
            )
        above = _lands_above(
            model_shape(config, depth), model_shape(config, expansion.to_layers), expansion
        )
        if expansion.init == "random" and above:
            where = (
                ""
                if expansion.insert == "top"
                else " puts new layers of one kind above trained ones of another"
            )
            found.append(
                f"{field}.insert: {expansion.insert} with init random{where}: instability after "
                f"expansion; likely cause: random layers at the top"
            )
        depth = expansion.to_layers
    return found
