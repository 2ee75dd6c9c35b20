"""Samples as Prometheus series: the same names from an agent's /metrics and from a monitor's (docs/metrics.md).

Units are in the names. What a card, driver or kernel does not say has no series. Values that only grow are counters
of the source (bytes since boot, joules since the driver was loaded), so a rate over them holds at any scrape interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from agent.monitor.engines import FIELDS as ENGINE_FIELDS
from agent.monitor.engines import EngineSample
from agent.monitor.node import NodeSample
from agent.monitor.procfs import HostSample
from agent.probe.gpu_sample import THROTTLE_REASONS, GpuProcess

MIB = 1 << 20
Gpus = Sequence[Any]  # GpuReading of telemetry or GpuSample: the fields that both have are named alike
Value = Callable[[Any], float | None]

_GPU = (
    ("herder_gpu_memory_used_bytes", "GPU memory in use.", "memory_used_bytes"),
    ("herder_gpu_memory_free_bytes", "GPU memory that is free.", "memory_free_bytes"),
    ("herder_gpu_utilisation_ratio", "Share of time in which a kernel ran.", "utilisation"),
    ("herder_gpu_memory_utilisation_ratio", "Share of time in which memory was read or written.", "memory_utilisation"),
    ("herder_gpu_temperature_celsius", "GPU temperature.", "temperature_c"),
    ("herder_gpu_power_watts", "Power drawn.", "power_w"),
    ("herder_gpu_ecc_uncorrected", "Uncorrected ECC errors since the driver was loaded.", "ecc_uncorrected"),
    ("herder_gpu_ecc_corrected", "Corrected ECC errors since the driver was loaded.", "ecc_corrected"),
    ("herder_gpu_power_limit_watts", "Power that it may draw.", "power_limit_w"),
    ("herder_gpu_pcie_transmit_bytes_per_second", "PCIe traffic from the card.", "pcie_tx_bytes_per_s"),
    ("herder_gpu_pcie_receive_bytes_per_second", "PCIe traffic to the card.", "pcie_rx_bytes_per_s"),
)
_GPU_COUNTERS = (
    ("herder_gpu_energy_joules", "Energy since the driver was loaded.", "energy_j"),
    ("herder_gpu_nvlink_transmit_bytes", "Bytes sent over all NVLinks.", "nvlink_tx_bytes"),
    ("herder_gpu_nvlink_receive_bytes", "Bytes received over all NVLinks.", "nvlink_rx_bytes"),
)
_GPU_LABELS = ["gpu", "uuid", "name"]
_DISK: tuple[tuple[str, str, Value], ...] = (
    ("herder_node_disk_read_bytes", "Bytes read from a disk.", lambda disk: disk.read_bytes),
    ("herder_node_disk_written_bytes", "Bytes written to a disk.", lambda disk: disk.written_bytes),
    ("herder_node_disk_reads", "Reads that a disk has done.", lambda disk: disk.reads),
    ("herder_node_disk_writes", "Writes that a disk has done.", lambda disk: disk.writes),
    ("herder_node_disk_busy_seconds", "Time in which a disk had something to do.", lambda disk: disk.busy_s),
)
_NIC: tuple[tuple[str, str, Value], ...] = (
    ("herder_node_network_receive_bytes", "Bytes received.", lambda nic: nic.rx_bytes),
    ("herder_node_network_transmit_bytes", "Bytes sent.", lambda nic: nic.tx_bytes),
    ("herder_node_network_receive_errors", "Errors in receiving.", lambda nic: nic.rx_errors),
    ("herder_node_network_transmit_errors", "Errors in sending.", lambda nic: nic.tx_errors),
)


def gauge(name: str, text: str, value: float | None) -> Metric:
    """One value without labels; without a sample where it is not known."""
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """One counter without labels; `_total` is added."""
    return CounterMetricFamily(name, text, value=value)


def gpu_series(gpus: Gpus, names: Mapping[str, str]) -> Iterator[Metric]:
    """GPUs and MIG instances; `names` by uuid."""

    def labels(gpu: Any) -> list[str]:
        return [str(gpu.index), gpu.uuid, names.get(gpu.uuid, "")]

    for kind, table in ((GaugeMetricFamily, _GPU), (CounterMetricFamily, _GPU_COUNTERS)):
        for name, text, field in table:
            family = kind(name, text, labels=_GPU_LABELS)
            for gpu in gpus:
                value = getattr(gpu, field, None)
                if value is not None and not gpu.is_lost:
                    family.add_metric(labels(gpu), float(value))
            yield family
    clocks = GaugeMetricFamily("herder_gpu_clock_hertz", "Clocks of now.", labels=[*_GPU_LABELS, "clock"])
    throttle = GaugeMetricFamily(
        "herder_gpu_throttle", "1 while this holds the clocks back.", labels=[*_GPU_LABELS, "reason"]
    )
    lost = GaugeMetricFamily("herder_gpu_lost", "1 when the driver has lost the card.", labels=["gpu", "uuid"])
    for gpu in gpus:
        lost.add_metric([str(gpu.index), gpu.uuid], float(gpu.is_lost))
        for clock, field in (("sm", "sm_clock_mhz"), ("memory", "memory_clock_mhz")):
            if getattr(gpu, field, None) is not None:
                clocks.add_metric([*labels(gpu), clock], getattr(gpu, field) * 1e6)
        held: tuple[str, ...] | None = getattr(gpu, "throttle", None)
        if held is not None:
            for reason in THROTTLE_REASONS.values():
                throttle.add_metric([*labels(gpu), reason], float(reason in held))
    yield from (clocks, throttle, lost)


def host_series(host: HostSample) -> Iterator[Metric]:
    """What the host does, beside CPU, load and memory, which an agent has from its telemetry."""
    cpu, memory = host.cpu, host.memory
    iowait = cpu.iowait if cpu else None
    yield gauge("herder_node_cpu_iowait_ratio", "CPU that waits for disks, 0..1 over all CPUs.", iowait)
    yield gauge("herder_node_page_cache_bytes", "Memory that holds files.", memory.page_cache_bytes if memory else None)
    yield gauge("herder_node_swap_used_bytes", "Swap in use.", memory.swap_used_bytes if memory else None)
    for name, text, value in _DISK:
        yield _counters(name, text, "device", host.disks, value)
    for name, text, value in _NIC:
        yield _counters(name, text, "interface", host.nics, value)
    pressure = CounterMetricFamily(
        "herder_node_pressure_seconds",
        "Time in which some or all tasks waited for a resource.",
        labels=["resource", "kind"],
    )
    for one in host.pressures:
        pressure.add_metric([one.resource, "some"], one.some_s)
        if one.full_s is not None:
            pressure.add_metric([one.resource, "full"], one.full_s)
    yield pressure


def _counters(name: str, text: str, label: str, things: Iterable[Any], value: Value) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for thing in things:
        family.add_metric([thing.name], float(value(thing) or 0))
    return family


def base_series(sample: NodeSample, memory_bytes: int, available_bytes: int) -> Iterator[Metric]:
    """CPU, load and memory under the names of an agent's telemetry."""
    host = sample.host
    has_memory = host.memory is not None
    yield gauge("herder_node_cpu_ratio", "CPU in use, 0..1 over all CPUs.", host.cpu.busy if host.cpu else None)
    yield gauge("herder_node_load1", "Load average over one minute.", host.load1)
    yield gauge("herder_node_memory_bytes", "Memory of the node.", memory_bytes if has_memory else None)
    yield gauge(
        "herder_node_memory_available_bytes", "Memory that is available.", available_bytes if has_memory else None
    )


