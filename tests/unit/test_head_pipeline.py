"""The pipeline: nothing leaves before it is durable, and what is refused is taken back whole."""

from __future__ import annotations

import copy

import pytest

from common import limits, wire
from common.errors import StateReadOnly
from head import pipeline as pipeline_module
from head.core import events as ev
from head.core.effects import CloseSession, Effect, Refuse, Reply, Send
from head.core.state import State
from head.core.turn import Turn
from head.pipeline import Pipeline
from tests.doubles.head_shell import NOW_MS, hello, model, record, register, small_step

FULL = StateReadOnly("disk full")


@pytest.fixture
def pipeline() -> Pipeline:
    """A pipeline with a small core and nothing in it."""
    return Pipeline(State(), small_step)


def names(effects: list[Effect]) -> list[str]:
    """Effects in short."""
    found = []
    for effect in effects:
        match effect:
            case Reply():
                found.append(f"reply {effect.request_id}")
            case Refuse():
                found.append(f"refuse {effect.request_id} {effect.error.code}")
            case Send():
                found.append(f"send {type(effect.message).__name__}")
            case CloseSession():
                found.append(f"close {effect.session_id}")
            case _:
                found.append(type(effect).__name__)
    return found


def lease(node: str = "n1") -> ev.LeaseRenewed:
    """A heartbeat."""
    return ev.LeaseRenewed(node, "ses-1", wire.Lease(1, 5))


def result(op_id: str) -> ev.ResultReceived:
    """A result that becomes a record."""
    return ev.ResultReceived("n1", "ses-1", wire.Result(op_id, 1, "ok"))


def test_an_answer_waits_for_the_disk(pipeline: Pipeline) -> None:
    """The reply to a change leaves when its batch is committed, not before."""
    assert pipeline.take(register("a"), NOW_MS).effects == []
    assert not pipeline.is_settled
    rows = pipeline.seal()
    assert rows is not None
    assert [row.key for row in rows] == ["a"]
    released = pipeline.committed()
    assert names(released.effects) == ["reply req-1"]
    assert [record.key for record in released.records] == ["a"]
    assert pipeline.is_settled


def test_a_quiet_pipeline_answers_questions_at_once(pipeline: Pipeline) -> None:
    """With nothing on its way to the disk, an event without records is answered immediately."""
    released = pipeline.take(ev.WhyRequested(request_id="q", kind="model", key="a"), NOW_MS)
    assert names(released.effects) == ["reply q"]


def test_a_question_waits_for_what_it_saw(pipeline: Pipeline) -> None:
    """An answer or a refusal that rests on undecided records leaves after them, in order."""
    pipeline.take(register("a", "req-1"), NOW_MS)
    pipeline.seal()
    assert pipeline.take(ev.WhyRequested(request_id="q", kind="model", key="a"), NOW_MS).effects == []
    assert pipeline.take(register("a", "req-2"), NOW_MS).effects == []
    assert names(pipeline.committed().effects) == ["reply req-1", "reply q", "refuse req-2 already_exists"]
    assert pipeline.is_settled


def test_leases_never_wait(pipeline: Pipeline) -> None:
    """Acks leave at once, whatever is on its way to the disk."""
    pipeline.take(register("a"), NOW_MS)
    pipeline.seal()
    assert names(pipeline.take(lease(), NOW_MS).effects) == ["send Ack"]
    assert pipeline.taken == 1


def test_later_events_are_stepped_while_a_batch_is_in_flight(pipeline: Pipeline) -> None:
    """They see what is undecided, form the next batch, and are committed after it."""
    pipeline.take(register("a", "req-1"), NOW_MS)
    pipeline.seal()
    pipeline.take(register("b", "req-2"), NOW_MS)
    assert pipeline.seal() is None
    assert set(pipeline.state.models) == {"a", "b"}
    assert names(pipeline.committed().effects) == ["reply req-1"]
    assert not pipeline.is_settled
    assert [row.revision for row in pipeline.seal() or []] == [2]
    assert names(pipeline.committed().effects) == ["reply req-2"]


def test_batches_have_a_limit(pipeline: Pipeline) -> None:
    """A batch takes whole turns up to JOURNAL_BATCH_RECORDS."""
    for number in range(limits.JOURNAL_BATCH_RECORDS + 5):
        pipeline.take(register(f"m{number}", f"req-{number}"), NOW_MS)
    assert len(pipeline.seal() or []) == limits.JOURNAL_BATCH_RECORDS
    pipeline.committed()
    assert len(pipeline.seal() or []) == 5


def test_a_refused_batch_leaves_no_trace(pipeline: Pipeline) -> None:
    """Every undecided turn is taken back, newest first, and each request hears that nothing was written."""
    pipeline.take(register("kept", "req-0"), NOW_MS)
    pipeline.seal()
    pipeline.committed()
    before = copy.deepcopy(pipeline.state)
    pipeline.take(register("a", "req-1"), NOW_MS)
    pipeline.seal()
    pipeline.take(register("b", "req-2"), NOW_MS)
    pipeline.take(register("a", "req-3"), NOW_MS)
    released = pipeline.refused(FULL)
    assert pipeline.state == before
    assert names(released.effects) == ["refuse req-1 state_read_only", "refuse req-2 state_read_only"]
    assert [getattr(event, "request_id", "") for event in released.retaken] == ["req-3"]
    assert pipeline.is_settled
    assert pipeline.decided == pipeline.taken


