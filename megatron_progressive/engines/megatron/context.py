"""The part of a sequence that a context-parallel rank computes with, and what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import multi_token_prediction


@dataclass(frozen=True)
class SequencePart:
    """Of 2 n chunks of a sequence rank r of n has chunks r and 2 n - 1 - r, as Megatron-core
    divides it (0.19.2: ``get_pos_emb_on_this_cp_rank``). A token attends to all before it, so that
    every rank then has equally many pairs of tokens."""

    positions: torch.Tensor
    """Of this rank's tokens in the sequence, int64 [1, S / n], on the device."""
    by_rank: torch.Tensor
    """Those of all ranks, one after another, int64 [S], on the device."""

    @classmethod
    def of(
        cls, sequence_length: int, rank: int = 0, ranks: int = 1, device: torch.device | None = None
    ) -> SequencePart:
        """The part of context-parallel rank ``rank`` of ``ranks``, twice which divide the length
        unless there is one."""
        everything = torch.arange(sequence_length, device=device)
        if ranks == 1:
            return cls(everything[None], everything)
        chunks = everything.chunk(2 * ranks)
        parts = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ranks)]
        return cls(parts[rank][None], torch.cat(parts))

    @property
    def length(self) -> int:
        """The number of this rank's tokens."""
        return self.positions.numel()

    @property
    def whole(self) -> bool:
        return self.length == self.by_rank.numel()

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's part of samples [n, S]."""
        return tokens if self.whole else tokens[:, self.positions[0]]

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of this rank's tokens against those of all ranks: 0 for
        tokens before it and its own, else -inf, of ``dtype`` [1, 1, S / n, S]. None where this rank
        has the whole sequence."""
        if self.whole:
            return None
        later = self.by_rank[None] > self.positions.mT
        allowed = torch.zeros(later.shape, dtype=dtype, device=later.device)
        return allowed.masked_fill_(later, -torch.inf)[None, None]


def weigh_predictions_evenly() -> None:
    """Let multi-token prediction divide its losses by the mean number of tokens of context-parallel
    ranks. Megatron-core 0.19.2 divides by each rank's own number, and as the tokens at the end of a
    sequence have nothing to predict, the losses of the rank that has them then weigh more
    (``multi_token_prediction.py``, ``process_mtp_loss``)."""
    original = multi_token_prediction.roll_tensor
    if getattr(original, "_counts_all_ranks", False):
        return

    def roll_tensor(
        tensor: Any,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        *rest: Any,
        **named: Any,
    ) -> tuple[Any, Any]:
        rolled, count = original(tensor, shifts, dims, cp_group, *rest, **named)
        if count is not None and cp_group is not None and cp_group.size() > 1:
            count = count.double()
            dist.all_reduce(count, group=cp_group)
            count /= cp_group.size()
        return rolled, count

    roll_tensor._counts_all_ranks = True  # type: ignore[attr-defined]
    multi_token_prediction.roll_tensor = roll_tensor
