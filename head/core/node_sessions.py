"""Sessions of agents: hello, leases, reports, results, the end. What a session says is believed for that session.

A newer session of a node takes over from an older one, whose frames are ignored from then on. Heartbeats write
floats and nothing else; only transitions become records. What is written here beside the records (`State.live`) is
taken back with its turn when the agent would otherwise never repeat it.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable
from typing import Any

import msgspec

from common import ids, limits, tickets, wire
from common.errors import (
    Conflict,
    Forbidden,
    HerderError,
    InvalidName,
    InvalidValue,
    ProtocolUnsupported,
    StaleHead,
    TooMany,
    WrongCluster,
)
from head.core import benchmark_runs, commands, copies, health_checks, node_facts, services
from head.core.effects import Alarm, CloseSession, Send
from head.core.events import (
    AgentLeaving,
    AgentReported,
    AgentSaidHello,
    Event,
    LeaseRenewed,
    ProgressReceived,
    ResultReceived,
    SessionClosed,
    TelemetryReceived,
)
from head.core.objects import Node
from head.core.state import Live, State
from head.core.turn import Turn

_AGENT_IDS_KEPT = 16


def said_hello(turn: Turn, event: AgentSaidHello) -> None:
    """Takes an agent in, or refuses it with the reason and closes its session."""
    hello = event.hello
    try:
        _check_hello(turn.state, hello)
        _check_identity(turn, hello)
    except HerderError as error:
        turn.emit(CloseSession(event.session_id, error.info()))
        return
    state, node_id = turn.state, hello.node_id
    before = state.nodes.get(node_id)
    _open_session(turn, event, before)
    node = _node_of(turn, hello, event.peer, before)
    if before is None:
        turn.put(node, "node_joined")
    elif node != before:
        is_back = before.status != "online"
        turn.put(node, "node_returned" if is_back else "node_updated", boot_id=node.boot_id)
    state.lost_ms.pop(node_id, None)
    if before is not None and before.boot_id != hello.boot_id:
        copies.on_node_rebooted(turn, node_id)
        services.on_node_rebooted(turn, node_id)
        benchmark_runs.on_node_rebooted(turn, node_id)
    if before is not None and before.inventory != hello.inventory:
        copies.on_inventory(turn, node_id)
    turn.emit(
        Send(
            node_id,
            event.session_id,
            wire.Welcome(
                proto=min(limits.PROTOCOL, hello.proto_max),
                cluster_id=state.cluster_id,
                head_epoch=state.head_epoch,
                session_id=event.session_id,
                lease_ms=node_facts.lease_ms(state),
                interval_ms=node_facts.interval_ms(state),
                respread_ms=node_facts.respread_ms(state),
                ticket_key=base64.b64encode(tickets.node_key(state.ticket_secret, node_id)).decode(),
                features=(wire.FEATURE_REPORT_PAGES,),
            ),
        )
    )


def renewed(turn: Turn, event: LeaseRenewed) -> None:
    """The heartbeat: a few numbers are written and an answer goes back; no record unless the node had been lost."""
    live = _live(turn, event.node, event.session_id)
    if live is None:
        return
    state, lease = turn.state, event.lease
    live.boottime_offset_ms = lease.sent_boottime_ms - turn.now_ms
    _seen(turn, event.node, live)
    if not live.has_reported:
        wants_report = True
    elif live.report_digest is None:  # the report did not say its own digest
        live.report_digest = lease.digest
        wants_report = False
    else:
        wants_report = lease.digest != live.report_digest
    turn.emit(
        Send(
            event.node,
            event.session_id,
            wire.Ack(
                seq=lease.seq,
                lease_ms=node_facts.lease_ms(state),
                interval_ms=node_facts.interval_ms(state),
                wants_report=wants_report,
            ),
        )
    )


def reported(turn: Turn, event: AgentReported) -> None:
    """Everything that the agent holds: taken in, and what disagrees with what is desired is ordered again."""
    live = _live(turn, event.node, event.session_id)
    if live is None or event.report.seq <= live.report_seq:
        return
    report = _whole(turn, event, live)
    if report is None:
        return
    is_first = not live.has_reported

    def ask_again() -> None:
        live.has_reported, live.report_digest, live.report_seq = False, None, -1

    turn.on_rollback(ask_again)
    live.has_reported = True
    live.report_seq = report.seq
    live.report_digest = report.digest or None
    _seen(turn, event.node, live)
    copies.observe(turn, event.node, report.copies, report.ops)
    services.observe(turn, event.node, report.replicas)
    benchmark_runs.observe(turn, event.node, report.runs)
    if is_first:
        benchmark_runs.touch_on(turn, event.node)
        for key in tuple(turn.state.replicas_by_node.get(event.node, ())):
            turn.touch("replica", key)
        for key, check in turn.state.checks.items():
            if check.node == event.node:
                turn.touch("check", key)


def _whole(turn: Turn, event: AgentReported, live: Live) -> wire.Report | None:
    """The report that this page completes; None while pages are missing. Nothing of those is believed before.

    Pages of the newest report are kept with the session and go with it. One that is lost is not asked for: the next
    lease asks for the whole report again.
    """
    page = event.report
    if page.pages == 1 and page.page == 0:
        live.report_pages = {}
        return page
    if not 0 <= page.page < page.pages <= limits.REPORT_PAGES:
        turn.emit(CloseSession(event.session_id, InvalidValue("a report has pages that cannot be").info()))
        return None
    kept = live.report_pages
    newest = next(iter(kept.values())).seq if kept else -1
    if page.seq < newest:
        return None
    if page.seq > newest:
        kept = live.report_pages = {}
    kept[page.page] = page
    _seen(turn, event.node, live)
    if len(kept) < page.pages:
        return None
    live.report_pages = {}
    ordered = [kept[index] for index in sorted(kept)]
    whole = wire.Report(
        page.seq,
        copies=tuple(status for one in ordered for status in one.copies),
        replicas=tuple(status for one in ordered for status in one.replicas),
        ops=tuple(op for one in ordered for op in one.ops),
        runs=tuple(run for one in ordered for run in one.runs),
        digest=page.digest,
    )
    if len(whole.copies) > limits.COPIES_PER_NODE or len(whole.replicas) > 2 * limits.REPLICAS_PER_NODE:
        turn.emit(CloseSession(event.session_id, InvalidValue("a report names more than a node can hold").info()))
        return None
    return whole


def told_readings(turn: Turn, event: TelemetryReceived) -> None:
    """The latest readings replace the ones before."""
    live = _live(turn, event.node, event.session_id)
    if live is not None:
        live.readings = event.telemetry


def progressed(turn: Turn, event: ProgressReceived) -> None:
    """How far a command is, for the resource that it is about."""
    if _live(turn, event.node, event.session_id) is None:
        return
    kind, _ = commands.split_op_id(event.progress.op_id)
    if kind == commands.COPY:
        copies.on_progress(turn, event.node, event.progress)
    elif kind == commands.REPLICA:
        services.on_progress(turn, event.node, event.progress)
    elif kind == commands.RUN:
        benchmark_runs.on_progress(turn, event.node, event.progress)


def ended(turn: Turn, event: ResultReceived) -> None:
    """How a command ended. Acknowledged in any case, so that the agent can forget it, once our records are durable."""
    if _live(turn, event.node, event.session_id) is None:
        return
    result = event.result
    kind, _ = commands.split_op_id(result.op_id)
    if kind == commands.COPY:
        copies.on_result(turn, event.node, result)
    elif kind == commands.REPLICA:
        services.on_result(turn, event.node, result)
    elif kind == commands.CHECK:
        health_checks.on_result(turn, event.node, result)
    elif kind in (commands.RUN, commands.FIRE, commands.END):
        benchmark_runs.on_result(turn, event.node, result)
    turn.emit(Send(event.node, event.session_id, wire.ResultAck(op_id=result.op_id, generation=result.generation)))


def is_leaving(turn: Turn, event: AgentLeaving) -> None:
    """The node's time ends: nothing new is placed there, and its services look for other places."""
    if _live(turn, event.node, event.session_id) is None:
        return
    node = turn.state.nodes[event.node]
    leaving_ms = turn.now_ms + max(0, event.leaving.deadline_ms)
    if node.leaving_ms and node.leaving_ms <= leaving_ms:
        return  # said before
    turn.put(msgspec.structs.replace(node, leaving_ms=leaving_ms), "node_leaving", reason=event.leaving.reason[:200])
    services.on_node_draining(turn, event.node)


