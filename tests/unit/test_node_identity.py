"""Whose a node id is: the secret shown with it first, kept as a hash, and what an admin can do about it."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from agent.identity import FILE, node_secret
from common import wire
from common.errors import ErrorInfo, InvalidConfig
from head.core.effects import Alarm, CloseSession, Effect, Send
from head.core.events import (
    AgentSaidHello,
    CreateKeyRequested,
    RemoveNodeRequested,
    ResetIdentityRequested,
    SessionClosed,
)
from herder import types as api
from tests.doubles.head_core import World, inventory

OURS, THEIRS = "a" * 64, "b" * 64


def says(world: World, identity: str, session: str, *, node: str = "n1", boot: str = "boot-1") -> list[Effect]:
    """A hello of this node id with the hash of a secret."""
    hello = wire.Hello(1, 1, node, boot, f"agent-{identity[:1]}", "1", inventory(), identity=identity)
    return world.step(AgentSaidHello(session_id=session, hello=hello, peer="10.0.0.1"))


def refusal(effects: list[Effect]) -> ErrorInfo | None:
    """The error with which the session is ended."""
    return next((effect.error for effect in effects if isinstance(effect, CloseSession)), None)


def alarms(effects: list[Effect]) -> list[tuple[str, bool]]:
    """Alarms that go on or off."""
    return [(effect.name, effect.is_on) for effect in effects if isinstance(effect, Alarm)]


def is_welcome(effects: list[Effect]) -> bool:
    """Whether the agent was taken in."""
    return any(isinstance(effect, Send) and isinstance(effect.message, wire.Welcome) for effect in effects)


class TestAtTheHead:
    """Who is let in under a node id."""

    def test_another_secret_is_refused_and_leaves_the_session_alone(self) -> None:
        """With or without the node being connected; nothing of the books changes, and an alarm says so."""
        world = World()
        says(world, OURS, "s1")
        before = world.state.nodes["n1"]
        for session, boot in (("s2", "boot-1"), ("s3", "boot-2")):
            effects = says(world, THEIRS, session, boot=boot)
            error = refusal(effects)
            assert error is not None
            assert error.code == "forbidden"
            assert "reset-identity n1" in error.hint
            assert alarms(effects) == [("wrong_identity:n1", True)]
            assert world.session("n1") == "s1"
            assert world.state.nodes["n1"] == before
        world.step(SessionClosed(node="n1", session_id="s1", reason="gone"))
        assert refusal(says(world, THEIRS, "s4")) is not None

    def test_no_secret_is_a_wrong_one_once_there_is_one(self) -> None:
        """An impostor cannot pass as an agent of an older version."""
        world = World()
        says(world, OURS, "s1")
        assert refusal(says(world, "", "s2")) is not None

    def test_the_right_secret_comes_back_and_ends_the_alarm(self) -> None:
        """After a restart of agent or machine."""
        world = World()
        says(world, OURS, "s1")
        says(world, THEIRS, "s2")
        effects = says(world, OURS, "s3", boot="boot-2")
        assert is_welcome(effects)
        assert alarms(effects) == [("wrong_identity:n1", False)]

    def test_a_node_of_an_older_version_is_bound_by_its_upgrade(self) -> None:
        """Without a secret it comes as before; the first that brings one binds it."""
        world = World()
        says(world, "", "s1")
        assert is_welcome(says(world, "", "s2"))
        assert is_welcome(says(world, OURS, "s3"))
        assert world.state.nodes["n1"].identity_sha256 == OURS
        assert refusal(says(world, THEIRS, "s4")) is not None

    def test_an_admin_lets_a_new_secret_in(self) -> None:
        """After a reset the next one binds the node, and the former is refused; the open session goes on meanwhile."""
        world = World()
        says(world, OURS, "s1")
        world.request(ResetIdentityRequested, node="n1")
        assert world.session("n1") == "s1"
        assert is_welcome(says(world, THEIRS, "s2"))
        assert refusal(says(world, OURS, "s3")) is not None

    def test_a_removed_node_is_forgotten_with_its_secret(self) -> None:
        """Its id is free again."""
        world = World()
        says(world, OURS, "s1")
        world.request(RemoveNodeRequested, node="n1", force=True)
        assert is_welcome(says(world, THEIRS, "s2"))

    def test_an_unknown_node_cannot_be_reset(self) -> None:
        """It says which."""
        answer = World().request(ResetIdentityRequested, node="nobody")
        assert isinstance(answer, ErrorInfo)
        assert answer.code == "node_not_found"

    def test_the_journal_of_an_older_version_loads(self) -> None:
        """A node without the field is a node without a secret."""
        world = World()
        says(world, "", "s1")
        stored = msgspec.json.encode(world.state.nodes["n1"])
        assert b"identity" not in stored
        assert msgspec.json.decode(stored, type=type(world.state.nodes["n1"])).identity_sha256 == ""


@pytest.mark.parametrize(
    ("role", "node", "code"), [("viewer", "n1", "invalid_value"), ("agent", "../x", "invalid_name")]
)
def test_only_agents_keys_are_bound_and_only_to_node_ids(role: api.Role, node: str, code: str) -> None:
    """A key for something that cannot be is not made."""
    body = api.CreateKey(role, "k", node=node)
    answer = World().request(CreateKeyRequested, body=body, secret_sha256="0" * 64)
    assert isinstance(answer, ErrorInfo)
    assert answer.code == code


class TestAtTheAgent:
    """The file that holds the secret."""

    def test_it_is_made_once(self, tmp_path: Path) -> None:
        """256 bits in a file that nobody else reads; every later start shows the same."""
        secret = node_secret(tmp_path)
        assert len(bytes.fromhex(secret)) == 32
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
        assert node_secret(tmp_path) == secret
        assert node_secret(tmp_path / ".") == secret

    @pytest.mark.parametrize("spoil", ["empty", "open"])
    def test_a_spoilt_file_is_an_error_and_stays(self, tmp_path: Path, spoil: str) -> None:
        """A new secret would only be refused by the head, and the old one be lost."""
        node_secret(tmp_path)
        path = tmp_path / FILE
        if spoil == "empty":
            path.write_text("")
        else:
            path.chmod(0o644)
        before = path.read_text()
        with pytest.raises(InvalidConfig):
            node_secret(tmp_path)
        assert path.read_text() == before

    def test_two_nodes_have_two(self, tmp_path: Path) -> None:
        """Nothing of it is derived from the machine."""
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        assert node_secret(tmp_path / "a") != node_secret(tmp_path / "b")
