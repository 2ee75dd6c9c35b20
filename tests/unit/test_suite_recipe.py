"""Recipes of the HPC benchmark toolkit: every mistake with its place, every knob in the runs that come of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.suite import checks, plan, reading, times, wizard, workload
from agent.suite.executors import DummyWorkloadExecutor, OllamaWorkloadExecutor, VllmWorkloadExecutor
from common.bench import spec as load_spec
from common.recipe import load_recipes

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {
    "scenario": "s",
    "partition": "gpu",
    "account": "a",
    "orchestration": {"mode": "slurm", "node_allocation": {"servers": {"nodes": 2}, "clients": {"nodes": 2}}},
    "resources": {"servers": {"gpus": 1, "cpus_per_task": 2, "mem_gb": 8}},
    "workload": {"component": "inference", "service": "vllm", "model": "m", "duration": "10m", "warmup": "1m"},
}


def changed(**parts: Any) -> dict[str, Any]:
    """GOOD with dotted places (`__` for the dot) set anew."""
    made = copy.deepcopy(GOOD)
    for place, value in parts.items():
        *path, last = place.split("__")
        inner = made
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return made


def errors_of(document: dict[str, Any]) -> list[str]:
    """Everything that is said against a document."""
    found = reading.shape_mistakes(document, for_slurm=True)
    return found or checks.errors(reading.recipe_of(document, for_slurm=True))


def runs_of(document: dict[str, Any]) -> list[plan.Benchmark]:
    """Its runs."""
    return plan.benchmarks_of(reading.recipe_of(document))


def test_all_mistakes_are_told_at_once_with_their_places() -> None:
    """One look at a recipe names every unknown key, wrong word, wrong kind and missing key."""
    bad = changed(
        partition=5,
        orchestration__mode="slurmy",
        workload__duration="ten",
        workload__prompt_len=[1, "a"],
        workload__benchmark_suite=[{"duration": "2m"}, {"name": "x", "num_thread": 3}],
        reporting__formats=["pdff"],
        orchestratoin={},
    )
    del bad["account"], bad["resources"]["servers"]["gpus"]
    found = errors_of(bad)
    for place in ("partition:", "orchestration.mode: 'slurmy'", "workload.duration: 'ten'", "workload.prompt_len[1]",
                  "workload.benchmark_suite[0].name: is missing", "num_thread: no such key; did you mean num_threads?",
                  "reporting.formats: 'pdff' is not one of pdf",
                  "orchestratoin: no such key; did you mean orchestration", "account: is missing",
                  "resources.servers.gpus: is missing"):  # fmt: skip
        assert any(place in said for said in found), (place, found)
    assert len(found) == 10, found


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("orchestration__mode", "kubernetes", "kubernetes is not there"),
        ("reporting__formats", ["pdf"], "pdf is not written"),
        ("monitoring__metrics", [{"type": "custom"}], "custom has no source"),
        ("workload__service", "milvus", "nothing here can ask it"),
        ("workload__service", "vlm", "is not known"),
        ("workload__component", "storage", "is of the component inference"),
        ("orchestration__total_nodes", 9, "servers + clients + 1"),
        ("orchestration__node_allocation__monitors", {"nodes": 2}, "exactly one"),
        ("orchestration__node_allocation__servers", {"nodes": 2, "node_range": "0-4"}, "names 5 nodes, nodes says 2"),
        ("binds", ["a:b:rx"], "is not host:container"),
        ("servers__service_config", {"distributed": {"enabled": True, "tensor_parallel_size": 8}}, "8 GPUs wanted"),
        ("servers__service_config", {"distributed": {"backend": "mpi"}}, "ray is the one"),
        ("workload__batch", 4, ""),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_sentence(place: str, value: Any, said: str) -> None:
    """Words of the schema without anything behind them, and parts that contradict each other, are errors."""
    found = errors_of(changed(**{place: value}))
    assert (len(found) == 1 and said in found[0]) if said else not found, found


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"target_rps": 5, "concurrency": 4}, "take one"),
        ({"target_rps": 5, "sleep_seconds": 0.1}, "not sleep_seconds"),
        ({"request_distribution": "poisson"}, "needs target_rps"),
        ({"dataset": "x.jsonl", "prompt_len": 5}, "brings its own prompts"),
        ({"concurrency": 1}, "less than the 2 clients"),
        ({"api": "ollama"}, "one of completions, chat"),
        ({"burstiness": 0.5, "target_rps": 5}, "belongs to request_distribution burst"),
    ],
)
def test_loads_that_contradict_themselves_are_refused(load: dict[str, Any], said: str) -> None:
    """A knob that would have no effect beside another is an error, never ignored."""
    document = changed()
    document["workload"] |= load
    found = errors_of(document)
    assert len(found) == 1, found
    assert said in found[0]


def test_recipes_of_the_toolkit_are_taken() -> None:
    """vLLM without prompt_len and monitors, extra keys that its scripts read, and a total without the orchestrator."""
    document = changed(
        qos="default", modules=["Apptainer"], orchestration__total_nodes=4, environment={"OLLAMA_NUM_PARALLEL": "4"},
        workload__clients_per_node=10, servers__health_check={"enabled": True, "timeout": 300, "endpoint": "/health"},
        servers__service_config={"tensor_parallel_size": 1, "max_model_len": 2048}, artifacts__container="apptainer",
        artifacts__containers_dir="/c", artifacts__service={"path": "v.sif", "remote": "docker://v"},
        artifacts__python={"path": "p.sif"}, binds=["/a:/b:rw"],
        logging={"type": "tailer", "create_jsonl": True, "flush_interval": 3, "outputs": {"stdout": "o.log"}},
    )  # fmt: skip
    assert errors_of(document) == []
    warned = checks.warnings(reading.recipe_of(document))
    assert any("prompt_len" in said for said in warned)
    assert any("shares the first client" in said for said in warned)


def test_shipped_recipes_are_valid_and_no_inference_recipes() -> None:
    """Every file below recipes/suite can be submitted, and the head does not take it for one of its own."""
    files = sorted((ROOT / "recipes" / "suite").glob("*.yaml"))
    assert len(files) >= 4
    for path in files:
        assert errors_of(reading.load(path)) == [], path.name
    assert not [name for name in load_recipes(ROOT / "recipes") if name.endswith("-suite")]


def test_lists_are_swept_and_suite_entries_override() -> None:
    """Each list gives a run per value, each combination once; entries change only what they name."""
    runs = runs_of(
        changed(workload__benchmark_suite=[
            {"name": "a", "prompt_len": [16, 32], "gen_tokens": [4, 8], "num_threads": 3, "duration": "2m"},
            {"name": "b", "target_rps": 7},
        ], workload__sleep_seconds=0.5)
    )  # fmt: skip
    assert [run.name for run in runs] == [
        "a-prompt_len-16-gen_tokens-4", "a-prompt_len-16-gen_tokens-8", "a-prompt_len-32-gen_tokens-4",
        "a-prompt_len-32-gen_tokens-8", "b",
    ]  # fmt: skip
    assert runs[0].config["duration"] == "2m"
    assert runs[0].config["sleep_seconds"] == 0.5
    assert runs[0].overrides == {"duration": "2m", "num_threads": 3, "prompt_len": 16, "gen_tokens": 4}
    assert runs[4].config["duration"] == "10m"
    assert "sleep_seconds" not in runs[4].config, "an open loop has no think time"


def test_entries_of_one_name_are_refused() -> None:
    """Two runs would write one file."""
    found = errors_of(changed(workload__benchmark_suite=[{"name": "a"}, {"name": "a"}]))
    assert "'a' is there twice" in found[0]


def test_a_flat_configuration_is_a_recipe() -> None:
    """What the toolkit's job wrote for its orchestrator runs as it is, without a warm-up that it never had."""
    runs = runs_of({"model": "llama2", "duration": "2m", "clients_per_node": 10, "service": "ollama"})
    assert runs[0].config["clients_per_node"] == 10
    assert times.seconds(runs[0].config["warmup"]) == 0
    assert times.seconds(runs_of({"workload": {"service": "dummy", "duration": "2m"}})[0].config["warmup"]) == 30


