"""Copies: wanted, fetched, dropped, pinned."""

from __future__ import annotations

import pytest

from common import limits, wire
from common.errors import HerderError
from head.core import copies
from head.core.events import CordonRequested, DrainRequested, PinRequested, UnpinRequested
from herder import types as api
from tests.doubles.head_copies import DISK, drop, ensure, make, refusal
from tests.doubles.head_core import GIB, World, error, inventory, manifest


class TestWant:
    """What may be wanted, and what happens then."""

    def test_the_command_goes_out_with_sources(self) -> None:
        """Op id, generation, epoch and cause name the order."""
        world = make()
        copy = world.want("m", "n1:disk", cause="job-1")
        command = world.command(wire.EnsureCopy)
        assert command is not None
        assert (command.op_id, command.generation, command.head_epoch) == (f"copy:{DISK}", copy.generation, 1)
        assert command.cause == "job-1"
        assert command.body == wire.EnsureCopy(
            model="m", revision="main", storage="disk", sources=(wire.Source(url="https://h/m.gguf"),)
        )

    @pytest.mark.parametrize(
        ("device", "code"),
        [
            ("n1:banana9", "invalid_device"),
            ("nowhere", "invalid_device"),
            ("n2:disk", "device_not_found"),
            ("n1:dram", "device_not_found"),
            ("n1:gpu7", "device_not_found"),
            ("n1:gpu0", "invalid_device"),
        ],
    )
    def test_devices_that_cannot_hold_it(self, device: str, code: str) -> None:
        """Unknown devices are refused with what exists; GPUs hold engines."""
        world = World()
        world.join("n1", gpus=(GIB,))
        world.register("m", "https://h/m")
        caught = refusal(world, "m", device)
        assert caught.code == code
        assert caught.hint

    def test_device_not_found_says_what_exists(self) -> None:
        """The refusal helps."""
        assert refusal(make(), "m", "n1:gpu3").details["devices"] == ["n1:disk"]

    def test_unknown_model(self) -> None:
        """Copies are of registered models."""
        assert refusal(make(), "other", "n1:disk").code == "model_not_found"

    def test_without_any_source(self) -> None:
        """Nothing to fetch from is said at once."""
        world = World()
        world.join("n1")
        world.register("m")
        assert refusal(world, "m", "n1:disk").code == "source_not_found"

    @pytest.mark.parametrize("source", ["ftp://x/y", "https://u:p@h/x"])
    def test_a_bad_explicit_source(self, source: str) -> None:
        """A source in a request is checked as a registered one."""
        assert refusal(make(), "m", "n1:disk", source=source).code == "invalid_source"

    def test_cordoned_draining_and_unreachable_nodes_take_nothing_new(self) -> None:
        """Each is refused with its reason; a copy that is there already is still given back."""
        world = make(nodes=("n1", "n2", "n3"))
        key = world.fetched("m", "n1:disk", 1000)
        world.request(CordonRequested, node="n1", is_cordoned=True)
        world.request(DrainRequested, node="n2", body=api.DrainNode())
        assert world.want("m", "n1:disk").key == key
        assert refusal(world, "m", "n2:disk").code == "node_cordoned"
        world.pass_s(17, alive=("n1", "n2"))
        assert refusal(world, "m", "n3:disk").code == "node_unreachable"

    def test_a_node_without_session_gets_the_order_when_it_returns(self) -> None:
        """Desired state is durable; the command follows the first report of the next session."""
        world = make()
        world.close("n1")
        world.want("m", "n1:disk")
        assert ensure(world) is None
        world.hello("n1", inventory(hostname="n1"))
        assert ensure(world) is None
        world.report("n1")
        assert ensure(world) is not None

    def test_wanting_again_changes_nothing(self) -> None:
        """A copy on its way is returned as it is."""
        world = make()
        first = world.want("m", "n1:disk")
        assert world.want("m", "n1:disk") == first

    def test_the_command_is_repeated_but_not_at_once(self) -> None:
        """An order that nobody confirmed is sent again after COMMAND_REPEAT_MS."""
        world = make()
        world.want("m", "n1:disk")
        quiet = world.pass_s(limits.COMMAND_REPEAT_MS / 1000 - 2, alive=("n1",))
        loud = world.pass_s(4, alive=("n1",))
        is_command = [isinstance(getattr(effect, "message", None), wire.Command) for effect in quiet]
        assert not any(is_command)
        assert sum(isinstance(getattr(effect, "message", None), wire.Command) for effect in loud) == 1

    def test_a_rolled_back_order_is_forgotten(self) -> None:
        """The journal refused: nothing was sent, nothing counts as sent, nobody reads."""
        world = make()
        world.want("m", "n1:disk")
        assert world.turn is not None
        world.turn.rollback()
        assert world.state.copies == {}
        assert world.state.commanded_ms == {}
        assert world.state.offered == {}

    def test_gpu_colon_form_is_the_same_device(self) -> None:
        """Keys are canonical."""
        world = World()
        world.join("n1", dram=GIB)
        world.register("m", "https://h/m")
        assert world.want("m", "n1:dram").device == "n1:dram"


