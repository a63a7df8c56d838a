"""The values that the fields of a configuration accept, by the name of the field; fields of an
expansion, or of a part of a mixture, are named without its number, and those of a validation set
without its name."""

from __future__ import annotations

from typing import Any

RECOMPUTE_MODULES = (
    "core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts",
)  # fmt: skip
"""Parts of a layer that can be computed anew, by Megatron-core's names (0.19.2)."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.resnet.block": (None, "basic", "bottleneck"),
    "model.resnet.stem": (None, "cifar", "imagenet"),
    "model.rope.scaling": (None, "none", "llama3", "yarn"),
    "data.attention": (None, "document"),
    "data.validation.split": ("all", "validation"),
    "train.precision": ("fp32", "bf16"),
    "kernels.attention": (None, "flash", "fused", "unfused"),
    "train.trackers": ("tensorboard", "wandb"),  # of each
    "optim.name": ("muon_nsgd", "adamw"),
    "optim.ns_coefficients": ("jordan", "polar_express", "deepseek_v4"),
    "optim.ns_dtype": (None, "fp32", "bf16", "fp16"),
    "optim.scale": ("out_in", "moonlight"),
    "optim.embeddings": ("muon", "adamw"),
    "schedule.name": ("wsd", "cosine", "linear"),
    "schedule.rewarm_layers": (None, "all", "new"),
    "parallel.engine": ("megatron", "deepspeed", "torch"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.recompute_modules": RECOMPUTE_MODULES,  # of each
    "expansion.init": ("random", "copying", "zero", "copying_zeroL", "copying_zeroN"),
    "expansion.order": ("stack", "inter", "last"),
    "expansion.insert": ("bottom", "top", "middle"),
    "expansion.optimizer_state": ("inherit", "copy", "reset"),
    "expansion.parallel.engine": (None, "megatron", "deepspeed", "torch"),
    "expansion.parallel.zero_stage": (None, 0, 1, 2, 3),
    "expansion.parallel.recompute": (None, "none", "selective", "full"),
    "expansion.parallel.recompute_modules": (None, *RECOMPUTE_MODULES),
}

_COUNT = 2**31 - 1
"""Bounds of counts of samples, tokens and ranks: the product of two of them fits in 64 bits."""
_STEPS, _WIDTH, _LAYERS, _EXPERTS = 10**7, 2**20, 10_000, 2**13
"""Upper bounds far above any run: a larger value is a slip of the keyboard, and its plan would fill
the memory."""
_FP32 = 3.4028234663852886e38
"""The greatest number in fp32, the type in which models are trained."""

BOUNDS: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**63 - 1),
    "model.num_layers": (0, _LAYERS),
    "model.hidden_size": (1, _WIDTH),
    "model.num_attention_heads": (1, _WIDTH),
    "model.num_query_groups": (1, _WIDTH),
    "model.head_dim": (1, _WIDTH),
    "model.ffn_hidden_size": (1, _WIDTH),
    "model.norm_epsilon": (0, 1),
    "model.mtp_layers": (0, _LAYERS),
    "model.mtp_loss_coeff": (0, _FP32),
    "model.rope.theta": (1, _FP32),
    "model.rope.factor": (1, _FP32),
    "model.rope.original_length": (1, _COUNT),
    "model.mla.q_lora_rank": (0, _WIDTH),
    "model.mla.kv_lora_rank": (1, _WIDTH),
    "model.mla.qk_nope_head_dim": (1, _WIDTH),
    "model.mla.qk_rope_head_dim": (2, _WIDTH),
    "model.mla.v_head_dim": (1, _WIDTH),
    "model.moe.num_experts": (1, _EXPERTS),
    "model.moe.top_k": (1, _EXPERTS),
    "model.moe.ffn_hidden_size": (1, _WIDTH),
    "model.moe.shared_experts": (0, _EXPERTS),
    "model.moe.first_k_dense": (0, _LAYERS),
    "model.moe.num_groups": (1, _EXPERTS),
    "model.moe.top_k_groups": (1, _EXPERTS),
    "model.moe.routed_scaling_factor": (0, _FP32),
    "model.moe.bias_update_rate": (0, _FP32),
    "model.moe.aux_loss_coeff": (0, _FP32),
    "model.resnet.groups": (1, _WIDTH),
    "data.vocab_size": (2, 2**24),
    "data.sequence_length": (1, _COUNT),
    "data.image_size": (8, 2**14),
    "data.num_classes": (2, _WIDTH),
    "data.validation_fraction": (0.0001, 0.5),
    "data.max_bytes": (0, 2**63 - 1),
    "data.mix.weight": (1e-9, 1e15),
    "data.mix.epochs_at_most": (1e-9, 1e9),
    "data.mix.max_bytes": (0, 2**63 - 1),
    "data.validation.max_bytes": (0, 2**63 - 1),
    "train.steps": (1, _STEPS),
    "train.stop_after": (1, _STEPS),
    "train.global_batch": (1, _COUNT),
    "train.micro_batch": (1, _COUNT),
    "train.eval_every": (1, _COUNT),
    "train.eval_tokens": (1, 2**53),
    "train.eval_samples": (1, _COUNT),
    "train.eval_tasks_every": (0, _COUNT),
    "train.eval_tasks_limit": (1, _COUNT),
    "train.save_every": (0, _COUNT),
    "train.keep_checkpoints": (0, _COUNT),
    "train.log_every": (1, _COUNT),
    "optim.lr": (0, _FP32),
    "optim.weight_decay": (0, _FP32),
    "optim.clip_grad": (0, _FP32),
    "optim.momentum": (0, 0.99999),
    "optim.ns_steps": (1, 1000),
    "optim.ns_kernel_from": (1, _COUNT),
    "optim.beta1": (0, 0.99999),
    "optim.beta2": (0, 0.99999),
    "optim.eps": (0, _FP32),
    "schedule.warmup": (0, 1),
    "schedule.decay": (0, 1),
    "schedule.rewarm": (0, 1),
    "schedule.rewarm_from": (0, 1),
    "parallel.tensor": (1, _COUNT),
    "parallel.pipeline": (1, _COUNT),
    "parallel.virtual_pipeline": (1, _COUNT),
    "parallel.context": (1, _COUNT),
    "parallel.expert": (1, _COUNT),
    "parallel.expert_tensor": (1, _COUNT),
    "parallel.recompute_layers": (1, _LAYERS),
    "parallel.staging_mib": (1, _WIDTH),
    "expansion.to_layers": (1, _LAYERS),
    "expansion.block": (0, _LAYERS),  # of each
    "expansion.parallel.tensor": (1, _COUNT),
    "expansion.parallel.pipeline": (1, _COUNT),
    "expansion.parallel.virtual_pipeline": (1, _COUNT),
    "expansion.parallel.context": (1, _COUNT),
    "expansion.parallel.expert": (1, _COUNT),
    "expansion.parallel.expert_tensor": (1, _COUNT),
    "expansion.parallel.recompute_layers": (1, _LAYERS),
    "expansion.parallel.staging_mib": (1, _WIDTH),
}
"""The least and the greatest value (both inclusive, neither infinite nor NaN) of every numeric
field that has no choices and is not in :data:`WORDING`."""

WORDING = {"expansion.at": "a fraction of train.steps below 1, or a step"}
"""What a field accepts that depends on other fields, in words. Those fields are compared once the
configuration is whole; that the value is a finite number is checked at once."""

LONGEST_TEXT, LONGEST_PATH = 200, 4096
"""The longest text and the longest path that are accepted, in characters; the path's limit is that
of Linux."""

NAMES = {"run.name": {"data": "run.dir/data holds prepared corpora"}}
"""Fields that name a folder, each with the names that are taken and the reason."""

TAKEN = ("held_out",)
"""Names that a validation set cannot have: that of the text which is held out of the corpus."""

PATHS = (
    "run.dir", "run.init_from", "data.corpus", "data.tokenizer", "data.prepared",
    "data.mix.corpus", "data.mix.prepared", "data.validation.corpus", "data.validation.prepared",
)  # fmt: skip
"""Fields that hold a path, or may hold one: in them ``~`` and variables mean what they mean in a
shell."""
