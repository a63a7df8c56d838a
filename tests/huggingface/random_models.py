"""Random models of every family, ours and transformers', and what ranks do with them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_progressive import config as configuration
from megatron_progressive.checkpoints import checkpoint
from megatron_progressive.checkpoints.checkpoint import TrainingPosition
from megatron_progressive.checkpoints.init_from import with_initial_model
from megatron_progressive.checkpoints.record import record_of_run
from megatron_progressive.config import RunConfig
from megatron_progressive.engines import make_engine
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS
from megatron_progressive.reshard.initial_values import initial_values
from megatron_progressive.runtime.layout import make_layout

FAMILIES = ("gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3")
LENGTH = 12
"""Tokens of a sample."""


def random_config(family: str, seed: int, parallel: dict[str, int], *words: str) -> RunConfig:
    """A small model of ours, another one for each seed, that ``parallel`` can cut.

    ``words`` are key=value.
    """
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice((2, 4, 6))
    width = draw.choice((4, 8, 12))
    groups = draw.choice([g for g in (1, 2, heads) if not heads % g])
    if parallel.get("tensor", 1) > 1:
        groups = 2 if groups == 1 else groups
    model: dict[str, Any] = {
        "family": family,
        "num_layers": draw.randint(1, 4),
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "ffn_hidden_size": 4 * draw.randint(4, 16),
        "tie_embeddings": draw.random() < 0.5,
    }
    if parallel.get("pipeline", 1) > 1:
        model["num_layers"] = draw.choice((2, 4))
    rope = {"theta": float(draw.choice((100, 10000, 500000)))}
    scaled = draw.random() < 0.5
    if family in ("llama3", "qwen3", "mixtral"):
        model["num_query_groups"] = groups
        if scaled:
            rope |= {"scaling": "llama3", "factor": 8.0}
        model["rope"] = rope
    if family == "qwen3":
        model["head_dim"] = draw.choice((4, 10, 16))
    experts = draw.choice((4, 8))
    if family == "mixtral":
        model["moe"] = {
            "num_experts": experts,
            "top_k": draw.choice((2, 3)),
            "ffn_hidden_size": 4 * draw.randint(2, 8),
        }
    if family == "deepseek_v3":
        if scaled:
            rope |= {"scaling": "yarn", "factor": 4.0, "original_length": 4}
        groups = draw.choice((1, 2))
        model |= {
            "rope": rope,
            "mla": {
                "q_lora_rank": draw.choice((0, 16)),
                "kv_lora_rank": draw.choice((8, 12)),
                "qk_nope_head_dim": draw.choice((4, 8)),
                "qk_rope_head_dim": draw.choice((4, 8)),
                "v_head_dim": draw.choice((4, 6)),
            },
            "moe": {
                "num_experts": experts,
                "top_k": 2 if groups > 1 else draw.choice((2, 3)),
                "ffn_hidden_size": 8,
                "shared_experts": draw.choice((0, 1, 2)),
                "first_k_dense": draw.randint(0, 2),
                "num_groups": groups,
                "top_k_groups": 1,
                "routed_scaling_factor": draw.choice((1.0, 2.5)),
                "bias_update_rate": draw.choice((0.0, 0.001)),
            },
        }
    return configuration.from_dict(
        {
            "run": {"seed": seed},
            "model": model,
            "data": {"vocab_size": draw.randint(130, 300), "sequence_length": LENGTH},
            "train": {"global_batch": 8, "micro_batch": 2},
            "parallel": parallel,
        },
        words,
    )


def random_hugging_face_config(family: str, seed: int) -> Any:
    """A small configuration of transformers, written without our map."""
    import transformers

    draw = random.Random(f"{seed} {family}")
    heads = draw.choice((2, 4))
    width = draw.choice((4, 8))
    layers = draw.randint(1, 4)
    common: dict[str, Any] = dict(
        vocab_size=draw.randint(130, 300),
        tie_word_embeddings=draw.random() < 0.5,
    )
    if family == "gpt2":
        return transformers.GPT2Config(
            **common,
            n_embd=heads * width,
            n_layer=layers,
            n_head=heads,
            n_inner=draw.choice((None, 44)),
            n_positions=LENGTH,
            activation_function=draw.choice(("gelu_new", "gelu_pytorch_tanh")),
            layer_norm_epsilon=draw.choice((1e-5, 1e-3)),
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": draw.choice((100.0, 10000.0))}
    scaled = draw.random() < 0.5
    common |= dict(
        hidden_size=heads * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([g for g in (1, 2, 4) if not heads % g]),
        intermediate_size=4 * draw.randint(4, 16),
        max_position_embeddings=LENGTH,
    )
    if family != "deepseek_v3":
        if scaled:
            rope |= dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            )
        common["rope_parameters"] = rope
        common["rms_norm_eps"] = draw.choice((1e-6, 1e-3))
    if family == "llama3":
        return transformers.LlamaConfig(**common)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=draw.choice((4, 16)))
    if family == "mixtral":
        return transformers.MixtralConfig(
            **common, num_local_experts=draw.choice((3, 5)), num_experts_per_tok=draw.choice((2, 3))
        )
    if scaled:
        rope |= dict(
            rope_type="yarn",
            factor=3.0,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=1.0,
            original_max_position_embeddings=4,
        )
    groups = draw.choice((1, 2, 4))
    chosen = draw.randint(1, groups - 1) if groups > 1 else 1
    common |= dict(num_key_value_heads=heads, rope_parameters=rope)
    return transformers.DeepseekV3Config(
        **common,
        q_lora_rank=draw.choice((None, 12)),
        kv_lora_rank=draw.choice((8, 10)),
        qk_nope_head_dim=draw.choice((4, 6)),
        qk_rope_head_dim=draw.choice((4, 8)),
        v_head_dim=draw.choice((4, 6)),
        n_routed_experts=8,
        num_experts_per_tok=2 * chosen if groups > 1 else 3,
        n_group=groups,
        topk_group=chosen,
        n_shared_experts=draw.choice((1, 2)),
        moe_intermediate_size=8,
        first_k_dense_replace=draw.randint(0, 2),
        routed_scaling_factor=draw.choice((1.0, 2.5)),
        num_nextn_predict_layers=draw.choice((0, 1)),
    )


def hugging_face_class(family: str) -> Any:
    import transformers

    return {
        "gpt2": transformers.GPT2LMHeadModel,
        "llama3": transformers.LlamaForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "mixtral": transformers.MixtralForCausalLM,
        "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    }[family]


def tokens_of(vocabulary: int, seed: int, count: int = 3) -> np.ndarray:
    """int64 [count, LENGTH]."""
    return np.random.default_rng(seed).integers(0, vocabulary, (count, LENGTH))


def save_random(config: RunConfig, folder: Path) -> None:
    """Save step 2 of a model whose every tensor is random, also those that start as a constant."""
    shape = model_shape(config)
    engine = make_engine(config, shape, make_layout(config.parallel, dist.get_world_size()))
    table = tensor_table(shape)
    for piece in engine.state().pieces:
        if piece.slot not in WEIGHT_SLOTS:
            continue
        spec = table[piece.name]
        std, shift = spec.std, 0.0
        if spec.init != "normal":
            std, shift = 0.2, float(spec.init == "ones")
        elif spec.role in ("embedding", "head", "position"):
            std = 0.5
        spec = replace(spec, init="normal", std=std)
        piece.data.copy_(initial_values(config.run.seed, 0, piece.name, spec, piece.box) + shift)
    engine.loaded()
    layers = shape.num_layers
    model = record_of_run(config, shape, engine.layout, ((0, layers),))
    checkpoint.save(
        engine.state(), folder, TrainingPosition(2, 0, layers, 16, 0.0, 0.0, 0.0), model, keep=0
    )
    engine.close()


def config_of(path: Path, *words: str) -> RunConfig:
    """A run that starts from a checkpoint."""
    family = checkpoint.read_description(path)[1].shape.family
    values = {
        "model": {"family": family},
        "run": {"init_from": str(path)},
        "train": {"global_batch": 8, "micro_batch": 2},
    }
    return with_initial_model(configuration.from_dict(values, words))


def loaded_engine(config: RunConfig) -> Any:
    """An engine with the weights of ``run.init_from``."""
    layout = make_layout(config.parallel, dist.get_world_size())
    engine = make_engine(config, model_shape(config), layout)
    checkpoint.load_weights(engine.state(), Path(config.run.init_from or ""))
    engine.loaded()
    return engine


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Of our model on one rank: [samples, length, vocab_size]."""
    config = config_of(path)
    engine = loaded_engine(config)
    model = engine.chunks[0].eval()
    positions = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens), positions, None)
    engine.close()
    assert bool((found[..., config.data.vocab_size :] == -torch.inf).all())
    return found[..., : config.data.vocab_size].numpy()  # type: ignore[no-any-return]


