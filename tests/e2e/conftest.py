"""Clusters for tests, and the logs of their daemons with every failure.

Modules share a cluster among their tests: with several workers, `--dist loadfile` keeps each module on one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    """A head of this test alone, without agents."""
    with Cluster(tmp_path / "cluster") as made:
        yield made


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows the last lines of the daemons' logs with a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for cluster in Cluster.live:
            for daemon in (cluster.head, *cluster.agents.values()):
                report.sections.append((f"log of {daemon.name} in {cluster.folder}", daemon.tail()))
