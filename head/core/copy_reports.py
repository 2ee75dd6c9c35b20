"""What agents say of copies, taken in: reports, progress and results, in any order, repeated or late.

The generation decides: what an agent says of an older order than the present one shows only that the order has to
be sent again. A copy is ready when the agent has verified it against the manifest that the cluster knows; the first
verified manifest of a revision is kept, and whatever differs from it never becomes a copy of that revision. What the
head does not know is listed or adopted, never deleted.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from common import ids, limits, wire
from common.errors import Cancelled, DigestMismatch, ErrorInfo, HerderError, Internal, InvalidValue
from common.manifest import Manifest
from head.core import commands
from head.core.copy_changes import become_ready, end_badly, fail, lose, pause_ms, rebalance, send_ensure
from head.core.copy_facts import (
    IN_FLIGHT,
    NOT_BEGUN,
    backing_of,
    is_projection,
    manifest_of,
    next_generation,
    node_of,
    storage_of,
)
from head.core.objects import Copy, ModelManifest, copy_key
from head.core.state import Progress, State
from head.core.turn import Turn

__all__ = ["lose", "observe", "on_progress", "on_result", "rebalance"]
_DIGEST_CHARS = 67  # "b3:" + 64 hex digits


def observe(
    turn: Turn,
    node_id: str,
    copies: Iterable[wire.CopyStatus],
    ops: Iterable[wire.OpStatus] = (),
) -> None:
    """Takes in a full report of a node: what it names is updated, what it leaves out is not there."""
    state = turn.state
    seen = {}
    for status in tuple(copies)[: limits.COPIES_PER_NODE]:
        key = _key_of(node_id, status)
        if key:
            seen[key] = status
    known = [key for key in sorted(state.copies_by_node.get(node_id, ())) if not is_projection(state.copies[key])]
    by_op = {op.op_id: op for op in ops}
    for key in known:
        copy = state.copies.get(key)
        if copy is not None:
            _observe(turn, copy, seen.get(key), by_op.get(commands.op_id(commands.COPY, key)))
    strangers = [seen[key] for key in sorted(seen.keys() - set(known))]
    unknown = tuple(status for status in strangers if not _adopt(turn, node_id, status))
    live = state.live.get(node_id)
    if live is not None:
        live.unknown_copies = unknown
    for storage in ("disk", "dram"):
        rebalance(turn, ids.parse_device(f"{node_id}:{storage}"))


def on_progress(turn: Turn, node_id: str, progress: wire.Progress) -> None:
    """Takes in how far a fetch is. Bytes are volatile; a new state and a size not known before are recorded."""
    copy = _named(turn.state, node_id, progress.op_id, progress.generation)
    if copy is None or copy.desired != "present" or copy.state not in (*NOT_BEGUN, *IN_FLIGHT):
        return
    if progress.state not in IN_FLIGHT:
        return
    _note_progress(turn, copy, progress.state, progress.bytes_done, progress.bytes_total)
    noted = turn.state.progress[copy.key]
    noted.rate_bytes_per_s = max(0.0, progress.rate_bytes_per_s)
    noted.source = progress.source[: limits.SOURCE_CHARS]


def on_result(turn: Turn, node_id: str, result: wire.Result) -> None:
    """Takes in how a copy's command ended; unknown and older ones change nothing. The caller acknowledges."""
    copy = _named(turn.state, node_id, result.op_id, result.generation)
    if copy is None:
        return
    if copy.desired == "absent":
        if result.outcome == "ok":
            turn.delete("copy", copy.key, "copy_dropped", cause=copy.cause)
        else:
            _drop_later(turn, copy, _error_of(result))
    elif copy.state == "ready":
        return  # said before
    elif result.outcome == "ok":
        _take_success(turn, copy, result)
    elif copy.state != "failed":
        end_badly(turn, copy, _error_of(result))


def check_manifest(manifest: Manifest, copy: Copy) -> HerderError | None:
    """What is wrong with a manifest that an agent sent for a copy; None: nothing."""
    if manifest.model != copy.model or manifest.revision != copy.revision:
        return InvalidValue(f"the manifest is of {manifest.model[:200]}@{manifest.revision[:64]}, not of this copy")
    if not 0 < len(manifest.files) <= limits.MANIFEST_FILES:
        return InvalidValue(f"the manifest has {len(manifest.files)} files", limit=limits.MANIFEST_FILES)
    if not _is_digest(manifest.digest) or not all(_is_digest(file.blob) for file in manifest.files):
        return InvalidValue("the manifest's digests are not of the known form")
    if any(file.size < 0 or file.chunk_bytes <= 0 for file in manifest.files):
        return InvalidValue("the manifest has a file of negative size")
    if len({file.path for file in manifest.files}) != len(manifest.files):
        return InvalidValue("the manifest names a file twice")
    try:
        for file in manifest.files:
            ids.check_relative_path(file.path)
    except HerderError as error:
        return error
    return None


