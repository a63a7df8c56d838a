"""Shared fixtures: a pool of gloo ranks and a small prepared corpus for all tests of a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from tests.cuda.serve import PoolOnDevice, variables
from tests.jobs import Jobs
from tests.pool import Pool

# In the background, or under nohup, these are ignored, by the children of the tests as well.
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
for _number, _handler in _DEFAULTS.items():
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(
    scope="session", params=["gloo", pytest.param("standin", marks=pytest.mark.cuda_full)]
)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool | PoolOnDevice]:
    """Ranks over gloo; with ``-m cuda_full`` over NCCL, on the stand-in CUDA device."""
    if request.param == "gloo":
        pool: Pool | PoolOnDevice = Pool(4)
    else:
        pool = PoolOnDevice(4, variables("computing"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder prepared from a part of the standard library, vocabulary 512."""
    from megatron_progressive import config, data

    folder = tmp_path_factory.mktemp("corpus")
    values = {
        "run": {"dir": str(folder)},
        "model": {"family": "gpt2"},
        # of few documents enough are held out for validations of some samples
        "data": {
            "vocab_size": 512,
            "sequence_length": 32,
            "max_bytes": 400_000,
            "validation_fraction": 0.1,
        },
    }
    return data.prepare(config.from_dict(values))
