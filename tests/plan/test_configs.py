"""Every configuration that comes with the code has a plan, and says what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_progressive.compare.run_pilot import plan_pilot
from megatron_progressive.config import load
from megatron_progressive.cost.activations import fullest_rank
from megatron_progressive.cost.cluster import GPUS
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.text import plan as grid_plan
from megatron_progressive.models import active_parameter_count
from megatron_progressive.plan.controls import control_words, fixed_size
from megatron_progressive.plan.layout_search import check_fits
from megatron_progressive.plan.plan import make_plan
from megatron_progressive.plan.plan_text import render
from megatron_progressive.plan.preflight import check_run, smallest_world, transformer_phases
from megatron_progressive.runs.decisive import decisive

ROOT = Path(__file__).parents[2] / "configs"
GRIDS = sorted((ROOT / "grids").glob("*.yaml"))
RUNS = sorted(p for p in ROOT.rglob("*.yaml") if "grids" not in p.relative_to(ROOT).parts)
LADDERS = {"llama3": (50, ("0.25b", "0.5b", "1b", "2b")), "deepseek_v3": (100, ("0.2b", "0.5b"))}
RUNGS = [
    (ROOT / family / f"{size}_progressive.yaml", tokens)
    for family, (tokens, sizes) in LADDERS.items()
    for size in (*sizes, "tiny")
]

CLUSTERS = {
    # the GPUs of the model's card or report; without these, H100
    "llama3/8b_progressive": ("h100", 1024), "llama3/70b_progressive": ("h100", 2048),
    "deepseek_v3/671b_published": ("h800", 2048), "deepseek_v3/671b_progressive": ("h100", 1024),
    "mixtral/8x7b_progressive": ("h100", 512),
    "qwen3/8b_progressive": ("h100", 1024), "qwen3/32b_progressive": ("h100", 2048),
}  # fmt: skip
"""The GPUs that configurations of more than a node are for, as their comments say."""


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_a_plan_and_a_pilot(path: Path) -> None:
    config = load(path)
    plan = make_plan(config)
    assert render(plan)
    assert plan.warnings == []
    assert path.parent == ROOT or config.run.name.startswith(f"{config.model.family}_")
    if config.expansion:
        assert plan_pilot(config).fixed.last_step == pytest.approx(config.train.steps / 4, abs=1)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_language_model_fits_its_gpus(path: Path) -> None:
    config = load(path)
    if config.model.family == "resnet":
        pytest.skip("activations are predicted for language models alone")
    named = CLUSTERS.get(str(path.relative_to(ROOT).with_suffix("")))
    least = 2 if config.model.preset == "tiny" else 8
    gpu, world = named or ("h100", max(least, smallest_world(config)))
    assert check_run(config, world) == []
    phases = transformer_phases(config, world)
    peaks = [fullest_rank(shape, config, layout, fused=True) for shape, layout in phases]
    check_fits(config, [layout for _, layout in phases], peaks, GPUS[gpu])
    if named:  # as in the file's own words
        assert f"--gpu {gpu} --gpus {world}" in path.read_text()
        assert config.expansion[0].at == 0.8
        assert phases[0][0].num_layers <= 1


def test_deepseek_v3_has_its_published_layout() -> None:
    """16 stages, 64 expert-parallel ranks, no tensor parallelism, ZeRO-1, 2,048 GPUs; 14.8T tokens
    in batches of 15,360 x 4,096 (arXiv 2412.19437, sections 3.2 and 4.2)."""
    config = load(ROOT / "deepseek_v3/671b_published.yaml")
    shape, layout = transformer_phases(config, 2048)[-1]
    assert (layout.pipeline, layout.expert, layout.tensor, layout.zero_stage) == (16, 64, 1, 1)
    assert {"layernorm", "mla_up_proj"} <= set(layout.recompute_modules)
    batch = config.train.global_batch * shape.sequence_length
    assert batch == 15360 * 4096
    assert config.train.steps * batch == pytest.approx(14.8e12, rel=1e-5)
    assert (shape.num_layers, shape.mtp_depth) == (61, 1)


def test_the_page_on_deepseek_v3_has_the_plans_numbers() -> None:
    """The control of full depth, against the published hours."""
    page = ROOT.parent / "docs/experiments/2026-11-29-deepseek-v3-published.md"
    shown = re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL)
    control = fixed_size(load(ROOT / "deepseek_v3/671b_published.yaml"))
    text = render(make_plan(control, 2048, cluster=GPUS["h800"]))
    assert [block for block in shown if block not in text] == []
    assert any("s/step" in block for block in shown)


@pytest.mark.parametrize(("path", "tokens"), RUNGS, ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_rungs_of_the_ladders(path: Path, tokens: int) -> None:
    config = load(path)
    tiny = config.model.preset == "tiny"
    plan = make_plan(config, 2 if tiny else 8)  # two cores; a node of 8 GPUs
    assert smallest_world(config) in (1, 2, 4, 8)
    assert plan.phases[0].phase.num_layers == 0
    assert config.model.preset + "_progressive" == path.stem
    trained = config.train.steps * plan.step_tokens
    assert trained / active_parameter_count(plan.shape) == pytest.approx(tokens, rel=2e-3)
    if not tiny:
        make_plan(config, 16)  # two nodes
    # the words that `mprog plan` prints make the fixed-size control
    assert load(path, control_words(config, fixed_size(config))) == fixed_size(config)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_has_a_plan_and_a_tiny_twin(path: Path) -> None:
    grid = load_grid(path)
    assert grid_plan(grid)
    assert grid.name == path.stem
    arms = {cell.arm for cell in grid.cells}
    assert "fixed" in arms or grid.crossings  # whose depths alone are the controls
    assert len(arms) > 1 or path.stem == "optimizer_tiny"  # which compares optimizers alone
    # an ablation has what is bad, too; of that there are warnings, and of nothing else
    expected = {"ablation_init": {"zero init"}, "ablation_order": {"random layers at the top"},
                "ablation_schedule": {"tau > 0.8 T", "expansion during decay",
                                      "cosine schedule with tau >= 0.5 T"}}  # fmt: skip
    causes = {warning.rpartition("likely cause: ")[2] for warning in grid.warnings}
    assert causes == expected.get(path.stem.removesuffix("_tiny"), set()), grid.warnings
    if path.stem.endswith("_tiny"):
        # two cores do 20 demos' FLOPs in some 40 minutes; ladders' twins and crossings take longer
        cost = sum(cell.flops for cell in grid.cells) / total_flops(load(ROOT / "demo.yaml"))
        longer = ("llama3_tiny", "deepseek_v3_tiny", "crossing_tiny")
        assert cost < (65 if path.stem in longer else 20)
        return
    twin = "gpt2_tiny" if path.stem == "gpt2_7b" else f"{path.stem}_tiny"
    small = load_grid(ROOT / "grids" / f"{twin}.yaml")
    deeper = {arm for arm in arms if arm.endswith("_layers")}
    assert arms - deeper <= {cell.arm for cell in small.cells}


@pytest.mark.parametrize(
    ("grid", "size", "file"),
    [(family, size, f"{family}/{size}_progressive")
     for family, (_, sizes) in LADDERS.items() for size in sizes]
    + [("gpt2", "124m", "gpt2/124m_progressive"), ("gpt2_7b", "7b", "gpt2/7b_progressive")],
)  # fmt: skip
def test_grids_have_the_runs_of_the_files(grid: str, size: str, file: str) -> None:
    """The zero-layer cell is the run of that file, and in the same layouts."""
    wanted = load(ROOT / f"{file}.yaml")
    (cell,) = (
        cell for cell in load_grid(ROOT / "grids" / f"{grid}.yaml").cells
        if (cell.size, cell.arm) == (size, "zero_layer")
    )  # fmt: skip
    own = {"run.name": "", "run.dir": ""}
    assert {**decisive(cell.config), **own} == {**decisive(wanted), **own}
    for phase in (0, 1):
        assert cell.config.parallel_after(phase) == wanted.parallel_after(phase)
    assert cell.config.train == wanted.train
