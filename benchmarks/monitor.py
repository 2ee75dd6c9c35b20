"""What watching a machine costs: the monitor on a node with 8 GPUs, beside others, all in the same minute.

    python -m benchmarks.monitor [--seconds 60] [--gpus 8]

The GPUs are the tests' double of the NVML library, loaded by the real bindings, each with one process; it answers at
once and costs next to nothing, so what is measured is ours: a real driver's own time comes on top, for everybody.
CPU is the kernel's account of each process (all threads) over the time measured, without its start. Beside ours:

  seed 002's monitor   psutil and pynvml as it uses them: four kinds of values, no links, disks, network or processes
  all readings, naive  the same readings as ours by psutil's and pynvml's own calls, one by one, into CSV
  node_exporter        Prometheus' own (Go), scraped once a second; it knows no GPU

Bar: at most 0.5 % of a core at one sample a second.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import ROOT, Usage, share_of_a_core, usage
from tests.doubles import fake_nvml

BAR = 0.005
SETTLE_S = 3.0
SEED = """
import csv, datetime, sys, time, psutil, pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
names = [name for n in range(len(handles)) for name in (f"gpu{n}_util", f"gpu{n}_mem_used")]
with open(sys.argv[1], "w", newline="") as file:
    writer = csv.DictWriter(file, fieldnames=["timestamp", *names, "cpu_percent", "ram_used_MB"])
    writer.writeheader()
    while True:
        row = {"timestamp": datetime.datetime.now().isoformat()}
        for n, handle in enumerate(handles):
            row[f"gpu{n}_util"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            row[f"gpu{n}_mem_used"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used // 2**20
        row["cpu_percent"] = psutil.cpu_percent(interval=None)
        row["ram_used_MB"] = psutil.virtual_memory().used // 2**20
        writer.writerow(row)
        file.flush()
        time.sleep(1.0)
"""
NAIVE = """
import csv, datetime, sys, time, psutil, pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
with open(sys.argv[1], "w", newline="") as file:
    writer = csv.writer(file)
    while True:
        row = [datetime.datetime.now().isoformat()]
        for handle in handles:
            rates, memory = pynvml.nvmlDeviceGetUtilizationRates(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            fields = pynvml.nvmlDeviceGetFieldValues(handle, [83, (138, 0xFFFFFFFF), (139, 0xFFFFFFFF), 197, 198])
            row += [rates.gpu, rates.memory, memory.total, memory.used, *(field.value.ullVal for field in fields)]
            row += [pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)]
            row += [pynvml.nvmlDeviceGetTemperature(handle, 0), pynvml.nvmlDeviceGetClockInfo(handle, 1)]
            row += [pynvml.nvmlDeviceGetClockInfo(handle, 2), pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)]
            row += [pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, 0) for kind in (0, 1)]
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                row += [process.pid, process.usedGpuMemory, psutil.Process(process.pid).name()]
            row += [use.smUtil for use in pynvml.nvmlDeviceGetProcessUtilization(handle, 0)]
        times, memory = psutil.cpu_times_percent(interval=None), psutil.virtual_memory()
        row += [*times, psutil.getloadavg()[0], *memory, psutil.swap_memory().used]
        for disk in psutil.disk_io_counters(perdisk=True).values():
            row += disk
        for nic in psutil.net_io_counters(pernic=True).values():
            row += nic
        for name in ("cpu", "memory", "io"):
            try:
                row.append(open(f"/proc/pressure/{name}").read())
            except OSError:
                pass
        writer.writerow(row)
        file.flush()
        time.sleep(1.0)
"""


@dataclass
class Peer:
    """One of those that watch."""

    name: str
    process: subprocess.Popen[bytes]
    samples: str = ""
    url: str = ""  # its /metrics, scraped once a second
    before: Usage | None = None
    after: Usage | None = None

    @property
    def share(self) -> float:
        """Of a core."""
        assert self.before is not None
        assert self.after is not None
        return share_of_a_core(self.before, self.after)


def main() -> None:
    """Prints the table; exit status 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gpus", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers = start(folder, given.gpus)
        try:
            measure(peers, given.seconds)
        finally:
            for peer in peers:
                peer.process.terminate()
            for peer in peers:
                peer.process.wait(30)
        own = show(folder, peers, given.seconds)
    sys.exit(0 if own <= BAR else 1)


