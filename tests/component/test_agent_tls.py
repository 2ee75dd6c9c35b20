"""A real agent against a real head over TLS, with client certificates: what works, and what each mistake says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.doubles.certificates import Authority, openssl

ROOT = Path(__file__).parents[2]


def wait_for(condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class Pair:
    """A head and an agent as processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.running: list[subprocess.Popen[bytes]] = []

    def spawn(self, name: str, *arguments: str, limits: str = "", **settings: object) -> Path:
        """Starts `python -m head` or `agent` with a configuration; gives the path of what it says."""
        config, said = self.root / f"{name}.yaml", self.root / f"{name}.log"
        config.write_text(yaml.safe_dump({"state_dir": str(self.root / name), **settings}))
        module = ["tests.e2e.scaled", name, limits] if limits else [name]
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *module, "--config", str(config), *arguments],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
            )
        self.running.append(process)
        return said

    def head(self, certificate: tuple[Path, Path], client_ca: Path | None = None) -> None:
        """Starts the head and waits until it listens."""
        tls = {"cert": str(certificate[0]), "key": str(certificate[1])}
        if client_ca is not None:
            tls["client_ca"] = str(client_ca)
        said = self.spawn("head", port=0, tls=tls)
        wait_for(lambda: re.search(r"at (https://127\.0\.0\.1:\d+),", said.read_text()), "the head")
        match = re.search(r"at (https://127\.0\.0\.1:\d+),", said.read_text())
        assert match is not None
        self.url = match[1]

    def agent(self, tls: dict[str, str], url: str = "", limits: str = "") -> Path:
        """Starts the agent; limits: other than the real ones, as JSON."""
        return self.spawn(
            "agent",
            limits=limits,
            head_url=url or self.url,
            node_id="n1",
            token_file=str(self.root / "head/join.token"),
            dram_budget_bytes=0,
            http={"port": 0},
            tls=tls,
        )

    def close(self) -> None:
        """Ends both."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(30)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Nothing runs yet."""
    made = Pair(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of head and agents."""
    return Authority(tmp_path_factory.mktemp("ca"), "good")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody here trusts."""
    return Authority(tmp_path_factory.mktemp("ca"), "other")


def of(authority: Authority, client: tuple[Path, Path] | None = None) -> dict[str, str]:
    """An agent's tls settings."""
    shown = {"cert": str(client[0]), "key": str(client[1])} if client is not None else {}
    return {"ca": str(authority.certificate), **shown}


def complaint(said: Path) -> str:
    """The agent's line about having no session."""
    wait_for(lambda: "no session with the head" in said.read_text(), "its complaint")
    text = said.read_text()
    assert "Traceback" not in text
    assert "session open" not in text
    return next(line for line in text.splitlines() if "no session with the head" in line)


def test_session_over_tls_with_client_certificates(pair: Pair, good: Authority) -> None:
    """Right certificates on both sides: a session opens, and the agent says nothing of an unencrypted head."""
    pair.head(good.sign("head"), good.certificate)
    said = pair.agent(of(good, good.sign("n1")))
    wait_for(lambda: "session open" in said.read_text(), "a session")
    assert "not encrypted" not in said.read_text()


def test_session_over_tls_without_client_certificates(pair: Pair, good: Authority) -> None:
    """A head that asks for none is content without."""
    pair.head(good.sign("head"))
    said = pair.agent(of(good))
    wait_for(lambda: "session open" in said.read_text(), "a session")
    assert "not encrypted" not in said.read_text()


def test_head_of_another_ca(pair: Pair, good: Authority, other: Authority) -> None:
    """A head whose CA is not ours is told as such; no token was sent."""
    pair.head(other.sign("head"))
    assert "is signed by a CA that is not in tls.ca" in complaint(pair.agent(of(good)))
    assert "n1" not in (pair.root / "head.log").read_text()


def test_expired_head(pair: Pair, good: Authority) -> None:
    """An expired certificate of the head is told as such."""
    pair.head(good.sign("late", days=-1))
    assert "has expired: renew tls.cert of the head" in complaint(pair.agent(of(good)))


def test_head_of_another_name(pair: Pair, good: Authority) -> None:
    """A certificate for another address is told as such."""
    pair.head(good.sign("elsewhere", address="192.0.2.1"))
    assert "is for another address than the one in head_url" in complaint(pair.agent(of(good)))


def test_missing_client_certificate(pair: Pair, good: Authority) -> None:
    """A head that wants a client certificate and gets none: the agent says what to set."""
    pair.head(good.sign("head"), good.certificate)
    assert "asks for a client certificate" in complaint(pair.agent(of(good)))


def test_client_certificate_of_another_ca(pair: Pair, good: Authority, other: Authority) -> None:
    """A client certificate that the head does not know is told as such."""
    pair.head(good.sign("head"), good.certificate)
    assert "our client certificate" in complaint(pair.agent(of(good, other.sign("n1"))))


def test_expired_client_certificate(pair: Pair, good: Authority) -> None:
    """An expired client certificate is told as such."""
    pair.head(good.sign("head"), good.certificate)
    assert "our client certificate, which has expired" in complaint(pair.agent(of(good, good.sign("old", days=-1))))


def test_renewed_certificates_are_read_at_the_next_attempt(pair: Pair, good: Authority, other: Authority) -> None:
    """An agent whose CA and client certificate are wrong needs no restart once both files are right."""
    pair.head(good.sign("head"), good.certificate)
    (pair.root / "ca.crt").write_bytes(other.certificate.read_bytes())
    shown = [pair.root / "n1.crt", pair.root / "n1.key"]
    for path, made in zip(shown, good.sign("late", days=-1), strict=True):
        path.write_bytes(made.read_bytes())
        path.chmod(0o600)
    tls = {"ca": str(pair.root / "ca.crt"), "cert": str(shown[0]), "key": str(shown[1])}
    said = pair.agent(tls, limits='{"RECONNECT_REFUSED_MS": 300, "RECONNECT_CAP_MS": 300}')
    assert "is signed by a CA that is not in tls.ca" in complaint(said)
    (pair.root / "ca.crt").write_bytes(good.certificate.read_bytes())
    wait_for(lambda: "our client certificate, which has expired" in said.read_text(), "the next complaint")
    for path, made in zip(shown, good.sign("n1"), strict=True):
        path.write_bytes(made.read_bytes())
    wait_for(lambda: "session open" in said.read_text(), "a session")
    assert "Traceback" not in said.read_text()


def test_https_to_a_head_without_tls(pair: Pair, good: Authority) -> None:
    """https in head_url, http at the head: told as such."""
    said = pair.spawn("head", port=0)
    wait_for(lambda: re.search(r"at (http://127\.0\.0\.1:\d+),", said.read_text()), "the head")
    match = re.search(r"at http://(127\.0\.0\.1:\d+),", said.read_text())
    assert match is not None
    assert "does not speak TLS on this port" in complaint(pair.agent(of(good), url=f"https://{match[1]}"))


def test_settings_that_cannot_work(pair: Pair, good: Authority, tmp_path: Path) -> None:
    """Each wrong file is named before anything starts, with status 2 and one line."""
    (tmp_path / "head").mkdir()
    (tmp_path / "head/join.token").write_text("hdr_agent_1_x")
    (tmp_path / "head/join.token").chmod(0o600)
    certificate, key = good.sign("n1")
    _, other_key = good.sign("n2")
    (tmp_path / "text.pem").write_text("no certificate")
    open_key = tmp_path / "open.key"
    open_key.write_bytes(key.read_bytes())
    open_key.chmod(0o644)
    locked_key = tmp_path / "locked.key"
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked_key)
    locked_key.chmod(0o600)
    cases = [
        ({"ca": "/no/such/ca.crt"}, "tls.ca: /no/such/ca.crt: No such file"),
        ({"ca": str(tmp_path / "text.pem")}, "holds no PEM certificate"),
        ({"cert": str(certificate)}, "belong together"),
        ({"cert": str(certificate), "key": str(other_key)}, "tls.cert and tls.key"),
        ({"cert": str(certificate), "key": str(open_key)}, "readable by others"),
        ({"cert": str(certificate), "key": str(locked_key)}, "without a password"),
    ]
    for tls, words in cases:
        said = pair.agent(tls, url="https://127.0.0.1:1")
        assert pair.running[-1].wait(30) == 2
        assert words in said.read_text()
        assert "Traceback" not in said.read_text()
        assert len(said.read_text().splitlines()) == 1
