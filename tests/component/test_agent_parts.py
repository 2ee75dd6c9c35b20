"""Adapters, the environment of engines, the ledger, logs and the metrics door, each by itself."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import aiohttp
import pytest

from agent.core.objects import Meta, Outcome, Record
from agent.core.state import State, load
from agent.exporter import Exporter, Facts
from agent.ledger import Ledger
from agent.logs import last_lines, tail_offset, whole_characters
from agent.run_files import RunFiles
from agent.runtimes.base import Setting, fill, gguf_file, scrubbed
from agent.runtimes.command import Command
from agent.runtimes.llamacpp import LlamaCpp
from common import wire
from common.errors import EngineMissing, Forbidden, InvalidValue, StateCorrupt, StateLocked, StateTooNew
from common.manifest import Manifest, ManifestFile
from tests.doubles.agent_node import Node, ensure_copy, ensure_replica


def manifest(*files: tuple[str, int]) -> Manifest:
    """A GGUF manifest."""
    made = tuple(ManifestFile(path, size, "b3:0", 1 << 20) for path, size in files)
    return Manifest("org/m", "main", made, "b3:0", "gguf")


def setting(**fields: object) -> Setting:
    """Where an engine is started."""
    order = ensure_replica("chat-0", **fields)
    return Setting(order, "127.0.0.1", 20_001, "/run/1", "/m", manifest(("a.gguf", 5)), "/run/1/api_key")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A program that says a version."""
    path = tmp_path / "llama-server"
    path.write_text("#!/bin/sh\necho 'version: 1234 (abc)' >&2\n")
    path.chmod(0o755)
    return path


class TestLlamaCpp:
    """Finding and starting llama-server."""

    def test_argv_on_cpu(self, server: Path) -> None:
        """The exact argv: model, address, name, key file, settings, no device, then the recipe's own words."""
        config = {"context": 2048, "parallel": 2, "threads": 0, "gpu_layers": -1, "embeddings": True}
        launch = LlamaCpp(str(server)).launch(setting(config=config, served_name="m", argv=("--seed", "{port}")))
        assert launch.argv == (
            *(str(server), "--model", "/m/a.gguf", "--host", "127.0.0.1", "--port", "20001", "--alias", "m"),
            *("--metrics", "--no-webui", "--offline", "--api-key-file", "/run/1/api_key"),
            *("--ctx-size", "2048", "--parallel", "2", "--embeddings", "--device", "none", "--seed", "20001"),
        )
        assert launch.env["CUDA_VISIBLE_DEVICES"] == ""
        assert launch.env["LLAMA_ARG_CACHE_RAM"] == "0"  # memory that nobody reserved is not taken

    def test_the_prompt_cache_is_what_was_reserved(self, server: Path) -> None:
        """The setting reaches the server by its environment; the service's own variable wins."""
        config: dict[str, object] = {"prompt_cache_mib": 512}
        assert LlamaCpp(str(server)).launch(setting(config=config)).env["LLAMA_ARG_CACHE_RAM"] == "512"
        own = {"LLAMA_ARG_CACHE_RAM": "64"}
        assert LlamaCpp(str(server)).launch(setting(config=config, env=own)).env["LLAMA_ARG_CACHE_RAM"] == "64"

    def test_gpus_by_uuid(self, server: Path) -> None:
        """With GPUs all layers go there, and the engine sees exactly those cards."""
        launch = LlamaCpp(str(server)).launch(setting(gpu_uuids=("GPU-a", "GPU-b")))
        assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
        assert "--device" not in launch.argv
        assert launch.argv[launch.argv.index("--n-gpu-layers") + 1] == "999"

    @pytest.mark.parametrize("config", [{"context": "many"}, {"parallel": True}, {"threads": 1.5}])
    def test_bad_config_is_refused(self, server: Path, config: dict[str, object]) -> None:
        """A setting of the wrong type is invalid_value, not an argument."""
        with pytest.raises(InvalidValue):
            LlamaCpp(str(server)).launch(setting(config=config))

    def test_version(self, server: Path) -> None:
        """The version is what the program says."""
        assert LlamaCpp(str(server)).find() == "1234 (abc)"

    @pytest.mark.parametrize("script", ["exit 1", "echo nonsense"])
    def test_broken_program_is_missing(self, server: Path, script: str) -> None:
        """A program that does not say a version is not an engine."""
        server.write_text(f"#!/bin/sh\n{script}\n")
        with pytest.raises(EngineMissing):
            LlamaCpp(str(server)).find()

    def test_absent_program(self) -> None:
        """No program: engine_missing with a hint."""
        with pytest.raises(EngineMissing) as caught:
            LlamaCpp("/no/such/llama-server").path()
        assert "engines.llamacpp" in caught.value.hint