def _observe(turn: Turn, copy: Copy, status: wire.CopyStatus | None, op: wire.OpStatus | None) -> None:
    seen_generation = max(status.generation if status else 0, op.generation if op else 0)
    if seen_generation > copy.generation:  # the head was restored from a backup: the agent would refuse our orders
        copy = msgspec.structs.replace(copy, generation=max(turn.next_generation(), seen_generation + 1))
        turn.put(copy, "copy_generation_raised")
    if copy.desired == "absent":
        is_done = op is not None and op.generation >= copy.generation and op.state == "done"
        if status is None and is_done:
            turn.delete("copy", copy.key, "copy_dropped", cause=copy.cause)
        else:
            turn.touch("copy", copy.key)
    elif status is None:
        _observe_missing(turn, copy, op)
    elif status.state == "ready":
        _observe_ready(turn, copy, status)
    elif status.state == "failed":
        if status.generation == copy.generation and copy.state != "failed":
            lacks_reason = Internal("the node says that the copy failed, and not why").info()
            end_badly(turn, copy, status.error or lacks_reason)
        elif copy.state in ("ready", "asleep"):
            lose(turn, copy, "the node does not have it: what it was ordered before has failed")
        else:
            _order_again(turn, copy, status)
    elif status.state in IN_FLIGHT and status.generation == copy.generation:
        if copy.state in (*NOT_BEGUN, *IN_FLIGHT):
            _note_progress(turn, copy, status.state, status.bytes_done, status.bytes_total)
    else:
        _order_again(turn, copy, status)


def _observe_missing(turn: Turn, copy: Copy, op: wire.OpStatus | None) -> None:
    """The agent does not have a copy that shall be there."""
    if copy.state in ("ready", "asleep"):
        lose(turn, copy, "the node does not have it any more")
    elif copy.state in IN_FLIGHT and (op is None or op.generation != copy.generation):
        turn.put(msgspec.structs.replace(copy, state="planned"), "copy_restarted", cause=copy.cause)
    else:
        turn.touch("copy", copy.key)


def _observe_ready(turn: Turn, copy: Copy, status: wire.CopyStatus) -> None:
    manifest = manifest_of(turn.state, copy.model, copy.revision)
    differs = manifest is not None and status.digest not in ("", manifest.digest)
    is_dram = storage_of(copy) == "dram"
    if differs and (copy.state == "ready" or status.generation >= copy.generation):
        if copy.state != "failed":
            fail(turn, copy, _mismatch(manifest, status.digest).info())
    elif copy.state == "ready":
        if copy.is_locked != status.is_locked:
            locked = msgspec.structs.replace(copy, is_locked=status.is_locked)
            turn.put(locked, "copy_locked" if status.is_locked else "copy_unlocked")
    elif manifest is None or differs or (not status.digest and not is_dram):
        if copy.state != "failed":
            _ask_for_result(turn, copy)
    elif copy.state == "failed" and is_dram and not _has_footing(turn.state, copy):
        return
    elif status.generation >= copy.generation or copy.state == "failed":
        become_ready(turn, copy, size=manifest.size_bytes, digest=manifest.digest, is_locked=status.is_locked)
    else:
        _order_again(turn, copy, status)


def _has_footing(state: State, copy: Copy) -> bool:
    """Whether the disk copy under a dram copy is there and shall stay."""
    below = backing_of(state, copy)
    return below is not None and below.desired == "present"


def _order_again(turn: Turn, copy: Copy, status: wire.CopyStatus) -> None:
    """The agent works by an older order (or drops what shall stay): ours has to reach it."""
    if copy.state in IN_FLIGHT and status.generation < copy.generation:
        turn.put(msgspec.structs.replace(copy, state="planned"), "copy_restarted", cause=copy.cause)
    turn.touch("copy", copy.key)


def _ask_for_result(turn: Turn, copy: Copy) -> None:
    """The agent says ready, but only its result can tell the manifest: the command, repeated, brings it."""
    if copy.state in NOT_BEGUN:
        turn.put(msgspec.structs.replace(copy, state="verifying"), "copy_verifying", cause=copy.cause)
        copy = turn.state.copies[copy.key]
    send_ensure(turn, copy)


def _adopt(turn: Turn, node_id: str, status: wire.CopyStatus) -> bool:
    """Takes a ready copy that the head does not know into its books (it was restored from an older backup)."""
    state = turn.state
    registered = state.models.get(status.model)
    if status.state != "ready" or registered is None or registered.is_deleting:
        return False
    manifest = manifest_of(state, status.model, status.revision)
    if manifest is not None and status.digest not in ("", manifest.digest):
        return False
    adopted = Copy(
        model=status.model,
        revision=status.revision,
        device=f"{node_id}:{status.storage}",
        desired="present",
        state="verifying",
        generation=max(turn.next_generation(), status.generation + 1),
        cause=turn.cause,
        created_ms=turn.now_ms,
        bytes=manifest.size_bytes if manifest else max(0, status.bytes_total),
    )
    if status.storage == "dram" and copy_key(status.model, status.revision, f"{node_id}:disk") not in state.copies:
        return False  # nothing to stand on
    turn.put(adopted, "copy_adopted", bytes=adopted.bytes)
    if manifest is not None and status.digest:
        become_ready(turn, adopted, size=manifest.size_bytes, digest=manifest.digest, is_locked=status.is_locked)
    else:
        send_ensure(turn, adopted)
    return True


