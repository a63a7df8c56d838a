"""The search for layouts, against plain loops and against what preflight and the plan say."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from megatron_progressive import cli
from megatron_progressive.config import ConfigError, RunConfig, load
from megatron_progressive.cost import flops
from megatron_progressive.cost.activations import fullest_rank
from megatron_progressive.cost.cluster import GPUS, Cluster, make_cluster
from megatron_progressive.cost.memory import stage_memory
from megatron_progressive.cost.step_time import parts, stage_states, step_time
from megatron_progressive.models import model_shape
from megatron_progressive.plan import preflight
from megatron_progressive.plan.layout_search import search
from megatron_progressive.plan.plan import make_plan
from megatron_progressive.plan.plan_text import render
from megatron_progressive.runtime.layout import Layout, make_layout
from tests.engines.on_ranks import family_config

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "configs/llama3/2b_progressive.yaml"
DEEPSEEK = ROOT / "configs/deepseek_v3/671b_progressive.yaml"
H100 = GPUS["h100"]


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(8, tensor=2, pipeline=2),
        Layout(4, pipeline=4),
        Layout(8, pipeline=2, virtual_pipeline=2, zero_stage=0),
    ],
    ids=str,
)
def test_quick_states_are_the_exact_ones(family: str, tie: bool, layout: Layout) -> None:
    words = [f"model.tie_embeddings={tie}", "train.precision=bf16", "optim.embeddings=adamw"]
    config = family_config(family, words)
    for depth in (0, 1, 5, 8):
        shape = model_shape(config, depth)
        assert stage_states(shape, config, layout) == stage_memory(shape, config, layout)


@pytest.mark.parametrize(
    "layout",
    [Layout(8, expert=4), Layout(8, tensor=2, expert=2, pipeline=2, expert_tensor=1)],
    ids=str,
)
def test_quick_states_of_experts_and_prediction(layout: Layout) -> None:
    config = family_config("deepseek_v3", ["model.mtp_layers=1", "optim.name=adamw"])
    for depth in (2, 6):
        shape = model_shape(config, depth)
        assert stage_states(shape, config, layout) == stage_memory(shape, config, layout)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "deepseek_v3"])
def test_flops_of_a_layer_are_what_it_adds_to_the_model(family: str) -> None:
    config = family_config(family, [])
    layers = parts(model_shape(config, 4), config.optim, True)[1]
    counts = [flops.forward_flops_per_token(model_shape(config, depth)) for depth in range(5)]
    added = [b - a for a, b in pairwise(counts)]
    assert [part.flops for part in layers] == added


def one_phase(words: list[str]) -> RunConfig:
    return load(LLAMA, ["expansion=[]", "model.num_layers=32", *words])


def test_a_step_without_communication_takes_its_flops_at_the_utilisation() -> None:
    config = one_phase(["optim.name=adamw", "train.global_batch=2"])
    shape, layout = model_shape(config), Layout(1)
    state = fullest_rank(shape, config, layout, fused=True).state
    seconds = step_time(shape, config, layout, H100, state).total
    assert seconds == pytest.approx(flops.step_flops(shape, config) / (989e12 * 0.4))


def test_the_bubble_is_that_of_the_schedule() -> None:
    config = one_phase(["train.global_batch=64", "train.micro_batch=2"])
    for chunks in (1, 4):
        layout = Layout(8, pipeline=4, virtual_pipeline=chunks)
        state = fullest_rank(model_shape(config), config, layout, fused=True).state
        seconds = step_time(model_shape(config), config, layout, H100, state)
        products = seconds.compute + seconds.uneven  # the last stage has the head as well
        assert seconds.uneven > 0
        assert seconds.bubble / products == pytest.approx(3 / (16 * chunks))


@pytest.mark.parametrize("words", [[], ["parallel.recompute=full"]])
def test_parts_of_the_products_are_those_of_the_slowest_stage(words: list[str]) -> None:
    """Counted apart: twice the layers' forward products to go back, once more to compute anew."""
    config = one_phase(["train.global_batch=64", "train.micro_batch=2", "optim.name=adamw", *words])
    shape, layout = model_shape(config), make_layout(replace(config.parallel, pipeline=4), 4)
    state = fullest_rank(shape, config, layout, fused=True).state
    seconds = step_time(shape, config, layout, H100, state)
    head, layers, tail = parts(shape, config.optim, True)
    deep = sum(layer.flops for layer in layers[24:])
    a_flop = 64 * shape.sequence_length / (989e12 * 0.4)
    everything = head.flops + sum(layer.flops for layer in layers) + tail.flops
    assert seconds.compute == pytest.approx(3 * everything / 4 * a_flop)
    assert seconds.uneven == pytest.approx(3 * (deep + tail.flops - everything / 4) * a_flop)
    assert seconds.recompute == pytest.approx(deep * a_flop if words else 0)


