"""What ranks do in the distributed tests: build, step, expand, gather."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from scipy.special import ndtri

from megatron_progressive import config as configuration
from megatron_progressive.checkpoints import checkpoint
from megatron_progressive.checkpoints.record import record_of_run
from megatron_progressive.config import RunConfig
from megatron_progressive.engines import make_engine
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.expansion.hook import expand
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.reshard import initial_values
from megatron_progressive.reshard.boxes import PieceMeta, ShardedState
from megatron_progressive.reshard.initial_values import initialise_all
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import make_layout

SMALL = {
    "model": {"family": "gpt2", "hidden_size": 32, "num_attention_heads": 4},
    "data": {"vocab_size": 250, "sequence_length": 16},
    "train": {"global_batch": 8, "micro_batch": 2, "steps": 20},
    "optim": {"ns_dtype": "fp32"},  # as on a CPU by default, on CUDA too
}
STAGING = 1 << 14  # bytes
MLA = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
       "v_head_dim": 8}  # fmt: skip
SMALL_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama3": {"num_query_groups": 4, "num_attention_heads": 4},
    "qwen3": {"num_query_groups": 4, "head_dim": 8},
    "mixtral": {"num_query_groups": 4, "moe": {"num_experts": 4, "ffn_hidden_size": 24}},
    "deepseek_v3": {"mla": MLA, "moe": {"num_experts": 4, "ffn_hidden_size": 16}},
}


def family_config(
    family: str, words: list[str], expansion: dict[str, Any] | None = None
) -> RunConfig:
    """A model of any family that two and four ranks can cut."""
    model = {**SMALL["model"], "family": family, "ffn_hidden_size": 48, **SMALL_FAMILIES[family]}
    values: dict[str, Any] = {**SMALL, "model": model}
    return configuration.from_dict({**values, "expansion": [expansion] if expansion else []}, words)


def small_config(words: list[str], expansion: dict[str, Any] | None = None) -> RunConfig:
    values: dict[str, Any] = {**SMALL, "expansion": [expansion] if expansion else []}
    return configuration.from_dict(values, words)


def tokens(first: int, count: int) -> torch.Tensor:
    """Random but learnable: each sample repeats a short motif."""
    samples = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        samples.append(torch.randint(0, 250, (5,), generator=generator).repeat(4)[:17])
    return torch.stack(samples)


def start(config: RunConfig, layers: int | None = None) -> Engine:
    shape = model_shape(config, layers)
    engine = make_engine(config, shape, make_layout(config.parallel, dist.get_world_size()))
    initialise_all(engine.state(), tensor_table(shape), config.run.seed)
    engine.loaded()
    return engine


def step(engine: Engine, number: int, lr: float = 0.01) -> float:
    return engine.train_step(GlobalBatch(tokens, 8 * number, 8), lr).loss


Full = dict[tuple[str, str], torch.Tensor]


def _bits(data: torch.Tensor) -> Any:
    return data.cpu().contiguous().view(torch.uint8).numpy()


def gather(state: ShardedState) -> Full:
    """Whole tensors from all ranks' pieces; replicas must agree bit for bit."""
    # as numpy arrays of bits: pickled tensors take a hundred times as long
    mine = [(p.key, p.global_shape, p.box, p.data.dtype, _bits(p.data)) for p in state.pieces]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    full: Full = {}
    counts: Full = {}
    for key, shape, box, dtype, bits in (piece for pieces in everyone for piece in pieces):
        data = torch.from_numpy(bits).view(dtype)
        if key not in full:
            full[key] = torch.zeros(shape, dtype=data.dtype)
            counts[key] = torch.zeros(shape, dtype=torch.int)
        index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        seen = counts[key][index] > 0
        assert torch.equal(full[key][index][seen], data[seen]), f"replicas of {key} differ"
        full[key][index] = data
        counts[key][index] += 1
    for key, count in counts.items():
        assert bool((count > 0).all()), f"{key}: elements that no rank holds"
    return full


def expand_and_gather(config: RunConfig, steps: int = 2) -> tuple[Full, Full, Any, list[float]]:
    """Whole state before and after an expansion, its event, and the next two losses."""
    engine = start(config)
    for number in range(steps):
        step(engine, number)
    before = gather(engine.state())
    engine, event = _expand(engine, config)
    after = gather(engine.state())
    losses = [step(engine, steps), step(engine, steps + 1)]
    engine.close()
    return before, after, event, losses


