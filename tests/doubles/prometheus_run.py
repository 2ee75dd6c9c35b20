"""A real Prometheus with the shipped configuration, adapted to a test's cluster and without long waits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

SHIPPED = Path(__file__).parents[2] / "monitoring" / "prometheus"
START_S = 30.0
NEEDED = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus on PATH: apt-get install prometheus (scripts/test does)",
)


def adapted(
    folder: Path,
    head_url: str,
    *,
    head_token: Path,
    agents_token: Path,
    certificate: Path | None = None,
    pushgateways: Path | None = None,
) -> Path:
    """The shipped configuration with a cluster's address and token files; with a certificate the head speaks TLS."""
    text = (SHIPPED / "prometheus.yml").read_text()
    scheme, _, host = head_url.partition("://")
    assert text.count("127.0.0.1:8470") == 2
    text = text.replace("127.0.0.1:8470", host)
    text = text.replace("/etc/prometheus/herder.token", str(head_token))
    text = text.replace("/etc/prometheus/herder-agents.token", str(agents_token))
    text = text.replace("/etc/prometheus/herder-pushgateways.yml", str(pushgateways or folder / "pushgateways.yml"))
    config = yaml.safe_load(text)
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
    head, agents, _ = config["scrape_configs"]
    (discovery,) = agents["http_sd_configs"]
    discovery["refresh_interval"] = "1s"
    if certificate:  # as the comments of the file say
        head |= {"scheme": scheme, "tls_config": {"ca_file": str(certificate)}}
        discovery |= {"url": discovery["url"].replace("http:", "https:"), "tls_config": head["tls_config"]}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running(folder: Path, config: Path) -> Iterator[str]:
    """A Prometheus that is ready; gives its address."""
    log = folder / "prometheus.log"
    words = ("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}")
    with log.open("wb") as output:
        process = subprocess.Popen([*words, "--web.listen-address=127.0.0.1:0"], stdout=output, stderr=output)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START_S)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        found = re.search(r'msg="Listening on" address=(127\.0\.0\.1:[1-9]\d*)', log.read_text())
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"Prometheus did not get ready: {log.read_text()}")


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def ask(address: str, query: str) -> list[dict[str, Any]]:
    """The rows of a query's answer now. A query that is refused fails with what Prometheus says."""
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None
    return found