def test_a_taken_back_refusal_is_decided_anew(pipeline: Pipeline) -> None:
    """ "already exists" that rested on a lost record becomes "nothing can be written"."""
    pipeline.take(register("a", "req-1"), NOW_MS)
    pipeline.seal()
    pipeline.take(register("a", "req-2"), NOW_MS)
    again = pipeline.refused(FULL).retaken
    assert [names(pipeline.take(event, NOW_MS).effects) for event in again] == [["refuse req-2 state_read_only"]]


def test_read_only_still_renews_leases_and_answers_questions(pipeline: Pipeline) -> None:
    """While nothing can be written, changes are refused at once and the rest goes on."""
    pipeline.take(register("a"), NOW_MS)
    pipeline.seal()
    pipeline.refused(FULL)
    assert names(pipeline.take(register("b", "req-2"), NOW_MS).effects) == ["refuse req-2 state_read_only"]
    assert names(pipeline.take(lease(), NOW_MS).effects) == ["send Ack"]
    question = ev.WhyRequested(request_id="q", kind="model", key="a")
    assert names(pipeline.take(question, NOW_MS).effects) == ["reply q"]
    assert pipeline.state.models == {}
    assert pipeline.seal() is None


def test_facts_from_agents_are_parked_and_taken_again(pipeline: Pipeline) -> None:
    """Results that could not be written wait, the latest of each, and are not acknowledged until they are."""
    pipeline.take(result("op-1"), NOW_MS)
    pipeline.seal()
    pipeline.take(result("op-2"), NOW_MS)
    released = pipeline.refused(FULL)
    assert released.effects == []
    assert pipeline.take(result("op-1"), NOW_MS).effects == []
    assert pipeline.parked == 2
    again = pipeline.recovered()
    assert [event.result.op_id for event in again if isinstance(event, ev.ResultReceived)] == ["op-2", "op-1"]
    for event in again:
        pipeline.take(event, NOW_MS)
    assert len(pipeline.seal() or []) == 2
    assert names(pipeline.committed().effects) == ["send ResultAck", "send ResultAck"]


def test_facts_of_benchmarks_are_parked_unless_they_are_errors() -> None:
    """What was stored, judged and written counts once the journal writes; what failed meanwhile is asked again."""

    def noting(state: State, event: ev.Event, now_ms: int) -> Turn:
        turn = Turn(state, now_ms, cause="test")
        turn.put(model("noted"), "model_registered")
        return turn

    pipeline = Pipeline(State(), noting)
    pipeline.take(result("op-1"), NOW_MS)
    pipeline.seal()
    pipeline.refused(FULL)
    kept = [
        ev.ArtifactStored("bench-1.0.0", 1, "load.bin", 9),
        ev.PointJudged("bench-1", 1, 0, is_valid=True),
        ev.BenchmarkWritten("bench-1", 1),
    ]
    asked_again = [
        ev.PointJudged("bench-1", 1, 1, error=FULL.info()),
        ev.BenchmarkWritten("bench-2", 1, FULL.info()),
    ]
    for event in (*kept, *asked_again):
        assert pipeline.take(event, NOW_MS).effects == []
    assert pipeline.recovered()[1:] == kept


def test_an_agent_that_cannot_be_admitted_is_sent_away(pipeline: Pipeline) -> None:
    """A hello whose records were refused ends its session, so that the agent tries again."""
    pipeline.take(ev.AgentSaidHello("ses-9", hello(), "10.0.0.1"), NOW_MS)
    pipeline.seal()
    assert names(pipeline.refused(FULL).effects) == ["close ses-9"]


def test_parking_has_a_limit(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit a session is ended instead: it reports everything when it returns."""
    monkeypatch.setattr(limits, "JOURNAL_QUEUE_EVENTS", 3)
    pipeline.problem = FULL
    for number in range(3):
        assert pipeline.take(result(f"op-{number}"), NOW_MS).effects == []
    assert names(pipeline.take(result("op-3"), NOW_MS).effects) == ["close ses-1"]
    assert pipeline.parked == 3


def test_a_bug_in_the_step_costs_one_request(pipeline: Pipeline) -> None:
    """The request is answered `internal`, the state is whole, undecided turns before it are untouched."""
    pipeline.take(register("a", "req-1"), NOW_MS)
    released = pipeline.take(register("bug", "req-2"), NOW_MS)
    assert isinstance(released.bug, ZeroDivisionError)
    assert names(released.effects) == ["refuse req-2 internal"]
    assert set(pipeline.state.models) == {"a"}
    pipeline.seal()
    assert names(pipeline.committed().effects) == ["reply req-1"]


def test_a_body_that_cannot_be_stored_costs_one_request(pipeline: Pipeline) -> None:
    """It is found when its turn is taken, not when a batch with others' records is written."""
    pipeline.take(register("a", "req-1"), NOW_MS)
    released = pipeline.take(register("unstorable", "req-2"), NOW_MS)
    assert isinstance(released.bug, TypeError)
    assert names(released.effects) == ["refuse req-2 internal"]
    assert [row.key for row in pipeline.seal() or []] == ["a"]


def test_a_journal_far_behind_refuses_more(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undecided records have a limit; beyond it changes are refused and facts parked until the disk catches up."""
    monkeypatch.setattr(pipeline_module, "OPEN_RECORDS", 4)
    for number in range(4):
        pipeline.take(register(f"m{number}", f"req-{number}"), NOW_MS)
    assert names(pipeline.take(register("more", "req-x"), NOW_MS).effects) == ["refuse req-x unavailable"]
    pipeline.take(result("op-1"), NOW_MS)
    assert pipeline.parked == 1
    pipeline.seal()
    released = pipeline.committed()
    assert len(released.retaken) == 1
    assert pipeline.open_records == 0


def test_the_small_core_used_here_is_faithful() -> None:
    """The records of the test's own builders put what they say."""
    assert record(1, "a").body == model("a")
