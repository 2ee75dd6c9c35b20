"""A real Prometheus with the shipped configuration against a real head and a real agent; rules; the glossary."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.doubles import prometheus_run

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "monitoring" / "prometheus"
GLOSSARY = ROOT / "docs" / "metrics.md"
START_S = 30.0
AGENT_SECRET = "a-secret-that-only-prometheus-and-the-agents-know"

pytestmark = pytest.mark.xdist_group("prometheus")  # one cluster for the module
needs_prometheus = prometheus_run.NEEDED


class Daemon:
    """A process that writes its log to a file."""

    def __init__(self, log: Path, *argv: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HERDER_")}
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env={**clean, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=output
            )

    def said(self, pattern: str) -> str:
        """Waits for a line that matches and returns the pattern's first group."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.log.read_text())
            assert match or self.process.poll() is None, self.log.read_text()
            return match

        return str(until(found, f"{pattern!r} in {self.log.name}")[1])

    def end(self) -> None:
        """Stops it."""
        self.process.terminate()
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(START_S)


class Cluster:
    """A head and one agent, each with a /metrics that asks for a token; with a certificate, the head speaks TLS."""

    def __init__(self, folder: Path, *, certificate: Path | None = None) -> None:
        self.folder = folder
        self.certificate = certificate
        self.daemons: list[Daemon] = []

    def start(self) -> None:
        """Starts both and waits until the agent is known with its address."""
        state = self.folder / "head"
        config = self.folder / "head.yaml"
        tls = (
            {"cert": str(self.certificate), "key": str(self.certificate.with_suffix(".key"))}
            if self.certificate
            else {}
        )
        config.write_text(yaml.safe_dump({"state_dir": str(state), "port": 0, "tls": tls}))
        head = self._run("head", "--config", str(config))
        self.url = head.said(r"herder-head \S+ at (\S+),")
        self.admin = (state / "admin.token").read_text().strip()
        key = self.call("POST", "/api/v1/keys", {"role": "viewer", "name": "prometheus"})
        self.viewer_file = self.secret("herder.token", key["token"])
        self.agents_file = self.secret("herder-agents.token", AGENT_SECRET)
        settings = {
            "head_url": self.url,
            "node_id": "n1",
            "token_file": str(state / "join.token"),
            "state_dir": str(self.folder / "agent"),
            "dram_budget_bytes": 0,  # no holder, which would outlive the test
            "disk_reserve_bytes": 0,
            "http": {"port": 0, "token_file": str(self.agents_file)},
        }
        if self.certificate:
            settings["tls"] = {"ca": str(self.certificate)}
        config = self.folder / "agent.yaml"
        config.write_text(yaml.safe_dump(settings))
        self._run("agent", "--config", str(config))
        until(self.targets, "the agent among the targets")
        self.agent_url = f"http://{self.targets()[0]['targets'][0]}"

    def _run(self, module: str, *arguments: str) -> Daemon:
        self.daemons.append(Daemon(self.folder / f"{module}.log", sys.executable, "-P", "-m", module, *arguments))
        return self.daemons[-1]

    def end(self) -> None:
        """Stops the agent, then the head."""
        for daemon in reversed(self.daemons):
            daemon.end()

    def secret(self, name: str, text: str) -> Path:
        """A 0600 file."""
        path = self.folder / name
        path.write_text(text + "\n")
        path.chmod(0o600)
        return path

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One API call as the admin."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Authorization", f"Bearer {self.admin}")
        request.add_header("Content-Type", "application/json")
        trusted = ssl.create_default_context(cafile=self.certificate) if self.certificate else None
        with urllib.request.urlopen(request, timeout=20, context=trusted) as answer:
            return json.loads(answer.read())

    def targets(self) -> Any:
        """What the head tells Prometheus."""
        return self.call("GET", "/api/v1/prometheus/targets")

    def metrics(self, job: str) -> str:
        """The text of a daemon's /metrics."""
        url, secret = (self.url, self.viewer_file) if job == "herder-head" else (self.agent_url, self.agents_file)
        return fetch(f"{url}/metrics", secret.read_text().strip())


