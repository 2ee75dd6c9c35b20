"""Real movers and real stores: killed, shared, full, damaged, and copying from each other."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.mover import protocol
from agent.store.digests import manifest_digest
from common.manifest import Manifest, ManifestFile
from common.wire import Source
from tests.doubles.hostile_http import Faults, HostileServer, eventually
from tests.doubles.mover_client import MoverClient, ticket

MIB = 1 << 20
BODY = random.Random(3).randbytes(24 * MIB + 777)
KEY = bytes(range(32))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "m.bin").write_bytes(BODY)
    (directory / "sub" / "note.txt").write_bytes(b"hello")
    (directory / "empty").write_bytes(b"")
    return directory


@pytest.fixture
def origin(tmp_path: Path, source: Path) -> Iterator[MoverClient]:
    """A mover that has the model and serves it as node n1."""
    with MoverClient(tmp_path / "origin", file_roots=(str(tmp_path),)) as mover:
        assert code(mover.fetch("org/m", f"file://{source}")) == "ok"
        mover.configure("n1", KEY)
        yield mover


def code(done: protocol.Done) -> str:
    return f"{done.error.code}" if done.error is not None else "ok"


def manifest_of(mover: MoverClient, model: str = "org/m") -> Manifest:
    for copy in mover.ask(protocol.Scan).copies:
        if copy.model == model and copy.manifest is not None:
            return copy.manifest
    raise AssertionError(f"{model} is not there")


def peer(mover: MoverClient, text: str) -> Source:
    return Source(mover.url, ticket=text)


def test_peer_copy_with_manifest(origin: MoverClient, tmp_path: Path) -> None:
    """A node copies a model from another node with the manifest and a ticket; directories nest as the names do."""
    manifest = manifest_of(origin)
    with MoverClient(tmp_path / "two") as mover:
        source = peer(origin, ticket(KEY, "n1", manifest.digest))
        done = mover.fetch("org/m", source, manifest=manifest)
        assert code(done) == "ok"
        assert done.manifest == manifest
        directory = mover.store / "models/org/m@r1"
        assert (directory / "m.bin").read_bytes() == BODY
        assert (directory / "sub/note.txt").read_bytes() == b"hello"
        assert (directory / "empty").read_bytes() == b""


def test_peer_gives_the_ticketed_manifest(origin: MoverClient, tmp_path: Path) -> None:
    """Without a manifest the peer's own is taken, because the ticket names its digest."""
    manifest = manifest_of(origin)
    with MoverClient(tmp_path / "two") as mover:
        done = mover.fetch("org/m", peer(origin, ticket(KEY, "n1", manifest.digest)))
        assert done.manifest == manifest


@pytest.mark.parametrize("fault", ["other key", "expired", "other node", "other model", "garbage"])
def test_bad_tickets(origin: MoverClient, tmp_path: Path, fault: str) -> None:
    """A ticket that is forged, ended, for another node or another model opens nothing."""
    manifest = manifest_of(origin)
    text = {
        "other key": ticket(bytes(32), "n1", manifest.digest),
        "expired": ticket(KEY, "n1", manifest.digest, ttl_ms=-1),
        "other node": ticket(KEY, "n2", manifest.digest),
        "other model": ticket(KEY, "n1", "b3:" + "0" * 64),
        "garbage": "AAAA.bbbb",
    }[fault]
    with MoverClient(tmp_path / "two") as mover:
        done = mover.fetch("org/m", peer(origin, text), manifest=manifest)
        assert code(done) in ("source_refused", "source_not_found")
        assert not (mover.store / "models/org/m@r1").exists()


def test_server_without_key_serves_nothing(tmp_path: Path, source: Path) -> None:
    """Before the head has given a key every request is refused."""
    with MoverClient(tmp_path / "a", file_roots=(str(tmp_path),)) as one, MoverClient(tmp_path / "b") as two:
        manifest = one.fetch("m", f"file://{source}").manifest
        assert manifest is not None
        done = two.fetch("m", peer(one, ticket(bytes(32), "", manifest.digest)), manifest=manifest)
        assert code(done) == "source_refused"


def test_kill_and_resume(tmp_path: Path) -> None:
    """kill -9 in the middle: the next mover fetches at most what was in flight, not what had landed."""
    with HostileServer({"/m.bin": BODY}) as server:
        server.faults["*"] = Faults(rate=4 * MIB)
        mover = MoverClient(tmp_path / "store", checkpoint_s=0.2)
        mover.start_fetch("m", f"{server.url}/m.bin")
        eventually(lambda: server.sent_bytes > 12 * MIB)
        mover.kill()
        server.faults.clear()
        before = server.sent_bytes
        with MoverClient(tmp_path / "store") as mover:
            assert code(mover.fetch("m", f"{server.url}/m.bin")) == "ok"
            assert (mover.store / "models/m@r1/m.bin").read_bytes() == BODY
            # at the kill 4 connections had at most one unfinished chunk each, and the kernel some buffered bytes
            assert server.sent_bytes - before < len(BODY) - 12 * MIB + 9 * MIB


