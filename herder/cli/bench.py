"""`herder bench`: load on any URL, with numbers that say how they were made. Needs no head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herder.cli import output
from herder.cli.command import Duration, Globals, KeyValue, pass_globals, verb

if TYPE_CHECKING:
    from agent.loadgen.order import Order
    from herder.settings import Settings

EXAMPLES = (
    "herder bench http://localhost:8000 --model llama --rate 10 --duration 60s",
    "herder bench localhost:8000 --model m --concurrency 32 --requests 500 --scenario 'U(9,99)'",
    "herder bench localhost:8000 --model llama --arrivals ramp --rate 1 --peak 50 --duration 5m",
    "herder bench localhost:8000 --model llama --trace mooncake.jsonl --speed 2",
    "herder bench localhost:80 --api embeddings --model m --scenario 'E(512)' --rate 50 --requests 99",
    "herder bench localhost:6333 --api qdrant --collection c --vector-dim 768 --rate 99 --duration 9s",
    "herder bench localhost:9000/health --api http --method GET --rate 1000 --duration 9s",
)
DISTANCES = ("cosine", "l2", "dot")
SPREADS = ("round-robin", "random", "all-to-all", "static")
ARRIVALS = ("poisson", "constant", "gamma", "burst", "ramp", "steps", "spike", "sine", "trace", "offline")


def _by_class(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        scenario, _, pair = text.partition(":")
        name, value = KeyValue().convert(pair, param, ctx)
        found.setdefault(scenario, {})[name] = value
    return found


@verb("bench", examples=EXAMPLES)
@click.argument("targets", nargs=-1, required=True, metavar="URL...")
@click.option("--spread", default="round-robin", type=click.Choice(SPREADS), help="How requests go to several URLs.")
@click.option("--model", default="", help="The model's name in requests.")
@click.option(
    "--api",
    help="chat, completions, embeddings, rerank, speech, ollama, ollama-generate, ollama-embed, http, qdrant, pgvector"
    "; else what scenarios need.",
)
@click.option("--rate", type=float, help="Open loop: requests per second, sent whatever came back.")
@click.option("--arrivals", type=click.Choice(ARRIVALS), default="poisson", help="Open loop: how arrivals are spread.")
@click.option("--burstiness", type=float, help="Shape of the gaps: 1 Poisson, below 1 clumps, inf equal gaps.")
@click.option("--burst-size", type=int, help="Arrivals burst: so many together, every SIZE / RATE seconds.")
@click.option("--peak", type=float, help="The rate at the end of a ramp, in a spike, at the top of a sine.")
@click.option("--peak-at", type=Duration(), help="When a spike begins; default a third into the run.")
@click.option("--peak-for", type=Duration(), help="How long a spike lasts; default a sixth of the run.")
@click.option("--period", type=Duration(), help="Of a sine; default the run.")
@click.option("--step", "steps", multiple=True, metavar="RATExTIME", help="A step, as 10x30s; one after the other.")
@click.option("--trace", type=click.Path(), help="Recorded arrivals: Mooncake, BurstGPT or Azure.")
@click.option("--speed", type=float, default=1.0, help="Play a trace so many times as fast.")
@click.option("--concurrency", type=int, help="Closed loop: requests kept on their way.")
@click.option("--in-flight", type=int, help="Open loop: the most requests on their way; those due beyond wait.")
@click.option("--think", type=Duration(), default=0.0, help="Closed loop: pause between answer and next request.")
@click.option("--stagger", type=Duration(), default=0.0, help="Closed loop: begin spread over this time.")
@click.option("--duration", type=Duration(), help="How long to measure; warm-up and cool-down come on top.")
@click.option("--requests", type=int, help="How many to send in all.")
@click.option("--warmup", type=Duration(), default=0.0, help="Load before the measured window.")
@click.option("--cooldown", type=Duration(), default=0.0, help="Load behind the measured window.")
@click.option("--scenario", "scenarios", multiple=True, help="Sizes, as 'D(100,50)'; several, with x3 as weight, mix.")
@click.option("--dataset", help="Prompts of a file: ShareGPT, HellaSwag, Alpaca, JSON lines, CSV, text.")
@click.option("--tokenizer", help="Exact counts: server or server:URL (its /tokenize), or a tokenizer.json.")
@click.option("--prefix-tokens", type=int, default=0, help="Tokens that prompts share, counted into their size.")
@click.option("--prefix-groups", type=int, default=1, help="How many such prefixes there are.")
@click.option("--turns", type=int, default=1, help="Turns of a conversation; each follows the answer before.")
@click.option("--turn-think", type=Duration(), default=0.0, help="Pause before the next turn.")
@click.option("--live-replies", is_flag=True, help="The next turn holds the server's real answer, not a prepared one.")
@click.option("--batch", type=int, default=1, help="Documents in a request of embeddings or rerank.")
@click.option("--stream/--no-stream", default=True, help="Stream answers (default).")
@click.option("--exact/--no-exact", default=True, help="Ask for exactly as many tokens: min_tokens, ignore_eos.")
@click.option("--chunk-usage", is_flag=True, help="Ask for token counts with every piece (vLLM, SGLang).")
@click.option("--param", "parameters", type=KeyValue(), multiple=True, help="A field of the body, as top_p=0.9.")
@click.option(
    "--class-param",
    "class_parameters",
    multiple=True,
    callback=_by_class,
    metavar="SCENARIO:NAME=VALUE",
    help="A field of the body for one scenario's requests alone.",
)
@click.option("--header", "headers", multiple=True, help="A header, as 'Name: value'.")
@click.option("--path", help="Another path than the API's.")
@click.option("--method", default="POST", help="Plain HTTP: the method.")
@click.option("--body", type=click.Path(), help="Plain HTTP: a file with the body.")
@click.option("--collection", default="", help="Vector search: the collection, or the table of PostgreSQL.")
@click.option("--vector-dim", type=int, default=0, help="Vector search: numbers of each vector.")
@click.option("--vectors", type=click.Path(), help="Vector search: queries of a file, JSON lines; else they are drawn.")
@click.option("--vector-column", default="embedding", help="pgvector: the column.")
@click.option("--top-k", type=int, default=10, help="Vector search: how many are to be found.")
@click.option("--distance", type=click.Choice(DISTANCES), default="cosine", help="Vector search: how it is measured.")
@click.option("--points", type=int, default=0, help="Vector search: make the collection with so many, remove it after.")
@click.option("--vector-index", type=click.Choice(("hnsw", "none")), default="hnsw", help="pgvector: with --points.")
@click.option("--password-file", type=click.Path(), help="pgvector: a file with the password; else PGPASSFILE.")
@click.option("--slo", "slos", multiple=True, metavar="METRIC:MS", help="A limit for goodput: ttft, tpot or e2e.")
@click.option("--seed", type=int, default=0, help="Of arrivals, sizes and texts.")
@click.option("--workers", type=int, default=1, help="Processes that share the load.")
@click.option("--drain", type=Duration(), default=60.0, help="How long answers are awaited after the last send.")
@click.option("--timeout", type=Duration(), default=900.0, help="Longest time of one request.")
@click.option("--first-timeout", type=Duration(), default=300.0, help="Longest wait for the first output.")
@click.option("--insecure", is_flag=True, help="Do not check the server's TLS certificate.")
@click.option(
    "--format", "format_", type=click.Choice(["json", "csv", "html", "vllm", "genai-bench"]), help="Of --save."
)
@click.option("--save", type=click.Path(), help="Write the report there; without --format by its suffix.")
@click.option("--detail", is_flag=True, help="With every request in the JSON report.")
@pass_globals
def command(options: Globals, /, **given: Any) -> int:
    """Send load to a URL, or spread over several, and say what it took.

    Open loop (--rate) sends on a schedule that was drawn beforehand; latencies count from the intended time, too.
    Closed loop (--concurrency) sends when an answer has come. A run whose own generator was late is marked invalid and
    ends with exit code 1. Ctrl-C stops sending and shows what was measured; a second one cuts answers off.
    """
    from agent.loadgen.order import Aim, order_of, perform
    from common.bench.spec import LoadSpec
    from herder.cli.bench_view import Live, render

    token = _token_for_all(options, given["targets"], given["headers"])
    headers = (*given["headers"], f"Authorization: Bearer {token}") if token else given["headers"]
    fields = {name: given[name] for name in LoadSpec.__struct_fields__}
    fields["parameters"] = dict(given["parameters"])
    try:
        aim = Aim(
            given["targets"],
            given["spread"],
            headers,
            options.ca_file or _own_ca_for_all(options, given["targets"]),
            is_unverified=given["insecure"],
            password_file=given["password_file"],
        )
        order: Order = order_of(LoadSpec(**fields), aim)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if given["save"]:
        _check_writable(Path(given["save"]))
    live = Live(options, order)
    try:
        report, outcome = perform(order, on_tick=live.take, on_start=live.begin)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    finally:
        live.end()
    value: Any = report
    said = ""
    if given["detail"]:
        value, said = _detailed(report, outcome)
    # First what was measured, then its file: a disk that is full must not cost the run.
    output.emit(options, value, render(report))
    if given["save"]:
        said = _save(given, report, outcome) or said
    if said:
        output.note(options, f"left out: {said}")
    for words in outcome.said:
        output.note(options, f"note: {words}")
    if outcome.is_interrupted:
        return output.EXIT_INTERRUPTED
    return output.EXIT_OK if report.is_valid else output.EXIT_FAILED


def _token_for_all(options: Globals, urls: tuple[str, ...], headers: tuple[str, ...]) -> str:
    """The token that may go to every one of the URLs; none where one of them must not have it."""
    tokens = {_token_for(options, url, headers) for url in urls}
    return tokens.pop() if len(tokens) == 1 else ""


def _token_for(options: Globals, url: str, headers: tuple[str, ...]) -> str:
    """The token that goes with requests: the one that is named, else Herder's own for the head that is its target.

    No other server ever gets a token that was not meant for it. Raises: HerderConfigError.
    """
    from herder.settings import read_token_file

    if any(header.lower().startswith("authorization:") for header in headers):
        return ""
    if options.token_file:
        return read_token_file(Path(options.token_file))
    own = _own(options, url)
    return own.token if own else ""


def _own_ca_for_all(options: Globals, urls: tuple[str, ...]) -> str | None:
    """Who signed the head's certificate, as every command finds it, when it is the only target; else None."""
    own = _own(options, urls[0]) if len(urls) == 1 and urls[0].startswith("https://") else None
    return (own.ca_file or None) if own else None


