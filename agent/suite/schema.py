"""A suite's recipe as the toolkit wrote it: every path of its schema, with the defaults that it declares.

The parts know their own keys and kinds of values. What two parts must agree on, and what is there but cannot be had,
is in `checks`. `SLURM_NEEDS` are the paths that a job script cannot do without; `herder orchestrate` needs only
`workload`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Whole = Annotated[int, Meta(ge=0, le=1_000_000)]
Text = Annotated[str, Meta(max_length=4_096)]
Word = Annotated[str, Meta(min_length=1, max_length=256)]
Time = int | float | str
"""Checked by `times.seconds`."""
OneOrMore = Count | list[Count]
Strategy = Literal["round-robin", "random", "all-to-all", "static"]
Category = Literal["application", "system", "benchmark", "infrastructure"]
Format = Literal["pdf", "json", "csv", "html"]
Include = Literal["metrics_summary", "performance_graphs", "resource_utilization", "raw_data"]
COMPONENTS: dict[str, tuple[str, ...]] = {
    "inference": ("ollama", "vllm", "triton", "dummy"),
    "storage": ("postgres", "s3", "fileio"),
    "vectordb": ("milvus", "faiss", "weaviate", "chroma"),
}
SLURM_NEEDS = (
    "scenario",
    "partition",
    "account",
    "orchestration",
    "orchestration.mode",
    "orchestration.node_allocation",
    "orchestration.node_allocation.servers",
    "orchestration.node_allocation.clients",
    "resources",
    "resources.servers",
    "resources.servers.gpus",
    "resources.servers.cpus_per_task",
    "resources.servers.mem_gb",
    "workload.component",
)
NEEDS = ("workload", "workload.service", "workload.duration")


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Root of a recipe's parts."""


class Servers(Part, frozen=True, kw_only=True):
    """Nodes that serve."""

    nodes: Count = 1
    node_range: Text = ""


class Mapping(Part, frozen=True, kw_only=True):
    """Which servers a group of clients asks. Groups and endpoints are numbers from 0, ranges of them or names."""

    client_group: Word | Whole
    server_endpoints: list[Word | Whole]


class Clients(Part, frozen=True, kw_only=True):
    """Nodes that send."""

    nodes: Count = 1
    node_range: Text = ""
    clients_per_node: Count | None = None
    distribution_strategy: Strategy = "round-robin"
    target_mapping: list[Mapping] = []


class Monitors(Part, frozen=True, kw_only=True):
    """The node of the orchestrator."""

    nodes: Count = 1
    node_range: Text = ""


class Allocation(Part, frozen=True, kw_only=True):
    """Who gets which nodes."""

    servers: Servers = Servers()
    clients: Clients = Clients()
    monitors: Monitors = Monitors()


class JobConfig(Part, frozen=True, kw_only=True):
    """The job's own settings."""

    time_limit: int | str = "02:00:00"
    exclusive: bool = True
    reservation: Text = ""


class Orchestration(Part, frozen=True, kw_only=True):
    """Where it runs."""

    mode: Literal["slurm", "kubernetes"] = "slurm"
    total_nodes: Count | None = None
    node_allocation: Allocation = Allocation()
    job_config: JobConfig = JobConfig()


class ServerResources(Part, frozen=True, kw_only=True):
    """Of each server node."""

    gpus: Whole = 0
    cpus_per_task: Count = 1
    mem_gb: Count = 8


class ClientResources(Part, frozen=True, kw_only=True):
    """Of each client node."""

    gpus: Whole = 0
    cpus_per_task: Count = 4
    mem_gb: Count = 8
    clients_per_node: Count | None = None
    """Where the toolkit's README has it."""


class MonitorResources(Part, frozen=True, kw_only=True):
    """Of the orchestrator's node."""

    cpus_per_task: Count = 4
    mem_gb: Count = 8


class Resources(Part, frozen=True, kw_only=True):
    """What nodes have."""

    servers: ServerResources = ServerResources()
    clients: ClientResources = ClientResources()
    monitors: MonitorResources = MonitorResources()