class TestGguf:
    """Which file is loaded."""

    @pytest.mark.parametrize(
        ("files", "chosen"),
        [
            ([("a.gguf", 1), ("b.gguf", 9)], "b.gguf"),
            ([("m-00002-of-00002.gguf", 9), ("m-00001-of-00002.gguf", 5)], "m-00001-of-00002.gguf"),
            ([("mmproj-big.gguf", 99), ("m.gguf", 5)], "m.gguf"),
            ([("x/m.GGUF", 5), ("readme.md", 99)], "x/m.GGUF"),
        ],
    )
    def test_choice(self, files: list[tuple[str, int]], chosen: str) -> None:
        """The first shard, else the largest file that is not a projector."""
        order = ensure_replica("chat-0")
        assert gguf_file(Setting(order, "h", 1, "/r", "/m", manifest(*files))) == f"/m/{chosen}"

    def test_none(self) -> None:
        """A model without GGUF is invalid_value."""
        with pytest.raises(InvalidValue):
            gguf_file(Setting(ensure_replica("chat-0"), "h", 1, "/r", "/m", manifest(("a.bin", 1))))


class TestCommand:
    """Free commands."""

    def test_words_stay_words(self) -> None:
        """What is filled in is never split, never looked at again, and other braces stay."""
        launch = Command().launch(setting(argv=("sh", "-c", "{model_path} {x}", '{"a": {port}}')))
        assert launch.argv[1:] == ("-c", "/m/a.gguf {x}", '{"a": 20001}')

    def test_values_are_not_templates(self) -> None:
        """A directory that looks like a placeholder is not filled in."""
        made = Setting(ensure_replica("chat-0"), "h", 1, "/r", "/{port}")
        assert fill("{model_dir}", made) == "/{port}"

    def test_missing_value(self) -> None:
        """A placeholder without a value is refused rather than left out."""
        with pytest.raises(InvalidValue):
            fill("{api_key_file}", Setting(ensure_replica("chat-0"), "h", 1, "/r", "/m"))

    def test_may_be_forbidden(self) -> None:
        """An operator may allow no free commands."""
        with pytest.raises(Forbidden):
            Command(is_allowed=False).launch(setting(argv=("sh",)))


def test_scrubbed_environment(tmp_path: Path) -> None:
    """Only what is allowed goes on, nothing that looks like a secret; our bin dir leaves PATH, also by another name."""
    ours = tmp_path / "bin"
    ours.mkdir()
    (tmp_path / "alias").symlink_to(ours)
    env = {
        "PATH": f"{ours}:/usr/bin:{tmp_path}/alias",
        "PYTHONPATH": "x", "VIRTUAL_ENV": "x", "HERDER_AGENT_HEAD_URL": "x", "NOTIFY_SOCKET": "x",
        "INVOCATION_ID": "x", "HOME": "/h", "SLURM_JOB_ID": "1", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "NVIDIA_API_KEY": "x", "NVIDIA_DRIVER_CAPABILITIES": "all", "LD_PRELOAD": "x", "http_proxy": "x", "MINE": "m",
    }  # fmt: skip
    kept = {"PATH": "/usr/bin", "HOME": "/h", "SLURM_JOB_ID": "1", "NVIDIA_DRIVER_CAPABILITIES": "all"}
    assert scrubbed(env, bin_dir=str(ours)) == kept
    assert scrubbed(env, bin_dir=str(ours), pass_env=("MINE",)) == {**kept, "MINE": "m"}


class TestLedger:
    """The SQLite file."""

    def test_round_trip(self, tmp_path: Path) -> None:
        """Every object of a working node comes back equal."""
        node = Node().start().open()
        node.command(ensure_copy(), 1)
        node.command(ensure_replica("chat-0"), 2)
        ledger = Ledger(tmp_path / "l.db")
        ledger.append([Record(1, "x", "y", kind, key, body) for (kind, key), body in node.ledger.items()])
        ledger.close()
        again = Ledger(tmp_path / "l.db")
        assert {(thing.KIND, thing.key): thing for thing in again.load()} == node.ledger
        again.close()

    def test_last_record_of_a_batch_counts(self, tmp_path: Path) -> None:
        """A put and a delete of one key in one batch leave nothing."""
        ledger = Ledger(tmp_path / "l.db")
        outcome = Outcome(wire.Result("op", 1, "ok"), 5)
        ledger.append([Record(1, "x", "y", "outcome", "op", outcome), Record(1, "x", "y", "outcome", "op", None)])
        assert ledger.load() == []
        ledger.close()

    def test_second_owner_is_refused(self, tmp_path: Path) -> None:
        """Two agents never share a ledger."""
        ledger = Ledger(tmp_path / "l.db")
        ledger.append([Record(1, "x", "y", "meta", "agent", Meta("b"))])
        with pytest.raises(StateLocked):
            Ledger(tmp_path / "l.db")
        ledger.close()

    def test_newer_schema_and_garbage(self, tmp_path: Path) -> None:
        """A ledger of a newer agent, and a file that is none, are refused with their own codes."""
        ledger = Ledger(tmp_path / "l.db")
        ledger._db.execute("PRAGMA user_version=99")
        ledger.close()
        with pytest.raises(StateTooNew):
            Ledger(tmp_path / "l.db")
        (tmp_path / "g.db").write_bytes(os.urandom(8192))
        with pytest.raises(StateCorrupt):
            Ledger(tmp_path / "g.db")

    def test_unknown_kind_is_left_alone(self, tmp_path: Path) -> None:
        """An object of a later version does not stop this one."""
        ledger = Ledger(tmp_path / "l.db")
        ledger._db.execute("INSERT INTO objects VALUES ('future', 'x', '{}')")
        assert load(State(), ledger.load()).copies == {}
        ledger.close()