def fetch(url: str, token: str = "") -> str:
    """The body behind a URL."""
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def is_up(url: str) -> bool:
    """Whether a URL answers with success."""
    try:
        return bool(fetch(url))
    except urllib.error.URLError:
        return False


def status_of(url: str, token: str = "") -> int:
    """The status of a GET."""
    try:
        fetch(url, token)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def until(condition: Callable[[], Any], what: str) -> Any:
    """Asks until the answer is true."""
    deadline = time.monotonic() + START_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running head and agent."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.end()


def adapted(cluster: Cluster) -> Path:
    """The shipped configuration for this cluster."""
    return prometheus_run.adapted(
        cluster.folder,
        cluster.url,
        head_token=cluster.viewer_file,
        agents_token=cluster.agents_file,
        certificate=cluster.certificate,
    )


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs promtool."""
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def prometheus(cluster: Cluster) -> Iterator[Callable[[str], Any]]:
    """A running Prometheus with the shipped configuration; gives the `data` of its API's answers."""
    with prometheus_run.running(cluster.folder, adapted(cluster)) as address:
        yield lambda path: json.loads(fetch(f"http://{address}/api/v1/{path}"))["data"]


def query(ask: Callable[[str], Any], expression: str) -> dict[str, str]:
    """The values of a query by node, or by job where there is no node."""
    rows = ask("query?" + urllib.parse.urlencode({"query": expression}))["result"]
    return {row["metric"].get("node", row["metric"].get("job")): row["value"][1] for row in rows}


@needs_prometheus
def test_prometheus_scrapes_the_cluster(cluster: Cluster) -> None:
    """With the shipped configuration both targets come up, queries return data, and the rules are evaluated."""
    with prometheus(cluster) as ask:
        until(lambda: query(ask, "up") == {"herder-head": "1", "n1": "1"}, "both targets up")
        assert query(ask, 'herder_nodes{state="online"}') == {"herder-head": "1"}
        assert int(query(ask, "herder_node_memory_bytes")["n1"]) > 0
        assert query(ask, "herder_agent_session_open") == {"n1": "1"}

        def evaluated() -> list[dict[str, Any]]:
            found = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
            return found if all(rule["health"] == "ok" for rule in found) else []

        known = until(evaluated, "every rule evaluated")
        assert len(known) == len(rules())
        # Pending is allowed: an evaluation before the first scrape finds no head yet.
        assert {rule["name"] for rule in known if rule.get("state") == "firing"} == set()


@needs_prometheus
def test_prometheus_reads_a_head_with_tls(tmp_path: Path) -> None:
    """With the lines for TLS that the configuration names, the head is read and the agents are found over https."""
    certificate = tmp_path / "head.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=head", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate),
         "-keyout", str(certificate.with_suffix(".key"))],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    certificate.with_suffix(".key").chmod(0o600)
    cluster = Cluster(tmp_path, certificate=certificate)
    try:
        cluster.start()
        assert cluster.url.startswith("https://")
        with prometheus(cluster) as ask:
            until(lambda: query(ask, "up") == {"herder-head": "1", "n1": "1"}, "both targets up")
    finally:
        cluster.end()


def test_metrics_ask_for_a_token(cluster: Cluster) -> None:
    """Neither /metrics answers without its token, and the agents' secret opens nothing at the head."""
    assert status_of(f"{cluster.url}/metrics") == 401
    assert status_of(f"{cluster.url}/metrics", AGENT_SECRET) == 401
    assert status_of(f"{cluster.url}/api/v1/prometheus/targets") == 401
    assert status_of(f"{cluster.agent_url}/metrics") == 401
    assert status_of(f"{cluster.agent_url}/metrics", cluster.viewer_file.read_text().strip()) == 401
    assert status_of(f"{cluster.agent_url}/metrics", AGENT_SECRET) == 200