def closed(turn: Turn, event: SessionClosed) -> None:
    """The websocket is gone: the node is suspect until it comes back or its lease ends."""
    live = turn.state.live.get(event.node)
    if live is not None and live.session_id == event.session_id:
        live.session_id = ""
        live.has_reported = False
        live.report_pages = {}


def _check_hello(state: State, hello: wire.Hello) -> None:
    """Raises: InvalidName, ProtocolUnsupported, WrongCluster, StaleHead, TooMany."""
    if hello.proto_min > limits.PROTOCOL or hello.proto_max < limits.PROTOCOL_MIN:
        raise ProtocolUnsupported(
            f"the agent speaks protocol {hello.proto_min} to {hello.proto_max}, "
            f"this head {limits.PROTOCOL_MIN} to {limits.PROTOCOL}",
            hint="upgrade the head first, then the agents",
            head_min=limits.PROTOCOL_MIN,
            head_max=limits.PROTOCOL,
            agent_min=hello.proto_min,
            agent_max=hello.proto_max,
        )
    ids.check_node_id(hello.node_id)
    ids.check_labels(hello.labels)
    if not hello.boot_id or not hello.agent_id or not 0 <= hello.data_port <= 65_535:
        raise InvalidName("the hello lacks its boot id or agent id, or its port is not one")
    if hello.cluster_id and hello.cluster_id != state.cluster_id:
        raise WrongCluster(
            "the agent belongs to another cluster",
            hint="give it an empty state directory if it shall join this one",
            ours=state.cluster_id,
            theirs=hello.cluster_id[:64],
        )
    if hello.max_head_epoch > state.head_epoch:
        raise StaleHead(
            f"the agent has served head epoch {hello.max_head_epoch}, this head is at {state.head_epoch}",
            hint="this head runs on old state: stop it, or restore with a higher epoch",
            head_epoch=state.head_epoch,
            seen=hello.max_head_epoch,
        )
    if hello.node_id not in state.nodes and len(state.nodes) >= limits.NODES:
        raise TooMany(f"{limits.NODES} nodes are known", hint="remove nodes that are gone")


