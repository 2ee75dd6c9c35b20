"""Commands to agents and the tickets in them: when one goes out, and that it is not sent too often.

A command says what one object wants; it goes out when the object changes, again in each new session once the agent
has reported, and when a report disagrees, at most once per COMMAND_REPEAT_MS and generation. Sending is never
relied upon: whoever sends here looks at reports and results to learn what became of it.
"""

from __future__ import annotations

from common import limits, tickets, wire
from head.core.effects import Send
from head.core.state import Live, State
from head.core.turn import Turn

COPY, REPLICA, CHECK = "copy", "replica", "check"
RUN, FIRE, END = "run", "fire", "end"
_KINDS = frozenset({COPY, REPLICA, CHECK, RUN, FIRE, END})


def op_id(kind: str, key: str) -> str:
    """The command name of an object: "copy:<copy key>", "replica:<replica id>", "check:<check id>", "run:<run id>"."""
    return f"{kind}:{key}"


def split_op_id(text: str) -> tuple[str, str]:
    """The kind and key in an op id; ("", "") when it is none of ours."""
    kind, colon, key = text.partition(":")
    return (kind, key) if colon and key and kind in _KINDS else ("", "")


def session_of(state: State, node: str) -> Live | None:
    """The node's open session, once it has reported in it; commands go only there."""
    live = state.live.get(node)
    return live if live is not None and live.session_id and live.has_reported else None


def is_due(turn: Turn, node: str, op: str, generation: int, *, force: bool = False) -> bool:
    """Whether this command may go out now: an open session that has reported, and not sent in it just before."""
    live = session_of(turn.state, node)
    if live is None:
        return False
    sent_ms = turn.state.commanded_ms.get(_sent_key(node, op, generation))
    return force or sent_ms is None or sent_ms < live.opened_ms or turn.now_ms - sent_ms >= limits.COMMAND_REPEAT_MS


def was_sent(state: State, node: str, op: str, generation: int) -> bool:
    """Whether this command went out lately (within about COMMAND_REPEAT_MS) or in this session's first moments."""
    return _sent_key(node, op, generation) in state.commanded_ms


def send_if_due(
    turn: Turn,
    node: str,
    op: str,
    generation: int,
    body: wire.AnyCommand,
    force: bool = False,
    *,
    cause: str = "",
    deadline_ms: int = 0,
) -> bool:
    """Sends a command to the node's open session if it is due; says whether it did.

    `force` sends even if the same generation was just sent. A turn that is rolled back forgets the sending.
    """
    if not is_due(turn, node, op, generation, force=force):
        return False
    state = turn.state
    live = state.live[node]
    key = _sent_key(node, op, generation)
    before = state.commanded_ms.pop(key, None)
    state.commanded_ms[key] = turn.now_ms

    def forget() -> None:
        state.commanded_ms.pop(key, None)
        if before is not None:
            state.commanded_ms[key] = before

    turn.on_rollback(forget)
    command = wire.Command(
        op_id=op,
        generation=generation,
        head_epoch=state.head_epoch,
        cause=cause or turn.cause,
        body=body,
        deadline_ms=deadline_ms,
    )
    turn.emit(Send(node, live.session_id, command))
    return True


def on_tick(turn: Turn) -> None:
    """Forgets sendings that are old enough to be repeated anyway."""
    sent = turn.state.commanded_ms
    while sent:
        key = next(iter(sent))
        if turn.now_ms - sent[key] < limits.COMMAND_REPEAT_MS:
            break
        del sent[key]


def issue_ticket(state: State, *, serving_node: str, reading_node: str, digest: str, now_ms: int) -> str:
    """A ticket that lets `reading_node` read the model with this manifest digest from `serving_node`.

    It ends after TICKET_TTL_MS in the serving node's own boottime, known from that node's last lease.
    """
    live = state.live.get(serving_node)
    offset_ms = live.boottime_offset_ms if live is not None else 0
    ticket = tickets.Ticket(
        cluster_id=state.cluster_id,
        serving_node=serving_node,
        reading_node=reading_node,
        digest=digest,
        until_boottime_ms=now_ms + offset_ms + limits.TICKET_TTL_MS,
    )
    return tickets.issue(ticket, tickets.node_key(state.ticket_secret, serving_node))


def _sent_key(node: str, op: str, generation: int) -> str:
    return f"{node}|{op}|{generation}"
