"""Search over training layouts: exact, explained, and of one mind with validation."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import NothingFits
from head.planner.hardware.accelerators import accelerator
from head.planner.hardware.topology import Topology, topology_of_preset
from head.planner.model.architecture import Architecture
from head.planner.model.presets import lookup
from head.planner.training.checks import check_layout, first_failure, is_valid
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import estimate_memory
from head.planner.training.search import SearchResult, pareto_front, remedies, search
from head.planner.training.search_space import Space, layouts, suited

SMALL = lookup("llama-3.1-8b")
LARGE = lookup("llama-3.1-70b")
EXPERTS = lookup("mixtral-8x7b")
NODE = topology_of_preset("H100-SXM-80GB", 8)
RACK = topology_of_preset("H100-SXM-80GB", 64)
BASE = TrainingLayout(global_batch=64, seq=4096)


def work(arch: Architecture, topology: Topology, layout: TrainingLayout) -> float:
    """A step time with the shape of the real one: work over GPUs, recomputation, tensor exchange, bubble."""
    base = 1e-4 * arch.layers * layout.global_batch * layout.seq / layout.gpus
    base *= {"none": 1.0, "selective": 1.05, "full": 1.33}[layout.recompute]
    base *= 1 + 0.02 * (layout.tp - 1) + (layout.pp - 1) / (layout.microbatches * layout.virtual_stages)
    return base * (1 + 0.1 / layout.micro_batch)


def found(arch: Architecture, topology: Topology, base: TrainingLayout = BASE, **more: object) -> SearchResult:
    """The search with the stand-in for time."""
    return search(arch, topology, base, step_seconds=work, **more)  # type: ignore[arg-type]


def test_search_is_exact_within_its_space() -> None:
    """The best choice has the highest score of every sound layout of the space, found by going through all of them."""
    result = found(SMALL, NODE)
    best = 0.0
    feasible = 0
    for layout in layouts(SMALL, NODE, BASE, suited(SMALL, NODE, BASE, Space())):
        if not is_valid(check_layout(SMALL, NODE, layout)):
            continue
        feasible += 1
        rate = layout.global_batch * layout.seq / work(SMALL, NODE, layout)
        best = max(best, rate * estimate_memory(SMALL, NODE, layout).fit_probability)
    assert result.feasible == feasible
    assert result.choices[0].score == pytest.approx(best)


def test_every_layout_is_kept_or_dropped_with_a_reason() -> None:
    """Counts add up, and each reason has an example that really fails for it."""
    result = found(LARGE, RACK)
    assert result.examined == result.feasible + sum(drop.count for drop in result.dropped)
    assert result.examined == len(list(layouts(LARGE, RACK, BASE, result.space)))
    for drop in result.dropped:
        failed = first_failure(LARGE, RACK, drop.example)
        reason = failed.name if failed else "memory_fit"
        assert reason == drop.reason
        assert drop.message


@pytest.mark.parametrize(("arch", "topology"), [(SMALL, NODE), (LARGE, RACK), (EXPERTS, RACK)])
def test_what_is_recommended_is_valid(arch: Architecture, topology: Topology) -> None:
    """No choice and no point of the front has a failed check."""
    result = found(arch, topology, top=20)
    assert result.choices
    for choice in (*result.choices, *result.pareto):
        assert is_valid(check_layout(arch, topology, choice.layout))
        assert choice.layout.gpus == topology.gpus


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 8, 16]),
    pp=st.sampled_from([1, 2, 4, 5]),
    dp=st.sampled_from([1, 2, 4, 8]),
    micro=st.sampled_from([1, 2, 3]),
    recompute=st.sampled_from(["none", "full"]),
    sharding=st.sampled_from(["zero1", "fsdp"]),
)
def test_validate_and_recommend_agree(tp: int, pp: int, dp: int, micro: int, recompute: str, sharding: str) -> None:
    """A space of one layout yields that layout exactly when its checks do not fail."""
    topology = RACK.with_gpus(tp * pp * dp)
    layout = msgspec.structs.replace(
        BASE, tp=tp, pp=pp, dp=dp, micro_batch=micro, recompute=recompute, sharding=sharding
    )
    one = Space(
        tps=(tp,), pps=(pp,), cps=(1,), eps=(1,), virtual_stages=(1,), micro_batches=(micro,),
        recomputes=(recompute,), shardings=(sharding,),  # type: ignore[arg-type]
    )  # fmt: skip
    result = found(LARGE, topology, space=one)
    if (LARGE.layers + 2) % pp == 0 and LARGE.layers % pp:
        return
    assert bool(result.choices) == is_valid(check_layout(LARGE, topology, layout))


def test_front_holds_what_nothing_beats() -> None:
    """No point of the front is dominated, and every other choice is dominated by or equal to one of the front."""
    result = found(SMALL, NODE, gpu_counts=(2, 4, 8), top=10_000)

    def numbers(choice: object) -> tuple[float, float, float, float]:
        memory = choice.memory.headroom_bytes  # type: ignore[attr-defined]
        return (choice.tokens_per_s, -choice.cost_usd, -choice.step_s, memory)  # type: ignore[attr-defined]

    front = [numbers(choice) for choice in result.pareto]
    for mine in front:
        assert not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in front)
    for choice in result.choices:
        assert any(all(a >= b for a, b in zip(other, numbers(choice), strict=True)) for other in front)
    assert pareto_front(result.pareto) == list(result.pareto)


def test_when_nothing_fits_remedies_do() -> None:
    """The refusal names what dropped everything; each remedy passes the checks it would be held to."""
    base = msgspec.structs.replace(BASE, global_batch=8)
    result = found(LARGE, NODE, base)
    assert not result.choices
    with pytest.raises(NothingFits) as refused:
        result.require()
    assert refused.value.status == 409
    assert refused.value.details["dropped"]["memory_fit"] > 0
    names = {remedy.name for remedy in result.remedies}
    assert {"lora", "qlora", "more_gpus", "offload_all"} <= names
    for remedy in result.remedies:
        where = NODE.with_gpus(remedy.gpus)
        if remedy.name == "larger_gpu":
            where = msgspec.structs.replace(where, accelerator=accelerator(remedy.message.split()[2]))
        assert is_valid(check_layout(LARGE, where, remedy.layout)), remedy.name
        assert remedy.total_bytes < where.accelerator.visible_bytes
    more = next(remedy for remedy in result.remedies if remedy.name == "more_gpus")
    assert found(LARGE, NODE.with_gpus(more.gpus), msgspec.structs.replace(base, global_batch=64)).choices


def test_offload_is_no_remedy_where_the_host_is_too_small() -> None:
    """A host of 64 GiB cannot take the optimizer of 70 billion parameters."""
    small_host = topology_of_preset("H100-SXM-80GB", 8, cpu_memory_gib=64)
    names = {remedy.name for remedy in remedies(LARGE, small_host, BASE)}
    assert "offload_optimizer" not in names
    assert "lora" in names


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tp": 3, "dp": 1}, "tp_heads"),
        ({"tp": 16, "dp": 4}, "tp_domain"),
        ({"pp": 64, "virtual_stages": 4, "dp": 1}, "pp_layers"),
        ({"dp": 48, "global_batch": 64}, "batch"),
        ({"cp": 3, "dp": 8, "seq": 4096}, "cp_sequence"),
        ({"ep": 4, "dp": 64}, "ep_experts"),
        ({"pp": 2, "dp": 32, "sharding": "zero2"}, "sharding"),
        ({"pp": 4, "dp": 16, "virtual_stages": 2, "global_batch": 96}, "microbatches"),
        ({"tp": 0}, "degrees"),
    ],
)
def test_unsound_layouts_fail_by_name(changes: dict[str, object], name: str) -> None:
    """Each rule of divisibility fails under its own name, and the layout is not valid."""
    layout = msgspec.structs.replace(BASE, **changes)
    topology = RACK.with_gpus(max(layout.gpus, 1))
    checks = check_layout(LARGE, topology, layout)
    assert name in [check.name for check in checks if check.status == "failed"]
    assert not is_valid(checks)


def test_heads_that_do_not_divide_fail_and_few_kv_heads_only_warn() -> None:
    """Query heads must divide; key/value heads fewer than tensor ranks are copied."""
    wide = topology_of_preset("GB200", 16, scaleup_gpus=72)
    layout = TrainingLayout(tp=16, global_batch=8)
    statuses = {check.name: check.status for check in check_layout(LARGE, wide, layout)}
    assert statuses["tp_heads"] == "passed"
    assert statuses["tp_kv_heads"] == "warning"
    odd = msgspec.structs.replace(layout, tp=5)
    failed = {check.name for check in check_layout(LARGE, wide.with_gpus(5), odd) if check.status == "failed"}
    assert {"tp_heads", "tp_kv_heads", "tp_widths"} <= failed


def test_too_many_gpus_fail_and_idle_ones_warn() -> None:
    """A layout cannot use GPUs that are not there; one that leaves some idle is only odd."""
    layout = TrainingLayout(dp=8, global_batch=64, sharding="fsdp", recompute="full")
    by_count = {
        gpus: next(c for c in check_layout(SMALL, RACK.with_gpus(gpus), layout) if c.name == "gpu_count").status
        for gpus in (4, 8, 16)
    }
    assert by_count == {4: "failed", 8: "passed", 16: "warning"}


def test_goals_rank_by_what_they_name() -> None:
    """The memory goal leaves most headroom; throughput and latency leave none of their own on the table."""
    by_goal = {goal: found(SMALL, NODE, goal=goal).choices[0] for goal in ("throughput", "latency", "memory")}
    assert by_goal["memory"].memory.headroom_bytes >= by_goal["throughput"].memory.headroom_bytes
    assert by_goal["throughput"].tokens_per_s >= by_goal["memory"].tokens_per_s
    assert by_goal["latency"].step_s <= by_goal["memory"].step_s


def test_rationale_compares_with_other_values() -> None:
    """The first choice says what its memory is and what other values of its dimensions would change."""
    choice = found(LARGE, RACK).choices[0]
    assert "GiB" in choice.rationale[0]
    assert any(text.startswith("tp=") and "%" in text for text in choice.rationale)


def test_search_is_deterministic_and_json_safe() -> None:
    """The same question gives the same bytes."""
    one, two = (msgspec.json.encode(found(EXPERTS, RACK)) for _ in range(2))
    assert one == two
    json.loads(one, parse_constant=lambda word: pytest.fail(word))