CHEAP = {
    "llama3": ["layernorm"],
    "deepseek_v3": ["layernorm", "mla_up_proj", "moe_act", "shared_experts"],
}


def quickest_by_loops(config: RunConfig, world: int, cluster: Cluster) -> tuple[float, int]:
    """Seconds of the quickest step of all layouts that fit, for a run with one phase, and how
    many these are."""
    best, fitting = float("inf"), 0
    for tensor, pipeline, chunks, expert, micro in product(
        range(1, 9), range(1, world + 1), (1, 2, 4, 8), range(1, world + 1), (1, 2, 4, 8, 16)
    ):
        for expert_tensor in {1, tensor} if model_shape(config).moe else {None}:
            parallel = replace(
                config.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks,
                expert=expert, expert_tensor=expert_tensor, uneven=True,
            )  # fmt: skip
            train = replace(config.train, micro_batch=micro)
            tried = replace(config, parallel=parallel, train=train)
            shape = model_shape(tried)
            if pipeline * chunks > shape.num_layers:
                continue
            try:
                preflight.check_run(tried, world)
            except ConfigError:
                continue
            for recompute, modules in (("none", []), ("selective", CHEAP[shape.family]),
                                       ("full", [])):  # fmt: skip
                anew = replace(parallel, recompute=recompute, recompute_modules=modules)
                layout = make_layout(anew, world)
                peak = fullest_rank(shape, tried, layout, fused=True)
                if peak.total <= 0.9 * cluster.memory_gib * 2**30:
                    best = min(best, step_time(shape, tried, layout, cluster, peak.state).total)
                    fitting += 1
                    break
    return best, fitting


@pytest.mark.parametrize(
    ("family", "world", "gib"),
    [("llama3", 8, 5e-3), ("llama3", 8, 2e-3), ("deepseek_v3", 8, 1e-2), ("deepseek_v3", 8, 3e-3)],
)
def test_the_search_finds_what_plain_loops_find(family: str, world: int, gib: float) -> None:
    config = family_config(family, ["model.num_layers=8", "train.global_batch=32",
                                    "data.sequence_length=128", "optim.name=adamw"])  # fmt: skip
    cluster = replace(H100, memory_gib=gib)
    found = search(config, world, cluster)
    quickest, fitting = quickest_by_loops(config, world, cluster)
    assert found.fitting == fitting
    assert quickest <= found.phases[0].time.total <= quickest * 1.05**2


@pytest.mark.parametrize(
    ("path", "world"), [(LLAMA, 64), (LLAMA, 8), (DEEPSEEK, 1024)], ids=["2b", "2b-8", "671b"]
)
def test_the_words_give_the_layouts_and_they_fit(path: Path, world: int) -> None:
    config = load(path)
    started = time.process_time()
    found = search(config, world, H100)
    assert time.process_time() - started < 60  # 5 s on an idle core
    words = found.words(config)
    changed = load(path, words)
    assert changed.train == found.applied(config).train
    for index, chosen in enumerate(found.phases):
        assert changed.parallel_after(index) == chosen.parallel
        assert found.applied(config).parallel_after(index) == chosen.parallel
    plan = make_plan(changed, world, cluster=H100)  # refuses what does not fit
    assert plan.on is not None
    for chosen, planned, peak in zip(found.phases, plan.phases, plan.on.peaks, strict=True):
        assert chosen.layout == planned.layout
        assert chosen.peak.total == pytest.approx(peak.total, rel=1e-3)
        assert chosen.layout.tensor <= 8
    text = render(make_plan(config, world, cluster=H100, search_layouts=True))
    assert max(len(line) for line in text.splitlines()) <= 100
    block = text.split(f"that fit of {found.tried:,}\n")[1].split("\n\n")[0]
    shell = ["bash", "-c", "printf '%s\\n' " + block.lstrip()]
    assert subprocess.run(shell, capture_output=True, text=True).stdout.splitlines() == words
    steps = [phase.steps for phase in flops.phases(config)]
    hours = sum(n * t.total for n, t in zip(steps, plan.on.times, strict=True)) / 3600
    assert f"total {hours:,.1f} hours, {hours * world:,.0f} GPU-hours" in text


