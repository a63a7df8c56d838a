"""Which kernels are chosen on which machine, and that overlapped communication trains the same."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_progressive.config import ConfigError, KernelsSection, OptimSection
from megatron_progressive.engines.megatron import engine as megatron
from megatron_progressive.engines.megatron import kernel_checks, kernels, spec
from megatron_progressive.engines.megatron.model import forget_graph
from megatron_progressive.engines.megatron.transformer_kwargs import transformer_config_kwargs
from megatron_progressive.engines.partitions import pieces_of_rank
from megatron_progressive.models import model_shape
from megatron_progressive.optim import owners
from megatron_progressive.plan.preflight import check_run
from megatron_progressive.runtime.layout import Layout, make_layout
from tests.engines.on_ranks import Full, family_config, gather, start, step
from tests.pool import Pool

NAMES = [
    f.name for f in fields(KernelsSection) if f.name not in ("transformer_engine", "attention")
]


def on(
    family: str, layers: int = 2, section: KernelsSection | None = None, **machine: bool
) -> set[str]:
    shape = model_shape(family_config(family, []), layers)
    given = {"cuda": True, "transformer_engine": True, "sharded": True, **machine}
    found = kernels.resolve(section or KernelsSection(), shape, **given)
    return {name for name in NAMES if getattr(found, name)}


def test_nothing_is_on_without_cuda() -> None:
    assert on("llama3", cuda=False) == set()


def test_defaults_on_cuda() -> None:
    dense = {"cross_entropy", "activation", "dropout", "overlap_gradients", "overlap_parameters"}
    assert on("llama3") == dense | {"rope"}
    assert on("gpt2") == dense  # learned positions
    assert on("mixtral") == dense | {"rope", "grouped_gemm", "permute"}
    assert on("mixtral", 0) == dense | {"rope"}  # no experts yet
    assert on("deepseek_v3", transformer_engine=False) == dense
    assert on("llama3", sharded=False) == (dense | {"rope"}) - {
        "overlap_gradients",
        "overlap_parameters",
    }


def test_deepep_is_of_experts_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default where it is installed; as if this were CUDA."""
    assert "deepep" in on("mixtral", deepep=True)
    assert on("mixtral", deepep=True) - on("mixtral") == {"deepep"}
    assert "deepep" not in on("mixtral", 0, deepep=True)  # no experts yet
    assert "deepep" not in on("llama3", deepep=True) | on("mixtral", deepep=True, fp32=True)
    assert "deepep" not in on("mixtral", section=KernelsSection(deepep=False), deepep=True)
    assert "deepep" not in on("mixtral", section=KernelsSection(deterministic=True), deepep=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = family_config("mixtral", ["train.precision=bf16"])
    shape, spread = model_shape(config, 2), Layout(8, expert=2)
    for installed in (False, True):
        monkeypatch.setattr(spec, "deepep_available", lambda there=installed: there)
        assert kernels.kernels_here(config, shape, spread).deepep is installed
        assert not kernels.kernels_here(config, shape, Layout(8)).deepep
    assert "DeepEP" in kernels.kernels_line(config, shape, spread)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_megatron_core_gets_its_flexible_dispatcher(family: str) -> None:
    """With groups of experts as they are, and without a capacity, beyond which tokens are lost."""
    shape = model_shape(family_config(family, []), 4)
    for deepep, kind in ((False, "alltoall"), (True, "flex")):
        chosen = kernels.Kernels(True, deepep=deepep)
        values = {**transformer_config_kwargs(shape), **kernels.transformer_kwargs(chosen, shape)}
        built = (TransformerConfig if shape.mla is None else MLATransformerConfig)(
            **values, expert_model_parallel_size=2
        )
        assert built.moe_token_dispatcher_type == kind
        assert built.moe_flex_dispatcher_backend == "deepep"
        assert built.moe_expert_capacity_factor is None
        assert built.moe_router_dtype == "fp32"  # which DeepEP takes
        groups = (2, 1) if family == "deepseek_v3" else (None, None)
        assert (built.moe_router_num_groups, built.moe_router_group_topk) == groups


def test_deepep_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["train.precision=bf16", "kernels.deepep=true", "parallel.expert=2"]
    config = family_config("mixtral", ["model.num_layers=2", *words])
    check_run(config, 2)  # a plan may have it
    monkeypatch.setattr(spec, "deepep_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^kernels\.deepep: got true, and deep_ep is not insta"):
        kernel_checks.check_kernels(config, [(model_shape(config), Layout(2, expert=2))])


def test_a_closed_model_keeps_no_graph_of_its_dispatchers() -> None:
    """Nor what DeepEP's part of one has."""
    layer, weight = torch.nn.Module(), torch.nn.Parameter(torch.ones(1))
    manager = SimpleNamespace(token_probs=weight * 2, token_indices=torch.ones(1))
    layer.token_dispatcher = SimpleNamespace(probs=weight * 3, _comm_manager=manager)
    forget_graph(layer)
    assert layer.token_dispatcher.probs is manager.token_probs is None
    assert manager.token_indices is not None


def test_fp32_is_fp32() -> None:
    """No kernel that rounds to bf16 or asks for TF32: Transformer Engine's layers and what comes
    with them, and Megatron-core's fused cross-entropy."""
    dense = {"activation", "dropout", "overlap_gradients", "overlap_parameters"}
    for family in ("gpt2", "llama3", "mixtral", "deepseek_v3"):
        assert on(family, fp32=True) == dense
    shape = model_shape(family_config("llama3", []), 2)
    machine = {"cuda": True, "transformer_engine": True, "sharded": True}
    assert not kernels.resolve(KernelsSection(), shape, **machine, fp32=True).transformer_engine
    assert kernels.resolve(KernelsSection(), shape, **machine, fp32=False).transformer_engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_decides_which_layers_a_run_has(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As if this were CUDA with Transformer Engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(spec, "transformer_engine_available", lambda: True)
    config = family_config("llama3", [f"train.precision={precision}"])
    shape, layout = model_shape(config, 2), Layout(1)
    fused = kernels.kernels_here(config, shape, layout).transformer_engine
    assert fused is (precision == "bf16")
    line = kernels.kernels_line(config, shape, layout)
    assert ("Transformer Engine layers" in line) is fused


def test_the_layers_are_those_that_the_configuration_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Transformer Engine is there."""
    monkeypatch.setattr(spec, "transformer_engine_available", lambda: True)
    local = SimpleNamespace(
        num_moe_experts=None, qk_layernorm=False, multi_latent_attention=False,
        normalization="RMSNorm", transformer_impl="local", moe_grouped_gemm=False,
    )  # fmt: skip
    layers = spec.decoder_spec(local, ["dense"])  # type: ignore[arg-type]
    attention = layers.layer_specs[0].submodules.self_attention.submodules
    assert attention.core_attention is spec.CausalAttention
    assert layers.layer_norm is spec.local_norm


def test_each_can_be_turned_off() -> None:
    everything = on("mixtral")
    for name in everything:
        assert on("mixtral", section=replace(KernelsSection(), **{name: False})) == (
            everything - {name}
        )
    assert "deterministic" in on("llama3", section=KernelsSection(deterministic=True))
    # Transformer Engine's own fall with it
    without = on("mixtral", section=KernelsSection(transformer_engine=False))
    assert without == everything - {"rope", "grouped_gemm", "permute"}


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mixtral"])
def test_megatron_core_takes_the_activation(family: str) -> None:
    """It accepts a fused GeLU by one name only; the kernel must be GPT-2's form."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    shape = model_shape(family_config(family, []), 2)
    values = kernels.transformer_kwargs(kernels.Kernels(True, activation=True), shape)
    assert ("activation_func" in values) == (family == "gpt2")
    if family == "gpt2":
        x, bias = torch.randn(4, 8), torch.randn(8)
        expected = torch.nn.functional.gelu(x + bias, approximate="tanh")
        assert torch.allclose(bias_gelu(bias, x), expected, atol=1e-6)


def test_asking_for_one_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel_checks.check_kernels(family_config("gpt2", ["kernels.rope=false"]))
    for name in NAMES:
        with pytest.raises(ConfigError, match=rf"kernels\.{name}: got true without a CUDA device"):
            kernel_checks.check_kernels(family_config("gpt2", [f"kernels.{name}=true"]))
    with pytest.raises(ConfigError, match=r"optim\.ns_kernel_from: got 4096"):
        kernel_checks.check_kernels(family_config("gpt2", ["optim.ns_kernel_from=4096"]))


BF16 = "train.precision=bf16"


@pytest.mark.parametrize(
    ("family", "words", "said"),
    [
        ("llama3", ["kernels.cuda_graphs=true"],
         "kernels.cuda_graphs: got true, which an expansion cannot replace: in Megatron-core"),
        ("llama3", ["kernels.cross_entropy=true"],
         "kernels.cross_entropy: got true, which is of bf16"),
        ("llama3", ["kernels.transformer_engine=true"],
         "kernels.transformer_engine: got true, which is of bf16"),
        ("llama3", [BF16, "kernels.grouped_gemm=true"], "kernels.grouped_gemm: got true, which"),
        ("gpt2", [BF16, "kernels.rope=true"], "kernels.rope: got true, which rotates"),
        ("llama3", ["parallel.zero_stage=0", "kernels.overlap_gradients=true"],
         "kernels.overlap_gradients: got true, which is of Megatron's distributed optimizer"),
        ("llama3", ["kernels.attention=flash"], "kernels.attention: got flash, which is of"),
        ("mixtral", [BF16, "kernels.deepep=true"], "kernels.deepep: got true, which sends tokens"),
        ("mixtral", ["parallel.expert=2", "kernels.deepep=true"],
         "kernels.deepep: got true, which sends tokens"),
        ("llama3", [BF16, "kernels.deterministic=true", "kernels.cross_entropy=true"],
         "kernels.cross_entropy: got true, which is of bf16 alone, and not deterministic"),
    ],
)  # fmt: skip
def test_what_no_phase_could_use_is_refused(family: str, words: list[str], said: str) -> None:
    """Before anything begins, whatever this machine has; off, and nothing, are always accepted."""
    config = family_config(family, ["model.num_layers=2", *words])
    with pytest.raises(ConfigError) as refused:
        check_run(config, 2)
    assert str(refused.value).startswith(said)
    assert "; accepted: " in str(refused.value)
    check_run(family_config(family, ["model.num_layers=2"]), 2)
    check_run(family_config(family, ["kernels.cuda_graphs=false"]), 2)


def test_what_a_later_phase_can_use_is_accepted() -> None:
    words = ["train.precision=bf16", "kernels.grouped_gemm=true", "kernels.attention=fused"]
    config = family_config("mixtral", ["model.num_layers=0", *words], {"at": 2, "to_layers": 2})
    check_run(config, 2)
    assert not on("mixtral", 0, config.kernels) & {"grouped_gemm"}


def test_attention_is_chosen_by_the_configuration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-core fails an assertion where the environment says something else."""
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(ConfigError, match=r"environment: got NVTE_FUSED_ATTN=0; accepted: without"):
        kernel_checks.check_kernels(family_config("llama3", []))
    section = KernelsSection(attention="flash")
    shape = model_shape(family_config("llama3", []), 2)
    machine = {"cuda": True, "transformer_engine": True, "sharded": True}
    chosen = kernels.resolve(section, shape, **machine)
    assert kernels.transformer_kwargs(chosen, shape)["attention_backend"].name == "flash"
    assert "Transformer Engine's flash attention" in kernels.summary(chosen, OptimSection(), "fp16")
    kernels.forget_attention()
    assert "NVTE_FUSED_ATTN" not in os.environ


def test_the_line_names_what_is_in_use() -> None:
    fast = kernels.Kernels(True, cross_entropy=True, rope=True, grouped_gemm=True)
    line = kernels.summary(fast, OptimSection(), "fp16")
    for part in ("Transformer Engine layers", "fused cross-entropy", "grouped GEMM", "rope",
                 "Muon-NSGD (5 jordan steps in fp16)"):  # fmt: skip
        assert part in line
    muon = OptimSection(embeddings="adamw", ns_kernel_from=4096)
    line = kernels.summary(fast, muon, "fp16", cuda=True)
    assert "(5 jordan steps in fp16, our symmetric kernel from 4096, AdamW for embeddings)" in line
    plain = kernels.summary(kernels.Kernels(False), OptimSection(name="adamw"), "fp32")
    assert "local layers" in plain
    assert "AdamW" in plain
    assert plain.endswith("none")


def said_and_built(words: list[str]) -> tuple[str, bool, bool]:
    """The printed line, and of the engine that is then built: whether it overlaps communication,
    and whether it has the distributed optimizer. Kernels are chosen as if this were CUDA."""
    config, resolve = family_config("gpt2", words), kernels.resolve

    def on_cuda(*given: Any, **machine: Any) -> kernels.Kernels:
        found = resolve(*given, **{**machine, "cuda": True})
        return kernels.Kernels(
            False,
            overlap_gradients=found.overlap_gradients,
            overlap_parameters=found.overlap_parameters,
        )

    kernels.resolve = on_cuda
    try:
        layout = make_layout(config.parallel, dist.get_world_size())
        line = kernels.kernels_line(config, model_shape(config, 2), layout)
        engine = start(config, 2)
    finally:
        kernels.resolve = resolve
    built = engine.chunks[0].ddp_config
    engine.close()
    return line, built.overlap_grad_reduce, built.use_distributed_optimizer


@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1])
def test_the_line_says_what_the_engine_has(pool: Pool, optimizer: str, stage: int) -> None:
    words = [f"optim.name={optimizer}", f"parallel.zero_stage={stage}"]
    line, overlaps, divided = pool.run(1, said_and_built, words)[0]
    assert overlaps is divided is bool(stage)
    assert ("overlap_gradients, overlap_parameters" in line) is bool(stage)


def test_deepspeed_overlaps_nothing_of_megatrons() -> None:
    for stage in range(4):
        assert not Layout(2, engine="deepspeed", zero_stage=stage).distributed_optimizer


def overlapped(words: list[str], overlaps: bool) -> tuple[list[float], Full]:
    """Losses of steps and state, with communication that is overlapped as on CUDA or not."""
    before = megatron.kernels_here
    forced = kernels.Kernels(False, overlap_gradients=overlaps, overlap_parameters=overlaps)
    megatron.kernels_here = lambda *_, **__: forced
    try:
        engine = start(family_config("gpt2", words), 2)
    finally:
        megatron.kernels_here = before
    losses = [step(engine, number) for number in range(3)]
    first = gather(engine.state())  # in the middle: the steps after it go on from the same weights
    losses += [step(engine, number) for number in range(3, 5)]
    last = gather(engine.state())
    engine.close()
    return losses, {**{(f"first {k[0]}", k[1]): v for k, v in first.items()}, **last}


def test_overlapped_communication_trains_the_same(pool: Pool) -> None:
    words = ["optim.name=adamw", "train.micro_batch=2"]  # two micro-batches a rank
    losses, full = pool.run(2, overlapped, words, True)[0]
    expected, whole = pool.run(2, overlapped, words, False)[0]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert full.keys() == whole.keys()
    for key, tensor in full.items():
        assert torch.allclose(tensor, whole[key], rtol=1e-5, atol=1e-7), key


def reductions(words: list[str], layers: int, bucket: int) -> tuple[list[str], int, float, bool]:
    """With buckets of a few thousand elements and gradients reduced as on CUDA: what happens in a
    step's backward pass and behind it, in order; buckets; a loss; and whether the pieces are those
    that are planned."""
    small = {"_BUCKET_NUMEL": bucket, "_BUCKET_NUMEL_A_RANK": 0}
    forced = kernels.Kernels(False, overlap_gradients=True, overlap_parameters=True)
    config = family_config("llama3", words)
    layout = make_layout(config.parallel, dist.get_world_size())
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            events.append(name)
            return function(*given, **named)

        return call

    with (
        patch.multiple(owners, **small),
        patch.object(megatron, "kernels_here", lambda *_, **__: forced),
    ):
        engine = start(config, layers)
        planned = pieces_of_rank(
            model_shape(config, layers), config.optim, "fp32", layout, dist.get_rank()
        )
        same = Counter(planned) == Counter(piece.meta for piece in engine.state().pieces)
    step(engine, 0)  # in the first step Megatron-core learns how often each gradient comes
    group = type(engine.chunks[0].bucket_groups[0])
    finalize = "megatron_progressive.engines.megatron.engine.finalize_model_grads"
    with (
        patch.object(group, "start_grad_sync", noted("reduce", group.start_grad_sync)),
        patch.object(group, "register_grad_ready", noted("ready", group.register_grad_ready)),
        patch(finalize, noted("finalize", megatron.finalize_model_grads)),
    ):
        loss = step(engine, 1)
    buckets = sum(len(chunk.bucket_groups) for chunk in engine.chunks)
    engine.close()
    return events, buckets, loss, same


@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_gradients_are_reduced_during_the_backward_pass(
    pool: Pool, optimizer: str, parallel: dict[str, int]
) -> None:
    words = [f"optim.name={optimizer}", "train.micro_batch=2"]
    words += [f"parallel.{key}={value}" for key, value in parallel.items()]
    world = 2 * (2 if parallel else 1)
    expected = pool.run(world, reductions, words, 8, 10**9)
    for (events, buckets, loss, planned), (_, one, same_loss, _) in zip(
        pool.run(world, reductions, words, 8, 8_000), expected, strict=True
    ):
        assert planned
        assert buckets > one
        assert events.count("reduce") == buckets
        before = events[: len(events) - 1 - events[::-1].index("ready")]
        assert before.count("reduce") > 0  # and gradients came after it
        assert events.index("finalize") > max(i for i, e in enumerate(events) if e == "ready")
        assert loss == pytest.approx(same_loss, rel=1e-6)
