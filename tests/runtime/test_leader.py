"""What rank 0 does while the others wait: no time limit, and its end is theirs. As Slurm starts
ranks: rank 0 holds the store."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime import leader
from megatron_progressive.runtime.distributed import Place
from megatron_progressive.runtime.launch import free_port
from megatron_progressive.runtime.leader import Leader

RANKS = 3


def rank_of_a_job(connection: Connection, rank: int, port: int, how: str) -> None:
    """One rank; sends what came of it and what it said."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    leader.TIMEOUT, leader.SILENT_SECONDS = timedelta(seconds=5), 0.2

    def act() -> list[object]:
        time.sleep(6 if how == "answers" else 1)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "refuses":
            raise ConfigError("data.corpus: got a; accepted: b")
        if how == "fails":
            raise OSError("disk full")
        return ["answer", 1]

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        met = Leader(Place(rank, rank, RANKS))
        assert met.is_me is (rank == 0)
        try:
            outcome = str(met.does(act, "prepares the corpus"))
        except (ConfigError, leader.LeaderFailed, OSError) as error:
            outcome = f"{type(error).__name__}: {error}"
    connection.send((outcome, said.getvalue()))
    if how == "answers":
        connection.recv()  # the store lives as long as rank 0


@pytest.mark.parametrize(
    ("how", "first", "others"),
    [
        ("answers", "['answer', 1]", "['answer', 1]"),
        ("refuses", *["ConfigError: data.corpus: got a; accepted: b"] * 2),
        ("fails", "OSError: disk full",
         "LeaderFailed: rank 0, which prepares the corpus, failed: disk full"),
        ("dies", "", "LeaderFailed: rank 0, which prepares the corpus, has ended"),
    ],
)  # fmt: skip
def test_the_others_end_as_rank_0_does(how: str, first: str, others: str) -> None:
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["tests.warm"])
    pipes = [context.Pipe() for _ in range(RANKS)]
    ranks = [
        context.Process(target=rank_of_a_job, args=(theirs, rank, port, how))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    try:
        found = [
            ours.recv() if rank or how != "dies" else ("", "")
            for rank, (ours, _) in enumerate(pipes)
        ]
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in ranks:
            process.join(60)
            process.kill()
    assert [outcome for outcome, _ in found] == [first, *[others] * (RANKS - 1)]
    lines = [said for _, said in found]  # one a host
    assert lines == ["", "rank 1: waits while rank 0 prepares the corpus\n", ""]


def test_alone_nobody_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for place in (None, Place(0, 0, 1)):
        assert Leader(place).does(lambda: 3, "counts") == 3
    with pytest.raises(ConfigError, match="environment: got a job of 2 ranks without MASTER_ADDR"):
        Leader(Place(1, 1, 2))
