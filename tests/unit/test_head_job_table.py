"""The table of jobs: a mapping like any other, in which ended jobs are packed and only decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import limits
from common.errors import ErrorInfo, StateCorrupt
from head.core import job_table, jobs
from head.core.job_table import JobFacts, JobTable
from head.core.objects import Job, Step
from head.core.records import Record
from head.core.state import State, apply, restore_job, undo
from head.core.turn import Turn


def a_job(id: str, state: str = "completed", *, ended_ms: int = 0, name: str = "download") -> Job:
    """A job of two steps, with everything that a step can carry."""
    steps = (
        Step(
            "a", "download", "completed", model="m", target_device="n1:disk", result={"bytes": 7, "x": [1, 2.5, None]}
        ),
        Step("b", "serve", "failed", dependencies=("a",), error=ErrorInfo("timed_out", "late", details={"s": 1})),
    )
    return Job(id, name, "me", state, 5, steps if state != "running" else steps[:1], ended_ms=ended_ms)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The bodies that were decoded whole."""
    bodies: list[bytes] = []
    decoder = msgspec.json.Decoder(Job)

    class Counting:
        def decode(self, body: bytes) -> Job:
            bodies.append(body)
            return decoder.decode(body)

    monkeypatch.setattr(job_table, "_decoder", Counting())
    return iter([bodies])


class TestMapping:
    """What a dict of jobs does, this does."""

    def test_an_ended_job_is_equal_to_what_was_put(self) -> None:
        """Packed and decoded, with errors and results."""
        table = JobTable()
        table["j"] = job = a_job("j", "failed", ended_ms=9)
        assert table["j"] == job
        assert table["j"] is not job
        assert table.facts["j"] == JobFacts("download", "failed", 5, 9, 2)

    def test_a_running_job_is_the_object_itself(self) -> None:
        """It changes often and is asked for often."""
        table = JobTable()
        table["j"] = job = a_job("j", "running")
        assert table["j"] is job

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["running", "completed", "failed", "gone"]))))
    def test_it_behaves_like_a_dict(self, changes: list[tuple[str, str]]) -> None:
        """Order, length, membership and contents, whatever happens to it."""
        table, model = JobTable(), dict[str, Job]()
        for number, (key, state) in enumerate(changes):
            if state == "gone":
                assert table.pop(key, None) == model.pop(key, None)
            else:
                table[key] = model[key] = a_job(key, state, ended_ms=number)
            assert dict(table.items()) == model
            assert list(table) == list(model) == list(table.facts)
            assert list(reversed(table)) == list(reversed(model))
            assert len(table) == len(model)
            assert [key in table for key in "abc"] == [key in model for key in "abc"]
            assert {key: facts.state for key, facts in table.facts.items()} == {k: j.state for k, j in model.items()}

    def test_a_job_that_is_not_there(self) -> None:
        """KeyError, and None from get."""
        table = JobTable()
        assert table.get("x") is None
        with pytest.raises(KeyError):
            table["x"]
        with pytest.raises(KeyError):
            del table["x"]

    def test_what_cannot_be_stored_stays_as_it_is(self) -> None:
        """The journal refuses it; until it is taken back it can be read."""
        table = JobTable()
        table["j"] = job = msgspec.structs.replace(a_job("j"), steps=(Step("a", "download", result={"x": object()}),))
        assert table["j"] is job


class TestLoad:
    """What the journal kept."""

    def test_an_ended_job_is_not_decoded(self, decoded: Iterator[list[bytes]]) -> None:
        """Nor for its facts; only when it is asked for."""
        bodies = next(decoded)
        job = a_job("j", ended_ms=9)
        state = State()
        restore_job(state, "j", msgspec.json.encode(job))
        assert state.jobs.facts["j"] == JobFacts("download", "completed", 5, 9, 2)
        assert "j" in state.jobs
        assert not bodies
        assert state.jobs["j"] == job
        assert len(bodies) == 1
        assert not state.live_jobs

    def test_a_running_job_is_indexed(self) -> None:
        """As if it had just been put."""
        state = State()
        restore_job(state, "j", msgspec.json.encode(a_job("j", "running")))
        assert list(state.live_jobs) == ["j"]

    @pytest.mark.parametrize(
        "body",
        [b"{", b"[]", b'{"id":"j"}', msgspec.json.encode(a_job("other")), b'{"id":"j","name":"n","state":"running"}'],
    )
    def test_what_is_no_job_is_refused(self, body: bytes) -> None:
        """A start says so at once."""
        with pytest.raises(StateCorrupt):
            JobTable().load("j", body)

    def test_a_broken_step_of_an_ended_job_is_said_when_it_is_read(self) -> None:
        """The start does not look that deep; who asks for the job hears it."""
        table = JobTable()
        table.load("j", b'{"id":"j","name":"n","actor":"a","state":"failed","created_ms":1,"steps":[{"id":1}]}')
        with pytest.raises(StateCorrupt):
            table["j"]


def test_a_turn_taken_back_leaves_the_job_running() -> None:
    """An end that the journal refused did not happen."""
    state = State()
    running, ended = a_job("j", "running"), a_job("j", ended_ms=3)
    apply(state, Record(1, 1, "job_created", "c", "job", "j", running))
    record = Record(2, 2, "job_completed", "c", "job", "j", ended)
    before = apply(state, record)
    assert not state.live_jobs
    undo(state, record, before)
    assert state.jobs["j"] == running
    assert list(state.live_jobs) == ["j"]


def test_pruning_takes_the_longest_ended_and_decodes_only_those(
    monkeypatch: pytest.MonkeyPatch, decoded: Iterator[list[bytes]]
) -> None:
    """Of 300 jobs the 40 beyond the limit go, by their end and not by their place."""
    bodies = next(decoded)
    monkeypatch.setattr(limits, "JOBS_KEPT", 260)
    monkeypatch.setattr(limits, "JOBS_PRUNED_PER_TICK", 40)
    state = State()
    for number in range(300):
        key = f"j{number:03}"
        restore_job(state, key, msgspec.json.encode(a_job(key, ended_ms=10_000 - number)))
    turn = Turn(state, 1, "tick")
    jobs.on_tick(turn)
    assert {record.key for record in turn.records} == {f"j{number:03}" for number in range(260, 300)}
    assert len(bodies) <= 2 * 40