class TestResults:
    """How fetches end."""

    def test_success_makes_it_ready_and_keeps_the_manifest(self) -> None:
        """Size and digest are the verified ones."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK, manifest=manifest("m", 1234))
        copy = world.state.copies[DISK]
        assert (copy.state, copy.bytes, copy.digest) == ("ready", 1234, manifest("m", 1234).digest)
        assert world.state.manifests["m@main"].made_by == "n1"
        assert copies.ready_on(world.state, "m", "main", "n1") == copy

    def test_success_without_a_manifest_is_no_success(self) -> None:
        """Nothing is trusted that was not verified."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK)
        assert world.state.copies[DISK].state == "failed"

    @pytest.mark.parametrize(
        "bad",
        [
            manifest("other", 10),
            manifest("m", 10, "v2"),
            manifest("m", -5),
            manifest("m", 10, salt="z"),
        ],
    )
    def test_a_manifest_that_cannot_be_is_refused(self, bad: object) -> None:
        """Wrong model, revision, size or digest: the copy fails, the manifest is not kept."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK, manifest=bad)  # type: ignore[arg-type]
        assert world.state.copies[DISK].state == "failed"
        assert world.state.manifests == {}

    @pytest.mark.parametrize("path", ["../../etc/passwd", "/abs", "a//b", "a\x00b"])
    def test_a_manifest_with_a_bad_path_is_refused(self, path: str) -> None:
        """Paths of a manifest are used on every node."""
        import msgspec

        world = make()
        world.want("m", "n1:disk")
        good = manifest("m", 10)
        bad = msgspec.structs.replace(good, files=(msgspec.structs.replace(good.files[0], path=path),))
        world.result(DISK, manifest=bad)
        assert world.state.copies[DISK].error.code == "invalid_path"  # type: ignore[union-attr]

    def test_another_content_never_becomes_a_copy_of_the_revision(self) -> None:
        """The source changed between two fetches."""
        world = make(nodes=("n1", "n2"))
        world.fetched("m", "n1:disk", 1000)
        world.want("m", "n2:disk")
        world.result("m@main|n2:disk", manifest=manifest("m", 1000, salt="f"))
        copy = world.state.copies["m@main|n2:disk"]
        assert (copy.state, copy.error.code) == ("failed", "digest_mismatch")  # type: ignore[union-attr]

    def test_a_stale_result_changes_nothing_and_is_acknowledged(self) -> None:
        """Only the present generation counts."""
        world = make()
        copy = world.want("m", "n1:disk")
        world.result(DISK, manifest=manifest("m", 10), generation=copy.generation - 1)
        assert world.state.copies[DISK].state == "planned"
        assert any(isinstance(getattr(e, "message", None), wire.ResultAck) for e in world.effects)

    def test_a_result_of_another_node_changes_nothing(self) -> None:
        """An agent speaks only of its own copies."""
        from head.core.events import ResultReceived

        world = make(nodes=("n1", "n2"))
        copy = world.want("m", "n1:disk")
        result = wire.Result(op_id=f"copy:{DISK}", generation=copy.generation, outcome="ok", manifest=manifest("m", 1))
        world.step(ResultReceived(node="n2", session_id=world.session("n2"), result=result))
        assert world.state.copies[DISK].state == "planned"

    def test_a_repeated_result_is_the_same(self) -> None:
        """Results are repeated until acknowledged."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK, manifest=manifest("m", 10))
        world.result(DISK, manifest=manifest("m", 10))
        assert world.turn is not None
        assert world.turn.records == []

    def test_retryable_failures_are_tried_again_with_pauses_up_to_the_limit(self) -> None:
        """Each attempt has a new generation; the last one is final."""
        world = make()
        generation = world.want("m", "n1:disk").generation
        for attempt in range(1, limits.STEP_ATTEMPTS):
            world.result(DISK, "failed", error=error("source_failed", is_retryable=True))
            copy = world.state.copies[DISK]
            assert (copy.state, copy.attempts) == ("planned", attempt)
            assert copy.generation > generation
            assert ensure(world) is None, "the pause comes first"
            generation = copy.generation
            pause_s = (copy.not_before_ms - world.now_ms) // 1000
            assert pause_s == 2 ** (attempt - 1)
            effects = world.pass_s(pause_s, alive=("n1",))
            assert any(isinstance(getattr(e, "message", None), wire.Command) for e in effects)
        world.result(DISK, "failed", error=error("source_failed", is_retryable=True))
        assert world.state.copies[DISK].state == "failed"
        effects = world.pass_s(120, alive=("n1",))
        assert not any(isinstance(getattr(e, "message", None), wire.Command) for e in effects)

    def test_a_final_failure_is_final_and_wanting_again_starts_anew(self) -> None:
        """A person may mend the cause and ask again."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK, "failed", error=error("source_refused"))
        assert world.state.copies[DISK].state == "failed"
        again = world.want("m", "n1:disk")
        assert (again.attempts, again.error) == (0, None)
        assert ensure(world) is not None

    def test_a_cancelled_fetch_has_failed(self) -> None:
        """The agent stopped by itself: the outcome is known."""
        world = make()
        world.want("m", "n1:disk")
        world.result(DISK, "cancelled")
        assert world.state.copies[DISK].error.code == "cancelled"  # type: ignore[union-attr]


class TestProgress:
    """How far a fetch is."""

    def test_bytes_are_volatile_states_are_recorded(self) -> None:
        """A record per state, not per megabyte."""
        world = make()
        world.want("m", "n1:disk")
        world.progress("n1", DISK, "fetching", 10, 100, rate_bytes_per_s=5.0, source="https://h/m.gguf")
        assert world.turn is not None
        assert [record.what for record in world.turn.records] == ["copy_fetching"]
        world.progress("n1", DISK, "fetching", 50, 100)
        assert world.turn.records == []
        assert world.state.progress[DISK].bytes_done == 50
        assert world.state.copies[DISK].bytes == 100

    @pytest.mark.parametrize("word", ["ready", "planned", "nonsense", "dropping"])
    def test_words_that_are_no_progress_change_nothing(self, word: str) -> None:
        """Only a result makes a copy ready."""
        world = make()
        world.want("m", "n1:disk")
        world.progress("n1", DISK, word, 10, 100)
        assert world.state.copies[DISK].state == "planned"

    def test_late_progress_does_not_unmake_a_ready_copy(self) -> None:
        """Frames may come late."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.progress("n1", key, "fetching", 1, 10)
        assert world.state.copies[key].state == "ready"
        assert key not in world.state.progress