def test_every_knob_of_the_load_reaches_the_generator(tmp_path: Path) -> None:
    """Rates, distributions, sizes, think time, seed and warm-up stand in the load run."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "hello there"}\n')
    style = VllmWorkloadExecutor.style

    def made(parts: int = 1, **config: Any) -> Any:
        base = {"model": "m", "duration": "10m", "server_url": "http://h", "parts": parts} | config
        found = workload.spec_of(base, workload.plan_of(base), style, [tmp_path])
        load_spec.check(found)
        return found

    closed = made(2, num_threads=3, clients_per_node=9, sleep_seconds=0.25, warmup="30s", prompt_len=64, gen_tokens=8)
    assert (closed.concurrency, closed.think, closed.warmup, closed.duration) == (6, 0.25, 30.0, 600.0)
    assert closed.scenarios == ("D(64,8)",)
    assert closed.exact
    assert made(clients_per_node=4, batch=3).concurrency == 12
    assert made(2, concurrency=7).concurrency == 7
    for kind, arrivals in (("constant", "constant"), ("poisson", "poisson"), ("burst", "gamma")):
        opened = made(target_rps=40, request_distribution=kind, seed=5)
        assert (opened.rate, opened.arrivals, opened.seed, opened.concurrency) == (40.0, arrivals, 5, None)
    assert made(target_rps=1, request_distribution="burst").burstiness == workload.BURSTINESS
    assert made(dataset="d.jsonl", gen_tokens=9).parameters["max_tokens"] == 9
    assert made(streaming=False).stream is False
    assert made(api="chat").api == "chat"
    assert made(request_timeout=7).timeout == 7.0


def test_datasets_lie_in_folders_that_may_be_read(tmp_path: Path) -> None:
    """A path that leaves the folders is refused; a known name is looked for there, and its lack says what to do."""
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="may read"):
        workload.dataset_path("../secret.jsonl", [inside])
    with pytest.raises(ValueError, match="may read"):
        workload.dataset_path(str(tmp_path / "secret.jsonl"), [inside])
    with pytest.raises(ValueError, match="fetch it there"):
        workload.dataset_path("hellaswag", [inside])
    (inside / "hellaswag_val.jsonl").write_text("{}")
    assert workload.dataset_path("HellaSwag", [inside]).endswith("hellaswag_val.jsonl:hellaswag")


def test_gpu_layers_go_with_ollamas_requests() -> None:
    """The knob that the toolkit parsed and forgot is Ollama's own option num_gpu."""
    document = changed(workload__service="ollama", servers__service_config={"gpu_layers": 12})
    config = runs_of(document)[0].config
    base = config | {"server_url": "http://h"}
    found = workload.spec_of(base, workload.plan_of(base), OllamaWorkloadExecutor.style, [])
    assert found.parameters["options"]["num_gpu"] == 12
    assert any("gpu_layers" in said for said in checks.warnings(reading.recipe_of(
        changed(workload__service="ollama", servers__service_config={"gpu_layers": 0}), for_slurm=True)))  # fmt: skip


