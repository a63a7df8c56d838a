"""Keys of ``config.json`` that do not change the logits of a model's language model.

There are three kinds: keys that tell what made the file, which an export writes anew; keys for
other programs and people (training, generation, other heads), which an export gives back; and
options that some programs write down although they are off. Collected from the configurations of
transformers 4 and 5 and of models on the Hugging Face hub.
"""

from __future__ import annotations

import re
from typing import Any

_OF_THE_FILE = re.compile(
    r"architectures|model_type|auto_map|transformers_version|_commit_hash|dtype|torch_dtype"
    r"|_?(\w+_)?name_or_path|_?(attn|experts)_implementation\w*|_flash_attn_2_enabled"
    r"|unsloth_\w+|paddlenlp_version"
)
_KEPT = frozenset({
    # training
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "pretraining_tp",
    "gradient_checkpointing", "finetuning_task", "dropout", "attn_dropout", "activation_dropout",
    "residual_dropout", "resid_dropout", "embedding_dropout", "embd_dropout", "ffn_dropout",
    "mlp_dropout", "initializer_factor", "neftune_noise_alpha", "bf16", "fp16", "fp32",
    # what a forward pass returns, and how it is computed
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_past",
    "output_router_logits", "chunk_size_feed_forward", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "use_sdpa",
    "xla_device", "trust_remote_code", "use_unpad", "use_memory_efficient_attention",
    # tokens and generation, beside the parameters of transformers' GenerationConfig
    "tokenizer_class", "prefix", "task_specific_params", "model_max_length",
    "max_sequence_length", "padding_side", "tokenizer_padding_side", "tokenizer_model_max_length",
    "bos_token", "eos_token", "pad_token", "unk_token", "forced_decoder_ids",
    "return_legacy_cache", "generation_kwargs", "chat_template", "add_bos_token", "add_eos_token",
    # other heads than the language model's
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "classifier_dropout",
    "n_special", "predict_special_tokens", "classifier_bias", "classifier_activation",
    "cross_attention_hidden_size",  # of a cross-attention, which is off or refused
    # notes for other programs
    "is_llama_config", "is_decoder", "transformers.js_config", "license", "language", "languages",
    "base_model", "datasets", "model_name", "revision",
})  # fmt: skip
_OFF: dict[str, Any] = {
    "rope_interleaved": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "alibi": False,
    "use_alibi": False,
    "parallel_attn": False,
    "use_parallel_residual": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
}
"""Keys that are harmless with this one value only."""


def describes_file(key: str) -> bool:
    """Whether a key tells of the file and of how it was made: an export writes such a key anew or
    leaves it out."""
    return _OF_THE_FILE.fullmatch(key) is not None


def is_kept(key: str, value: Any) -> bool:
    """Whether a key is for those who use or train the model: an export gives such a key back."""
    if key in _OFF:
        return same(value, _OFF[key])
    return key in _KEPT or re.fullmatch(r"\w+_token_id", key) is not None


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; ``true`` does not equal 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
