"""The part of a sequence that a context-parallel rank computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