def test_recovery_hashes_nothing(tmp_path: Path, source: Path) -> None:
    """After kill -9 a new mover has the same copies at once, and takes over the dead one's store."""
    mover = MoverClient(tmp_path / "store", file_roots=(str(tmp_path),))
    manifest = mover.fetch("m", f"file://{source}").manifest
    mover.kill()
    with MoverClient(tmp_path / "store") as mover:
        assert manifest_of(mover, "m") == manifest


def test_lost_catalogue_is_rebuilt(tmp_path: Path, source: Path) -> None:
    """Without its state.db a mover finds the published copies in the store itself."""
    with MoverClient(tmp_path / "store", file_roots=(str(tmp_path),)) as mover:
        manifest = mover.fetch("m", f"file://{source}").manifest
    for path in (tmp_path / "store").glob("state.db*"):
        path.unlink()
    with MoverClient(tmp_path / "store") as mover:
        assert manifest_of(mover, "m") == manifest


def test_second_mover_on_a_store_is_refused(tmp_path: Path) -> None:
    """Two movers of the same name cannot have one store: the second ends with state_locked."""
    with MoverClient(tmp_path / "store"):
        second = MoverClient(tmp_path / "store")
        assert second.ready is None
        assert second.process.stderr is not None
        assert b"state_locked" in second.process.stderr.read()
        assert second.process.wait(timeout=10) == 3
        second.close()


def test_two_movers_share_a_store(tmp_path: Path, source: Path) -> None:
    """Movers with names of their own share a store directory; both publish the same model and neither harms it."""
    roots = (str(tmp_path),)
    with (
        MoverClient(tmp_path / "store", instance="n1", file_roots=roots) as one,
        MoverClient(tmp_path / "store", instance="n2", file_roots=roots) as two,
    ):
        tokens = [mover.start_fetch("m", f"file://{source}") for mover in (one, two)]
        results = [mover.wait(token) for mover, token in zip((one, two), tokens, strict=True)]
        assert [code(done) for done in results] == ["ok", "ok"]
        assert results[0].manifest == results[1].manifest
        assert code(one.fetch("second", f"file://{source}")) == "ok"
        assert manifest_of(two, "second").digest == manifest_of(one, "m").digest
        assert code(one.ask(lambda token: protocol.Drop(token, "m", "r1"))) == "ok"
        eventually(lambda: not any((one.store / "trash").iterdir()))
        assert (one.store / "models/second@r1/m.bin").read_bytes() == BODY
        assert [copy.model for copy in two.ask(protocol.Scan).copies] == ["second"]


def test_same_blob_is_linked(origin: MoverClient) -> None:
    """A model whose blobs are here under another name is a matter of links: no source is asked."""
    manifest = manifest_of(origin)
    done = origin.fetch("org/again", "peer://127.0.0.1:1", manifest=manifest)
    assert done.error is not None  # a peer without a ticket is refused before anything else
    done = origin.fetch("org/again", Source("peer://127.0.0.1:1", ticket="x"), manifest=manifest)
    assert code(done) == "ok"
    inodes = {(origin.store / f"models/org/{name}@r1/m.bin").stat().st_ino for name in ("m", "again")}
    assert len(inodes) == 1


def test_drop_frees_what_nobody_uses(origin: MoverClient) -> None:
    """Dropping one of two copies frees nothing; dropping the other frees the blobs."""
    manifest = manifest_of(origin)
    assert code(origin.fetch("org/again", Source("peer://127.0.0.1:1", ticket="x"), manifest=manifest)) == "ok"
    first = origin.ask(lambda token: protocol.Drop(token, "org/m", "r1"))
    assert first.detail["freed_bytes"] == 0
    assert (origin.store / "models/org/again@r1/m.bin").read_bytes() == BODY
    second = origin.ask(lambda token: protocol.Drop(token, "org/again", "r1"))
    assert second.detail["freed_bytes"] == manifest.size_bytes
    assert not (origin.store / "models/org").exists()
    eventually(lambda: not any((origin.store / "trash").iterdir()))
    assert not list(origin.store.glob("blobs/??/*"))
    assert code(origin.ask(lambda token: protocol.Drop(token, "org/again", "r1"))) == "ok"


