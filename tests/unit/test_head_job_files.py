"""Job files: both dialects, fan-out, and everything that is refused at the door."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import HerderError, InvalidJob, JobCycle
from head.core.job_files import steps_of
from head.core.objects import Step
from herder.types import JobAction


def steps(*actions: dict[str, Any]) -> tuple[Step, ...]:
    """The steps of a file's actions."""
    return steps_of(msgspec.convert(list(actions), tuple[JobAction, ...]))


def graph(name: str, *dependencies: str, **fields: Any) -> dict[str, Any]:
    """A download in the graph dialect."""
    return {
        "action_id": name,
        "action_type": "download",
        "model_name": "m",
        "devices": ["n1:disk"],
        "dependencies": list(dependencies),
        **fields,
    }


class TestInOrder:
    """The dialect in order."""

    def test_each_depends_on_the_one_before(self) -> None:
        """The deployment of the model store's manual."""
        first, second, third = steps(
            {"action": "download", "model": "m", "source": "https://h/m", "target": "n1:disk"},
            {"action": "move", "model": "m", "from": "n1:disk", "to": "n1:gpu0"},
            {"action": "serve", "model": "m", "device": "n1:gpu0", "port": 8080},
        )
        assert (first.source_url, first.target_device, first.dependencies) == ("https://h/m", "n1:disk", ())
        assert (second.source_device, second.target_device, second.dependencies) == ("n1:disk", "n1:gpu0", (first.id,))
        assert (third.target_device, third.port, third.dependencies) == ("n1:gpu0", 8080, (second.id,))

    def test_a_source_may_be_a_device(self) -> None:
        """`source` with a device is where to take it from."""
        (step,) = steps({"action": "copy", "model": "m", "source": "n1:disk", "to": "n2:disk"})
        assert (step.source_device, step.source_url) == ("n1:disk", "")

    def test_a_deletion_may_say_from(self) -> None:
        """`from` of a deletion is the device it is deleted from."""
        (step,) = steps({"action": "delete", "model": "m", "from": "n1:disk"})
        assert (step.target_device, step.source_device) == ("n1:disk", "")


class TestGraph:
    """The dialect with ids and dependencies."""

    def test_dependencies_stand_as_written(self) -> None:
        """Order in the file does not matter."""
        second, first = steps(graph("b", "a"), graph("a"))
        assert (first.dependencies, second.dependencies) == ((), ("a",))

    def test_several_targets_fan_out(self) -> None:
        """One step for each device; dependents wait for all."""
        made = steps(graph("a", devices=["n1:disk", "n2:disk", "n3:disk"]), graph("b", "a"))
        assert [step.target_device for step in made[:3]] == ["n1:disk", "n2:disk", "n3:disk"]
        assert made[3].dependencies == tuple(step.id for step in made[:3])

    def test_a_copy_names_its_source_first(self) -> None:
        """devices = [source, target, ...]."""
        made = steps(graph("a", action_type="copy", devices=["n1:disk", "n2:disk", "n3:disk"]))
        assert [(step.source_device, step.target_device) for step in made] == [
            ("n1:disk", "n2:disk"),
            ("n1:disk", "n3:disk"),
        ]

    def test_a_move_to_several_drops_its_source_last(self) -> None:
        """All targets have their copy before the source goes."""
        first, last = steps(graph("a", action_type="move", devices=["n1:disk", "n2:disk", "n3:disk"]))
        assert (first.action, last.action) == ("copy", "move")
        assert last.dependencies == (first.id,)

    def test_a_cycle_is_named(self) -> None:
        """Who waits for whom stands in the error."""
        with pytest.raises(JobCycle) as caught:
            steps(graph("a", "c"), graph("b", "a"), graph("c", "b"), graph("d"))
        assert set(caught.value.details["cycle"]) == {"a", "b", "c"}

    def test_a_step_that_waits_for_itself_is_a_cycle(self) -> None:
        """The smallest cycle."""
        with pytest.raises(JobCycle):
            steps(graph("a", "a"))

    def test_a_long_chain_is_no_cycle(self) -> None:
        """The walk does not recurse."""
        chain = [graph("s0"), *(graph(f"s{n}", f"s{n - 1}") for n in range(1, 1000))]
        assert len(steps(*chain)) == 1000


class TestRefused:
    """What is refused names the action and the field."""

    @pytest.mark.parametrize(
        ("actions", "field"),
        [
            ([{"model": "m"}], "action"),
            ([{"action": "download", "model": "m"}], "target"),
            ([{"action": "download", "target": "n1:disk"}], "model"),
            ([{"action": "serve", "model": "m"}], "device"),
            ([{"action": "move", "model": "m", "from": "n1:disk"}], "to"),
            ([{"action": "download", "model": "m", "target": "n1:disk", "to": "n1:disk"}], "to"),
            ([{"action": "download", "model": "m", "model_name": "m", "target": "n1:disk"}], "model_name"),
            ([{"action": "move", "model": "m", "from": "n1:disk", "to": "n1:disk"}], "to"),
            ([{"action": "move", "model": "m", "source": "https://h/m", "to": "n1:disk"}], "source"),
            ([{"action": "download", "model": "m", "target": "n1:disk", "port": 80}], "port"),
            ([{"action": "serve", "model": "m", "device": "n1:disk", "force": True}], "force"),
            ([{"action": "download", "model": "m", "target": "n1:disk", "dependencies": ["x"]}], "dependencies"),
            ([{"action": "download", "action_type": "download", "model": "m"}], "action_type"),
            ([graph("a"), {"action": "download", "model": "m", "target": "n1:disk"}], "action"),
            ([graph("a"), graph("a")], "action_id"),
            ([graph("")], "action_id"),
            ([graph("a", "ghost")], "dependencies"),
            ([graph("a", devices=[])], "devices"),
            ([graph("a", devices=["n1:disk", "n1:disk"])], "devices"),
            ([graph("a", device="n1:disk")], "device"),
            ([graph("a", devices=["n1:disk", "n2:disk"]), graph("a.1")], "action_id"),
        ],
    )
    def test_the_field_is_named(self, actions: list[dict[str, Any]], field: str) -> None:
        """A script can tell what to mend."""
        with pytest.raises(InvalidJob) as caught:
            steps(*actions)
        assert caught.value.details["field"] == field

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "action": st.sampled_from(["download", "move", "delete", "serve", "stop_serve", "health_check"]),
                    "action_type": st.sampled_from(["copy", "move", "serve"]),
                    "action_id": st.sampled_from(["a", "b", "a.1", ""]),
                    "model": st.just("m"),
                    "model_name": st.just("m"),
                    "source": st.sampled_from(["https://h/x", "n1:disk", ""]),
                    "from": st.sampled_from(["n1:disk", ""]),
                    "to": st.just("n2:disk"),
                    "device": st.just("n2:gpu0"),
                    "devices": st.lists(st.sampled_from(["n1:disk", "n2:disk", "n3:disk"]), max_size=3),
                    "dependencies": st.lists(st.sampled_from(["a", "b", "c"]), max_size=2),
                    "target_url": st.just("http://x"),
                    "config": st.just({"name": "svc"}),
                },
            ),
            min_size=1,
            max_size=4,
        )
    )
    def test_any_file_is_taken_or_refused(self, actions: list[dict[str, Any]]) -> None:
        """Nothing but a HerderError leaves, and what is taken is a graph with unique ids and known dependencies."""
        try:
            made = steps(*actions)
        except HerderError:
            return
        names = [step.id for step in made]
        assert len(set(names)) == len(names) >= 1
        assert all(name in names and name != step.id for step in made for name in step.dependencies)