def test_target_mapping_says_who_asks_whom() -> None:
    """Groups by number, range and name; a client without a group is an error."""
    clients, servers = ["c1", "c2", "c3"], ["http://s1:80", "http://s2:80"]

    def mapped(*pairs: tuple[Any, list[Any]]) -> dict[str, list[str]]:
        mapping = [{"client_group": group, "server_endpoints": wanted} for group, wanted in pairs]
        document = changed(orchestration__node_allocation__clients={"nodes": 3, "target_mapping": mapping})
        return plan.targets_of(reading.recipe_of(document), clients, servers)

    assert mapped(("0-1", [0]), ("c3", ["s2", "other:9"])) == {
        "c1": ["http://s1:80"], "c2": ["http://s1:80"], "c3": ["http://s2:80", "http://other:9"],
    }  # fmt: skip
    assert mapped(("c[1-3]", ["0-1"]))["c2"] == servers
    with pytest.raises(ValueError, match="no group has the client c3"):
        mapped(("0-1", [0]))
    with pytest.raises(ValueError, match="counted from 0"):
        mapped((3, [0]))


def test_the_dummy_asks_plain_http() -> None:
    """Without an API the dummy gets /health, as any server has it."""
    base = {"duration": 5, "server_url": "h:1"}
    found = workload.spec_of(base, workload.plan_of(base), DummyWorkloadExecutor.style, [])
    assert (found.api, found.method, found.path) == ("http", "GET", "/health")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML would lose the first without a word."""
    path = tmp_path / "r.yaml"
    path.write_text("scenario: a\nscenario: b\n")
    with pytest.raises(reading.Mistakes, match="twice"):
        reading.load(path)


def test_the_wizard_makes_valid_recipes() -> None:
    """Every kind gives a recipe that reads back without a mistake, and a rate makes an open loop."""
    for kind in wizard.KINDS:
        made = wizard.document_of(wizard.Answers(kind=kind, model="m"))
        assert errors_of(yaml.safe_load(wizard.text_of(made))) == []
    assert wizard.document_of(wizard.Answers(kind="dummy", target_rps=3))["workload"]["target_rps"] == 3
    with pytest.raises(reading.Mistakes, match="model"):
        wizard.document_of(wizard.Answers(kind="vllm"))


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("300s", 300), ("2h", 7200), (45, 45), ("7d", 604_800)])
def test_times(text: Any, seconds: float) -> None:
    """Times of recipes, as words and as numbers."""
    assert times.seconds(text) == seconds


def test_time_limits() -> None:
    """Slurm's form; an unquoted one, which YAML makes a number of seconds, is the same."""
    assert times.time_limit("02:00:00") == times.time_limit(7200) == 7200
    assert times.time_limit("1-00:30:00") == 88_200
    assert times.slurm_time(times.time_limit("26:00:00")) == "26:00:00"
    with pytest.raises(ValueError, match="HH:MM:SS"):
        times.time_limit("2h")
