"""The lock of a folder: one owner at a time, whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.runtime import folder_lock
from megatron_progressive.runtime.folder_lock import FolderInUse, FolderLock, owner_of

FORK: ForkContext = multiprocessing.get_context("fork")
SLEEP_S = 60


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lock"


@pytest.fixture
def processes() -> Iterator[list[ForkProcess]]:
    started: list[ForkProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join()


def hold(path: Path, ready: Any) -> None:
    FolderLock(path).acquire()
    ready.set()
    time.sleep(SLEEP_S)


def holder(path: Path, processes: list[ForkProcess]) -> ForkProcess:
    """A process that has the lock until it is killed."""
    ready = FORK.Event()
    processes.append(FORK.Process(target=hold, args=(path, ready)))
    processes[-1].start()
    assert ready.wait(30)
    return processes[-1]


def contents(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}


def test_the_second_is_refused_and_changes_nothing(
    lock: Path, processes: list[ForkProcess]
) -> None:
    owner = holder(lock, processes)
    before = contents(lock.parent)
    with pytest.raises(FolderInUse, match=f"process {owner.pid} on .* since 20") as refused:
        FolderLock(lock).acquire()
    assert refused.value.owner.pid == owner.pid
    assert owner_of(lock) == refused.value.owner
    assert contents(lock.parent) == before


def test_it_is_gone_when_it_is_released(lock: Path) -> None:
    assert owner_of(lock) is None
    with FolderLock(lock) as held:
        found = owner_of(lock)
        assert found is not None
        assert found.pid == os.getpid()
        with pytest.raises(FolderInUse):
            FolderLock(lock).acquire()
        with pytest.raises(FolderInUse):
            held.acquire()
        assert held.still_there()
    assert owner_of(lock) is None
    assert not held.still_there()
    assert list(lock.parent.iterdir()) == []
    held.release()
    held.acquire()
    held.release()


def test_a_killed_owner_s_lock_is_taken_at_once(lock: Path, processes: list[ForkProcess]) -> None:
    owner = holder(lock, processes)
    os.kill(owner.pid or 0, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while owner_of(lock) is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # not joined: as a zombie that nobody reaps it is dead, too
    start = time.monotonic()
    with FolderLock(lock):
        assert time.monotonic() - start < 1


def test_a_stopped_owner_keeps_it(lock: Path, processes: list[ForkProcess]) -> None:
    owner = holder(lock, processes)
    os.kill(owner.pid or 0, signal.SIGSTOP)
    for file in lock.iterdir():
        os.utime(file, (0, 0))
    with pytest.raises(FolderInUse):
        FolderLock(lock).acquire()


def elsewhere(path: Path, silent_s: float, **changes: Any) -> Path:
    """The lock of an owner on another machine, silent for so long by the file system's clock."""
    path.mkdir(parents=True)
    file = path / "token"
    owner = replace(folder_lock._this_process(), host="node9", machine="node9 other boot")
    file.write_text(json.dumps(asdict(replace(owner, **changes))))
    now = file.stat().st_mtime
    os.utime(file, (now - silent_s, now - silent_s))
    return file


def test_one_number_of_another_process_is_no_owner(lock: Path) -> None:
    elsewhere(lock, 0, machine=folder_lock._machine(), started="1")
    assert owner_of(lock) is None
    FolderLock(lock).acquire()


def test_an_owner_elsewhere_is_believed_while_it_gives_signs_of_life(lock: Path) -> None:
    elsewhere(lock, folder_lock.STALE_SECONDS - 5)
    found = owner_of(lock)
    assert found is not None
    assert found.host == "node9"
    with pytest.raises(FolderInUse, match="on node9"):
        FolderLock(lock).acquire()
    assert [p.name for p in lock.parent.iterdir()] == [".lock"]


def test_a_crashed_owner_elsewhere_loses_it(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.1)
    elsewhere(lock, folder_lock.STALE_SECONDS + 5)
    assert owner_of(lock) is None
    FolderLock(lock).acquire()
    found = owner_of(lock)
    assert found is not None
    assert found.pid == os.getpid()


