"""hf:// sources against a double of the Hub that the real huggingface_hub talks to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.mover import protocol
from tests.doubles.hostile_http import HostileServer
from tests.doubles.hub import Hub
from tests.doubles.mover_client import MoverClient

WEIGHTS = random.Random(5).randbytes(3 * (1 << 20) + 9)
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS[::-1],
    ".gitattributes": b"x",
    "onnx/model.onnx": b"onnx",
}


def code(done: protocol.Done) -> str:
    return f"{done.error.code}" if done.error is not None else "ok"


@pytest.fixture
def cdn() -> Iterator[HostileServer]:
    with HostileServer({f"/{path}": body for path, body in FILES.items()}) as cdn:
        yield cdn


def test_download(tmp_path: Path, cdn: HostileServer) -> None:
    """Files, sha256 and the commit come from the hub, bytes from the CDN; duplicates of the weights are left out."""
    with Hub("org/tiny", FILES, cdn=cdn.url) as hub, MoverClient(tmp_path / "s", hf_endpoint=hub.url) as mover:
        done = mover.fetch("org/tiny", "hf://org/tiny@main")
        assert code(done) == "ok"
        assert done.manifest is not None
        rows = {file.path: file for file in done.manifest.files}
        assert set(rows) == {"config.json", "model.safetensors"}
        assert rows["model.safetensors"].sha256
        assert (mover.store / "models/org/tiny@r1/model.safetensors").read_bytes() == WEIGHTS
        assert done.manifest.detected["layers"] == 2


def test_token_stays_with_the_hub(tmp_path: Path, cdn: HostileServer) -> None:
    """A private repository is read with the token, which the CDN never sees."""
    with Hub("org/tiny", FILES, cdn=cdn.url, token="hf_secret") as hub:
        with MoverClient(tmp_path / "a", hf_endpoint=hub.url) as mover:
            assert code(mover.fetch("org/tiny", "hf://org/tiny")) == "source_not_found"
        with MoverClient(tmp_path / "b", hf_endpoint=hub.url, env={"HF_TOKEN": "hf_secret"}) as mover:
            assert code(mover.fetch("org/tiny", "hf://org/tiny")) == "ok"
        assert all("authorization" not in headers for _, headers in cdn.requests)
        assert cdn.requests


def test_endpoint_from_environment(tmp_path: Path) -> None:
    """HF_ENDPOINT names a mirror."""
    with Hub("org/tiny", FILES) as hub, MoverClient(tmp_path / "s", env={"HF_ENDPOINT": hub.url}) as mover:
        assert code(mover.fetch("org/tiny", "hf://org/tiny?allow=*.json")) == "ok"


def test_patterns(tmp_path: Path) -> None:
    """allow and ignore choose files; choosing none is an error."""
    with Hub("org/tiny", FILES) as hub, MoverClient(tmp_path / "s", hf_endpoint=hub.url) as mover:
        done = mover.fetch("a", "hf://org/tiny?allow=*.bin&allow=*.json&ignore=config*")
        assert done.manifest is not None
        assert [file.path for file in done.manifest.files] == ["pytorch_model.bin"]
        assert code(mover.fetch("b", "hf://org/tiny?allow=*.none")) == "source_not_found"


def test_refusals(tmp_path: Path) -> None:
    """Unknown repository or revision, a gated one and a bad name each have their code."""
    with Hub("org/tiny", FILES) as hub, MoverClient(tmp_path / "s", hf_endpoint=hub.url) as mover:
        assert code(mover.fetch("m", "hf://org/none")) == "source_not_found"
        assert code(mover.fetch("m", "hf://org/tiny@v9")) == "source_not_found"
        assert code(mover.fetch("m", "hf://../etc")) == "invalid_source"
        hub.gated = True
        done = mover.fetch("m", "hf://org/tiny")
        assert code(done) == "source_refused"
        assert done.error is not None
        assert "terms" in done.error.hint


def test_not_installed(tmp_path: Path) -> None:
    """Without huggingface_hub the error names the command that installs it."""
    block = tmp_path / "block"
    (block / "huggingface_hub").mkdir(parents=True)
    (block / "huggingface_hub/__init__.py").write_text("raise ImportError('blocked')\n")
    path = f"{block}:{Path(__file__).resolve().parents[2]}"
    with MoverClient(tmp_path / "s", env={"PYTHONPATH": path}) as mover:
        done = mover.fetch("m", "hf://org/tiny")
        assert code(done) == "extra_missing"
        assert done.error is not None
        assert "herder[hf]" in done.error.hint
