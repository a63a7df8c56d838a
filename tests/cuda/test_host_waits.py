"""How often a step waits for the device, and how many kernels it launches, counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cuda.conftest import Run

STEP = """
import json, sys
import torch
from mprog_standin import native
from megatron_progressive.engines import make_engine
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.distributed import Place, world_group
from megatron_progressive.runtime.layout import make_layout
from tests.engines.on_ranks import family_config

found = []
with world_group(Place(0, 0, 1)):
    for family, words in json.loads(sys.argv[1]):
        config = family_config(family, words)
        engine = make_engine(config, model_shape(config), make_layout(config.parallel, 1))
        def read(first, count):
            return torch.zeros(count, 17, dtype=torch.int64)
        for _ in range(2):
            engine.train_step(GlobalBatch(read, 0, 8), 0.01).loss
        counted = []
        for size in (2, 8):
            native.reset()
            metrics = engine.train_step(GlobalBatch(read, 0, size), 0.01)
            report = native.report()
            kernels = sum(report["kernels"].values())
            metrics.loss, metrics.grad_norm, metrics.stop
            counted.append([report["host"], kernels, native.report()["host"], metrics.late])
        found.append(counted)
        engine.close()
print(json.dumps(found))
"""
DENSE = [
    ("gpt2", ["optim.name=muon_nsgd", "train.precision=bf16"]),
    ("gpt2", ["optim.name=adamw", "train.precision=fp32"]),
    ("llama3", ["optim.name=muon_nsgd", "optim.embeddings=adamw", "parallel.zero_stage=0"]),
    ("llama3", ["optim.name=adamw", "train.precision=bf16", "optim.clip_grad=0"]),
]


def count(on_device: Run, cases: list[tuple[str, list[str]]]) -> Any:
    """Of each case, for a step of one micro-batch and one of four: waits by name until it is
    launched, kernels, waits until its numbers are read, whether these come late."""
    done = on_device("counting", "-c", STEP, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_waits_once_whatever_the_micro_batches(on_device: Run) -> None:
    """For the loss, the norm and the wish to stop, when they are read: launching it waits for
    nothing."""
    cases = [(family, ["model.num_layers=4", *words]) for family, words in DENSE]
    for case, counted in zip(cases, count(on_device, cases), strict=True):
        for launching, _, reading, late in counted:
            assert not sum(launching.values()), (case, launching)
            assert reading == {"cudaEventSynchronize": 1}, (case, reading)
            assert late


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
def test_many_layers_are_updated_by_as_many_kernels_as_few(
    on_device: Run, family: str, optimizer: str
) -> None:
    """Each for all tensors at once: momentum, decay and application (of tensors that the stand-in
    counts: what is done with small ones it computes);
    tensors of one shape are cut, orthogonalised and normalised together."""
    words = ["model.hidden_size=256", "model.ffn_hidden_size=1024", f"optim.name={optimizer}",
             "train.precision=bf16"]  # fmt: skip
    cases = [(family, [f"model.num_layers={layers}", *words]) for layers in (4, 12)]
    besides = []
    for (_, one, *_), (_, four, *_) in count(on_device, cases):
        micro_batch = (four - one) / 3
        besides.append(one - micro_batch)
    few, many = besides
    assert many - few < 24  # three for each layer that is more: batches of bounded size
