"""Our GPT-2 against Hugging Face's: the same weights, tokens and AdamW give the same losses.

The names are written here a second time, on purpose: ``tests/models`` goes through the package's
own map.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from tests.engines import on_ranks
from tests.pool import Pool

STEPS = 10


def initial_weights_and_losses(config: RunConfig, layers: int) -> tuple[on_ranks.Full, list[float]]:
    engine = on_ranks.start(config, layers)
    weights = {k: v for k, v in on_ranks.gather(engine.state()).items() if k[1] == "param"}
    losses = [on_ranks.step(engine, number, lr=config.optim.lr) for number in range(STEPS)]
    engine.close()
    return weights, losses


def huggingface_model(weights: on_ranks.Full, config: RunConfig, layers: int) -> Any:
    """GPT2LMHeadModel with our weights. Its linears are transposed, its QKV rows whole."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = model_shape(config, layers)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.sequence_length,
            n_embd=shape.hidden_size,
            n_layer=layers,
            n_head=shape.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=shape.tie_embeddings,
        )
    )
    ours = {name: tensor for (name, _), tensor in weights.items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in ours:
            ours[name] = ours[name][: shape.vocab_size]
    heads, head = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads

    def qkv(tensor: torch.Tensor) -> torch.Tensor:
        per_head = tensor.view(heads, 3, head, *tensor.shape[1:])
        return torch.cat([per_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])

    theirs = {
        "transformer.wte.weight": ours["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": ours["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": ours["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": ours["decoder.final_layernorm.bias"],
        "lm_head.weight": ours.get("output_layer.weight", ours["embedding.word_embeddings.weight"]),
    }
    modules = {
        "ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm",
        "attn.c_attn": "self_attention.linear_qkv", "attn.c_proj": "self_attention.linear_proj",
        "mlp.c_fc": "mlp.linear_fc1", "mlp.c_proj": "mlp.linear_fc2",
    }  # fmt: skip
    for layer in range(layers):
        for their, our in modules.items():
            for kind in ("weight", "bias"):
                tensor = ours[f"decoder.layers.{layer}.{our}.{kind}"]
                tensor = qkv(tensor) if "qkv" in our else tensor
                tensor = tensor.t().contiguous() if tensor.dim() == 2 else tensor
                theirs[f"transformer.h.{layer}.{their}.{kind}"] = tensor
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith(("attn.bias", "masked_bias"))]
    return model


@pytest.mark.parametrize(
    ("layers", "tied", "world", "words"),
    [
        (2, True, 1, []),
        (2, False, 1, []),
        (1, True, 2, ["parallel.tensor=2"]),
        (2, True, 2, ["parallel.pipeline=2"]),
        (0, True, 1, []),
    ],
)
def test_losses_equal_huggingfaces(
    pool: Pool, layers: int, tied: bool, world: int, words: list[str]
) -> None:
    config = on_ranks.small_config(
        ["optim.name=adamw", "optim.lr=0.003", "optim.weight_decay=0.1",
         f"model.tie_embeddings={str(tied).lower()}", *words]
    )  # fmt: skip
    weights, ours = pool.run(world, initial_weights_and_losses, config, layers)[0]
    model = huggingface_model(weights, config, layers)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=0.003,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        weight_decay=0.1,
    )
    theirs = []
    for number in range(STEPS):
        sample = on_ranks.tokens(8 * number, 8)
        logits = model(sample[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours == pytest.approx(theirs, rel=2e-5)