def test_open_file_survives_a_drop(origin: MoverClient) -> None:
    """An engine that has the file open reads on after the copy was dropped."""
    with (origin.store / "models/org/m@r1/m.bin").open("rb") as file:
        assert code(origin.ask(lambda token: protocol.Drop(token, "org/m", "r1"))) == "ok"
        eventually(lambda: not any((origin.store / "trash").iterdir()))
        assert file.read() == BODY


def test_flipped_bit_on_disk_costs_one_chunk(origin: MoverClient) -> None:
    """Verify finds a flipped bit and withdraws the copy; the repair fetches one chunk."""
    manifest = manifest_of(origin)
    digits = digits_of(manifest)
    path = origin.store / "blobs" / digits[:2] / digits
    leaves = (origin.store / "chunks" / digits[:2] / digits).read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(7 * MIB + 5)
        byte = file.read(1)
        file.seek(7 * MIB + 5)
        file.write(bytes([byte[0] ^ 1]))
    done = origin.ask(lambda token: protocol.Verify(token, "org/m", "r1"))
    assert code(done) == "digest_mismatch"
    assert done.error is not None
    assert done.error.details["paths"] == ["m.bin"]
    assert not (origin.store / "models/org/m@r1").exists()
    assert origin.ask(protocol.Scan).copies == ()
    with HostileServer({f"/blobs/{digits}": BODY, f"/chunks/{digits}": leaves}) as server:
        assert code(origin.fetch("org/m", as_peer(server), manifest=manifest)) == "ok"
        assert (origin.store / "models/org/m@r1/m.bin").read_bytes() == BODY
        assert server.sent_bytes == MIB


def test_wrong_chunk_comes_from_another_peer(origin: MoverClient, tmp_path: Path) -> None:
    """A peer that always gives one wrong chunk costs that chunk once: it is then asked of another peer."""
    manifest = manifest_of(origin)
    digits = digits_of(manifest)
    leaves = (origin.store / "chunks" / digits[:2] / digits).read_bytes()
    files = {f"/blobs/{digits}": BODY, f"/chunks/{digits}": leaves}
    with HostileServer(files) as liar, HostileServer(files) as good, MoverClient(tmp_path / "two") as mover:
        only = Manifest("m", "r1", (file_of(manifest),), manifest_digest([file_of(manifest)]))
        liar.faults[f"/blobs/{digits}"] = Faults(flips={5 * MIB: -1})
        good.faults[f"/blobs/{digits}"] = Faults(rate=20 * MIB)
        done = mover.fetch("m", as_peer(liar), as_peer(good), manifest=only)
        assert code(done) == "ok"
        assert (mover.store / "models/m@r1/m.bin").read_bytes() == BODY
        assert good.sent_bytes > 0
        assert liar.sent_bytes + good.sent_bytes <= len(BODY) + len(leaves) + 2 * MIB


def test_wrong_chunk_from_the_only_source_is_asked_again(origin: MoverClient, tmp_path: Path) -> None:
    """One flip on the way costs one more chunk from the same source, when there is no other."""
    manifest = manifest_of(origin)
    digits = digits_of(manifest)
    leaves = (origin.store / "chunks" / digits[:2] / digits).read_bytes()
    only = Manifest("m", "r1", (file_of(manifest),), manifest_digest([file_of(manifest)]))
    with HostileServer({f"/blobs/{digits}": BODY, f"/chunks/{digits}": leaves}) as server:
        server.faults[f"/blobs/{digits}"] = Faults(flips={5 * MIB: 1})
        with MoverClient(tmp_path / "two") as mover:
            assert code(mover.fetch("m", as_peer(server), manifest=only)) == "ok"
            assert (mover.store / "models/m@r1/m.bin").read_bytes() == BODY
            assert server.sent_bytes == len(BODY) + len(leaves) + MIB
        server.faults[f"/blobs/{digits}"] = Faults(flips={5 * MIB: -1})
        with MoverClient(tmp_path / "three") as mover:
            assert code(mover.fetch("m", as_peer(server), manifest=only)) == "digest_mismatch"
            assert not (mover.store / "models/m@r1").exists()


