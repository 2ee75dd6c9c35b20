"""Clients of other projects that `benchmarks.peers` runs with those projects' own Python: standard library only.

    PYTHON peer_clients.py vllm FILE URL STREAMS REQUESTS      vLLM's request function, loaded from its file alone
    PYTHON peer_clients.py sglang FILE URL STREAMS REQUESTS    SGLang's Rust client, loaded from its extension module

Prints one JSON object: CPU seconds of the measured part, and what the client reports, in milliseconds.
"""

import asyncio
import importlib.machinery
import importlib.util
import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

TOKENS = 100


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _loaded(path: str, name: str) -> Any:
    """A module from one file, without its package."""
    loader: Any = (
        importlib.machinery.SourceFileLoader if path.endswith(".py") else importlib.machinery.ExtensionFileLoader
    )
    spec = importlib.util.spec_from_loader(name, loader(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def vllm(path: str, url: str, streams: int, requests: int) -> dict[str, Any]:
    """A closed loop of `streams` over `async_request_openai_chat_completions`, with a session as its tool makes one."""
    import aiohttp

    module = _loaded(path, "endpoint_request_func")
    prompt = "word " * 100

    async def one(session: Any, gate: asyncio.Semaphore) -> Any:
        async with gate:
            asked = module.RequestFuncInput(
                prompt=prompt, api_url=f"{url}/v1/chat/completions", prompt_len=100, output_len=TOKENS, model="stub",
                ignore_eos=True,
            )  # fmt: skip
            return await module.async_request_openai_chat_completions(asked, session)

    async def everything() -> list[Any]:
        connector = aiohttp.TCPConnector(limit=streams, limit_per_host=streams, ttl_dns_cache=300, keepalive_timeout=60)
        gate = asyncio.Semaphore(streams)
        async with aiohttp.ClientSession(connector=connector, trust_env=True) as session:
            return list(await asyncio.gather(*(one(session, gate) for _ in range(requests))))

    before = _cpu_s()
    answers = asyncio.run(everything())
    cpu_s = _cpu_s() - before
    assert all(answer.success for answer in answers), next(answer.error for answer in answers if not answer.success)
    times = sorted(answer.ttft * 1000 for answer in answers)
    gaps = [(answer.latency - answer.ttft) * 1000 / (TOKENS - 1) for answer in answers]
    return {
        "cpu_s": cpu_s,
        "ttft_p50": statistics.median(times),
        "ttft_p99": times[int(len(times) * 0.99)],
        "tpot_p50": statistics.median(gaps),
    }


def sglang(path: str, url: str, streams: int, requests: int) -> dict[str, Any]:
    """One worker thread; CPU of the whole call, prompts included."""
    client = _loaded(path, "_bench")
    config = {
        "backend": "vllm-chat", "base_url": url, "model": "stub", "tokenizer": "tok", "dataset_name": "random-ids",
        "random_input_len": 100, "random_output_len": TOKENS, "random_range_ratio": 1.0, "num_prompts": requests,
        "max_concurrency": streams, "worker_threads": 1, "request_rate": "inf", "warmup_requests": 0,
        "disable_tqdm": True, "output_file": "sglang.jsonl",
    }  # fmt: skip
    before = _cpu_s()
    found = json.loads(client.run_config(json.dumps(config)))
    return {
        "cpu_s": _cpu_s() - before,
        "ttft_p50": found["median_ttft_ms"],
        "ttft_p99": found["p99_ttft_ms"],
        "tpot_p50": found["median_tpot_ms"],
    }


if __name__ == "__main__":
    which, file, base, wanted, count = sys.argv[1:]
    made = {"vllm": vllm, "sglang": sglang}[which](str(Path(file)), base, int(wanted), int(count))
    print("PEER " + json.dumps(made))
