"""A real mover against HTTP sources that lie, stall, die and come back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.mover import protocol
from tests.doubles.hostile_http import Faults, HostileServer, eventually
from tests.doubles.mover_client import MoverClient

MIB = 1 << 20
BODY = random.Random(1).randbytes(24 * MIB + 12_345)
OTHER = random.Random(2).randbytes(24 * MIB + 12_345)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer({"/m.bin": BODY}) as server:
        yield server


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[MoverClient]:
    with MoverClient(tmp_path / "store", read_timeout_s=2.0, connect_timeout_s=2.0) as mover:
        yield mover


def published(mover: MoverClient, path: str = "m.bin", model: str = "m") -> bytes:
    return (mover.store / "models" / f"{model}@r1" / path).read_bytes()


def code(done: protocol.Done) -> str:
    return f"{done.error.code}" if done.error is not None else "ok"


def leftovers(mover: MoverClient) -> list[Path]:
    return list((mover.store / "part").iterdir())


def test_single_file_arrives_whole(server: HostileServer, mover: MoverClient) -> None:
    """A well-behaved server's file is published as it is, read-only, and nothing is left over."""
    done = mover.fetch("m", f"{server.url}/m.bin")
    assert code(done) == "ok"
    assert published(mover) == BODY
    assert (mover.store / "models/m@r1/m.bin").stat().st_mode & 0o777 == 0o444
    eventually(lambda: not leftovers(mover))


def test_ranges_ignored(server: HostileServer, mover: MoverClient) -> None:
    """A server that answers 200 with everything to each range request still gives the right file."""
    server.faults["*"] = Faults(ignores_ranges=True)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY


def test_ranges_ignored_and_cut(server: HostileServer, mover: MoverClient) -> None:
    """Without ranges a cut is healed by reading the stream again and comparing what is here already."""
    server.faults["*"] = Faults(ignores_ranges=True, cut_after=3 * MIB + 7, cuts=2)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY


def test_source_dies_and_returns(server: HostileServer, mover: MoverClient) -> None:
    """A connection that breaks half-way is taken up where it broke; no chunk that landed is asked again."""
    server.faults["*"] = Faults(cut_after=MIB + 100, cuts=3)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY
    assert server.sent_bytes < len(BODY) + 4 * MIB  # of a broken range only the chunk in hand is asked again


def test_source_dies_for_good_then_resumes(server: HostileServer, mover: MoverClient) -> None:
    """After a failed fetch a second one begins with the chunks that the first one landed."""
    server.faults["/m.bin"] = Faults(rate=4 * MIB)
    token = mover.start_fetch("m", f"{server.url}/m.bin")
    eventually(lambda: server.sent_bytes > 12 * MIB)
    server.faults["/m.bin"] = Faults(status=503, statuses=-1)
    assert code(mover.wait(token)) == "source_failed"
    assert leftovers(mover)
    before = server.sent_bytes
    server.faults.clear()
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY
    assert server.sent_bytes - before < 18 * MIB


def test_wrong_content_range(server: HostileServer, mover: MoverClient) -> None:
    """A 206 for another range than the one asked is never written."""
    server.faults["*"] = Faults(shift=4_096)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "source_failed"
    assert not (mover.store / "models/m@r1").exists()


def test_unsatisfiable_ranges(server: HostileServer, mover: MoverClient) -> None:
    """A source that refuses ranges it has promised fails after a bounded number of tries."""
    server.faults["*"] = Faults(range_limit=MIB)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "source_failed"
    assert not (mover.store / "models/m@r1").exists()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_source_is_asked_again(server: HostileServer, mover: MoverClient, status: int) -> None:
    """429 and 5xx are tried again, after Retry-After when it is given."""
    server.faults["*"] = Faults(status=status, statuses=2, retry_after="0")
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY


def test_file_changes_midway(server: HostileServer, mover: MoverClient) -> None:
    """When the ETag changes while the file is fetched, all of it is fetched anew: no mixture is published."""
    server.faults["/m.bin"] = Faults(change_after=2, changed=OTHER)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == OTHER


def test_file_changes_midway_without_ranges(server: HostileServer, mover: MoverClient) -> None:
    """The same where the server knows neither ranges nor ETags: the bytes themselves tell."""
    server.faults["/m.bin"] = Faults(ignores_ranges=True, cut_after=3 * MIB, cuts=2, change_after=2, changed=OTHER)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == OTHER


@pytest.mark.parametrize("size", [len(BODY) + 1, len(BODY) - 1, 10])
def test_lying_size(server: HostileServer, mover: MoverClient, size: int) -> None:
    """A listing with another size than the server has is refused by name and leaves nothing behind."""
    server.files["/d/herder-manifest.json"] = msgspec.json.encode([{"path": "m.bin", "size": size}])
    server.files["/d/m.bin"] = BODY
    done = mover.fetch("m", f"{server.url}/d/")
    assert code(done) == "size_mismatch"
    assert not (mover.store / "models/m@r1").exists()
    eventually(lambda: not leftovers(mover))


def test_wrong_sha256(server: HostileServer, mover: MoverClient) -> None:
    """A file that is not what its published sha256 says never becomes a copy."""
    row = {"path": "m.bin", "size": len(BODY), "sha256": hashlib.sha256(OTHER).hexdigest()}
    server.files["/d/herder-manifest.json"] = msgspec.json.encode({"files": [row]})
    server.files["/d/m.bin"] = BODY
    assert code(mover.fetch("m", f"{server.url}/d/")) == "digest_mismatch"
    assert not (mover.store / "models/m@r1").exists()
    eventually(lambda: not leftovers(mover))


