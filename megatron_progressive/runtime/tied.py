"""Processes that end when the process that started them is gone, however that ended, also by
SIGKILL.

The starter keeps one end of a pipe and its children inherit the other. A child reads the end of the
file once the starter is gone, even where that happened before the child first looked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE_SECONDS = 300.0
"""How many seconds a process whose starter is gone has to save and end."""

_VARIABLE = "MPROG_STARTER_PIPE"
_SET_PDEATHSIG = 1  # linux/prctl.h

starter_gone = threading.Event()
"""Set once this process knows that its starter is gone."""

_pipe: tuple[int, int] | None = None
_making = threading.Lock()


def start_tied(
    command: Sequence[str],
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a process of this program that calls :func:`end_with_starter`, in a session of its own:
    what a terminal sends reaches it through its starter alone.

    Args:
        options: of :class:`subprocess.Popen`.
    """
    global _pipe
    with _making:  # cells start in several threads
        _pipe = _pipe or os.pipe()
    reading = _pipe[0]
    return subprocess.Popen(
        command, env={**environment, _VARIABLE: str(reading)}, pass_fds=(*pass_fds, reading),
        start_new_session=True, **options,
    )  # fmt: skip


def end_with_starter() -> None:
    """Have SIGTERM sent to this process once its starter is gone, if :func:`start_tied` started it:
    a run then saves and stops, anything else ends. It is to be called once, before anything that
    takes time."""
    word = os.environ.pop(_VARIABLE, "")  # it is not for the processes that this one starts
    if word.isdecimal() and _is_pipe(int(word)):
        threading.Thread(target=_wait_for_the_end, args=(int(word),), daemon=True).start()


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _wait_for_the_end(descriptor: int) -> None:
    os.read(descriptor, 1)  # nobody writes: it returns when the other end is closed
    starter_gone.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)  # it waits for a rank that is gone, or for a store that went with the starter


def tied_command(command: Sequence[str], number: int) -> list[str]:
    """The command of another program (``srun``), changed so that it gets the signal ``number`` when
    the process that starts it is gone. This works on Linux alone; elsewhere the command stays as it
    is."""
    if not sys.platform.startswith("linux"):
        return list(command)
    words = [str(int(number)), str(os.getpid()), *command]
    return [sys.executable, "-m", __name__, *words]


def _become(number: int, starter: int, command: Sequence[str]) -> None:
    """Replace this process by ``command``, which keeps the request for a signal."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, number)
    if os.getppid() != starter:  # it was gone before it could be asked
        sys.exit(128 + number)
    os.execvp(command[0], list(command))


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
