"""Runs for the training tests: small models on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_progressive import config as configuration
from megatron_progressive import data
from megatron_progressive.config import RunConfig


def run_values(folder: Path, corpus: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A tiny preset on the test corpus, as nested values; ``changes`` replace whole sections."""
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder)},
        "model": {"family": "gpt2", "preset": "tiny", "num_layers": 1},
        "data": {"vocab_size": 512, "sequence_length": 32, "prepared": str(corpus)},
        "train": {"steps": 60, "global_batch": 8, "micro_batch": 4, "eval_every": 20,
                  "eval_samples": 16, "save_every": 20},
        "expansion": [{"at": 40, "to_layers": 4, "init": "copying"}],
    }  # fmt: skip
    values.update(changes)
    return values


def run_config(folder: Path, corpus: Path, name: str, *words: str, **changes: Any) -> RunConfig:
    return configuration.from_dict(run_values(folder, corpus, name, **changes), words)


def train_here(config: RunConfig) -> int:
    """Train or resume inside the pool's world group; returns the exit code."""
    from megatron_progressive.runs.folder import check_folder
    from megatron_progressive.train.loop import train

    position = check_folder(config)
    dist.barrier()  # all have looked before rank 0 begins to write
    trained_on, _ = data.settle(config)
    return train(config, position, [], trained_on)