def test_words_reckon_with_the_phase_before() -> None:
    """A phase without a setting of its own has that of the phase before."""
    words = ["parallel.tensor=4", "expansion.0.parallel.tensor=null"]
    config = load(LLAMA, words)
    found = search(config, 64, H100)
    first, second = found.phases
    phases = [
        replace(first, parallel=replace(first.parallel, tensor=1)),
        replace(second, parallel=replace(second.parallel, tensor=4)),
    ]
    found = replace(found, phases=phases)
    changed = load(LLAMA, [*words, *found.words(config)])
    assert [changed.parallel_after(i).tensor for i in (0, 1)] == [1, 4]


@pytest.mark.parametrize("words", [[], ["--search"]])
def test_what_is_said_to_be_missing_is_what_is_missing(words: list[str]) -> None:
    config = load(DEEPSEEK)
    looks = bool(words)
    world = 128 if looks else 1024

    def plan(cluster: Cluster) -> None:
        make_plan(config, world, cluster=cluster, search_layouts=looks)

    cluster = replace(H100, memory_gib=40.0)
    with pytest.raises(ConfigError, match="GiB too much") as refusal:
        plan(cluster)
    lacks = float(re.search(r"([\d.]+) GiB too much", str(refusal.value))[1])  # type: ignore[index]
    assert lacks > 1
    with pytest.raises(ConfigError, match="too much"):
        plan(replace(cluster, memory_gib=40 + (lacks - 0.2) / 0.9))
    message = ""
    try:
        plan(replace(cluster, memory_gib=40 + (lacks + 0.2) / 0.9))
    except ConfigError as error:  # the phase fits; both states at once may not
        message = str(error)
    assert not message or "the old and the new state" in message


def test_options_replace_numbers_of_the_table() -> None:
    numbers = {"gpu_memory_gib": 40.0, "peak_tflops": 500.0, "mfu": 0.5, "link_gb_per_s": 12.5}
    cluster = make_cluster("a100", dict(numbers))
    assert cluster is not None
    assert cluster.usable_bytes == pytest.approx(36 * 2**30)
    assert cluster.flops_per_s == pytest.approx(250e12)
    assert (cluster.bytes_per_s(8), cluster.bytes_per_s(9)) == (300e9, 12.5e9)


