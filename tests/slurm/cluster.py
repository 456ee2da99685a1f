"""A Slurm cluster of two virtual nodes on this machine: munged, slurmctld and two slurmd, in a directory of their own.

It needs the programs of Debian's ``slurm-wlm`` and ``munge``, and neither root nor a configuration of the system. The
nodes claim 64 CPUs and 8 GPUs each, as the scripts' ``#SBATCH`` lines ask for, whatever the machine has: each job of
theirs gets a node of its own. The "GPUs" are eight harmless device files, so that Slurm sets ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

PROGRAMS: Final = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo", "srun")
NODES: Final = ("n1", "n2")
ENDED: Final = frozenset("COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY DEADLINE BOOT_FAIL".split())
DAEMON_PATIENCE: Final = 60.0
"""Seconds for a daemon to start, or for all jobs to be gone."""

GPU_FILES: Final = "null zero full random urandom tty ptmx pts/ptmx".split()

CONFIGURATION: Final = """\
ClusterName=pytest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as a credential lives, by default two minutes.
AuthInfo=socket={directory}/munge.socket,cred_expire=8
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=4000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=4000 Gres=gpu:8
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of ``PROGRAMS`` that this machine lacks; the daemons may be where only root looks."""
    return [name for name in PROGRAMS if _find(name) is None]


@dataclass(frozen=True)
class Job:
    """What Slurm knows of a job.

    Attributes:
        state: ``RUNNING``, ``COMPLETED``, ...; restarts: times it was requeued; exit_code: of its script.
    """

    number: str
    state: str
    restarts: int
    exit_code: int


class Cluster:
    """The daemons, between :meth:`start` and :meth:`stop`, and the commands that speak to them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        """What a process needs in its environment to reach this cluster and no other."""
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle.

        Raises:
            RuntimeError: they do not come up; with the last lines of their logs.
        """
        self._configure()
        self._daemon(
            "munged", "--foreground", "--force", "--key-file=munge.key", "--socket=munge.socket",
            "--pid-file=munged.pid", "--log-file=munged.log", "--seed-file=munged.seed",
        )  # fmt: skip
        self._wait_until((self.directory / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait_until(lambda: self._ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, "two idle nodes")

    def stop(self) -> list[str]:
        """Cancel every job and stop the daemons; returns the command lines of what outlived them, killed by then."""
        try:
            jobs = self._ask("squeue", "-h", "-o", "%A").split()
            if jobs:
                self._ask("scancel", *jobs)
                self._ask("scancel", "--signal=KILL", "--full", *jobs)
                self._wait_until(lambda: not self._ask("squeue", "-h").strip(), "an empty queue")
        finally:
            for daemon in reversed(self._daemons):  # slurmd, slurmctld, munged
                daemon.terminate()
            for daemon in self._daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(DAEMON_PATIENCE)
                daemon.kill()
                daemon.wait()
            left = self._processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return list(left.values())

    def submit(self, working_copy: Path, environment: Mapping[str, str], *words: str) -> str:
        """``sbatch`` options, script and arguments in ``working_copy``; returns the job's number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=working_copy, env={**environment, **self.environment}, capture_output=True, text=True, check=False,
            timeout=DAEMON_PATIENCE,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def command(self, *words: str) -> str:
        """Run ``scontrol ...`` or ``scancel ...`` and return what it printed."""
        return self._ask(*words, check=True)

    def job(self, number: str) -> Job:
        """What Slurm knows of a job (of an array: ``12_0``)."""
        record = self._ask("scontrol", "--oneliner", "show", "job", number, check=True)

        def value(key: str) -> str:
            found = re.search(rf"\b{key}=(\S+)", record)
            assert found is not None, record
            return found[1]

        return Job(number, value("JobState"), int(value("Restarts")), int(value("ExitCode").split(":")[0]))

    def job_processes(self, number: str, *settings: str) -> dict[int, str]:
        """Process id -> command line of a job's living processes with all of ``settings`` in their environment."""
        return self._processes(f"SLURM_JOB_ID={number}", *settings)

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o600)
        values = {"host": socket.gethostname().split(".")[0], "user": os.getuid(), "ports": _free_ports(3)}
        text = CONFIGURATION.format(directory=self.directory, **values)
        (self.directory / "slurm.conf").write_text(text, encoding="utf-8")
        gpus = ",".join(f"/dev/{name}" for name in GPU_FILES)
        (self.directory / "gres.conf").write_text(f"Name=gpu File={gpus}\n", encoding="utf-8")

    def _daemon(self, *words: str) -> None:
        program = _find(words[0])
        assert program is not None
        with (self.directory / f"{words[0]}{len(self._daemons)}.out").open("wb") as output:
            daemon = subprocess.Popen(
                [program, *words[1:]],
                cwd=self.directory, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _ask(self, *words: str, check: bool = False) -> str:
        result = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False,
            timeout=DAEMON_PATIENCE,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{' '.join(words)}: {result.stderr}"
        return result.stdout

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DAEMON_PATIENCE
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(_tail(path) for path in sorted(self.directory.glob("*.out")))
                raise RuntimeError(f"waited in vain for {what}:\n{logs}")
            time.sleep(0.1)

    def _processes(self, *settings: str) -> dict[int, str]:
        """The same of all that this cluster started, its daemons too."""
        wanted = dict(setting.split("=", 1) for setting in settings) | self.environment
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and wanted.items() <= process.environ().items():
                    found[process.pid] = " ".join(process.cmdline())
        return found


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def _free_ports(count: int) -> Sequence[int]:
    """Ports nobody listens on, below the range that the kernel and the scripts' ``free_port`` hand out."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(10_000, 19_999)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            ports.append(port)
    return ports


def _end_with_parent() -> None:
    """Where the tests are killed, the daemons end too: PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join([f"{path.name}:", *path.read_text(errors="replace").splitlines()[-lines:]])
