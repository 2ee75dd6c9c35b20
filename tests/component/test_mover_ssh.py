"""ssh:// sources against a real sshd."""

from __future__ import annotations

import getpass
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.mover import protocol
from tests.doubles.hostile_http import eventually
from tests.doubles.mover_client import MoverClient

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
BODY = random.Random(6).randbytes(6 * (1 << 20) + 11)

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="no sshd on this machine (scripts/test installs it)")

_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/hostkey
PidFile {place}/sshd.pid
AuthorizedKeysFile {place}/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
Subsystem sftp internal-sftp
"""


class Sshd:
    """A private OpenSSH server with one host key and one client key."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("hostkey", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        (place / "config").write_text(_CONFIG.format(port=self.port, place=place))
        key = " ".join((place / "hostkey.pub").read_text().split()[:2])
        (place / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}\n")
        command = [SSHD, "-D", "-f", str(place / "config"), "-E", str(place / "log")]
        self.process = subprocess.Popen(command)
        eventually(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def settings(self) -> dict[str, object]:
        return {"key_files": (str(self.place / "id"),), "known_hosts": str(self.place / "known_hosts")}

    def url(self, path: Path) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{path}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path / "sshd")
    yield server
    server.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "m.bin").write_bytes(BODY)
    (directory / "sub/note.txt").write_bytes(b"hi")
    return directory


def code(done: protocol.Done) -> str:
    return f"{done.error.code}" if done.error is not None else "ok"


def start(tmp_path: Path, **ssh: object) -> MoverClient:
    from agent.mover.config import SshSettings

    return MoverClient(tmp_path / "store", ssh=SshSettings(**ssh), attempts=2)  # type: ignore[arg-type]


def test_directory_and_file(tmp_path: Path, sshd: Sshd, model: Path) -> None:
    """A directory and a single file come over SFTP as they are."""
    with start(tmp_path, **sshd.settings) as mover:
        assert code(mover.fetch("d", sshd.url(model))) == "ok"
        assert (mover.store / "models/d@r1/m.bin").read_bytes() == BODY
        assert (mover.store / "models/d@r1/sub/note.txt").read_bytes() == b"hi"
        assert code(mover.fetch("f", sshd.url(model / "m.bin"))) == "ok"
        assert (mover.store / "models/f@r1/m.bin").read_bytes() == BODY


def test_missing_path(tmp_path: Path, sshd: Sshd, model: Path) -> None:
    """A path that is not there is source_not_found."""
    with start(tmp_path, **sshd.settings) as mover:
        assert code(mover.fetch("m", sshd.url(model / "none"))) == "source_not_found"


def test_host_key_is_checked(tmp_path: Path, sshd: Sshd, model: Path) -> None:
    """An unknown or another host key, and a missing known_hosts, refuse the source before any login."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = " ".join(other.with_suffix(".pub").read_text().split()[:2])
    wrong = tmp_path / "wrong_hosts"
    wrong.write_text(f"[127.0.0.1]:{sshd.port} {key}\n")
    for known_hosts in (wrong, tmp_path / "none"):
        with start(tmp_path, key_files=(str(sshd.place / "id"),), known_hosts=str(known_hosts)) as mover:
            assert code(mover.fetch("m", sshd.url(model))) == "source_refused"


def test_wrong_key_is_refused(tmp_path: Path, sshd: Sshd, model: Path) -> None:
    """A key that the host does not accept is source_refused, and does not hang."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    with start(tmp_path, key_files=(str(other),), known_hosts=str(sshd.place / "known_hosts")) as mover:
        assert code(mover.fetch("m", sshd.url(model))) == "source_refused"


def test_host_is_down(tmp_path: Path, sshd: Sshd, model: Path) -> None:
    """A host that does not answer is source_failed, which may be tried again."""
    sshd.stop()
    with start(tmp_path, **sshd.settings) as mover:
        done = mover.fetch("m", sshd.url(model))
        assert code(done) == "source_failed"
        assert done.error is not None
        assert done.error.is_retryable