def _check_identity(turn: Turn, hello: wire.Hello) -> None:
    """A node id belongs to the secret that was shown with it first. Raises: Forbidden.

    A node without a secret (an agent of an older version) is bound by the first hello that brings one, and from then
    on a hello without is refused too.
    """
    node = turn.state.nodes.get(hello.node_id)
    alarm = f"wrong_identity:{hello.node_id}"
    if node is None or not node.identity_sha256:
        return
    if hmac.compare_digest(node.identity_sha256, hello.identity):
        turn.emit(Alarm(alarm, "the node has come with its own secret", is_on=False))
        return
    turn.emit(Alarm(alarm, f"an agent says that it is {hello.node_id} and does not know that node's secret"))
    raise Forbidden(
        f"{hello.node_id} is known under another secret",
        hint=f"if its state directory was lost: `herder nodes reset-identity {hello.node_id}`; else give this agent "
        "a node id of its own",
        node=hello.node_id,
    )


def _open_session(turn: Turn, event: AgentSaidHello, before: Node | None) -> None:
    """Makes this the node's session; an older one is closed. A turn taken back leaves the old one standing."""
    state, node_id = turn.state, event.hello.node_id
    old = state.live.get(node_id)
    live = Live(
        session_id=event.session_id,
        lease_until_ms=turn.now_ms + node_facts.lease_ms(state),
        last_seen_ms=turn.now_ms,
        interval_ms=node_facts.interval_ms(state),
        opened_ms=turn.now_ms,
    )
    if old is not None:
        live.boottime_offset_ms = old.boottime_offset_ms
        live.readings = old.readings
        live.unknown_copies = old.unknown_copies
        live.agent_ids, live.flaps, live.flapped_ms = dict(old.agent_ids), old.flaps, old.flapped_ms
        if old.session_id and old.session_id != event.session_id:
            superseded = Conflict("a newer session of this node took over")
            turn.emit(CloseSession(old.session_id, superseded.info()))
    state.live[node_id] = live

    def restore() -> None:
        if old is None:
            state.live.pop(node_id, None)
        else:
            state.live[node_id] = old

    turn.on_rollback(restore)
    _count_flaps(turn, live, event.hello, before)