def losses(path: Path, words: list[str], steps: int, lr: float) -> list[float]:
    """Of our training from a checkpoint; step n takes :func:`batch_of` n."""
    from megatron_progressive.engines.base import GlobalBatch

    config = config_of(path, *words)
    engine = loaded_engine(config)
    vocabulary = int(config.data.vocab_size or 0)

    def read(first: int, count: int) -> torch.Tensor:
        return batch_of(vocabulary, first, count)

    out = [engine.train_step(GlobalBatch(read, 8 * n, 8), lr).loss for n in range(steps)]
    engine.close()
    return out


def batch_of(vocabulary: int, first: int, count: int) -> torch.Tensor:
    """Random but learnable samples by number: int64 [count, LENGTH + 1]."""
    rows = []
    for number in range(first, first + count):
        motif = np.random.default_rng(number).integers(0, vocabulary, 5)
        rows.append(np.tile(motif, 4)[: LENGTH + 1])
    return torch.from_numpy(np.stack(rows))


def loaded_state(path: Path, words: list[str]) -> dict[tuple[str, str], torch.Tensor]:
    """Whole state of a new engine with a checkpoint's weights."""
    from tests.engines.on_ranks import gather

    engine = loaded_engine(config_of(path, *words))
    full = gather(engine.state())
    engine.close()
    return full
