"""The head's settings: strict, from file, environment and command line."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from common.errors import InvalidConfig
from head.config import HeadConfig, TlsConfig, check, load, ssl_context


def make_certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    key.chmod(0o600)
    return str(cert), str(key)


def test_defaults_are_closed() -> None:
    """Out of the box only this machine can reach the head, and nothing is open."""
    config = load(None, environ={})
    assert (config.host, config.port, config.metrics_open) == ("127.0.0.1", 8470, False)
    assert config.is_loopback
    assert config.url == "http://127.0.0.1:8470"


def test_later_places_win(tmp_path: Path) -> None:
    """Command line over environment over file."""
    file = tmp_path / "head.yaml"
    file.write_text("host: 10.0.0.1\nport: 1\nlog_level: debug\ngateway: {enabled: false}\n")
    environ = {"HERDER_HEAD_PORT": "2", "HERDER_HEAD_HOST": "10.0.0.2", "OTHER": "x"}
    config = load(file, environ=environ, overrides={"port": 3, "state_dir": None})
    assert (config.host, config.port, config.log_level, config.gateway.enabled) == ("10.0.0.2", 3, "debug", False)
    assert not config.is_loopback


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 1", "prot"),
        ("port: high", "int"),
        ("port: 70000", "65535"),
        ("log_level: loud", "loud"),
        ("gateway: {enabled: 1}", "bool"),
        ("gateway: {idle_timeout_s: 0}", "0"),
        ("host: ''", "host is empty"),
        ("tls: {cert: a.pem}", "belong together"),
        ("tls: {client_ca: a.pem}", "needs tls.cert"),
        ("tls: {cert: /nowhere/a.pem, key: /nowhere/b.pem}", "No such file"),
        ("recipes_dir: /nowhere", "not a folder"),
        ("- a list", "not a mapping"),
        ("{", "not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    """Every mistake is refused with its place."""
    file = tmp_path / "head.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as error:
        load(file, environ={})
    assert says in error.value.message


def test_tls_context(tmp_path: Path) -> None:
    """TLS 1.2 at least, client certificates on demand, and a key that others can read is refused."""
    cert, key = make_certificate(tmp_path)
    context = ssl_context(TlsConfig(cert, key, cert))
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert ssl_context(TlsConfig()) is None
    Path(key).chmod(0o640)
    with pytest.raises(InvalidConfig, match="readable by others"):
        check(HeadConfig(tls=TlsConfig(cert, key)))


@pytest.mark.parametrize(
    ("host", "is_loopback", "url"),
    [
        ("localhost", True, "http://localhost:8470"),
        ("::1", True, "http://[::1]:8470"),
        ("0.0.0.0", False, "http://127.0.0.1:8470"),
        ("::", False, "http://[::1]:8470"),
        ("head.example", False, "http://head.example:8470"),
    ],
)
def test_addresses(host: str, is_loopback: bool, url: str) -> None:
    """What counts as this machine only, and how a local program reaches it."""
    config = HeadConfig(host=host)
    assert (config.is_loopback, config.url) == (is_loopback, url)
