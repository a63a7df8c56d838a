"""How evenly tokens spread over experts, by the counts that routers with an expert bias keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_progressive.models.base import MOE, TransformerShape


class ExpertLoad:
    """The counts of this rank's routers, by global layer.

    Routers count only where they have an expert bias, which follows the counts. The counts start
    anew when the bias has been updated, so :meth:`read` has to be called before that.
    """

    def __init__(self, shape: TransformerShape, chunks: Sequence[GPTModel]) -> None:
        kinds = shape.layer_kinds()
        biased = shape.moe is not None and shape.moe.bias_update_rate > 0
        self.experts = shape.moe.num_experts if shape.moe is not None and biased else 0
        self._first = kinds.index(MOE) if MOE in kinds else len(kinds)
        self.layers = len(kinds) - self._first if biased else 0
        self._routers = {
            layer.layer_number - 1: layer.mlp.router
            for chunk in chunks
            for layer in chunk.decoder.layers
            if self.layers and kinds[layer.layer_number - 1] == MOE
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._counts = torch.zeros(self.layers, self.experts, dtype=torch.float64, device=device)

    def read(self) -> None:
        """Remember the tokens that this rank has sent to each expert in the current step."""
        self._counts.zero_()
        for number, router in self._routers.items():
            self._counts[number - self._first] = router.local_tokens_per_expert

    @property
    def counts(self) -> torch.Tensor:
        """The tokens of each expert in every layer with experts, flat; to be summed over all
        ranks."""
        return self._counts.view(-1)

    @property
    def busiest(self) -> Callable[[torch.Tensor], float | None]:
        """:func:`busiest_expert` of these layers, which keeps nothing of the model alive."""
        return partial(busiest_expert, self.layers, self.experts)


def busiest_expert(layers: int, experts: int, counts: torch.Tensor) -> float | None:
    """The tokens of the busiest expert over the mean, in the least balanced layer, from counts
    that were summed over all ranks; None where nothing is counted."""
    if not layers:
        return None
    by_layer = counts.view(layers, experts)
    return float((by_layer.max(1).values / by_layer.mean(1)).max())
