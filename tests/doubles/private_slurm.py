"""A private Slurm on this machine: munged, slurmctld and some slurmd, all below one folder, all on loopback.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Nothing is written outside the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("/usr/sbin/munged", "/usr/sbin/slurmctld", "/usr/sbin/slurmd")
CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
MailProg=/bin/true
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=10000,batch_sched_delay=0
MinJobAge=120
KillWait=3
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
DefMemPerCPU=500
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:2
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_possible() -> bool:
    """Whether a cluster can be started here."""
    return os.geteuid() == 0 and all(Path(program).exists() for program in PROGRAMS) and bool(shutil.which("sbatch"))


@contextmanager
def cluster(folder: Path, nodes: int = 3) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to a cluster with nodes n1, n2, ..."""
    for name in ("state", "log", "run", "munge", "gpu", *(f"spool/n{number}" for number in range(1, nodes + 1))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    ports = [_free_port() for _ in range(nodes + 1)]
    lines = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]}"
        for number in range(1, nodes + 1)
    ]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, port=ports[0], folder=folder, nodes="\n".join(lines)))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for number in range(2):
        (folder / "gpu" / f"nvidia{number}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{nodes}] Name=gpu File={folder}/gpu/nvidia[0-1]\n")
    environment = os.environ | {"SLURM_CONF": str(conf)}
    try:
        _start(folder, conf, nodes, environment)
        yield environment
    finally:
        _stop(folder, environment)


def _start(folder: Path, conf: Path, nodes: int, environment: dict[str, str]) -> None:
    munge = folder / "munge"
    (munge / "munge.key").write_bytes(os.urandom(128))
    (munge / "munge.key").chmod(0o400)
    munge.chmod(0o755)
    # munged looks at every folder above its socket, and refuses those that others may write to.
    _run(
        ["/usr/sbin/munged", "--force", f"--key-file={munge}/munge.key", f"--socket={munge}/munge.sock",
         f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/log/munged.log",
         f"--seed-file={munge}/munge.seed", "--num-threads=2"], environment
    )  # fmt: skip
    _run(["/usr/sbin/slurmctld", "-f", str(conf), "-c"], environment)
    for number in range(1, nodes + 1):
        _run(["/usr/sbin/slurmd", "-f", str(conf), "-N", f"n{number}"], environment)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        said = _run(["sinfo", "-h", "-t", "idle", "-o", "%D"], environment, is_checked=False)
        if said.strip() == str(nodes):
            return
        time.sleep(0.1)
    raise AssertionError("the cluster did not get ready: " + (folder / "log" / "slurmctld.log").read_text()[-2_000:])


def _stop(folder: Path, environment: dict[str, str]) -> None:
    with suppress(subprocess.TimeoutExpired):
        _run(["scancel", "-u", "root"], environment, is_checked=False)
    pids = []
    for path in (folder / "run").glob("*.pid"):
        with suppress(OSError, ValueError):
            pids.append(int(path.read_text()))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)


def _run(command: list[str], environment: dict[str, str], *, is_checked: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    assert not is_checked or done.returncode == 0, (command, done.stderr)
    return done.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
