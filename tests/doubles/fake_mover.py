"""A mover for agents under test, without chunks and checks: it copies file:// sources into the store at once.

`python fake_mover.py --fd N --config FILE`. A file `die` in the store makes it end at the next request.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
from pathlib import Path

import msgspec

from agent.mover import protocol
from agent.mover.config import MoverConfig
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile


class FakeMover:
    """See the module's first lines."""

    def __init__(self, config: MoverConfig, channel: socket.socket) -> None:
        self.models = Path(config.store_dir) / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.stream = channel.makefile("rwb")

    def send(self, answer: protocol.Answer) -> None:
        """One frame."""
        self.stream.write(protocol.frame(answer))
        self.stream.flush()

    def run(self) -> None:
        """Until the socket closes or Stop comes."""
        self.send(protocol.Ready("", host="127.0.0.1", port=12345, pid=os.getpid()))
        while len(head := self.stream.read(protocol.LENGTH.size)) == protocol.LENGTH.size:
            request = protocol.requests.decode(self.stream.read(protocol.LENGTH.unpack(head)[0]))
            if isinstance(request, protocol.Stop) or (self.models.parent / "die").exists():
                return
            self.send(self.answer(request))

    def answer(self, request: protocol.AnyRequest) -> protocol.Done:
        """What the request leads to."""
        match request:
            case protocol.Fetch():
                return self.fetch(request)
            case protocol.Drop():
                shutil.rmtree(self.models / f"{request.model}@{request.revision}", ignore_errors=True)
            case protocol.Scan():
                found = [held for path in sorted(self.models.rglob("*@*")) if (held := self.held(path))]
                return protocol.Done(request.token, copies=tuple(found))
            case protocol.Capacity():
                return protocol.Done(request.token, detail={"used_bytes": 42, "reserved_bytes": 7})
            case _:
                pass
        return protocol.Done(request.token)

    def fetch(self, request: protocol.Fetch) -> protocol.Done:
        """Copies the first source."""
        source = Path(request.sources[0].url.removeprefix("file://"))
        target = self.models / f"{request.model}@{request.revision}"
        if not source.is_file():
            return protocol.Done(request.token, ErrorInfo("source_not_found", f"{source} is not there"))
        target.mkdir(parents=True, exist_ok=True)
        if not (target / source.name).exists():
            os.link(source, target / source.name)
        self.send(protocol.Moving(request.token, "fetching", 1, source.stat().st_size))
        held = self.held(target)
        return protocol.Done(request.token, manifest=held.manifest if held else None)

    def held(self, path: Path) -> protocol.HeldCopy | None:
        """A published copy."""
        model, _, revision = str(path.relative_to(self.models)).rpartition("@")
        files = tuple(
            ManifestFile(file.name, file.stat().st_size, "b3:" + "0" * 64, 1 << 20) for file in sorted(path.iterdir())
        )
        manifest = Manifest(model, revision, files, f"b3:{model}", "gguf")
        return protocol.HeldCopy(
            model, revision, str(path), manifest.size_bytes, manifest.digest, "gguf", manifest=manifest
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--config", type=Path)
    options = parser.parse_args()
    settings = msgspec.json.decode(options.config.read_bytes(), type=MoverConfig)
    FakeMover(settings, socket.socket(fileno=options.fd)).run()