def start(folder: Path, gpus: int) -> list[Peer]:
    """Everybody, on a machine with so many GPUs."""
    library = fake_nvml.build(folder / "driver", gpus=gpus, has_processes=True)
    env = {name: value for name, value in os.environ.items() if name != "FAKE_NVML_STATE"}
    env |= {"LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT)}

    def run(name: str, *argv: str, samples: str = "", url: str = "") -> Peer:
        log = (folder / "log").open("ab")
        return Peer(name, subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log), samples, url)

    peers = []
    for name, interval in (("second", 1.0), ("tenth", 0.1)):
        (folder / name).mkdir()
        (folder / name / "order.json").write_text(json.dumps({"interval": interval}))
        said = f"herder monitor, {interval:g} s"
        argv = (sys.executable, "-m", "agent.monitor", "--run", str(folder / name))
        peers.append(run(said, *argv, samples=f"{name}/monitor.csv"))
    port, other = free_port(), free_port()
    cli = "from herder.cli.main import main; main()"
    words = ("monitor", "--save", "scraped.csv", "--listen", str(port))
    url = f"http://127.0.0.1:{port}/metrics"
    said = "herder monitor, 1 s, scraped each second"
    peers.append(run(said, sys.executable, "-c", cli, *words, samples="scraped.csv", url=url))
    peers.append(run("seed 002's monitor, 1 s", sys.executable, "-c", SEED, "seed.csv", samples="seed.csv"))
    peers.append(run("all readings, naive, 1 s", sys.executable, "-c", NAIVE, "naive.csv", samples="naive.csv"))
    exporter = shutil.which("prometheus-node-exporter")
    if exporter:
        flags = (f"--web.listen-address=127.0.0.1:{other}", "--log.level=error")
        url = f"http://127.0.0.1:{other}/metrics"
        peers.append(run("node_exporter, scraped each second", exporter, *flags, url=url))
    return peers


def measure(peers: list[Peer], seconds: float) -> None:
    """Lets them run for so long once they have settled."""
    ended = threading.Event()
    scrapers = [threading.Thread(target=scrape, args=(peer.url, ended)) for peer in peers if peer.url]
    for scraper in scrapers:
        scraper.start()
    try:
        time.sleep(SETTLE_S)
        for peer in peers:
            assert peer.process.poll() is None, f"{peer.name} has ended"
            peer.before = usage(peer.process.pid)
        time.sleep(seconds)
        for peer in peers:
            assert peer.process.poll() is None, f"{peer.name} has ended"
            peer.after = usage(peer.process.pid)
    finally:
        ended.set()
        for scraper in scrapers:
            scraper.join()


def scrape(url: str, ended: threading.Event) -> None:
    """Reads a page once a second."""
    while not ended.wait(1.0):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            answer.read()


def show(folder: Path, peers: list[Peer], seconds: float) -> float:
    """Prints the table and returns the share of the first."""
    print(f"{seconds:g} s, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':42} {'of a core':>10} {'memory':>8} {'columns':>8} {'rows':>6}")
    for peer in peers:
        assert peer.after is not None
        rows = list(csv.reader((folder / peer.samples).open(newline=""))) if peer.samples else []
        columns = str(len(rows[-2])) if len(rows) > 1 else "-"
        print(
            f"{peer.name:42} {peer.share:10.2%} {peer.after.rss_bytes / 1e6:5.0f} MB {columns:>8}"
            f" {len(rows) if rows else '-':>6}"
        )
    own = peers[0].share
    print(f"bar: herder monitor at 1 s takes at most {BAR:.1%} of a core: {'reached' if own <= BAR else 'MISSED'}")
    return own


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
