"""Who a process is among a job's, and how the ranks wait for each other."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime import rendezvous
from megatron_progressive.runtime.distributed import Place, place_from_environment
from megatron_progressive.runtime.launch import free_port

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, None),
        ({**STEP, **MEETING}, Place(1, 0, 4)),
        ({**RANKS, **MEETING, "SLURM_NTASKS": "8"}, Place(1, 1, 2)),  # torchrun inside Slurm
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Place(0, 0, 1)),
    ],
)
def test_the_place_of_a_process(environment: dict[str, str], place: Place | None) -> None:
    assert place_from_environment(environment) == place


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in {**STEP, **MEETING}.items() if key != name}


BATCH = {**without("SLURM_STEP_ID"), "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "needed"),
    [
        (BATCH, ["SLURM_NTASKS=4 without srun", "`srun mprog"]),
        ({**BATCH, "SLURM_STEP_ID": "4294967290"}, ["SLURM_NTASKS=4 without srun"]),  # salloc
        (without("SLURM_PROCID"), ["SLURM_NTASKS=4 without srun"]),
        ({"SLURM_NTASKS": "many"}, ["SLURM_NTASKS=many", "a number"]),
        ({"SLURM_NTASKS": ""}, ["SLURM_NTASKS=;", "a number"]),
        (without("SLURM_LOCALID"), ["SLURM_LOCALID=None", "a number"]),
        (without("MASTER_ADDR"), ["no MASTER_ADDR", "rank 0's host"]),
        (without("MASTER_PORT"), ["MASTER_PORT=None", "a number"]),
        ({**RANKS, **MEETING, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "from 1 to 65535"]),
        ({**RANKS, **MEETING, "RANK": "2"}, ["RANK=2", "below WORLD_SIZE"]),
        ({**RANKS, **MEETING, "RANK": "x"}, ["RANK=x", "a number"]),
    ],
)
def test_no_place_is_said_in_one_line(environment: dict[str, str], needed: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        place_from_environment(environment)
    line = str(caught.value)
    assert line.startswith("environment: got ")
    assert "accepted: " in line
    assert "\n" not in line
    for text in needed:
        assert text in line


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where ranks can meet; notes come at once."""
    port = str(free_port())
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous, "FIRST_NOTE_SECONDS", 0.2)
    return f"127.0.0.1:{port}"


def test_ranks_that_wait_say_for_whom(meeting: str, capfd: Any) -> None:
    stores: dict[int, Any] = {}

    def rank(number: int) -> threading.Thread:
        def come() -> None:
            stores[number] = rendezvous.meet(number, number, 3)

        thread = threading.Thread(target=come)
        thread.start()
        return thread

    lines = ""

    def said(text: str) -> None:
        nonlocal lines
        deadline = time.monotonic() + 60
        while text not in lines:
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
            lines += capfd.readouterr().err

    threads = [rank(1)]
    time.sleep(0.5)
    threads.append(rank(0))
    said(f"waiting for 1 rank at {meeting} (2 here)\n")
    threads.append(rank(2))
    for thread in threads:
        thread.join(60)
    assert sorted(stores) == [0, 1, 2]
    stores[0].set("all", "here")
    assert stores[2].get("all") == b"here"
    assert lines.count("waiting") <= 6  # ever more sparsely


def test_the_first_of_a_node_waits_for_rank_0_aloud(
    meeting: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=1))
    for local_rank in (0, 1):
        with pytest.raises(TimeoutError, match=f"rank 0 did not come to {meeting} within"):
            rendezvous.meet(1, local_rank, 2)
        said = capfd.readouterr().err
        assert (f"waiting for rank 0 at {meeting}" in said) == (local_rank == 0)


def test_a_meeting_that_is_not_complete_in_time(
    meeting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(TimeoutError, match=f"not all of 2 ranks came to {meeting}"):
        rendezvous.meet(0, 0, 2)