@needs_prometheus
@pytest.mark.parametrize("job", ["herder-head", "herder-agent"])
def test_promtool_has_no_complaint(cluster: Cluster, job: str) -> None:
    """`promtool check metrics` finds nothing in what a daemon exports."""
    done = promtool("check", "metrics", text=cluster.metrics(job))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_prometheus
def test_the_configuration_is_good(cluster: Cluster) -> None:
    """`promtool check config` takes the shipped configuration once its token files exist."""
    done = promtool("check", "config", str(adapted(cluster)))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_rules_do_what_they_say() -> None:
    """The rules are valid, and their unit tests pass."""
    checked = promtool("check", "rules", str(SHIPPED / "rules" / "herder.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", str(SHIPPED / "tests" / "herder.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def rules() -> list[dict[str, Any]]:
    """The shipped rules."""
    document = yaml.safe_load((SHIPPED / "rules" / "herder.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_every_alert_is_tested() -> None:
    """Each alert has a unit test in which it is raised, a severity, and words for whom it wakes."""
    document = yaml.safe_load((SHIPPED / "tests" / "herder.yml").read_text())
    raised = {case["alertname"] for test in document["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert raised == {rule["alert"] for rule in alerts}
    assert {rule["labels"]["severity"] for rule in alerts} == {"page", "ticket"}
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in alerts)


def exported(cluster: Cluster, job: str) -> dict[str, str]:
    """Families of a daemon with their types; without the start times that the library adds to counters."""
    found = re.findall(r"^# TYPE (\S+) (\S+)$", cluster.metrics(job), re.MULTILINE)
    return {name: kind for name, kind in found if not name.endswith("_created")}


def test_rules_use_series_that_exist(cluster: Cluster) -> None:
    """Every series named in a rule is exported by a daemon or recorded by another rule."""
    there = exported(cluster, "herder-head") | exported(cluster, "herder-agent")
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        for name in re.findall(r"[\w:]*herder_[\w:]+", rule["expr"]):
            assert name in recorded or name.removesuffix("_bucket") in there, (name, rule["expr"])


def glossary() -> dict[str, dict[str, tuple[str, set[str]]]]:
    """By daemon: family -> type and labels, as docs/metrics.md says."""
    found: dict[str, dict[str, tuple[str, set[str]]]] = {}
    here: dict[str, tuple[str, set[str]]] = {}
    for line in GLOSSARY.read_text().splitlines():
        if line.startswith("## "):
            here = found.setdefault(line[3:].strip(), {})
        elif match := re.match(r"\| `(herder_\w+)` \| (\w+) \|([^|]*)\|", line):
            assert match[1] not in here, f"{match[1]} is explained twice"
            here[match[1]] = (match[2], set(re.findall(r"`(\w+)`", match[3])))
    return found


@pytest.mark.parametrize(("job", "chapter"), [("herder-head", "Head"), ("herder-agent", "Agent")])
def test_the_glossary_is_complete(cluster: Cluster, job: str, chapter: str) -> None:
    """docs/metrics.md explains exactly the families that a daemon exports, with their types and labels."""
    explained = glossary()[chapter]
    there = exported(cluster, job)
    assert {name: kind for name, (kind, _) in explained.items()} == there
    for family in text_string_to_metric_families(cluster.metrics(job)):
        for sample in family.samples:
            name = next((name for name in (sample.name, family.name) if name in explained), None)
            if name is not None:
                assert set(sample.labels) - {"le"} == explained[name][1], sample


def test_the_glossary_has_no_labels_that_the_code_does_not_know() -> None:
    """Labels of families that had no sample in this run stand in the code that makes them."""
    code = "".join(
        (ROOT / path).read_text()
        for path in (
            "head/metrics.py",
            "head/gateway/metering.py",
            "head/crowd.py",
            "agent/exporter.py",
            "agent/monitor/series.py",
        )
    )
    for families in glossary().values():
        for name, (_, labels) in families.items():
            assert all(f'"{label}"' in code for label in labels), name
