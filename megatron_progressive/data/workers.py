"""Tasks of a preparation in several processes of this machine."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_progressive.data.prepared_parts import Context, Task, do_task

Told = Callable[[Task, int | None], None]
"""Called with a task and the bytes of text of its unit that have been read; None when it is
done."""


def run_tasks(
    context: Context, tasks: Iterator[Task], workers: int, threads: int, told: Told
) -> None:
    """Do tasks, each in one of several processes, which end with this one however it ends.

    Args:
        context: what the tasks share.
        tasks: the tasks; the next one is asked for when a process is free.
        workers: the number of processes.
        threads: the number of threads with which each process tokenizes.
        told: told how far they are.

    Raises:
        ConfigError: see :func:`.parts.do_task`.
        ChildProcessError: a process was killed.
    """
    # not forked from this process: its tokenizer may have threads already
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["megatron_progressive.data.preloaded"])
    busy: dict[Connection, tuple[BaseProcess, Task]] = {}
    processes: list[BaseProcess] = []
    try:
        while len(busy) < workers and (task := next(tasks, None)) is not None:
            mine, theirs = made.Pipe()
            process: BaseProcess = made.Process(
                target=_work, args=(theirs, context, threads), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            mine.send(task)
            busy[mine] = process, task
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, task = busy[ready]
                answer = _answer(ready, process, context)
                if isinstance(answer, BaseException):
                    raise answer
                told(task, answer)
                if answer is None and (following := next(tasks, None)) is not None:
                    busy[ready] = process, following
                    ready.send(following)
                elif answer is None:
                    del busy[ready]
                    ready.close()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _answer(connection: Connection, process: BaseProcess, context: Context) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else "without a word"
        return ChildProcessError(
            errno.ECHILD,
            f"a worker that prepared it was ended ({how}; by too little memory, perhaps); the same "
            "command goes on from what is finished",
            str(context.work),
        )


def _work(connection: Connection, context: Context, threads: int) -> None:
    """Do the tasks that come, until none comes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one gets it, too
    threading.Thread(target=_end_with_starter, daemon=True).start()
    # read when the tokenizer is first used
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        try:
            do_task(context, task, connection.send)
            answer: BaseException | None = None
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except Exception:  # an error that cannot be sent as it is
            connection.send(RuntimeError("".join(traceback.format_exception(answer))))


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    if starter is not None:
        wait([starter.sentinel])
        os._exit(1)