def _count_flaps(turn: Turn, live: Live, hello: wire.Hello, before: Node | None) -> None:
    """An agent process that returns after another took its place: both run, under one node id."""
    since_ms = live.agent_ids.pop(hello.agent_id, None)
    is_other = before is not None and before.agent_id != hello.agent_id
    if is_other and since_ms is not None and turn.now_ms - since_ms < limits.FLAP_WINDOW_MS:
        live.flaps += 1
        live.flapped_ms = turn.now_ms
        if live.flaps >= limits.FLAPS_ALARM:
            text = f"two agents use the node id {hello.node_id} and take over from each other"
            turn.emit(Alarm(f"duplicate_node:{hello.node_id}", text))
    live.agent_ids[hello.agent_id] = turn.now_ms
    while len(live.agent_ids) > _AGENT_IDS_KEPT:
        del live.agent_ids[next(iter(live.agent_ids))]


def _node_of(turn: Turn, hello: wire.Hello, peer: str, before: Node | None) -> Node:
    """The node as this hello makes it; what operators set stays. A new agent process is not leaving any more."""
    said = {
        "boot_id": hello.boot_id,
        "agent_id": hello.agent_id,
        "version": hello.version[:64],
        "inventory": hello.inventory,
        "agent_labels": dict(hello.labels),
        "advertise": hello.advertise or peer,
        "data_port": hello.data_port,
        "http_port": hello.http_port,
        "launch_id": hello.launch_id,
        "identity_sha256": hello.identity,
    }
    if before is None:
        return Node(
            id=hello.node_id,
            first_seen_ms=turn.now_ms,
            status="online",
            status_since_ms=turn.now_ms,
            generation=turn.next_generation(),
            **said,  # type: ignore[arg-type]
        )
    node = msgspec.structs.replace(before, **said)
    if before.agent_id != hello.agent_id or before.status == "left":
        node = msgspec.structs.replace(node, leaving_ms=0)
    if before.status != "online":
        node = msgspec.structs.replace(node, status="online", status_since_ms=turn.now_ms)
    if node != before:
        node = msgspec.structs.replace(node, generation=turn.next_generation())
    return node


def _live(turn: Turn, node_id: str, session_id: str) -> Live | None:
    """The node's live facts if this is its present session; a frame of any other ends that other."""
    live = turn.state.live.get(node_id)
    if live is not None and live.session_id == session_id and node_id in turn.state.nodes:
        return live
    turn.emit(CloseSession(session_id, Conflict("this session has ended").info()))
    return None


def _seen(turn: Turn, node_id: str, live: Live) -> None:
    """The node has spoken: its lease runs anew; one that was judged lost is back."""
    live.last_seen_ms = turn.now_ms
    live.lease_until_ms = turn.now_ms + node_facts.lease_ms(turn.state)
    node = turn.state.nodes[node_id]
    if node.status != "online":
        turn.put(msgspec.structs.replace(node, status="online", status_since_ms=turn.now_ms), "node_returned")
        turn.state.lost_ms.pop(node_id, None)


HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    AgentSaidHello: said_hello,
    AgentReported: reported,
    LeaseRenewed: renewed,
    TelemetryReceived: told_readings,
    ProgressReceived: progressed,
    ResultReceived: ended,
    AgentLeaving: is_leaving,
    SessionClosed: closed,
}