def test_right_sha256_is_kept_and_dedupes(server: HostileServer, mover: MoverClient) -> None:
    """With a published sha256 the manifest carries it, and the same file under another name is not fetched again."""
    row = {"path": "m.bin", "size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}
    server.files["/d/herder-manifest.json"] = msgspec.json.encode([row])
    server.files["/d/m.bin"] = BODY
    done = mover.fetch("m", f"{server.url}/d/")
    assert done.manifest is not None
    assert done.manifest.files[0].sha256 == row["sha256"]
    asked = len(server.asked("/d/m.bin"))
    assert code(mover.fetch("other", f"{server.url}/d/")) == "ok"
    assert len(server.asked("/d/m.bin")) == asked
    inode = (mover.store / "models/m@r1/m.bin").stat().st_ino
    assert (mover.store / "models/other@r1/m.bin").stat().st_ino == inode


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "a\\b", "", ".manifest.json", "a\0b"])
def test_hostile_paths(server: HostileServer, mover: MoverClient, path: str) -> None:
    """A listing that names a path outside the model is refused before anything is fetched."""
    server.files["/d/herder-manifest.json"] = msgspec.json.encode([{"path": path, "size": 3}])
    assert code(mover.fetch("m", f"{server.url}/d/")) in ("invalid_path", "invalid_value")
    assert not (mover.store / "models/m@r1").exists()


def test_token_goes_to_first_host_only(server: HostileServer, tmp_path: Path) -> None:
    """After a redirect to another host the token is not sent there."""
    token = tmp_path / "token"
    token.write_text("secret-token\n")
    token.chmod(0o600)
    with HostileServer({"/m.bin": BODY}) as first:
        first.faults["/m.bin"] = Faults(redirect=f"{server.url}/m.bin")
        host = first.url.removeprefix("http://")
        with MoverClient(tmp_path / "store", http_token_files={host: str(token)}) as mover:
            assert code(mover.fetch("m", f"{first.url}/m.bin")) == "ok"
            assert published(mover) == BODY
        assert all(row.get("authorization") == "Bearer secret-token" for row in first.asked("/m.bin"))
        assert server.asked("/m.bin")
        assert all("authorization" not in row for row in server.asked("/m.bin"))


def test_redirect_loop(server: HostileServer, mover: MoverClient) -> None:
    """A redirect loop ends with a refusal."""
    server.faults["/m.bin"] = Faults(redirect=f"{server.url}/m.bin")
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "source_refused"


def test_redirect_to_the_metadata_service(server: HostileServer, mover: MoverClient) -> None:
    """Nothing is fetched from a link-local address, however it is reached; it is told as such and not tried again."""
    server.faults["/m.bin"] = Faults(redirect="http://169.254.169.254/latest/meta-data/")
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "address_refused"
    assert code(mover.fetch("n", "http://2852039166/m.bin")) == "address_refused"


def test_dripping_source(server: HostileServer, tmp_path: Path) -> None:
    """A source that sends a byte now and then is given up, however steadily it drips."""
    server.faults["/m.bin"] = Faults(drip_s=0.05)
    with MoverClient(tmp_path / "store", read_timeout_s=0.3, attempts=2) as mover:
        assert code(mover.fetch("m", f"{server.url}/m.bin", timeout_s=30)) == "source_failed"


def test_chunked_answer_of_unknown_size(server: HostileServer, mover: MoverClient) -> None:
    """A file whose size nobody says is measured first and then verified like any other."""
    server.faults["/m.bin"] = Faults(ignores_ranges=True, chunked=True)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
    assert published(mover) == BODY


def test_missing_and_forbidden(server: HostileServer, mover: MoverClient) -> None:
    """404 and 403 are final and have their own codes."""
    assert code(mover.fetch("m", f"{server.url}/none")) == "source_not_found"
    server.faults["/m.bin"] = Faults(status=403, statuses=-1)
    assert code(mover.fetch("m", f"{server.url}/m.bin")) == "source_refused"


def test_second_source_is_tried(server: HostileServer, mover: MoverClient) -> None:
    """When the first source fails, the next one in order gives the model."""
    done = mover.fetch("m", f"{server.url}/none", f"{server.url}/m.bin")
    assert code(done) == "ok"
    assert published(mover) == BODY


def test_cancel_discards(server: HostileServer, mover: MoverClient) -> None:
    """A cancelled fetch says so and leaves neither bytes nor reservation."""
    server.faults["/m.bin"] = Faults(rate=200_000)
    token = mover.start_fetch("m", f"{server.url}/m.bin")
    eventually(lambda: server.sent_bytes > 50_000)
    mover.ask(lambda own: protocol.Cancel(own, token))
    assert code(mover.wait(token)) == "cancelled"
    eventually(lambda: not leftovers(mover))
    assert mover.ask(protocol.Capacity).detail["reserved_bytes"] == 0


def test_fetch_is_idempotent(server: HostileServer, mover: MoverClient) -> None:
    """Fetching what is here answers at once and asks no source."""
    first = mover.fetch("m", f"{server.url}/m.bin")
    asked = len(server.requests)
    assert mover.fetch("m", f"{server.url}/m.bin").manifest == first.manifest
    assert len(server.requests) == asked