def _own(options: Globals, url: str) -> Settings | None:
    """The settings of the head when it is what is meant by the URL. Raises: HerderConfigError."""
    from urllib.parse import urlsplit

    from herder.settings import discover

    own = discover(url=options.url, context=options.context)
    there, here = urlsplit(url if "://" in url else f"http://{url}"), urlsplit(own.url)
    try:
        is_own = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
    except ValueError:  # a port that is none: what it is aimed with says so
        return None
    return own if is_own else None


def _detailed(report: Any, outcome: Any) -> tuple[dict[str, Any], str]:
    """(the report with every request, why without)."""
    import msgspec

    from common.bench.report import detail

    value: dict[str, Any] = msgspec.to_builtins(report)
    try:
        return value | {"requests": detail(outcome.records)}, ""
    except ValueError as error:
        return value, str(error)


def _check_writable(path: Path) -> None:
    """Says before a run, not after it, that its report cannot be written. Raises: OSError."""
    is_new = not path.exists()
    if not is_new and not (path.is_file() or path.is_dir()):
        return  # a pipe would take the try for the report
    path.open("ab").close()
    if is_new:
        path.unlink()


def _save(given: dict[str, Any], report: Any, outcome: Any) -> str:
    """Writes the report in its format; what could not be written, or nothing."""
    import msgspec

    from common.bench import formats

    said = ""
    path = Path(given["save"])
    kind = given["format_"] or {".csv": "csv", ".html": "html"}.get(path.suffix, "json")
    if kind == "html":
        from common.bench.html import of_run, render

        path.write_text(render(*of_run(msgspec.to_builtins(report)), {}))
        return ""
    if kind == "csv":
        path.write_text(formats.to_csv(report))
        return ""
    value: Any = msgspec.to_builtins(report)
    if kind == "vllm":
        value = formats.to_vllm(report, outcome.records)
    elif kind == "genai-bench":
        try:
            value = formats.to_genai_bench(report, outcome.records)
        except ValueError as error:
            return f"{path.name}: {error}"
    elif given["detail"]:
        value, said = _detailed(report, outcome)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    return said
