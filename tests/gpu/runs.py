"""Short runs through an expansion, to be held against each other on a GPU and a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.models import TRANSFORMERS
from tests.engines import on_ranks, reference

BEFORE, AFTER = 3, 5
"""Steps before and after the expansion."""
GROWTH = {"at": BEFORE, "to_layers": 4, "init": "copying", "optimizer_state": "copy"}
FROM_NOTHING = {"init": "random", "optimizer_state": "inherit"}
FP32_NEWTON_SCHULZ = "optim.ns_dtype=fp32"
"""On CUDA it is fp16 by default."""


@dataclass(frozen=True)
class Curve:
    """What a run gives, in order."""

    losses: list[float]
    norms: list[float]
    across: list[float]
    """Loss before and after the expansion, on one batch."""


def run(family: str, *words: str, layers: int = 1, **growth: Any) -> Curve:
    """Train a small model, expand it, train on. Collective over the ranks of the world.

    Args:
        layers: of the source.
        growth: further fields of the expansion.
    """
    expansion = {**GROWTH, **({} if layers else FROM_NOTHING), **growth}
    config = on_ranks.family_config(family, [f"model.num_layers={layers}", *words], expansion)
    engine = on_ranks.start(config, layers)
    losses, norms = [], []
    event: Any = None
    for number in range(BEFORE + AFTER):
        if number == BEFORE:
            engine, event = on_ranks._expand(engine, config)
        metrics = engine.train_step(GlobalBatch(on_ranks.tokens, 8 * number, 8), 0.01)
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    engine.close()
    return Curve(losses, norms, [event.loss_before, event.loss_after])


EVERY_RUN: dict[str, dict[str, Any]] = {
    f"{family}, {optimizer}, {layers} layers": {
        "family": family,
        "words": [f"optim.name={optimizer}", FP32_NEWTON_SCHULZ],
        "layers": layers,
    }
    for family in TRANSFORMERS
    for optimizer, layers in (("muon_nsgd", 1), ("adamw", 0))
}
"""By name: arguments of :func:`run`. In fp32."""
STAGES = {
    f"ZeRO {before} to {after}": {
        "family": "llama3",
        "words": [FP32_NEWTON_SCHULZ, f"parallel.zero_stage={before}"],
        "parallel": {"zero_stage": after},
    }
    for before, after in ((0, 1), (1, 0))
}
EVERY_RUN |= STAGES
EVERY_RUN["DeepSpeed, ZeRO 3, to Megatron-core"] = {
    "family": "gpt2",
    "words": [FP32_NEWTON_SCHULZ, "parallel.engine=deepspeed", "parallel.zero_stage=3"],
    "parallel": {"engine": "megatron", "zero_stage": 1},
}


def named(name: str, *more: str) -> Curve:
    """One of :data:`EVERY_RUN`, with further words."""
    values = dict(EVERY_RUN[name])
    words = [*values.pop("words"), *more]
    return run(values.pop("family"), *words, **values)


def expanded_state(family: str, *words: str) -> tuple[on_ranks.Full, on_ranks.Full]:
    """The whole state after an expansion, and what plain code makes of the state before it."""
    growth = {**GROWTH, "parallel": {"zero_stage": 1}}
    config = on_ranks.family_config(family, ["model.num_layers=1", *words], growth)
    engine = on_ranks.start(config, 1)
    for number in range(2):
        on_ranks.step(engine, number)
    before = on_ranks.gather(engine.state())
    engine, _ = on_ranks._expand(engine, config)
    after = on_ranks.gather(engine.state())
    shape = engine.shape
    engine.close()
    adam = config.optim.name == "adamw"
    expected = reference.expanded(
        before, shape, 1, "copying", "stack", "bottom", "copy", config.run.seed, lambda _: adam
    )
    return after, expected


def main(file: Path, *names: str) -> None:
    """Run these on this machine's device and write what they give."""
    from megatron_progressive.runtime.distributed import Place, world_group

    with world_group(Place(0, 0, 1)):
        found = {name: asdict(named(name)) for name in names}
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