def _take_success(turn: Turn, copy: Copy, result: wire.Result) -> None:
    known = manifest_of(turn.state, copy.model, copy.revision)
    if storage_of(copy) == "dram":
        if copy.state == "failed" and not _has_footing(turn.state, copy):
            return  # given up since, and the disk copy with it; the next report shows what is there
        size = known.size_bytes if known else copy.bytes
        is_locked = bool(result.detail.get("is_locked", False))
        become_ready(turn, copy, size=size, digest=known.digest if known else "", is_locked=is_locked)
        return
    manifest = result.manifest or known
    if manifest is None:
        fail(turn, copy, Internal("the node reported success without a manifest").info())
        return
    wrong = check_manifest(manifest, copy)
    if wrong is not None:
        fail(turn, copy, wrong.info())
        return
    if known is not None and manifest.digest != known.digest:
        fail(turn, copy, _mismatch(known, manifest.digest).info())
        return
    if known is None:
        kept = ModelManifest(manifest=manifest, made_by=node_of(copy), at_ms=turn.now_ms)
        turn.put(kept, "manifest_made", cause=copy.cause, bytes=manifest.size_bytes)
    become_ready(turn, copy, size=manifest.size_bytes, digest=manifest.digest)
    if known is None:  # copies that were admitted without a size have one now
        keys = sorted(turn.state.copies_by_model.get(copy.model, ()))
        others = [other for other in (turn.state.copies[key] for key in keys) if not other.bytes]
        for device in dict.fromkeys(other.device for other in others if not is_projection(other)):
            rebalance(turn, ids.parse_device(device))


def _drop_later(turn: Turn, copy: Copy, error: ErrorInfo) -> None:
    """The agent could not drop it (an engine has it open): again after a pause, for as long as it is unwanted."""
    attempts = copy.attempts + 1
    later = msgspec.structs.replace(
        copy,
        attempts=attempts,
        error=error,
        generation=next_generation(turn, copy),
        not_before_ms=turn.now_ms + pause_ms(attempts),
    )
    turn.put(later, "copy_drop_failed", cause=copy.cause, error=error.code)


def _note_progress(turn: Turn, copy: Copy, state_word: str, done: int, total: int) -> None:
    """Writes how far a copy is; records a change of its state, and its size when that is news."""
    noted = turn.state.progress.get(copy.key)
    if noted is None:
        noted = turn.state.progress[copy.key] = Progress(started_ms=turn.now_ms, changed_ms=turn.now_ms)
    done, total = max(0, done), max(0, total)
    if done > noted.bytes_done or state_word != noted.state:
        noted.changed_ms = turn.now_ms
    noted.state, noted.bytes_done, noted.bytes_total = state_word, done, total
    size = copy.bytes or total
    if copy.state != state_word or size != copy.bytes:
        turn.put(msgspec.structs.replace(copy, state=state_word, bytes=size), f"copy_{state_word}", cause=copy.cause)
    if size != copy.bytes:
        rebalance(turn, ids.parse_device(copy.device))


def _named(state: State, node_id: str, op_id: str, generation: int) -> Copy | None:
    """The copy that a frame of this node is about, if the frame belongs to its present order."""
    kind, key = commands.split_op_id(op_id)
    copy = state.copies.get(key) if kind == commands.COPY else None
    if copy is None or node_of(copy) != node_id or copy.generation != generation or is_projection(copy):
        return None
    return copy


def _key_of(node_id: str, status: wire.CopyStatus) -> str:
    """The key of a reported copy; "" when its names are not usable."""
    try:
        ids.check_model_name(status.model)
        ids.check_revision(status.revision)
    except HerderError:
        return ""
    return (
        copy_key(status.model, status.revision, f"{node_id}:{status.storage}")
        if (status.storage in ("disk", "dram"))
        else ""
    )


def _error_of(result: wire.Result) -> ErrorInfo:
    if result.outcome == "cancelled":
        return result.error or Cancelled("the node stopped working on it").info()
    return result.error or Internal("the node gave no reason").info()


def _mismatch(known: Manifest | None, found: str) -> DigestMismatch:
    return DigestMismatch(
        "the files differ from what this revision is known to be",
        hint="the source has changed: register it under another revision",
        known=known.digest if known else "",
        found=found[:_DIGEST_CHARS],
    )


def _is_digest(text: str) -> bool:
    return len(text) == _DIGEST_CHARS and text.startswith("b3:") and all(c in "0123456789abcdef" for c in text[3:])