def process_series(processes: Sequence[GpuProcess]) -> Iterator[Metric]:
    """Processes on GPUs."""
    labels = ["gpu", "pid", "process"]
    memory = GaugeMetricFamily("herder_gpu_process_memory_bytes", "GPU memory of a process.", labels=labels)
    use = GaugeMetricFamily(
        "herder_gpu_process_utilisation_ratio", "Share of the GPU's time that a process used.", labels=labels
    )
    for process in processes:
        names = [str(process.gpu), str(process.pid), process.name]
        if process.memory_bytes is not None:
            memory.add_metric(names, process.memory_bytes)
        if process.utilisation is not None:
            use.add_metric(names, process.utilisation)
    yield from (memory, use)


def engine_series(samples: Sequence[EngineSample]) -> Iterator[Metric]:
    """What engines said last; one that does not answer is down and says nothing."""
    up = GaugeMetricFamily("herder_engine_up", "1 when the engine's own metrics could be read.", labels=["replica"])
    for sample in samples:
        up.add_metric([sample.replica], float(sample.is_up))
    yield up
    for field in ENGINE_FIELDS:
        kind = CounterMetricFamily if field.name.endswith(("_total", "_sum", "_count")) else GaugeMetricFamily
        name = f"herder_engine_{field.name.removesuffix('_total')}"
        family = kind(name, f"{field.name} as the engine says.", labels=["replica"])
        for sample in samples:
            if sample.is_up and field.name in sample.values:
                family.add_metric([sample.replica], sample.values[field.name])
        yield family


def seed_series(sample: NodeSample, samples: int, loop_s: float, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The series of seed 002 with its labels, for dashboards that were made for it."""
    names, values = list(labels), list(labels.values())

    def one(name: str, text: str, value: float | None, kind: type[Any] = GaugeMetricFamily) -> Metric:
        family: Metric = kind(name, text, labels=names)
        if value is not None:
            family.add_metric(values, value)  # type: ignore[attr-defined]
        return family

    host = sample.host
    busy = host.cpu.busy if host.cpu else None
    yield one("monitor_samples", "Samples taken.", samples, CounterMetricFamily)
    yield one("monitor_loop_duration_seconds", "How long the last sample took.", loop_s)
    yield one("cpu_usage_percent", "CPU in use.", None if busy is None else busy * 100)
    yield one("ram_used_megabytes", "Memory in use.", host.memory.used_bytes / MIB if host.memory else None)
    use = GaugeMetricFamily("gpu_utilization_percent", "Share of time with a kernel.", labels=["gpu_id", *names])
    held = GaugeMetricFamily("gpu_memory_used_megabytes", "GPU memory in use.", labels=["gpu_id", *names])
    for gpu in sample.gpus or ():
        if gpu.utilisation is not None:
            use.add_metric([str(gpu.index), *values], gpu.utilisation * 100)
        if gpu.memory_used_bytes is not None:
            held.add_metric([str(gpu.index), *values], gpu.memory_used_bytes / MIB)
    yield from (use, held)


def exposition(collect: Callable[[], Iterable[Metric]]) -> bytes:
    """Prometheus' text form."""

    class _Collector(Collector):
        def collect(self) -> Iterable[Metric]:
            return collect()

        def describe(self) -> Iterable[Metric]:
            return ()

    registry = CollectorRegistry()
    registry.register(_Collector())
    return generate_latest(registry)