class Load(Part, frozen=True, kw_only=True):
    """What a suite's entry may set anew."""

    model: Word | None = None
    duration: Time | None = None
    """Of the measured part; the warm-up comes before it."""
    warmup: Time | None = None
    clients_per_node: Count | None = None
    num_threads: Count | None = None
    """The same, and stronger."""
    sleep_seconds: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    """Think time between an answer and the next request."""
    concurrency: OneOrMore | None = None
    """Requests on their way, of all clients together; stronger than both."""
    batch: OneOrMore | None = None
    """Requests that every client keeps on their way instead of one."""
    prompt_len: OneOrMore | None = None
    gen_tokens: OneOrMore | None = None
    target_rps: Annotated[float, Meta(gt=0, le=10_000_000)] | None = None
    """Open loop: requests per second of all clients together."""
    request_distribution: Literal["constant", "poisson", "burst"] | None = None
    burstiness: Annotated[float, Meta(gt=0, le=1_000)] | None = None
    """Ours: shape of the gaps of `burst`, below 1; default 0.25."""
    dataset: Word | None = None
    tokenizer: Word | None = None
    api: Literal["chat", "completions", "ollama", "http"] | None = None
    path: Word | None = None
    streaming: bool | None = None
    parameters: dict[str, Any] | None = None
    request_timeout: Time | None = None


class Entry(Load, frozen=True, kw_only=True):
    """One benchmark of a suite."""

    name: Word


class Workload(Load, frozen=True, kw_only=True):
    """What is sent."""

    service: Word = "ollama"
    component: Literal["storage", "inference", "vectordb"] | None = None
    benchmark_suite: list[Entry] = []


class HealthCheck(Part, frozen=True, kw_only=True):
    """How servers are asked whether they are ready."""

    enabled: bool = True
    timeout: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """Their schema says 60; without it `--timeout` of `herder orchestrate` holds."""
    interval: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    endpoint: Text = ""


class ServerSettings(Part, frozen=True, kw_only=True):
    """The servers."""

    health_check: HealthCheck = HealthCheck()
    service_config: dict[str, Any] = {}


class Metric(Part, frozen=True, kw_only=True):
    """One source of samples."""

    type: Literal["prometheus", "gpu", "system", "custom"]
    scrape_interval: Time = "5s"
    targets: list[Literal["servers", "clients", "all"]] = msgspec.field(default_factory=lambda: ["all"])


class Monitoring(Part, frozen=True, kw_only=True):
    """What is sampled beside the load."""

    enabled: bool = True
    metrics: list[Metric] = []
    retention: Time = "7d"


class LogOutputs(Part, frozen=True, kw_only=True):
    """Names of the collected files."""

    stdout: Word = "stdout.log"
    stderr: Word = "stderr.log"
    aggregated: Word = "aggregated.jsonl"


class Logging(Part, frozen=True, kw_only=True):
    """Which logs are collected, and how."""

    enabled: bool = True
    type: Literal["tailer"] = "tailer"
    aggregation: Literal["centralized", "distributed"] = "centralized"
    categories: list[Category] = msgspec.field(default_factory=lambda: ["application", "benchmark"])
    format: Literal["json", "text"] = "json"
    retention: Time = "7d"
    create_jsonl: bool = True
    flush_interval: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    outputs: LogOutputs = LogOutputs()


class Image(Part, frozen=True, kw_only=True):
    """A container image: a file below containers_dir, and where it is pulled from when it is missing."""

    path: Word
    remote: Text = ""


class Artifacts(Part, frozen=True, kw_only=True):
    """Files that the job needs."""

    container: Text = ""
    """Their schema demanded it and their scripts never read it: a .sif file here is the service's image."""
    containers_dir: Text = ""
    service: Image | None = None
    python: Image | None = None
    dataset: Text = ""


class Reporting(Part, frozen=True, kw_only=True):
    """What is written at the end."""

    formats: list[Format] = msgspec.field(default_factory=lambda: ["json", "csv"])
    include: list[Include] = msgspec.field(default_factory=lambda: ["metrics_summary", "performance_graphs"])
    output_directory: Text = ""


class Metadata(Part, frozen=True, kw_only=True):
    """What is kept with the result."""

    seed: int = 0
    git_commit: Text = ""
    notes: Text = ""
    tags: list[Word] = []


class Recipe(Part, frozen=True, kw_only=True):
    """A suite's recipe."""

    scenario: Word = "benchmark"
    partition: Text = ""
    account: Text = ""
    qos: Text = ""
    modules: list[Word] | None = None
    repetitions: Annotated[int, Meta(ge=1, le=1_000)] = 1
    environment: dict[str, str | int | float | bool] = {}
    """Variables of the servers."""
    orchestration: Orchestration = Orchestration()
    resources: Resources = Resources()
    workload: Workload
    servers: ServerSettings = ServerSettings()
    monitoring: Monitoring = Monitoring()
    logging: Logging = Logging()
    artifacts: Artifacts = Artifacts()
    binds: list[Word] = []
    reporting: Reporting = Reporting()
    metadata: Metadata = Metadata()