class TestDrop:
    """Copies that are not wanted any more."""

    def test_it_is_gone_when_the_agent_confirms(self) -> None:
        """The object stays until then, dropping."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        drop(world, key)
        assert world.state.copies[key].state == "dropping"
        assert isinstance(world.command(wire.DropCopy), wire.Command)
        world.result(key)
        assert key not in world.state.copies

    def test_a_report_without_it_is_no_confirmation_but_a_done_order_is(self) -> None:
        """The report may be older than the order that still travels."""
        world = make()
        world.want("m", "n1:disk")
        gone = drop(world, DISK)
        assert gone is not None
        world.report("n1")
        assert world.state.copies[DISK].state == "dropping"
        world.report("n1", ops=(wire.OpStatus(op_id=f"copy:{DISK}", generation=gone.generation - 1, state="done"),))
        assert DISK in world.state.copies
        world.report("n1", ops=(wire.OpStatus(op_id=f"copy:{DISK}", generation=gone.generation, state="done"),))
        assert DISK not in world.state.copies

    def test_what_is_pinned_read_or_last_needs_force(self) -> None:
        """Each refusal has its code and says what to do."""
        world = make(nodes=("n1", "n2"))
        key = world.fetched("m", "n1:disk", 10)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk"))
        with pytest.raises(HerderError) as caught:
            drop(world, key)
        assert caught.value.code == "in_use"
        world.request(UnpinRequested, body=api.Pin(model_name="m", device="n1:disk"))
        world.want("m", "n2:disk")
        with pytest.raises(HerderError) as caught:
            drop(world, key)
        assert caught.value.details["readers"] == ["m@main|n2:disk"]
        drop(world, key, force=True)

    def test_a_copy_that_was_found_and_is_not_verified_yet_is_not_thrown_away(self) -> None:
        """The bytes of a model without a source may be on that disk only: neither a delete nor a cancel takes them."""
        world = World()
        world.register("m")
        world.join("n1", wire.CopyStatus("m", "main", "disk", "ready", bytes_total=10))
        assert world.state.copies[DISK].state == "verifying"
        with pytest.raises(HerderError) as caught:
            drop(world, DISK)
        assert caught.value.code == "last_copy"
        world.do(lambda turn: copies.cancel(turn, DISK, "test"))
        assert world.state.copies[DISK].desired == "present"
        drop(world, DISK, force=True)
        assert world.state.copies[DISK].desired == "absent"

    def test_a_failed_copy_that_is_wanted_again_keeps_its_pins(self) -> None:
        """Who pinned it has not unpinned it."""
        world = make()
        world.want("m", "n1:disk")
        world.request(PinRequested, body=api.Pin("m", "n1:disk", name="mine"))
        world.result(DISK, "failed", error=error("digest_mismatch"))
        assert world.state.copies[DISK].state == "failed"
        world.want("m", "n1:disk")
        assert [pin.name for pin in world.state.copies[DISK].pins] == ["mine"]

    def test_the_last_copy_without_a_source_needs_force(self) -> None:
        """A copy on a node that cannot be reached does not count as another."""
        world = World()
        for node in ("n1", "n2", "n3", "n4"):
            world.join(node)
        world.register("m")
        world.want("m", "n1:disk", source="https://mirror/m")
        world.result(DISK, manifest=manifest("m", 10))
        other = world.fetched("m", "n2:disk", 10)
        world.pass_s(17, alive=("n1", "n3", "n4"))
        with pytest.raises(HerderError) as caught:
            drop(world, DISK)
        assert caught.value.code == "last_copy"
        world.hello("n2", inventory(hostname="n2"))
        assert world.state.copies[other].state == "ready"
        drop(world, DISK)

    def test_an_unknown_copy(self) -> None:
        """Only what is there can be dropped."""
        with pytest.raises(HerderError) as caught:
            drop(make(), DISK)
        assert caught.value.code == "copy_not_found"

    def test_wanted_again_while_dropping_is_a_new_order(self) -> None:
        """The late confirmation of the drop changes nothing."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        gone = drop(world, key)
        assert gone is not None
        world.want("m", "n1:disk")
        world.result(key, generation=gone.generation)
        assert world.state.copies[key].desired == "present"

    def test_cancel_stops_a_fetch_and_keeps_a_ready_copy(self) -> None:
        """Cancelling what is done is nothing."""
        world = make()
        world.want("m", "n1:disk")
        world.progress("n1", DISK, "fetching", 1, 10)
        world.do(lambda turn: copies.cancel(turn, DISK, "job-1"))
        assert isinstance(world.command(wire.DropCopy), wire.Command)
        assert DISK not in world.state.progress
        world.result(DISK)
        key = world.fetched("m", "n1:disk", 10)
        world.do(lambda turn: copies.cancel(turn, key, "job-1"))
        assert world.state.copies[key].state == "ready"


