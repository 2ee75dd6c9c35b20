"""What every question shares: which model, which machine, and what the planner may look at to find them.

A question is a msgspec struct; the HTTP API, its OpenAPI document, the command line and its help are made from its
fields. Fields have defaults wherever the documents of the planner that this one replaces had them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.errors import InvalidValue
from common.wire import Inventory
from head.planner.hardware.topology import (
    NodeFacts,
    Source,
    Topology,
    topology_of_nodes,
    topology_of_preset,
)
from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.headers import architecture_of_registered, architecture_of_tensors
from head.planner.model.presets import architecture_of, lookup

DEFAULT_GPU, DEFAULT_GPUS = "H100-SXM-80GB", 8
LEAST_MEMORY_BYTES = 100_000_000  # of an accelerator whose memory is given
MOCK_GPUS = 4  # what the old planner took where mock_topology came without a number

Count = Annotated[int, Meta(ge=1, le=1_048_576)]
Batch = Annotated[int, Meta(ge=1, le=1 << 24)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 26)]
Name = Annotated[str, Meta(max_length=256)]
Positive = Annotated[float, Meta(ge=1e-6, le=1e18)]


class PlanGpu(msgspec.Struct, frozen=True):
    """One GPU of the inventory, as far as plans need it."""

    index: int
    name: str
    memory_bytes: int
    nvlink_peers: tuple[int, ...] = ()


class NodeKind(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes that are alike: ten thousand of one kind are said once."""

    gpus: tuple[PlanGpu, ...] = ()
    cpu_model: str = ""
    cpus: int = 0
    numa_nodes: int = 1
    memory_bytes: int = 0
    nic_bits_per_s: float = 0.0
    node_ids: tuple[str, ...] = ()


class Desk(msgspec.Struct, frozen=True, kw_only=True):
    """What answers may draw on besides the question; plain data, so that it can travel to another process.

    `source` says where the nodes come from; `models` maps names to the metadata that agents read from the files, for
    those models that the question names, or (source: headers) to what a file's own headers say; `names` are all
    registered ones.
    """

    kinds: tuple[NodeKind, ...] = ()
    source: Source = "registered"
    models: dict[str, dict[str, Any]] = {}
    names: tuple[str, ...] = ()

    def nodes(self) -> tuple[NodeFacts, ...]:
        """Every node of the inventory."""
        return tuple(
            NodeFacts(
                node_id=node_id,
                gpus=kind.gpus,
                cpu_model=kind.cpu_model,
                cpus=kind.cpus,
                numa_nodes=kind.numa_nodes,
                memory_bytes=kind.memory_bytes,
                nic_bits_per_s=kind.nic_bits_per_s,
            )
            for kind in self.kinds
            for node_id in kind.node_ids
        )


def kind_of(inventory: Inventory) -> NodeKind:
    """What plans need of a node. GPUs that are split into MIG instances are left out, their instances are in."""
    return NodeKind(
        gpus=tuple(
            PlanGpu(gpu.index, gpu.name, gpu.memory_bytes, gpu.nvlink_peers)
            for gpu in inventory.gpus
            if not gpu.mig_mode
        ),
        cpu_model=inventory.cpu_model,
        cpus=inventory.cpus,
        numa_nodes=inventory.numa_nodes,
        memory_bytes=inventory.memory_bytes,
        nic_bits_per_s=1e6 * sum(max(0, nic.speed_mbps) for nic in inventory.nics if nic.name != "lo"),
    )


class Dimensions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model by its numbers, for one that has no name yet."""

    hidden: Annotated[int, Meta(ge=1, le=1 << 20)]
    layers: Annotated[int, Meta(ge=1, le=10_000)]
    heads: Annotated[int, Meta(ge=1, le=65_536)]
    kv_heads: Annotated[int, Meta(ge=0, le=65_536, description="0: as heads.")] = 0
    head_dim: Annotated[int, Meta(ge=0, le=65_536, description="0: hidden / heads.")] = 0
    ffn: Annotated[int, Meta(ge=1, le=1 << 22)]
    vocab: Annotated[int, Meta(ge=1, le=1 << 24)]
    is_gated: bool = True
    is_tied: bool = False
    experts: Annotated[int, Meta(ge=0, le=65_536)] = 0
    active_experts: Annotated[int, Meta(ge=0, le=65_536)] = 0
    shared_ffn: Annotated[int, Meta(ge=0, le=1 << 22)] = 0
    window: Annotated[int, Meta(ge=0, le=1 << 26, description="Tokens of a sliding window; 0: none.")] = 0
    context: Annotated[int, Meta(ge=0, le=1 << 26)] = 0


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Root of the questions."""


class ModelQuestion(Question, frozen=True, kw_only=True):
    """About one model: by name, by its config.json, or by its numbers."""

    model: Annotated[Name, Meta(description="A preset, a registered model, or just a name beside config.")] = ""
    config: Annotated[dict[str, Any] | None, Meta(description="The content of a Hugging Face config.json.")] = None
    dimensions: Dimensions | None = None