class TestLogs:
    """Reading segments."""

    @pytest.mark.parametrize(
        ("text", "lines", "tail"),
        [("a\nb\nc\n", 2, "b\nc\n"), ("a\nb\nc", 1, "c"), ("a\n", 5, "a\n"), ("", 3, ""), ("\n\n\n", 1, "\n")],
    )
    def test_tail(self, tmp_path: Path, text: str, lines: int, tail: str) -> None:
        """The offset of the last lines, with or without a newline at the end."""
        (tmp_path / "log.000000000000000").write_text(text)
        assert text[tail_offset(tmp_path, lines) :] == tail

    def test_tail_over_segments(self, tmp_path: Path) -> None:
        """Lines are found across the border of two segments."""
        (tmp_path / "log.000000000000100").write_text("one\ntw")
        (tmp_path / "log.000000000000106").write_text("o\nthree\n")
        assert last_lines(tmp_path, 2) == ("two", "three")
        assert tail_offset(tmp_path, 2) == 104

    @pytest.mark.parametrize("text", ["é", "€", "😀", "a", ""])
    def test_whole_characters(self, text: str) -> None:
        """A character cut off at the end is left for the next piece; whole ones are not."""
        data = f"x{text}".encode()
        assert whole_characters(data) == data
        for cut in range(1, len(text.encode())):
            assert whole_characters(data[:-cut]) == b"x"


@pytest.mark.parametrize(
    ("token", "is_open", "header", "status"),
    [
        ("t", False, "", 401),
        ("t", False, "Bearer x", 401),
        ("t", False, "Bearer t", 200),
        ("", True, "", 200),
        ("", False, "", 401),
    ],
)
async def test_metrics_door(token: str, is_open: bool, header: str, status: int) -> None:
    """/metrics asks for its token unless it was opened; /healthz tells nothing secret and is open."""
    node = Node().start().open()
    node.command(ensure_copy(), 1)
    reading = wire.GpuReading(0, "GPU-1", 5, 6, utilisation=0.5)
    facts = Facts("n1", "0", True, 1, wire.Telemetry(gpus=(reading,)), wire.Inventory("n1"), 0, 1, 1, 1, 1, False, 0.0)
    exporter = Exporter(node.state, lambda: facts, token=token, is_open=is_open)
    await exporter.start("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{exporter.port}"
        headers = {"Authorization": header} if header else {}
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/metrics", headers=headers) as response:
                assert response.status == status
                text = await response.text()
            async with http.get(f"{url}/healthz") as response:
                assert response.status == 200
    finally:
        await exporter.close()
    if status == 200:
        assert 'herder_gpu_utilisation_ratio{gpu="0",name="",uuid="GPU-1"} 0.5' in text
        assert 'herder_node_copies{state="ready",storage="disk"} 1.0' in text


def test_ledger_is_private(tmp_path: Path) -> None:
    """The ledger's folder keeps others out: keys and tickets stand in it."""
    from common.statedir import StateDir

    state_dir = StateDir.open(tmp_path / "state", daemon="herder-agent")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    state_dir.close()


def test_ended_runs_keep_only_their_logs(tmp_path: Path) -> None:
    """What an engine left in its folder goes when its run is over, and secrets with it; logs stay, for a while."""
    files = RunFiles(tmp_path)
    for run in (1, 2):
        directory, key = files.make("chat-0", run, api_key="secret")
        (directory / "log.000000000000000").write_text("said")
        (directory / "cache").mkdir()
        (directory / "cache/big").write_text("x" * 100)
        (directory / "core").symlink_to("/etc/passwd")
        assert Path(key).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in (tmp_path / "chat-0/1").iterdir()) == ["log.000000000000000"]
    assert (tmp_path / "chat-0/2/cache/big").exists()
    files.forget("chat-0")
    assert sorted(path.name for path in (tmp_path / "chat-0/2").iterdir()) == ["log.000000000000000"]
    long_ago = time.time() - 15 * 86_400
    os.utime(tmp_path / "chat-0/forgotten", (long_ago, long_ago))
    files.make("chat-1", 1, api_key="")
    files.forget("chat-1")
    assert not (tmp_path / "chat-0").exists()
    assert (tmp_path / "chat-1").exists()
