"""A real Slurm on this machine: munged, slurmctld and some slurmd, under one folder.

Debian's packages ``slurmctld slurmd slurm-client munge`` (22.05 was tested); no systemd, no
installation-wide files, any user, a port range of its own. Nodes are called 127.0.0.1, 127.0.0.2,
..., so that their names resolve.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
JobRequeue=1
MailProg=/bin/true
KillWait=30
# A machine that is busy with other things answers late.
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
SlurmdTimeout=600
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

DEADLINE_S = 600.0
"""Of every wait, which costs nothing while all is well."""


def missing() -> list[str]:
    """Programs of Slurm that are not installed."""
    paths = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=paths) is None]


_ENDED = ("", "FAILED", "CANCELLED", "TIMEOUT")


class Cluster:
    """Start with :meth:`start`, end with :meth:`stop`."""

    def __init__(self, base: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.base, self.nodes, self.cpus = base, nodes, cpus
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(base / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def start(self) -> None:
        base = self.base
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)
        for name in ("state", *(f"spool-127.0.0.{i + 1}" for i in range(self.nodes))):
            (base / name).mkdir()
        key = base / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        port = _free_ports(self.nodes + 1)
        lines = [
            f"NodeName=127.0.0.{i + 1} NodeHostname={socket.gethostname().split('.')[0]} "
            f"NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs={self.cpus} RealMemory=4000"
            for i in range(self.nodes)
        ]
        text = _CONFIGURATION.format(
            base=base, host=socket.gethostname().split(".")[0], user=_user(), port=port,
            nodes="\n".join(lines),
        )  # fmt: skip
        (base / "slurm.conf").write_text(text)
        self._run("munged", "--force", f"--key-file={key}", f"--socket={base}/munge.socket",
                  f"--pid-file={base}/munged.pid", f"--log-file={base}/munged.log",
                  f"--seed-file={base}/munged.seed")  # fmt: skip
        self._run("slurmctld", "-i")
        for i in range(self.nodes):
            self._run("slurmd", "-N", f"127.0.0.{i + 1}")
        deadline = time.monotonic() + DEADLINE_S
        while self.output("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(self.nodes):
            if time.monotonic() > deadline:
                logs = "\n".join(p.read_text()[-800:] for p in base.glob("*.log"))
                raise RuntimeError(f"nodes are not idle after {DEADLINE_S} s\n{logs}")
            time.sleep(0.2)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, env=self.environment, timeout=DEADLINE_S)

    def output(self, *command: str) -> str:
        """What a client prints; empty where the controller does not answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(
                command, capture_output=True, text=True, env=self.environment, timeout=150,
                check=False,
            ).stdout  # fmt: skip
        return ""

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """``sbatch``; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, capture_output=True, text=True,
            env={**self.environment, **environment}, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, ..."""
        return self.output("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait(self, job: str, states: set[str], seconds: float = DEADLINE_S) -> str:
        """Wait for one of ``states``. A requeued job, which Slurm would hold back for two minutes,
        starts after four seconds: in the second of the requeue its credential is still revoked, and
        a job that starts then has failed."""
        deadline, hurried = time.monotonic() + seconds, False
        while not set((state := self.state(job)).split()) or not set(state.split()) <= states:
            if time.monotonic() > deadline or state in _ENDED:
                raise TimeoutError(f"job {job} is {state or 'gone'}, not {states}")
            if state == "PENDING" and not hurried:
                self.output("scontrol", "update", f"JobId={job}", "StartTime=now+4")
            hurried = state == "PENDING"
            time.sleep(0.3)
        return state

    def stop(self) -> None:
        self.output("scancel", "--quiet", "--full", "-u", _user())
        time.sleep(0.5)
        pids = [int(path.read_text()) for path in self.base.glob("*.pid") if path.read_text()]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 10
            while any(map(_alive, pids)) and time.monotonic() < deadline:
                time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> int:
    """The first of some ports in a row that nothing listens on. From a place of its own, for
    another cluster may be starting on this machine."""
    start = random.SystemRandom().randrange(23000, 31000)
    for first in range(start, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")
