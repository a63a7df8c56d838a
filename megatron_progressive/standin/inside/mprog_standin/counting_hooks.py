"""What libraries must be told when nothing is computed."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def _even_tokens(module: ModuleType) -> None:
    """Megatron-core's all-to-all dispatcher asks the router's result how many tokens each expert
    gets (0.19.2: transformer/moe/token_dispatcher.py): here all get the same."""
    import torch

    dispatcher: Any = module.MoEAlltoAllTokenDispatcher
    original = dispatcher.preprocess

    def preprocess(self: Any, routing_map: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        original(self, routing_map, *args, **kwargs)
        each = routing_map.size(0) * self.config.moe_router_topk // self.num_experts

        def full(shape: tuple[int, ...], value: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int64).to(routing_map.device)

        local, experts, tensors = self.num_local_experts, self.ep_size, self.tp_size
        if experts > 1 or tensors > 1:
            self.input_splits = full((experts,), each * local)
            self.output_splits = full((experts,), each * local)
            self.output_splits_tp = full((tensors,), each * local * experts)
        if local > 1:
            self.num_global_tokens_per_local_expert = full((tensors * experts, local), each)
        return full((local,), each * experts * tensors)

    dispatcher.preprocess = preprocess


def _calls(package: ModuleType) -> None:
    from . import counting_transformer_engine, transformer_engine

    transformer_engine.replace_calls(counting_transformer_engine.CALLS)


def _permutation(module: ModuleType) -> None:
    from . import counting_transformer_engine, transformer_engine

    transformer_engine.replace_permutation(module, counting_transformer_engine.PERMUTATION)


AFTER = {
    "transformer_engine.pytorch": _calls,
    "transformer_engine.pytorch.triton.permutation": _permutation,
    "megatron.core.transformer.moe.token_dispatcher": _even_tokens,
}
"""By module: what is called once it has been imported."""
