"""Models: registered with checked names and sources, changed, deleted with all their copies."""

from __future__ import annotations

import pytest

from common import limits
from common.errors import InvalidSource
from head.core.effects import Reply
from head.core.events import DeleteModelRequested, PinRequested, RegisterModelRequested, UpdateModelRequested
from head.core.objects import Service
from head.core.source_urls import check_source
from herder import types as api
from tests.doubles.head_core import World, error


def register(world: World, name: str = "m", **fields: object) -> object:
    """Registers, with whatever fields and event fields a test needs."""
    event = {key: fields.pop(key) for key in ("idempotency_key", "request_sha256", "actor") if key in fields}
    return world.request(RegisterModelRequested, body=api.RegisterModel(name=name, **fields), **event)  # type: ignore[arg-type]


class TestRegister:
    """A model becomes known."""

    def test_a_model_is_kept_as_given(self) -> None:
        """Name, type, sources and metadata are what was sent; source_url is one of the sources."""
        world = World()
        answer = register(
            world,
            "org/name",
            type="embedding",
            source_url="https://h/a.gguf",
            sources=("hf://org/name",),
            metadata={"a": 1},
        )
        assert isinstance(answer, Reply)
        assert answer.reference == "model:org/name"
        model = world.state.models["org/name"]
        assert (model.type, model.revision, model.metadata) == ("embedding", "main", {"a": 1})
        assert model.sources == ("https://h/a.gguf", "hf://org/name")

    def test_the_same_source_twice_is_one(self) -> None:
        """Order is kept, repeats are not."""
        world = World()
        register(world, source_url="https://h/a", sources=("https://h/b", "https://h/a"))
        assert world.state.models["m"].sources == ("https://h/a", "https://h/b")

    def test_a_duplicate_is_a_conflict(self) -> None:
        """Unlike in the seed, it does not say success."""
        world = World()
        register(world)
        answer = register(world, type="vision")
        assert answer.code == "already_exists"  # type: ignore[attr-defined]
        assert world.state.models["m"].type == "llm"

    @pytest.mark.parametrize("name", ["../x", "a/b/c", "a b", ".x", "x/", "a/../b", "x" * 193, "a\x00b", "-x"])
    def test_bad_names(self, name: str) -> None:
        """Path tricks end at the door."""
        world = World()
        assert register(world, name).code == "invalid_name"  # type: ignore[attr-defined]
        assert world.state.models == {}

    @pytest.mark.parametrize("revision", ["../x", "", "a/b", "x" * 65])
    def test_bad_revisions(self, revision: str) -> None:
        """A revision becomes part of a path, too."""
        assert register(World(), revision=revision).code == "invalid_name"  # type: ignore[attr-defined]

    def test_metadata_is_limited(self) -> None:
        """A megabyte of metadata is a mistake."""
        assert register(World(), metadata={"x": "y" * limits.METADATA_BYTES}).code == "invalid_value"  # type: ignore[attr-defined]

    def test_sources_are_limited(self) -> None:
        """More sources than the limit are refused, not cut."""
        urls = tuple(f"https://h/{n}" for n in range(limits.SOURCES_PER_MODEL + 1))
        assert register(World(), sources=urls).code == "invalid_source"  # type: ignore[attr-defined]

    def test_the_number_of_models_is_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A runaway script is told to stop."""
        monkeypatch.setattr(limits, "MODELS", 1)
        world = World()
        register(world)
        assert register(world, "m2").code == "too_many"  # type: ignore[attr-defined]


class TestSources:
    """What may be a source."""

    @pytest.mark.parametrize(
        "url",
        [
            "file:///data/m.gguf",
            "http://host/a",
            "https://host:8443/a/b?x=1",
            "hf://org/name",
            "hf://org/name@v1.0",
            "hf://gpt2",
            "ssh://user@host/data/m",
            "ssh://host:2222/data/m",
        ],
    )
    def test_good_sources_stay_as_they_are(self, url: str) -> None:
        """Each scheme with its usual forms."""
        assert check_source(url) == url

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "m.gguf",
            "/data/m.gguf",
            "ftp://host/a",
            "javascript:alert(1)",
            "file://relative/path",
            "file:///",
            "file:///a/../../etc/shadow",
            "https://host/a/../b",
            "https://",
            "http:///path",
            "https://user:secret@host/a",
            "https://host:99999/a",
            "hf://a/b/c",
            "hf://",
            "hf://org/name@../x",
            "ssh://host",
            "https://host/a b",
            "https://host/a\nb",
            "https://host\\a",
            "peer://host:1",
            "HTTPS//host",
            "https:host/x",
            "https://host/" + "x" * limits.SOURCE_CHARS,
        ],
    )
    def test_bad_sources(self, url: str) -> None:
        """Everything else is refused with a hint."""
        with pytest.raises(InvalidSource) as caught:
            check_source(url)
        assert caught.value.hint

    def test_a_password_is_not_repeated(self) -> None:
        """A refusal must not show a secret in logs."""
        with pytest.raises(InvalidSource) as caught:
            check_source("https://user:hunter2@host/a")
        assert "hunter2" not in str(caught.value) + caught.value.hint

    @pytest.mark.parametrize(
        ("page", "source"),
        [
            ("https://huggingface.co/meta-llama/Llama-2-7b-hf", "hf://meta-llama/Llama-2-7b-hf"),
            ("https://huggingface.co/org/name/tree/v2", "hf://org/name@v2"),
            (
                "https://huggingface.co/org/name/resolve/main/x.gguf",
                "https://huggingface.co/org/name/resolve/main/x.gguf",
            ),
            ("https://huggingface.co/datasets/squad", "https://huggingface.co/datasets/squad"),
        ],
    )
    def test_the_page_of_a_hub_repository_is_its_hf_source(self, page: str, source: str) -> None:
        """People paste the address of the page; the page itself is no model."""
        assert check_source(page) == source


class TestUpdate:
    """A model changes."""

    def test_fields_left_out_stay(self) -> None:
        """Metadata is merged, null removes."""
        world = World()
        register(world, sources=("https://h/a",), metadata={"a": 1, "b": 2})
        body = api.UpdateModel(metadata={"a": None, "c": 3}, type="vision")
        assert world.request(UpdateModelRequested, model="m", body=body).reference == "model:m"
        model = world.state.models["m"]
        assert (model.type, model.sources, model.metadata) == ("vision", ("https://h/a",), {"b": 2, "c": 3})

    def test_nothing_changed_is_no_record(self) -> None:
        """Repeating an update is silent."""
        world = World()
        register(world)
        world.request(UpdateModelRequested, model="m", body=api.UpdateModel(type="llm"))
        assert world.turn is not None
        assert world.turn.records == []

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (api.UpdateModel(sources=("nope",)), "invalid_source"),
            (api.UpdateModel(revision="a/b"), "invalid_name"),
            (api.UpdateModel(metadata={"x": "y" * limits.METADATA_BYTES}), "invalid_value"),
        ],
    )
    def test_bad_updates_change_nothing(self, body: api.UpdateModel, code: str) -> None:
        """The checks of registration hold for updates."""
        world = World()
        register(world)
        before = world.state.models["m"]
        assert world.request(UpdateModelRequested, model="m", body=body).code == code
        assert world.state.models["m"] is before

    def test_unknown_model(self) -> None:
        """Only known models change."""
        assert World().request(UpdateModelRequested, model="m", body=api.UpdateModel()).code == "model_not_found"

    def test_a_new_source_helps_a_waiting_copy(self) -> None:
        """A copy that waits for an unreachable peer goes on from the new source at once."""
        world = World()
        for node in ("n1", "n2", "n3", "n4"):
            world.join(node)
        register(world, sources=("https://h/a",))
        world.fetched("m", "n1:disk", 1000)
        world.request(UpdateModelRequested, model="m", body=api.UpdateModel(sources=()))
        world.pass_s(17, alive=("n2", "n3", "n4"))
        copy = world.want("m", "n2:disk")
        assert world.state.copies[copy.key].state == "waiting"
        world.request(UpdateModelRequested, model="m", body=api.UpdateModel(sources=("https://h/b",)))
        (command,) = world.commands("n2")
        assert [source.url for source in command.body.sources] == ["https://h/b"]  # type: ignore[union-attr]


class TestDelete:
    """A model goes, copies first."""

    def test_without_copies_it_is_gone_at_once(self) -> None:
        """Nothing has to be dropped."""
        world = World()
        register(world)
        assert isinstance(world.request(DeleteModelRequested, model="m"), Reply)
        assert world.state.models == {}

    def test_copies_are_dropped_first(self) -> None:
        """The model and its manifest end with the last copy, the RAM copy before the disk copy under it."""
        world = World()
        world.join("n1", dram=1 << 30)
        world.register("m", "https://h/a")
        dram = world.fetched("m", "n1:dram", 1000)
        disk = "m@main|n1:disk"
        world.request(DeleteModelRequested, model="m")
        assert [command.op_id for command in world.commands("n1")] == [f"copy:{dram}"]
        assert world.state.models["m"].is_deleting
        world.result(dram)
        assert [command.op_id for command in world.commands("n1")] == [f"copy:{disk}"]
        world.result(disk)
        assert (world.state.models, world.state.manifests, world.state.copies) == ({}, {}, {})

    def test_while_it_goes_nothing_new_is_made_of_it(self) -> None:
        """No new copy, no change, no new registration of the name."""
        world = World()
        world.join("n1")
        world.register("m", "https://h/a")
        world.fetched("m", "n1:disk", 1000)
        world.request(DeleteModelRequested, model="m")
        assert register(world).code == "already_exists"  # type: ignore[attr-defined]
        assert world.request(UpdateModelRequested, model="m", body=api.UpdateModel()).code == "conflict"
        with pytest.raises(Exception, match="being deleted"):
            world.want("m", "n1:disk")

    def test_a_drop_that_fails_is_repeated_until_it_succeeds(self) -> None:
        """A deletion ends; it is not given up."""
        world = World()
        world.join("n1")
        world.register("m", "https://h/a")
        key = world.fetched("m", "n1:disk", 1000)
        world.request(DeleteModelRequested, model="m")
        for _ in range(6):
            world.result(key, "failed", error=error("in_use"))
            world.pass_s(61, alive=("n1",))
        world.result(key)
        assert world.state.models == {}

    def test_a_model_in_service_is_not_deleted(self) -> None:
        """Not even by force while the service shall run."""
        world = World()
        register(world)
        service = Service(
            name="s",
            model="m",
            revision="main",
            recipe="r",
            replicas=0,
            generation=1,
            spec_hash="",
            created_ms=1,
            cause="x",
        )
        world.state.services["s"] = service
        assert world.request(DeleteModelRequested, model="m").code == "in_use"
        assert world.request(DeleteModelRequested, model="m", force=True).code == "in_use"
        del world.state.services["s"]
        assert isinstance(world.request(DeleteModelRequested, model="m"), Reply)

    def test_pinned_copies_need_force(self) -> None:
        """A pin says that someone wants it."""
        world = World()
        world.join("n1")
        world.register("m", "https://h/a")
        world.fetched("m", "n1:disk", 1000)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk"))
        assert world.request(DeleteModelRequested, model="m").code == "in_use"
        assert isinstance(world.request(DeleteModelRequested, model="m", force=True), Reply)

    def test_unknown_model(self) -> None:
        """Only known models can go."""
        assert World().request(DeleteModelRequested, model="m").code == "model_not_found"


class TestIdempotency:
    """Repeats of a request."""

    def test_the_same_request_gets_the_same_answer_once(self) -> None:
        """A repeat makes nothing and answers the same reference."""
        world = World()
        first = register(world, idempotency_key="k", request_sha256="h")
        again = register(world, idempotency_key="k", request_sha256="h")
        assert first.reference == again.reference == "model:m"  # type: ignore[attr-defined]
        assert world.turn is not None
        assert world.turn.records == []

    def test_another_request_under_the_key_is_refused(self) -> None:
        """A key names one request."""
        world = World()
        register(world, idempotency_key="k", request_sha256="h")
        answer = register(world, "m2", idempotency_key="k", request_sha256="other")
        assert answer.code == "idempotency_mismatch"  # type: ignore[attr-defined]
        assert "m2" not in world.state.models

    def test_keys_belong_to_their_actor(self) -> None:
        """Two people may choose the same key."""
        world = World()
        register(world, idempotency_key="k", request_sha256="h", actor="ann")
        register(world, "m2", idempotency_key="k", request_sha256="g", actor="bob")
        assert set(world.state.models) == {"m", "m2"}

    def test_a_refused_request_is_not_remembered(self) -> None:
        """After the reason is gone the same request may succeed."""
        world = World()
        register(world)
        assert register(world, idempotency_key="k", request_sha256="h").code == "already_exists"  # type: ignore[attr-defined]
        world.request(DeleteModelRequested, model="m")
        assert isinstance(register(world, idempotency_key="k", request_sha256="h"), Reply)

    def test_keys_are_forgotten_after_their_time(self) -> None:
        """A day later the key may be used anew."""
        world = World()
        register(world, idempotency_key="k", request_sha256="h")
        world.now_ms += limits.IDEMPOTENCY_TTL_MS
        world.state.last_tick_ms = world.now_ms - 60_000
        world.pass_s(1)
        assert world.state.idempotents == {}

    @pytest.mark.parametrize("key", ["x" * 129, "a\nb"])
    def test_unusable_keys(self, key: str) -> None:
        """A key is short and printable."""
        assert register(World(), idempotency_key=key, request_sha256="h").code == "invalid_value"  # type: ignore[attr-defined]
