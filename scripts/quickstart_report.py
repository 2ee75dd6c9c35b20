"""The last part of scripts/quickstart: asks the served model one question through the gateway, then says what was
done, where things are and what to type next. Every figure is read back from the running daemons.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.table import Table

from herder import Client
from herder.types import JobView

QUESTION = "In one sentence: what does a shepherd do?"


def sized(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def transfer_rates(jobs: list[JobView], model: str) -> dict[str, float]:
    """Bytes per second of the first job that brought the model to each device, from order to done."""
    rates: dict[str, float] = {}
    for job in sorted(jobs, key=lambda job: job.created_ms):
        for step in job.steps:
            size = step.result.get("bytes")
            if (
                step.model == model
                and step.action in ("download", "copy")
                and size
                and step.started_ms
                and step.ended_ms
            ):
                rates.setdefault(step.devices[-1], size / max(0.001, (step.ended_ms - step.started_ms) / 1000))
    return rates


def metric(text: str, name: str) -> list[str]:
    """Samples of a metric family in an exposition."""
    return [line for line in text.splitlines() if line.startswith(name)]


def main() -> int:
    """Prints the answer, a table, the addresses and what to try next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--began", type=float, required=True, help="seconds since the epoch")
    options = parser.parse_args()
    console = Console(width=min(80, Console().width), highlight=False)

    with Client() as client:
        print(f"\n> {QUESTION}\n")
        begun = time.monotonic()
        first = 0.0
        pieces = 0
        for chunk in client.chat(options.model, QUESTION, max_tokens=60, temperature=0):
            if not chunk.text:
                continue
            first = first or time.monotonic()
            pieces += 1
            print(chunk.text, end="", flush=True)
        ended = time.monotonic()
        print("\n")
        if not first:
            print("error: the model gave no answer; see: herder logs", file=sys.stderr)
            return 1

        model = client.model(options.model)
        copies = sorted(model.copies, key=lambda copy: copy.device)
        replicas = list(client.replicas(model=options.model))
        rates = transfer_rates(list(client.jobs(status="completed")), options.model)
        url = os.environ["HERDER_URL"]
        token = (options.state / "head" / "admin.token").read_text().strip()
        request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            metrics = answer.read().decode()

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("where")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("how fast", justify="right")
    for copy in copies:
        rate = f"{sized(rates[copy.device])}/s" if copy.device in rates else ""
        state = f"copy, {copy.state}{', locked in RAM' if copy.is_locked else ''}"
        table.add_row(copy.device, state, sized(copy.bytes_total), rate)
    for replica in replicas:
        ready = ""
        if replica.ready_ms and replica.started_ms:
            ready = f"ready in {(replica.ready_ms - replica.started_ms) / 1000:.1f} s"
        table.add_row(replica.device, f"engine {replica.replica}, {replica.state}", sized(replica.memory_bytes), ready)
    table.add_row("gateway", "time to first token", f"{1000 * (first - begun):.0f} ms", "")
    speed = f"{(pieces - 1) / (ended - first):.0f} tokens/s" if pieces > 1 else ""
    table.add_row("gateway", "answer", f"{pieces} tokens", speed)
    console.print(table)

    wanted = ("herder_nodes", "herder_copies", "herder_replicas", "herder_gateway_requests_total")
    print("\nfrom /metrics:")
    for name in wanted:
        for line in metric(metrics, name)[:3]:
            print(f"  {line}")

    print(
        f"""
done in {time.time() - options.began:.0f} s. Everything listens on this machine only:
  API and docs   {url}/docs
  gateway        {url}/v1   (OpenAI-compatible)
  token          {options.state / "head" / "admin.token"}
  state          {options.state}

try next (. .venv/bin/activate, then):
  export HERDER_URL={url} HERDER_TOKEN_FILE={options.state / "head" / "admin.token"}
  herder status
  herder chat {options.model} "Why is the sky blue?"
  herder story {options.model}
  herder logs -f {replicas[0].replica if replicas else "REPLICA"}
  scripts/quickstart --stop"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