def test_a_search_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from megatron_progressive.cli import main\n"
        "main(['plan', 'configs/llama3/2b_progressive.yaml', '--gpu', 'h100', '--gpus', '64',"
        " '--search'])\n"
        "print([m for m in ('torch', 'megatron', 'matplotlib') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["--gpu", "v100"], ["--gpu: got 'v100'", "a100, h100, h800, h200"]),
        (["--gpu", "h100", "--mfu", "40"], ["--mfu: got 40", "up to 1"]),
        (["--gpu", "h100", "--peak-tflops", "nan"], ["--peak-tflops: got 'nan'", "above 0"]),
        (["--gpu", "h100", "--gpu-memory-gib", "0"], ["--gpu-memory-gib: got '0'", "above 0"]),
        (["--mfu", "0.4"], ["--mfu: got no --gpu"]),
        (["--search", "--gpus", "64"], ["--search", "--gpu and --nproc"]),
        (["--search", "--gpu", "h100"], ["--search", "--gpu and --nproc"]),
        (["--gpu", "h100", "--gpus", "64", "--gpu-memory-gib", "20",
          "expansion.0.parallel.tensor=1"],
         ["expansion[0].parallel: phase 2", "GiB too much", "--search"]),
        (["--gpu", "h100", "--gpus", "7", "--search"], ["--nproc: got 7", "phase 1"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    words: list[str], holds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(LLAMA), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for text in holds:
        assert text in captured.err


def test_layers_are_computed_anew_where_nothing_else_fits() -> None:
    config = one_phase(["data.sequence_length=32768", "model.num_layers=8"])
    large, small = replace(H100, memory_gib=100), replace(H100, memory_gib=50)
    plain, found = (search(config, 1, cluster) for cluster in (large, small))
    assert plain.phases[0].layout == Layout(1, sequence=None)
    assert "parallel.recompute=full" in found.words(config)
    shape, again = model_shape(config), found.applied(config)
    layout = make_layout(again.parallel, 1)
    assert layout == found.phases[0].layout
    assert fullest_rank(shape, again, layout, fused=True).total <= small.usable_bytes
    assert fullest_rank(shape, again, Layout(1), fused=True).total > small.usable_bytes
    assert found.phases[0].time.total > plain.phases[0].time.total


@pytest.mark.parametrize("family", ["llama3", "mixtral", "deepseek_v3"])
def test_what_is_computed_anew_costs_its_forward_pass(family: str) -> None:
    """A step whose layers are all computed anew has a fourth more products of layers."""
    config = family_config(family, ["train.precision=bf16"])
    shape = model_shape(config, 6)
    state = stage_memory(shape, config, Layout(1))[0]
    head = flops.forward_flops_per_token(model_shape(config, 0))
    layers = flops.forward_flops_per_token(shape) - head

    def compute(layout: Layout) -> float:
        found = step_time(shape, config, layout, H100, state)
        return found.compute + found.recompute

    unit = compute(Layout(1)) / (3 * (head + layers))
    full = compute(Layout(1, recompute="full"))
    assert full == pytest.approx(unit * (3 * head + 4 * layers))
    some = compute(Layout(1, recompute="full", recompute_layers=2))
    assert compute(Layout(1)) < some < full
    every = tuple(sorted(shape.recomputable()))
    parts_anew = compute(Layout(1, recompute="selective", recompute_modules=every))
    assert compute(Layout(1)) < parts_anew < full  # all but the projections of the attention
    experts = (("moe",), ("moe", "shared_experts"))  # of which the first holds the second
    one, both = (compute(Layout(1, recompute="selective", recompute_modules=m)) for m in experts)
    assert one == both


def test_ranks_divide_a_sequence_where_nothing_else_divides() -> None:
    """One sample and one layer of four heads for eight ranks."""
    words = ["model.num_layers=1", "train.global_batch=1", "train.micro_batch=1"]
    config = family_config("llama3", [*words, "data.sequence_length=8192"])
    found = search(config, 8, H100)
    assert (found.phases[0].layout.tensor, found.phases[0].layout.context) == (4, 2)
    assert "parallel.context=2" in found.words(config)
    assert found.applied(config).parallel.context == 2
    preflight.check_run(found.applied(config), 8)
    with pytest.raises(ConfigError, match="no layout of phase 1 can run"):
        search(family_config("llama3", [*words, "data.sequence_length=4096"]), 8, H100)


@pytest.mark.parametrize("family", ["llama3", "deepseek_v3"])
def test_a_divided_sequence_costs_the_passing_of_keys_and_values(family: str) -> None:
    """Of a rank's part three times to each other rank, and as many products as of whole ones."""
    config = family_config(family, ["train.precision=bf16", "model.num_layers=6"])
    shape = model_shape(config)
    state = stage_memory(shape, config, Layout(4))[0]
    whole, divided = (
        step_time(shape, config, Layout(4, context=context), H100, state) for context in (1, 4)
    )
    assert divided.compute == pytest.approx(whole.compute)
    assert divided.data == whole.data
    # queries and keys have 8 + 4 dimensions in latent attention, values 8
    token = 4 * (12 + 8) if family == "deepseek_v3" else 4 * (8 + 8)
    tokens = config.train.global_batch * shape.sequence_length / 4
    sent = 3 * 6 * 2 * token * tokens * 3
    assert whole.context == 0
    assert divided.context == pytest.approx(sent / (H100.nvlink_gb_per_s * 1e9))
