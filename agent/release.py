"""`herder-agent --release`: ends what outlives an agent on a node: engines, runs, the holder of the RAM tier.

Works on the state directory alone, as its owner, so that no agent can be running. Services stay the head's: an
engine that is still wanted starts again with the next agent.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from agent import holder_protocol as protocol
from agent import procs
from agent.run_files import RunFiles
from agent.runs.directory import RunDirectories
from common.errors import Internal
from common.statedir import StateDir

GRACE_S = 15.0
KILL_S = 10.0
HOLDER_S = 60.0  # unlocking and unmapping a large tier takes a while


def release(state_path: Path) -> str:
    """Ends everything and says what that was. Raises: StateLocked while an agent runs, Internal for what stays."""
    if not state_path.is_dir():
        return "nothing runs here"
    owner = StateDir.open(state_path, daemon="herder-agent", allow_network_fs=True)
    try:
        engines = _end_engines(RunFiles(state_path / "replicas"))
        runs = _end_runs(RunDirectories(state_path / "runs"))
        has_holder = _end_holder(state_path / "holder" / "holder.sock")
    finally:
        owner.close()
    ended = [*engines, *runs, *(["the RAM tier"] if has_holder else [])]
    return f"ended {', '.join(ended)}" if ended else "nothing runs here"


def _end_engines(files: RunFiles) -> list[str]:
    live = {}
    for replica, run in files.unfinished():
        identity = files.identity(replica, run)
        is_ours = identity is not None and identity.boot_id == procs.boot_id()
        shim = identity.shim_pid if identity is not None and is_ours else 0
        if identity is not None and shim and procs.is_running(shim, identity.shim_ticks):
            os.kill(shim, signal.SIGTERM)  # the shim passes it on
        else:
            shim = 0
        if procs.members(shim, files.mark(replica, run)):
            live[(replica, run)] = shim
    deadline = time.monotonic() + GRACE_S
    waiting = dict(live)
    while waiting and time.monotonic() < deadline:
        waiting = {key: shim for key, shim in waiting.items() if procs.members(shim, files.mark(*key))}
        time.sleep(0.05)
    for key, shim in waiting.items():
        procs.kill_all(shim, files.mark(*key), within_s=KILL_S, keep=shim)
        left = procs.kill_all(shim, files.mark(*key), within_s=KILL_S) if not _has_ended(files, key) else []
        if left:
            raise Internal(f"{key[0]}: processes {left} are left after SIGKILL")
    return sorted(replica for replica, _ in live)


def _end_runs(files: RunDirectories) -> list[str]:
    """Kills load generators and monitors: their benchmark will not be believed in any case."""
    ended = []
    for run in files.names():
        if not procs.members(0, files.mark(run)):
            continue
        left = procs.kill_all(0, files.mark(run), within_s=KILL_S)
        if left:
            raise Internal(f"{run}: processes {left} are left after SIGKILL")
        ended.append(run)
    return ended


def _has_ended(files: RunFiles, key: tuple[str, int], within_s: float = 2.0) -> bool:
    """Whether the shim has written how it ended, which it does once nothing else is left."""
    deadline = time.monotonic() + within_s
    while files.exit(*key) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _end_holder(path: Path) -> bool:
    """Ends the holder that answers on the socket, and any whose socket file was removed; False when none runs."""
    has_ended = _stop_holder(path)
    for process in procs.processes():
        if _is_holder_of(process.pid, path):
            os.kill(process.pid, signal.SIGTERM)
            _await_end(process.pid, process.start_ticks)
            has_ended = True
    return has_ended


def _is_holder_of(pid: int, path: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        is_mine = os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False  # it ended meanwhile
    wanted = [b"-m", b"agent.holder", b"--socket", os.fsencode(path)]
    return is_mine and any(words[at : at + 4] == wanted for at in range(len(words)))


def _stop_holder(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(HOLDER_S)
        try:
            channel.connect(str(path))
            pid = _pid_of(channel)
            process = procs.read_process(pid)
            channel.sendall(protocol.frame(protocol.Stop("stop")))
            while channel.recv(65_536):
                pass
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise Internal(f"the holder of the RAM tier does not answer: {error}") from None
    if process is not None:
        _await_end(pid, process.start_ticks)
    return True


def _await_end(pid: int, start_ticks: int) -> None:
    deadline = time.monotonic() + HOLDER_S
    while procs.is_running(pid, start_ticks):
        if time.monotonic() > deadline:
            raise Internal(f"the holder of the RAM tier, process {pid}, did not end")
        time.sleep(0.02)


def _pid_of(channel: socket.socket) -> int:
    """The pid at the other end, by the kernel."""
    return int.from_bytes(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