def test_clocks_of_hosts_do_not_matter(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's clock is an hour ahead: by it, the owner would be dead."""
    elsewhere(lock, 1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    with pytest.raises(FolderInUse):
        FolderLock(lock).acquire()


def test_an_owner_that_comes_back_while_another_looks_keeps_it(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system stood still for both."""
    file = elsewhere(lock, folder_lock.STALE_SECONDS + 5)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(file))
    with pytest.raises(FolderInUse):
        FolderLock(lock).acquire()


@pytest.mark.parametrize("text", ["", '{"host": "no', "[]", '{"other": 1}'])
def test_an_unreadable_file_holds_until_it_is_stale(
    lock: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.1)
    file = elsewhere(lock, 0)
    file.write_text(text)
    with pytest.raises(FolderInUse, match="cannot be read"):
        FolderLock(lock).acquire()
    os.utime(file, (0, 0))
    with FolderLock(lock):
        pass


def test_an_empty_folder_is_no_lock(lock: Path) -> None:
    lock.mkdir(parents=True)
    with FolderLock(lock):
        pass


def test_a_plain_file_in_its_place_is_judged_by_its_age(lock: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.1)
    lock.parent.mkdir()
    lock.write_text("")
    with pytest.raises(FolderInUse):
        FolderLock(lock).acquire()
    os.utime(lock, (0, 0))
    with FolderLock(lock):
        pass


def test_signs_of_life(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.02)
    with FolderLock(lock) as held:
        (file,) = lock.iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 1
        file.unlink()
        assert not held.still_there()
    assert not lock.exists()


def child_of_an_owner(held: FolderLock, path: Path, answers: Any) -> None:
    held.release()  # not its own
    try:
        FolderLock(path).acquire()
    except FolderInUse as error:
        answers.put(error.owner.pid)
    else:
        answers.put(0)


def test_a_forked_child_has_no_part_in_it(lock: Path, processes: list[ForkProcess]) -> None:
    with FolderLock(lock) as held:
        answers = FORK.Queue()
        processes.append(FORK.Process(target=child_of_an_owner, args=(held, lock, answers)))
        processes[-1].start()
        assert answers.get(timeout=30) == os.getpid()
        assert held.still_there()


def compete(path: Path, inside: Path, times: int, failures: Any, kills: bool) -> None:
    """Take the lock ``times`` times; whoever is in makes a file that must not be there."""
    folder_lock.HEARTBEAT_SECONDS = 0.05
    for _ in range(times):
        lock = FolderLock(path)
        while True:
            try:
                lock.acquire()
                break
            except FolderInUse:
                time.sleep(random.uniform(0, 0.01))
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            failures.put(os.getpid())
        inside.unlink(missing_ok=True)
        if kills:
            os.kill(os.getpid(), signal.SIGKILL)  # with the lock
        lock.release()


def race(path: Path, times: int, workers: int, processes: list[ForkProcess], kills: bool) -> Any:
    failures = FORK.Queue()
    arguments = (path, path.parent.parent / "inside", times, failures, kills)
    processes += [FORK.Process(target=compete, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if kills else 0)
    return failures


def test_never_two_inside(lock: Path, processes: list[ForkProcess]) -> None:
    assert race(lock, 10, 20, processes, kills=False).empty()
    assert list(lock.parent.iterdir()) == []


def test_never_two_inside_where_every_owner_is_killed(
    lock: Path, processes: list[ForkProcess]
) -> None:
    """Each breaks the lock of the one before, with all others after the same one."""
    assert race(lock, 1, 40, processes, kills=True).empty()
    with FolderLock(lock):
        assert [p.name for p in lock.parent.iterdir()] == [".lock"]


def probe(path: Path, over: Any) -> None:
    while not over.is_set():
        owner_of(path)


def test_whoever_looks_keeps_nobody_out(lock: Path, processes: list[ForkProcess]) -> None:
    over = FORK.Event()
    processes += [FORK.Process(target=probe, args=(lock, over)) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in range(200):
        with FolderLock(lock):  # raises where it is not free
            pass
    over.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_two_that_break_the_same_lock(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found its owner dead; the slower one finds the lock taken."""
    elsewhere(lock, 0, machine=folder_lock._machine(), started="1")
    is_alive, quicker = folder_lock._is_alive, FolderLock(lock)

    def slowly(file: Path, own: Path) -> bool:
        found = is_alive(file, own)
        monkeypatch.setattr(folder_lock, "_is_alive", is_alive)
        if not found:
            quicker.acquire()
        return found

    monkeypatch.setattr(folder_lock, "_is_alive", slowly)
    with pytest.raises(FolderInUse) as refused:
        FolderLock(lock).acquire()
    assert refused.value.owner.pid == os.getpid()
    assert quicker.still_there()


def test_what_killed_takers_prepared_is_removed(lock: Path, processes: list[ForkProcess]) -> None:
    owner = holder(lock, processes)
    lock.rename(lock.with_name(".lock.abc"))
    lock.with_name(".lock.empty").mkdir()
    os.utime(lock.with_name(".lock.empty"), (0, 0))
    owner.kill()
    owner.join()
    with FolderLock(lock):
        assert [p.name for p in lock.parent.iterdir()] == [".lock"]
