"""An ``mprog`` that starts at once: a process that has imported everything forks for each command.

A shell finds the command as a small program that hands its words, folder, environment and open
files to that process and leaves with the exit code of the fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -S
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(words).to_bytes(8, "big")], [0, 1, 2])
link.sendall(words)
sys.exit(int(link.recv(16) or b"1"))
"""


def _command(words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """The fork: becomes the command, and ends with its exit code."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    # what this process began with may have been of another kind: a file, and not a pipe
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        from megatron_progressive.cli import main

        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(address: str) -> None:
    import tests.warm  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen()
    os.rename(address + ".new", address)  # there when it can be used
    while True:
        link, _ = listener.accept()
        head, files, _, _ = socket.recv_fds(link, 8, 3)
        size, data = int.from_bytes(head, "big"), b""
        while len(data) < size:
            data += link.recv(size - len(data))
        pid = os.fork()
        if pid == 0:
            _command(*json.loads(data), files)
        for file in files:
            os.close(file)
        link.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        link.close()


class WarmMprog:
    """The process, and ``mprog`` programs that use it."""

    def __init__(self, folder: Path) -> None:
        self._address = folder / "mprog.socket"
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(str(self._address),), daemon=True)
        self._process.start()

    def program(self, path: Path) -> None:
        """Make ``path`` an ``mprog``."""
        while not self._address.exists():
            assert self._process.is_alive(), "the process that imports everything has failed"
            self._process.join(0.05)
        path.write_text(CLIENT.format(python=sys.executable, address=str(self._address)))
        path.chmod(0o755)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