class PlacedQuestion(ModelQuestion, frozen=True, kw_only=True):
    """About one model on some machine. Without any of these fields the cluster's own inventory is taken."""

    gpu: Annotated[Name, Meta(description="Accelerator, as H100-SXM-80GB; see /plan/topology.")] = ""
    gpus: Annotated[int, Meta(ge=0, le=1_048_576, description="Accelerators in all; 0: as the machine has.")] = 0
    gpus_per_node: Annotated[int, Meta(ge=0, le=1_024, description="0: as is usual for the accelerator.")] = 0
    nic_gbit: Annotated[float, Meta(ge=0, le=1e6, description="Network per accelerator, Gbit/s; 0: usual.")] = 0.0
    memory: Annotated[float, Meta(ge=0, le=1e5, description="Memory of one accelerator, GB; 0: its own.")] = 0.0
    mock_topology: Annotated[
        Literal["", "b200", "h100"] | None, Meta(description="As gpu, in the old planner's words.")
    ] = None
    mock_gpus: Annotated[int, Meta(ge=0, le=1_024, description="How many, beside mock_topology; 0: 4.")] = 0


def architecture_for(question: ModelQuestion, desk: Desk) -> Architecture:
    """The model a question is about. Raises: NotFound with near names, InvalidValue."""
    if question.config is not None and question.dimensions is not None:
        raise InvalidValue("config and dimensions: give one of them", field="config")
    if question.config is not None:
        return architecture_of(question.config, question.model or "config.json")
    if question.dimensions is not None:
        return architecture_of_dimensions(question.dimensions, question.model or "given")
    return architecture_named(question.model, desk)


def architecture_named(name: str, desk: Desk) -> Architecture:
    """A model of the cluster, else a preset. Raises: InvalidValue without a name, NotFound with near names."""
    if not name:
        raise InvalidValue("model: say which", field="model", hint="a name, or config, or dimensions")
    known = desk.models.get(name)
    if known is not None and known.get("source") == "headers":
        tensors = known.get("tensors")
        found = architecture_of_tensors(tensors, name=name) if tensors else architecture_of_registered(known, name)
        return msgspec.structs.replace(found, source="headers")
    if known is not None:
        try:
            return msgspec.structs.replace(architecture_of_registered(known, name), source="registered")
        except InvalidValue:
            pass  # its files do not say enough; a preset of the same name may
    return lookup(name)


def architecture_of_dimensions(given: Dimensions, name: str) -> Architecture:
    """A model of equal layers. Raises: InvalidValue."""
    kv_heads = given.kv_heads or given.heads
    if given.heads % kv_heads:
        raise InvalidValue(f"kv_heads: {kv_heads} does not divide {given.heads} heads", field="dimensions.kv_heads")
    if not given.head_dim and given.hidden % given.heads:
        raise InvalidValue(f"heads: {given.heads} does not divide hidden {given.hidden}", field="dimensions.heads")
    if given.active_experts > given.experts:
        raise InvalidValue("active_experts: more than experts", field="dimensions.active_experts")
    if given.experts and not given.active_experts:
        raise InvalidValue("active_experts: needed with experts", field="dimensions.active_experts")
    attention = Attention(
        kind="sliding" if given.window else "full",
        heads=given.heads,
        kv_heads=kv_heads,
        head_dim=given.head_dim or given.hidden // given.heads,
        window=given.window,
    )
    feed_forward = FeedForward(
        kind="moe" if given.experts else "dense",
        width=given.ffn,
        is_gated=given.is_gated,
        experts=given.experts,
        active=given.active_experts,
        shared_width=given.shared_ffn,
    )
    return Architecture(
        name=name,
        hidden=given.hidden,
        vocab=given.vocab,
        groups=(LayerGroup(count=given.layers, attention=attention, feed_forward=feed_forward),),
        is_tied=given.is_tied,
        context=given.context,
        source="given",
    )


def topology_for(question: PlacedQuestion, desk: Desk, *, gpus: int = 0) -> Topology:
    """The machine a question is about: what it names, else the inventory, else a preset that says it was assumed.

    gpus: how many when the question does not say. Raises: NotFound for an unknown accelerator, InvalidValue.
    """
    is_mock = bool(question.mock_topology) and not question.gpu
    wanted = question.gpus or question.mock_gpus or gpus or (MOCK_GPUS if is_mock else 0)
    name = question.gpu or question.mock_topology
    if not name and any(kind.gpus for kind in desk.kinds):
        found = topology_of_nodes(desk.nodes(), gpus=wanted, source=desk.source)
    else:
        is_assumed = not name
        found = topology_of_preset(
            name or DEFAULT_GPU,
            wanted or DEFAULT_GPUS,
            gpus_per_node=question.gpus_per_node,
            nic_gbit_per_s=question.nic_gbit or None,
        )
        if is_assumed:
            note = f"no accelerator was named and none is in the inventory: {DEFAULT_GPU} is assumed"
            found = msgspec.structs.replace(found, notes=(*found.notes, note))
    if question.memory:
        found = with_memory(found, question.memory)
    return found


def with_memory(topology: Topology, memory_gb: float) -> Topology:
    """The same machine with accelerators of `memory_gb` (1e9 bytes), of which the usual share is visible."""
    device = topology.accelerator
    wanted = int(memory_gb * 1e9)
    if wanted < LEAST_MEMORY_BYTES:
        raise InvalidValue(f"memory: {memory_gb:g} GB is not an accelerator's", field="memory")
    visible = int(wanted * device.visible_bytes / device.memory_bytes)
    device = msgspec.structs.replace(device, memory_bytes=wanted, visible_bytes=visible)
    note = f"memory of one accelerator given as {memory_gb:g} GB"
    return msgspec.structs.replace(topology, accelerator=device, notes=(*topology.notes, note))