def _expand(engine: Engine, config: RunConfig, read: Any = tokens) -> tuple[Engine, Any]:
    def build(memory: LateMemory) -> Engine:
        layout = make_layout(config.parallel_after(1), dist.get_world_size())
        depth = config.expansion[0].to_layers
        return make_engine(config, model_shape(config, depth), layout, memory)

    probe = GlobalBatch(read, 10_000, config.train.global_batch)
    return expand(engine, config.expansion[0], build, probe, config.run.seed, 1, STAGING)


def drawn_in_expansion(config: RunConfig) -> int:
    """Normal values that this rank draws at an expansion."""
    engine = start(config)
    step(engine, 0)
    drawn: list[int] = []

    def counted(values: Any, **given: Any) -> Any:
        drawn.append(values.size)
        return ndtri(values, **given)

    with patch.object(initial_values, "ndtri", counted):
        engine, _ = _expand(engine, config)
    engine.close()
    return sum(drawn)


def trainable_after_expansion(config: RunConfig) -> list[str]:
    """Names of weights that the step after an expansion left unchanged."""
    engine = start(config)
    step(engine, 0)
    engine, _ = _expand(engine, config)
    before = gather(engine.state())
    step(engine, 1)
    after = gather(engine.state())
    engine.close()
    return [k[0] for k in before if k[1] == "param" and torch.equal(before[k], after[k])]


def losses_and_norms(config: RunConfig, layers: int, steps: int) -> list[tuple[float, float]]:
    engine = start(config, layers)
    out = []
    for number in range(steps):
        metrics = engine.train_step(GlobalBatch(tokens, 8 * number, 8), 0.01)
        out.append((metrics.loss, metrics.grad_norm))
    engine.close()
    return out


def saved_and_loaded(source: RunConfig, target: RunConfig, folder: Path) -> tuple[Full, Full]:
    """Whole state of a trained engine, and of one in another layout that loads its checkpoint.

    The second engine then trains a step: its state is not only there but usable.
    """
    engine = start(source)
    for number in range(2):
        step(engine, number)
    saved = gather(engine.state())
    position = checkpoint.TrainingPosition(2, 0, engine.shape.num_layers, 16, 0.0, 0.0, 0.0)
    model = record_of_run(source, engine.shape, engine.layout, ((0, engine.shape.num_layers),))
    path = checkpoint.save(engine.state(), folder, position, model, keep=1)
    expected = step(engine, 2)
    engine.close()
    engine = start(target)
    checkpoint.load(engine.state(), path)
    engine.loaded()
    loaded = gather(engine.state())
    bf16 = target.train.precision == "bf16"
    assert abs(step(engine, 2) / expected - 1) < (2e-2 if bf16 else 2e-5)
    engine.close()
    return saved, loaded


def groups_after_expansions(config: RunConfig, cycles: int) -> list[tuple[int, int]]:
    """Process groups that torch knows, and threads (a group that something holds keeps some),
    after each of several engines in a row."""
    import psutil
    import torch.distributed.distributed_c10d as c10d

    counts = []
    for _ in range(cycles):
        engine = start(config)
        step(engine, 0)
        engine, _ = _expand(engine, config)
        engine.close()
        del engine
        time.sleep(0.1)  # threads end a moment later
        counts.append((len(c10d._world.pg_map), psutil.Process().num_threads()))
    return counts


def left_after_close(config: RunConfig) -> dict[str, int]:
    """What an engine that has trained leaves when its ``close`` returns, while the caller still
    has the engine: modules, parameters and bytes of floating-point tensors of a kibibyte and more
    (the states of Megatron-core's generators, of which there is one set a process, are bytes)."""
    known = {id(o) for o in gc.get_objects() if isinstance(o, torch.nn.Module | torch.Tensor)}
    engine = start(config)
    step(engine, 0)
    engine.close()
    alive = [o for o in gc.get_objects() if isinstance(o, torch.nn.Module | torch.Tensor)]
    alive = [o for o in alive if id(o) not in known]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in alive
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    return {
        "modules": sum(isinstance(o, torch.nn.Module) for o in alive),
        "parameters": sum(isinstance(o, torch.nn.Parameter) for o in alive),
        "bytes": sum(size for size in storages.values() if size > 1 << 10),
    }


def held_pieces_of(configs: list[RunConfig]) -> list[list[PieceMeta]]:
    """Of the engine of each config: what this rank holds."""
    held = []
    for config in configs:
        layout = make_layout(config.parallel, dist.get_world_size())
        engine = make_engine(config, model_shape(config), layout)
        held.append([piece.meta for piece in engine.state().pieces])
        engine.close()
    return held
