"""Laws between the answers of the planner: the recommended is valid, parts sum, nothing beats linear scaling."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import pytest

from common.errors import InvalidValue, NothingFits
from head.planner.endpoints.base import ask
from head.planner.endpoints.questions import Desk, NodeKind, PlacedQuestion, PlanGpu
from head.planner.endpoints.table import BY_PATH, ENDPOINTS
from tests.doubles.planner import answer

H100 = {"gpu": "H100", "gpus": 8}

# what fits


MISFITS: list[tuple[str, dict[str, Any]]] = [
    ("recommend", {"model": "llama-3.1-405b", "training": True, **H100}),
    ("recommend", {"model": "llama-3.1-70b", "training": True, "gpu": "H100", "gpus": 8, "seq_length": 8192}),
    ("autotune", {"model": "llama-3.1-70b", "gpu": "A100-40GB", "gpus": 8}),
    ("sharding", {"model": "llama-3.1-405b", "gpu": "A100-40GB", "dp": 2}),
    ("optimize", {"model": "llama-3.1-70b", "gpu": "H100", "gpus": 8}),
    ("moe", {"model": "mixtral-8x22b", "gpu": "H100", "gpus": 8}),
    ("long-context", {"model": "llama-3.1-70b", "gpu": "H100", "gpus": 8}),
]


@pytest.mark.parametrize(("path", "question"), MISFITS)
def test_remedies_fit_when_asked_again(path: str, question: dict[str, Any]) -> None:
    """What does not fit is 409 with numbers; every remedy that it names is valid as a question of its own."""
    with pytest.raises(NothingFits) as caught:
        ask(BY_PATH[path], question, Desk())
    assert caught.value.status == 409
    assert caught.value.hint
    remedies = caught.value.details["remedies"]
    assert remedies
    for remedy in remedies:
        asked = {"model": question["model"], "gpu": question["gpu"], **remedy["validate"]}
        checked = answer("validate", **asked)
        assert checked["valid"], (remedy["name"], checked["recommendation"])


@pytest.mark.parametrize(
    ("model", "gpu", "gpus", "more"),
    [
        ("llama-3.1-8b", "H100", 8, {}),
        ("llama-3.1-8b", "A100-40GB", 8, {"stack": "deepspeed"}),
        ("llama-3.1-70b", "H100", 32, {"seq_length": 8192, "stack": "megatron"}),
        ("mixtral-8x7b", "H200", 16, {"seq_length": 4096}),
        ("qwen3-8b", "B200", 4, {"tuning": "lora"}),
        ("llama-3.1-8b", "L40S", 16, {"precision": "fp8"}),
    ],
)
def test_what_is_recommended_is_valid(model: str, gpu: str, gpus: int, more: dict[str, Any]) -> None:
    """Each recommended layout passes every check of validate on the same machine, with the same memory."""
    found = answer("recommend", model=model, gpu=gpu, gpus=gpus, training=True, **more)
    for row in found["recommendations"]:
        layout = row["strategy"]
        asked = {name: layout[name] for name in ("tp", "pp", "dp", "cp", "ep", "virtual_stages", "global_batch")}
        asked |= {name: layout[name] for name in ("seq_length", "precision", "sharding", "optimizer", "schedule")}
        asked |= {"micro_batch": layout["micro_batch_size"], "checkpointing": layout["activation_checkpointing"]}
        asked |= {name: more[name] for name in ("stack", "tuning") if name in more}
        checked = answer("validate", model=model, gpu=gpu, gpus=gpus, **asked)
        assert checked["valid"], (layout["name"], checked["recommendation"])
        memory = answer("memory", model=model, gpu=gpu, gpus=gpus, **asked)
        assert memory["total_memory_gb"] == pytest.approx(row["analysis"]["memory_per_gpu_gb"])


def test_what_is_refused_is_not_recommended() -> None:
    """Layouts that validate refuses, over many degrees, are not among what recommend finds feasible."""
    found = answer("recommend", model="llama-3.1-8b", gpu="A100-40GB", gpus=8, training=True)
    recommended = {(row["tp"], row["pp"], row["dp"]) for row in found["recommendations"]}
    for tp, pp in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8)):
        if 8 % (tp * pp):
            continue
        whole = answer(
            "validate",
            model="llama-3.1-8b",
            gpu="A100-40GB",
            gpus=8,
            tp=tp,
            pp=pp,
            sharding="fsdp",
            checkpointing="full",
        )
        if not whole["valid"]:
            assert (tp, pp, 8 // tp // pp) not in recommended


@pytest.mark.parametrize("sharding", ["none", "zero1", "fsdp"])
def test_more_memory_never_makes_a_misfit(sharding: str) -> None:
    """As the memory of a GPU grows, fits goes from no to yes once, and the largest batch never falls."""
    fits = [
        answer("memory", model="llama-3.1-8b", gpu="H100", dp=8, sharding=sharding, batch_size=1, memory=size)["fits"]
        for size in range(20, 260, 20)
    ]
    assert fits == sorted(fits)
    assert len(set(fits)) == 2
    largest = []
    for size in (60, 80, 120, 200):
        try:
            largest.append(
                answer("batchsize", model="llama-3.1-8b", gpu="H100", dp=8, sharding="fsdp", memory=size)[
                    "max_batch_size"
                ]
            )
        except NothingFits:
            largest.append(0)
    assert largest == sorted(largest)


def test_the_cluster_s_machines_are_taken() -> None:
    """With an inventory no endpoint plans for another machine unasked, and each says whose it is."""
    peers = range(8)
    gpus = tuple(PlanGpu(i, "NVIDIA H100 80GB HBM3", 80 << 30, tuple(j for j in peers if j != i)) for i in peers)
    nodes = tuple(f"n{number}" for number in range(8))
    desk = Desk(kinds=(NodeKind(gpus=gpus, nic_bits_per_s=4e11, memory_bytes=1 << 40, node_ids=nodes),))
    for endpoint in ENDPOINTS:
        if not issubclass(endpoint.question, PlacedQuestion) or endpoint.path == "largescale":
            continue
        question = {name: value for name, value in endpoint.example if name not in ("gpu", "gpus")}
        text = msgspec.json.encode(ask(endpoint, question, desk)).decode()
        assert 'source":"registered"' in text, endpoint.path
        assert "none is in the inventory" not in text


# laws between numbers


LAYOUTS: list[dict[str, Any]] = [
    {"model": "llama-3.1-8b", "dp": 8, "sharding": "fsdp"},
    {"model": "llama-3.1-70b", "tp": 8, "pp": 4, "dp": 2, "micro_batch": 1},
    {"model": "llama-3.1-70b", "tp": 4, "pp": 2, "dp": 16, "checkpointing": "full"},
    {"model": "mixtral-8x7b", "tp": 2, "dp": 8, "ep": 8},
    {"model": "llama-3.1-8b", "tp": 2, "cp": 4, "seq_length": 65_536, "batch_size": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shares_and_parts_sum(layout: dict[str, Any]) -> None:
    """Shares of the time sum to one, parts to the step, parts of the memory to the whole; shares are in [0, 1]."""
    found = answer("bottleneck", gpu="H100", **layout)
    assert math.fsum(found["time_breakdown"].values()) == pytest.approx(1.0)
    assert all(0 <= share <= 1 for share in (*found["time_breakdown"].values(), *found["utilization"].values()))
    assert math.fsum(found["parts_s"].values()) == pytest.approx(found["step_s"]["value"])
    assert 0 < found["mfu"]["value"] <= found["hfu"]["value"] <= 1
    memory = answer("memory", gpu="H100", **layout)
    assert math.fsum(memory["breakdown"].values()) == pytest.approx(memory["total_memory_gb"])
    assert memory["memory"]["value"] == pytest.approx(1e9 * memory["total_memory_gb"])
    assert memory["breakdown"]["gradients"] > 0


def test_what_if_reads_the_scenario() -> None:
    """Different scenarios have different outcomes, none the constant that an unread one would have."""
    scenarios = ("double_batch_size", "tp=2", "double gpus", "precision=fp8", "gpu=b200")
    gains = {}
    for text in scenarios:
        found = answer("whatif", model="llama-3.1-8b", gpu="H100", dp=8, scenario=text)
        assert len(found["scenarios"]) == 1
        gains[text] = found["scenarios"][0]["change_vs_current"]["throughput_pct"]
    assert len({round(gain, 3) for gain in gains.values()}) == len(scenarios)
    assert gains["double gpus"] > 50
    with pytest.raises(InvalidValue):
        answer("whatif", model="llama-3.1-8b", gpu="H100", dp=8, scenario="make it nice")


@pytest.mark.parametrize("training", [True, False])
def test_no_point_of_the_front_is_dominated(training: bool) -> None:
    """Over numbers of GPUs: no point is as good as another in cost, throughput, time and headroom and better in one."""
    points = answer("pareto", model="llama-3.1-8b", gpu="H100", gpus=16, training=training)["pareto_frontier"]
    assert len({point["num_gpus"] for point in points}) > 1
    for one, other in itertools.permutations(points, 2):
        pairs = [
            (one["throughput_tps"], other["throughput_tps"]),
            (-one["cost_per_m_tokens"], -other["cost_per_m_tokens"]),
            (-one["latency_ms"], -other["latency_ms"]),
            (one["memory_headroom_gb"], other["memory_headroom_gb"]),
        ]
        assert not all(mine >= theirs for mine, theirs in pairs), (one, other)


@pytest.mark.parametrize("training", [True, False])
def test_a_comparison_ranks(training: bool) -> None:
    """The winner has the most tokens a second and 100 points; smaller models are faster."""
    names = ["llama-3.1-8b", "qwen3-32b", "qwen3-0.6b"]
    found = answer("compare", models=names, training=training, gpu="H100", gpus=8)
    rows = [found["comparison"][name] for name in found["ranking"]]
    assert found["ranking"] == ["qwen3-0.6b", "llama-3.1-8b", "qwen3-32b"]
    assert [row["throughput_tps"] for row in rows] == sorted((row["throughput_tps"] for row in rows), reverse=True)
    assert (found["winner"], rows[0]["score"]) == ("qwen3-0.6b", 100)
    assert rows[1]["score"] == pytest.approx(100 * rows[1]["throughput_tps"] / rows[0]["throughput_tps"])


def test_a_comparison_takes_a_model_by_its_config() -> None:
    """A model that is given beside the names is one more."""
    dimensions = {"hidden": 1024, "layers": 12, "heads": 16, "ffn": 4096, "vocab": 32_000}
    found = answer("compare", models=["qwen3-0.6b"], model="ours", dimensions=dimensions, training=True, **H100)
    assert set(found["comparison"]) == {"qwen3-0.6b", "ours"}


def test_strong_and_weak_scaling_differ() -> None:
    """The same batch on more GPUs loses efficiency; a batch that grows along keeps more of it; none beats linear."""
    found = answer("scaling", model="llama-3.1-8b", gpu="H100", base_gpus=8, target_gpus=128, batch_size=1)
    assert found["strong_scaling_efficiency"] < found["weak_scaling_efficiency"] <= 1
    assert all(0 < row["efficiency"] <= 1 for row in found["scaling_projections"] if not row["problem"])
    other = answer("scaling", model="llama-3.1-70b", gpu="H100", base_gpus=32, target_gpus=128, batch_size=1)
    assert other["strong_scaling_efficiency"] != found["strong_scaling_efficiency"]


def test_estimates_scale() -> None:
    """Twice the tokens take twice the time and cost; twice the GPUs at the same rate cost twice."""
    one = answer("estimate", model="llama-3.1-70b", tokens=1e12, gpus=64)
    two = answer("estimate", model="llama-3.1-70b", tokens=2e12, gpus=64)
    assert two["training_time_hours"] == pytest.approx(2 * one["training_time_hours"])
    assert two["total_cost_usd"] == pytest.approx(2 * one["total_cost_usd"])
    wide = answer("estimate", model="llama-3.1-70b", tokens=1e12, gpus=128)
    assert wide["training_time_hours"] == one["training_time_hours"]
    assert wide["total_cost_usd"] == pytest.approx(2 * one["total_cost_usd"])
    assert one["total_checkpoint_storage_gb"] == pytest.approx(5 * one["checkpoint_size_gb"])


def test_tensor_parallelism_shares_out_the_work() -> None:
    """Eight ranks are faster than one, never more than eight times."""
    single = answer("bottleneck", model="llama-3.1-8b", gpu="B200", dp=1, batch_size=4)["step_s"]["value"]
    spread = answer("bottleneck", model="llama-3.1-8b", gpu="B200", dp=1, tp=8, batch_size=4)["step_s"]["value"]
    assert 1 < single / spread < 8


def test_keys_and_values_are_shared_out() -> None:
    """The KV cache of an inference rank shrinks with tensor and pipeline parallelism."""
    asked = {"model": "llama-3.1-70b", "gpu": "H100", "training": False, "batch_size": 32}
    whole = answer("memory", **asked)["breakdown"]["kv_cache"]
    assert answer("memory", **asked, tp=8)["breakdown"]["kv_cache"] == pytest.approx(whole / 8)
    assert answer("memory", **asked, pp=4)["breakdown"]["kv_cache"] == pytest.approx(whole / 4)


def test_activations_grow_with_the_sequence_and_not_its_square() -> None:
    """Fused attention keeps no matrix of scores."""
    short, long = (
        answer("memory", model="llama-3.1-8b", gpu="B200", dp=8, batch_size=1, seq_length=length)["breakdown"]
        for length in (8_192, 32_768)
    )
    assert long["activations"] == pytest.approx(4 * short["activations"], rel=0.02)


def test_goals_lead_to_different_choices() -> None:
    """Memory and efficiency are goals of their own: none is best at everything."""
    best = {
        goal: answer("recommend", model="llama-3.1-8b", gpu="H100", gpus=16, training=True, goal=goal)["best"][
            "analysis"
        ]
        for goal in ("throughput", "memory")
    }
    assert best["memory"]["memory_headroom_gb"] > best["throughput"]["memory_headroom_gb"]
    assert best["throughput"]["estimated_throughput_tps"] > best["memory"]["estimated_throughput_tps"]
    scores = [
        row["score"] for row in answer("recommend", model="llama-3.1-8b", training=True, **H100)["recommendations"]
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 100
    assert len(set(scores)) == len(scores)


def test_sharding_is_a_list_with_reasons() -> None:
    """Every way is in the answer with memory that adds up; the more is sharded, the less is needed."""
    rows = {
        row["config"]["strategy"]: row for row in answer("sharding", model="llama-3.1-8b", gpu="H100", dp=8)["result"]
    }
    for row in rows.values():
        memory = row["analysis"]["memory"]
        assert math.fsum(value for name, value in memory.items() if name != "total_gb") == pytest.approx(
            memory["total_gb"]
        )
        assert 0 <= row["analysis"]["communication"]["overhead_pct"] <= 100
    totals = [rows[name]["analysis"]["memory"]["total_gb"] for name in ("none", "ZeRO-1", "ZeRO-2", "ZeRO-3")]
    assert totals == sorted(totals, reverse=True)
    shares = {round(row["analysis"]["communication"]["overhead_pct"]) for row in rows.values()}
    assert len(shares) > 1


def test_launch_checks_its_product() -> None:
    """Degrees that do not multiply up to the GPUs are refused."""
    with pytest.raises(InvalidValue, match="16"):
        answer("launch", nodes=2, gpus=8, tp=4, pp=4, dp=4)


def test_serving_obeys_littles_law() -> None:
    """Requests in flight are their rate times the time that each takes; a target that is missed says so."""
    found = answer("inference", model="llama-3.1-8b", gpu="H100", gpus=1, batch_size=32, latency_target_ms=1e-3)
    best = found["best"]
    assert best["requests_per_s"] * best["e2e_s"]["value"] == pytest.approx(best["concurrency"], rel=0.02)
    assert best["output_tokens_per_s"] == pytest.approx(512 * best["requests_per_s"], rel=0.01)
    assert found["slo"]["itl_met"] is False
    assert found["slo"]["adjustments"]


def test_inference_keeps_to_the_tensor_parallelism_that_is_given() -> None:
    """A fixed degree is not a hint."""
    for tp in (1, 2, 4):
        found = answer("inference", model="llama-3.1-8b", tp=tp, **H100)
        assert {row["tp"] for row in found["options"]} == {tp}
    with pytest.raises(InvalidValue):
        answer("inference", model="llama-3.1-8b", tp=16, **H100)
