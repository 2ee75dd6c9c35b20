"""`herder chat`: ask a served model; the answer streams."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from herder.cli import output, text
from herder.cli.command import Globals, pass_globals, verb

if TYPE_CHECKING:
    from herder.client_sync import Client


@verb(
    "chat",
    examples=(
        'herder chat smollm2 "Why is the sky blue?"',
        "herder chat smollm2 --system 'Answer in one word.' < question.txt",
        "herder chat smollm2                # a conversation, until Ctrl-D",
    ),
)
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--system", default="", help="What the model is told first.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 10), help="0: always the likeliest.")
@click.option(
    "--stats/--no-stats", default=None, help="Time to first token and rate, on stderr; default: on a terminal."
)
@pass_globals
def command(
    options: Globals,
    model: str,
    prompt: tuple[str, ...],
    system: str,
    max_tokens: int | None,
    temperature: float | None,
    stats: bool | None,
) -> None:
    """Ask MODEL. PROMPT: the rest of the line, standard input, or a conversation."""
    extra = {"max_tokens": max_tokens, "temperature": temperature}
    asked = {name: value for name, value in extra.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    has_stats = sys.stderr.isatty() if stats is None else stats
    with options.connect() as client:
        if not prompt and sys.stdin.isatty():
            _converse(options, client, model, messages, asked, has_stats=has_stats)
            return
        words = " ".join(prompt) or sys.stdin.read()
        if not words.strip():
            raise click.UsageError("there is no prompt")
        _ask(options, client, model, [*messages, {"role": "user", "content": words}], asked, has_stats=has_stats)


def _converse(
    options: Globals,
    client: Client,
    model: str,
    messages: list[dict[str, str]],
    asked: dict[str, Any],
    *,
    has_stats: bool,
) -> None:
    output.note(options, f"talking to {model}; Ctrl-D ends it")
    while True:
        try:
            words = input("> ")
        except EOFError:
            click.echo()
            return
        if not words.strip():
            continue
        messages.append({"role": "user", "content": words})
        answer = _ask(options, client, model, messages, asked, has_stats=has_stats)
        messages.append({"role": "assistant", "content": answer})


def _ask(
    options: Globals,
    client: Client,
    model: str,
    messages: list[dict[str, str]],
    asked: dict[str, Any],
    *,
    has_stats: bool,
) -> str:
    begun, first, pieces, count = time.monotonic(), 0.0, [], 0
    usage: dict[str, Any] = {}
    finish = None
    with output.interruptible("The answer was cut off; nothing goes on."):
        for chunk in client.chat(model, messages, **asked):
            if chunk.text or chunk.reasoning:
                first = first or time.monotonic()
                count += 1
            pieces.append(chunk.text)
            usage = chunk.usage or usage
            finish = chunk.finish_reason or finish
            if options.output == "table" and chunk.text:
                output.stream(chunk.text)
    answer = "".join(pieces)
    ended = time.monotonic()
    if options.output == "table":
        click.echo()
    else:
        value: dict[str, Any] = {"model": model, "text": answer, "finish_reason": finish, "usage": usage or None}
        value["ttft_s"] = round(first - begun, 4) if first else None
        output.emit(options, value)
    if has_stats and first:
        tokens = int(usage.get("completion_tokens") or count)
        rate = f", {(tokens - 1) / (ended - first):.1f} tokens/s" if tokens > 1 and ended > first else ""
        output.note(options, f"[first token after {text.duration(first - begun)}; {tokens} tokens{rate}]")
    return answer