class TestPins:
    """Pins."""

    def test_a_pin_ends_by_its_time(self) -> None:
        """A pin with a time to live is taken away by the tick."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk", name="a", ttl_s=3))
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk", name="b"))
        world.pass_s(3, alive=("n1",))
        assert [pin.name for pin in world.state.copies[key].pins] == ["b"]

    def test_the_same_name_sets_a_new_end(self) -> None:
        """One name, one pin."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        for ttl_s in (5, 500):
            world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk", ttl_s=ttl_s))
        assert [pin.until_ms - world.now_ms for pin in world.state.copies[key].pins] == [500_000]

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (api.Pin(model_name="x", device="n1:disk"), "model_not_found"),
            (api.Pin(model_name="m", device="n1:disk"), "copy_not_found"),
            (api.Pin(model_name="m", device="n1:gpu0"), "device_not_found"),
            (api.Pin(model_name="m", device="banana"), "invalid_device"),
        ],
    )
    def test_what_is_not_there_cannot_be_pinned(self, body: api.Pin, code: str) -> None:
        """Each with its own code."""
        world = make()
        assert world.request(PinRequested, body=body).code == code
        assert world.request(UnpinRequested, body=body).code == code

    def test_pins_are_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A script that pins by random names is told to stop."""
        monkeypatch.setattr(limits, "PINS_PER_COPY", 1)
        world = make()
        world.fetched("m", "n1:disk", 10)
        world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk", name="a"))
        answer = world.request(PinRequested, body=api.Pin(model_name="m", device="n1:disk", name="b"))
        assert answer.code == "too_many"

    def test_use_is_journalled_rarely(self) -> None:
        """The last use is volatile, and durable to the hour."""
        world = make()
        key = world.fetched("m", "n1:disk", 10)
        world.now_ms += 1_000
        world.do(lambda turn: copies.touch_used(turn, key))
        assert world.turn is not None
        assert world.turn.records == []
        assert world.state.last_used_ms[key] == world.now_ms
        world.now_ms += 3_600_000
        world.do(lambda turn: copies.touch_used(turn, key))
        assert world.state.copies[key].last_used_ms == world.now_ms
