"""Reports in pages in whole clusters: pages are lost, doubled and overtaken, and what is there comes to be known."""

from __future__ import annotations

import pytest

from common import limits
from common.manifest import Manifest, ManifestFile
from tests.sim.cluster import Cluster
from tests.sim.machine import held_copy
from tests.sim.profiles import PROFILES
from tests.sim.world import Faults

MANY = 20_000


@pytest.mark.parametrize(("profile", "seed"), [("network", 1), ("everything", 2), ("heads", 3), ("silence", 4)])
def test_small_pages_under_faults(profile: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a page for every copy or two the cluster comes to the same rest as with whole reports."""
    monkeypatch.setattr(limits, "REPORT_PAGE_BYTES", 200)
    monkeypatch.setattr(limits, "REPORT_PAGES", 1_000)
    cluster = Cluster(seed, nodes=5, models=6, faults=PROFILES[profile], requests=60)
    pages: list[int] = []
    for node in cluster.nodes.values():
        send = node._send

        def counted(message: object, *, is_lossless: bool = False, send: object = send) -> None:
            pages.append(getattr(message, "pages", 0))
            send(message, is_lossless=is_lossless)  # type: ignore[operator]

        monkeypatch.setattr(node, "_send", counted)
    cluster.run()
    assert max(pages) > 3, "the run must have sent reports in pages"


def test_an_agent_with_twenty_thousand_copies() -> None:
    """Its report is far larger than a frame; frames are lost and the head crashes, and in the end all are listed."""
    faults = Faults(loss=0.05, duplicate=0.05, reorder=0.1, head_crash_per_s=0.02, until_ms=60_000)
    cluster = Cluster(1, nodes=2, models=1, faults=faults, requests=0, rest_ms=60_000)
    for number in range(MANY):
        name = f"found-in-the-store/{number:080d}"
        digest = f"b3:{number:064x}"
        held = Manifest(name, "main", (ManifestFile("m.gguf", 1, digest, 1 << 20),), digest, "gguf")
        cluster.nodes["n0"].machine.store[(name, "main")] = held_copy(held)
    cluster.run()
    assert cluster.head.starts > 1
    assert len(cluster.head.state.live["n0"].unknown_copies) == MANY