def test_lying_chunk_list(origin: MoverClient, tmp_path: Path) -> None:
    """A chunk list that is not the blob's is not believed, and what comes without a list is checked as a whole."""
    manifest = manifest_of(origin)
    digits = digits_of(manifest)
    only = Manifest("m", "r1", (file_of(manifest),), manifest_digest([file_of(manifest)]))
    bad = bytes(len(BODY))
    with HostileServer({f"/blobs/{digits}": bad, f"/chunks/{digits}": bytes(32 * 25)}) as server:
        with MoverClient(tmp_path / "two") as mover:
            assert code(mover.fetch("m", as_peer(server), manifest=only)) == "digest_mismatch"
            server.files[f"/blobs/{digits}"] = BODY
            assert code(mover.fetch("m", as_peer(server), manifest=only)) == "ok"


def digits_of(manifest: Manifest) -> str:
    return file_of(manifest).blob[3:]


def file_of(manifest: Manifest) -> ManifestFile:
    return next(file for file in manifest.files if file.path == "m.bin")


def as_peer(server: HostileServer) -> Source:
    return Source(server.url.replace("http:", "peer:"), ticket="any")


def test_lying_manifest(tmp_path: Path, source: Path) -> None:
    """A manifest whose digest is not that of its files, or whose files are others, never becomes a copy."""
    row = ManifestFile("m.bin", len(BODY), "b3:" + "1" * 64, MIB)
    with MoverClient(tmp_path / "store", file_roots=(str(tmp_path),)) as mover:
        bad = Manifest("m", "r1", (row,), "b3:" + "2" * 64)
        assert code(mover.fetch("m", f"file://{source}", manifest=bad)) == "digest_mismatch"
        wrong = Manifest("m", "r1", (row,), manifest_digest([row]))
        assert code(mover.fetch("m", f"file://{source}", manifest=wrong)) == "digest_mismatch"
        short = ManifestFile("m.bin", 10, "b3:" + "1" * 64, MIB)
        other = Manifest("m", "r1", (short,), manifest_digest([short]))
        assert code(mover.fetch("m", f"file://{source}", manifest=other)) == "size_mismatch"
        assert not (mover.store / "models/m@r1").exists()


def test_file_sources_are_confined(tmp_path: Path) -> None:
    """file:// reads below the configured roots only, also when a symbolic link points outside."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret").write_bytes(b"secret")
    (tmp_path / "in/link").symlink_to(tmp_path / "out/secret")
    with MoverClient(tmp_path / "store", file_roots=(str(tmp_path / "in"),)) as mover:
        for url in (f"file://{tmp_path}/out/secret", f"file://{tmp_path}/in/link", f"file://{tmp_path}/in/../out"):
            assert code(mover.fetch("m", url)) == "forbidden"
        assert code(mover.fetch("m", f"file://{tmp_path}/in/none")) == "source_not_found"
    with MoverClient(tmp_path / "store") as mover:
        assert code(mover.fetch("m", f"file://{tmp_path}/in/link")) == "forbidden"


def test_budget_refuses_with_numbers(tmp_path: Path, source: Path) -> None:
    """A fetch that does not fit the budget is refused before a byte is stored, and says by how much."""
    with MoverClient(tmp_path / "store", file_roots=(str(tmp_path),), disk_budget_bytes=10 * MIB) as mover:
        done = mover.fetch("m", f"file://{source}")
        assert code(done) == "disk_full"
        assert done.error is not None
        assert done.error.details["need"] == len(BODY) + 5
        assert done.error.details["free"] == 10 * MIB
        assert not any((mover.store / "part").iterdir())


def test_small_file_system(tmp_path: Path, source: Path) -> None:
    """On a file system that is too small the answer is disk_full; what fits beside it goes on working."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", mount]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with MoverClient(mount / "store", file_roots=(str(tmp_path),)) as mover:
            assert code(mover.fetch("m", f"file://{source}")) == "disk_full"
            assert code(mover.fetch("note", f"file://{source}/sub/note.txt")) == "ok"
            tokens = []
            for index in range(4):
                path = tmp_path / f"five-{index}"
                path.write_bytes(bytes([index]) * 5 * MIB)
                tokens.append(mover.start_fetch(f"five-{index}", f"file://{path}"))
            codes = sorted(code(mover.wait(token)) for token in tokens)
            assert codes.count("ok") >= 1
            assert set(codes) <= {"ok", "disk_full"}
            assert "disk_full" in codes
    finally:
        subprocess.run(["umount", mount], check=True)


def test_bad_names_are_refused(tmp_path: Path, source: Path) -> None:
    """A model name or revision that is a path trick is refused by the mover itself."""
    with MoverClient(tmp_path / "store", file_roots=(str(tmp_path),)) as mover:
        for model, revision in (("../m", "r1"), ("m", "../r"), ("a/b/c", "r1"), ("", "r1")):
            assert code(mover.fetch(model, f"file://{source}", revision=revision)) == "invalid_name"
