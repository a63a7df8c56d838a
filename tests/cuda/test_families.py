"""Every family through an expansion with another layout, CUDA against the CPU.

The local layers, and Transformer Engine's where MPROG_TRANSFORMER_ENGINE names a folder with its
wheels unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_progressive.config import RunConfig
from tests.cuda.on_device import layers_and_losses
from tests.cuda.serve import PoolOnDevice, variables
from tests.engines import test_documents as documents
from tests.engines.on_ranks import SMALL_FAMILIES, family_config
from tests.pool import Pool

ROUNDING = {"fp32": 2e-6, "bf16": 5e-3}
"""Largest relative difference of losses. In bf16 intermediate values are rounded elsewhere."""
HEADS = [f"model.mla.{size}=8" for size in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
"""Of latent attention, as Transformer Engine's fused attention takes them: multiples of 8."""
LAYOUTS = {
    "tensor": ([], {"tensor": 2}),
    "pipeline": ([], {"pipeline": 2}),
    "expert": (["parallel.expert=2"], {"expert": 1, "tensor": 2}),
}
"""Words of the first layout, of two ranks, and the second layout."""
EXPERTS = ("mixtral", "deepseek_v3")
CASES = [
    (family, layout, precision, optimizer)
    for family in SMALL_FAMILIES
    for layout in LAYOUTS
    for precision in ROUNDING
    for optimizer in ("muon_nsgd", "adamw")
    if layout != "expert" or family in EXPERTS
]
REDUCED = {
    ("llama3", "pipeline", "fp32", "muon_nsgd"),
    ("deepseek_v3", "expert", "fp32", "muon_nsgd"),
}
"""Those of every run; the rest needs ``-m cuda_full``."""


@pytest.fixture(scope="session")
def engine_pool(transformer_engine: str) -> Iterator[PoolOnDevice]:
    """Ranks on the device that find Transformer Engine."""
    there = variables("computing")
    pool = PoolOnDevice(4, {**there, "PYTHONPATH": f"{there['PYTHONPATH']}:{transformer_engine}"})
    yield pool
    pool.close()


def config_of(family: str, layout: str, precision: str, optimizer: str) -> RunConfig:
    before, after = LAYOUTS[layout]
    expansion = {"at": 10, "to_layers": 4, "init": "copying", "parallel": after}
    own = [f"train.precision={precision}", f"optim.name={optimizer}", "optim.ns_dtype=fp32"]
    return family_config(family, ["model.num_layers=2", *own, *before], expansion)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id="-".join(c), marks=() if c in REDUCED else pytest.mark.cuda_full)
        for c in CASES
    ],
)
def test_family_agrees_with_the_cpu(
    pool: Pool, device_pool: PoolOnDevice, case: tuple[str, str, str, str]
) -> None:
    config = config_of(*case)
    _, there = pool.run(2, layers_and_losses, config)[0]
    layers, here = device_pool.run(2, layers_and_losses, config)[0]
    assert layers == "local"
    assert here == pytest.approx(there, rel=ROUNDING[case[2]])


@pytest.mark.cuda_full
@pytest.mark.parametrize("case", [pytest.param(c, id="-".join(c)) for c in CASES if c[2] == "bf16"])
def test_transformer_engine_agrees_with_the_cpu(
    pool: Pool, engine_pool: PoolOnDevice, case: tuple[str, str, str, str]
) -> None:
    """In bf16, its only precision here: in fp32 its products are TF32."""
    config = config_of(*case)
    _, there = pool.run(2, layers_and_losses, config)[0]
    layers, here = engine_pool.run(2, layers_and_losses, config)[0]
    assert layers == "transformer_engine"
    assert here == pytest.approx(there, rel=ROUNDING["bf16"])


@pytest.mark.parametrize("words", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"]])
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3"])
def test_documents_in_packed_form_agree_with_masks(
    pool: Pool, engine_pool: PoolOnDevice, family: str, words: list[str]
) -> None:
    """Transformer Engine takes documents as packed sequences, the host's layers take a mask."""
    words = [*words, *(HEADS if family == "deepseek_v3" else [])]
    config = documents.config_of(family, "train.precision=bf16", *words)
    there = pool.run(2, documents.trained, config)[0]
    here = engine_pool.run(2, documents.trained, config)[0]
    whole = pool.run(2, documents.trained, config, False)[0]
    assert here == pytest.approx(there, rel=2e-4)
    assert whole != pytest.approx(there, rel=1e-3)  # it matters


@pytest.mark.parametrize("after", [{"context": 2}, {"context": 1, "tensor": 2}])
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3"])
def test_sequences_divided_over_ranks_agree_with_the_cpu(
    pool: Pool, engine_pool: PoolOnDevice, family: str, after: dict[str, int]
) -> None:
    """Context parallelism: Transformer Engine passes keys and values from rank to rank, the host's
    layers gather them."""
    expansion = {"at": 10, "to_layers": 4, "init": "copying", "parallel": after}
    words = ["model.num_layers=2", "train.precision=bf16", "optim.ns_dtype=fp32"]
    words += ["parallel.context=2"] if after["context"] == 1 else []
    words += HEADS if family == "deepseek_v3" else []
    config = family_config(family, words, expansion)
    _, there = pool.run(2, layers_and_losses, config)[0]
    layers, here = engine_pool.run(2, layers_and_losses, config)[0]
    assert layers == "transformer_engine"
    assert here == pytest.approx(there, rel=1e-3)
