"""Gradients that are reduced during the backward pass, over NCCL."""

from __future__ import annotations

import pytest

from tests.cuda.serve import PoolOnDevice
from tests.engines.test_kernels import reductions
from tests.pool import Pool


@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
def test_reductions_start_early_and_no_stream_reads_too_soon(
    pool: Pool, checking_pool: PoolOnDevice, optimizer: str
) -> None:
    """Checking refuses a stream that reads what another has not finished writing."""
    words = [f"optim.name={optimizer}", "train.micro_batch=2", "optim.ns_dtype=fp32"]
    there = pool.run(2, reductions, words, 8, 8_000)
    for (events, buckets, loss, planned), (order, _, expected, _) in zip(
        checking_pool.run(2, reductions, words, 8, 8_000), there, strict=True
    ):
        assert planned
        assert events.count("reduce") == buckets > 1
        assert events == order
        assert loss == pytest.approx(expected, rel=1e-5)
