"""Processes whose starter goes: real ones, without torch."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_progressive.runtime import signals

ROOT = Path(__file__).resolve().parents[2]

# Starts CHILD and stays; the child writes its process id once it is ready.
STARTER = """
import os, sys, time
from megatron_progressive.runtime.tied import start_tied
start_tied([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ)
time.sleep(600)
"""
CHILD = """
import os, signal, sys, time
{before}
from megatron_progressive.runtime.tied import end_with_starter
end_with_starter()
from pathlib import Path
folder = Path(sys.argv[1])
if {handles}:
    def save(*_):
        (folder / "saved").touch()
        os._exit(75)
    signal.signal(signal.SIGTERM, save)
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "pid")
time.sleep(600)
"""


def wait_for(condition: object, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start(folder: Path, script: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *words, str(folder)], cwd=ROOT)


@pytest.mark.parametrize("handles", [True, False])
def test_a_child_saves_and_ends_when_its_starter_is_killed(tmp_path: Path, handles: bool) -> None:
    starter = start(tmp_path, STARTER, CHILD.format(before="", handles=handles))
    wait_for((tmp_path / "pid").exists, "the child")
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.2)
    assert alive(pid)
    starter.kill()
    starter.wait()
    wait_for(lambda: not alive(pid), "its end")
    assert (tmp_path / "saved").exists() == handles


def test_a_starter_that_is_gone_before_the_child_looks(tmp_path: Path) -> None:
    """Nothing is missed between the start of a process and its first look."""
    before = (f"from pathlib import Path; part = Path({str(tmp_path)!r}, 'part')\n"
              f"part.write_text(str(os.getpid())); part.rename(part.with_name('begun'))\n"
              f"while os.getppid() == {{starter}}: time.sleep(0.01)")  # fmt: skip
    script = STARTER.replace("sys.argv[1], sys", "sys.argv[1] % os.getpid(), sys")
    child = CHILD.format(before=before.format(starter="%d"), handles=False)
    starter = start(tmp_path, script, child)
    wait_for((tmp_path / "begun").exists, "the child")
    starter.kill()
    starter.wait()
    pid = int((tmp_path / "begun").read_text())
    wait_for(lambda: not alive(pid), "its end")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_another_program_gets_its_signal(tmp_path: Path) -> None:
    script = (
        "import os, signal, subprocess, sys, time\n"
        "from megatron_progressive.runtime.tied import tied_command\n"
        "command = tied_command(['bash', '-c', sys.argv[1], 'x', sys.argv[2]], signal.SIGUSR1)\n"
        "subprocess.Popen(command, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    program = """
        trap 'touch "$1/saved"; exit' USR1
        echo $$ > "$1/part" && mv "$1/part" "$1/pid"
        for i in {1..6000}; do sleep 0.1; done
    """
    starter = start(tmp_path, script, program)
    wait_for((tmp_path / "pid").exists, "the program")
    starter.kill()
    starter.wait()
    wait_for((tmp_path / "saved").exists, "the signal")


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
def test_a_hang_up_stops_a_run_but_for_nohup(before: str) -> None:
    script = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{before})\n"
        "from megatron_progressive.runtime.signals import StopFlag\n"
        "with StopFlag() as flag:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(flag.raised)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() == str(before == "SIG_DFL")


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_output_may_lose_its_reader(tmp_path: Path, kind: str) -> None:
    """As when a terminal is closed: the run goes on to its save."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from megatron_progressive.runtime.signals import outlives_its_reader\n"
        "sys.stdin.readline()\n"
        "for _ in range(3):\n"
        "    with outlives_its_reader():\n"
        "        print('step', file=sys.stderr, flush=True)\n"
        f"Path({str(tmp_path)!r}, 'saved').touch()\n"
    )
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, stderr=writer, cwd=ROOT,
                               start_new_session=True)  # fmt: skip
    os.close(reader)
    os.close(writer)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "saved").exists()


def test_a_log_may_be_on_a_full_disk() -> None:
    script = (
        "import sys\n"
        "from megatron_progressive.runtime.signals import outlives_its_reader\n"
        "for _ in range(3):\n"
        "    with outlives_its_reader():\n"
        "        print('step', file=sys.stderr, flush=True)\n"
        "print('saved')\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=full, check=False)  # fmt: skip
    assert done.stdout == b"saved\n"


def test_other_errors_of_output_are_errors() -> None:
    with pytest.raises(OSError, match="closed"), signals.outlives_its_reader():
        raise OSError(errno.EBADF, "closed")
