"""The scenario grammar, prompts, datasets, traces, URLs and the options of a run."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loadgen import datasets, order, traces
from agent.loadgen.apis import APIS
from agent.loadgen.bodies import png
from agent.loadgen.style import Style
from agent.loadgen.target import parse_postgres, parse_url
from agent.loadgen.words import WORDS, Words
from agent.loadgen.workload import Item, api_for, prepare
from common.bench.scenario import Shape, parse
from common.bench.spec import LoadSpec
from herder.cli.bench import _own_ca_for_all, _token_for, _token_for_all, command
from herder.cli.command import Globals
from herder.cli.main import run


@pytest.mark.parametrize(
    ("text", "task", "numbers", "weight"),
    [
        ("D(100,50)", "text", (100, 50), 1),
        ("N(480,240)/(300,150)x3", "text", (480, 240, 300, 150), 3),
        ("U(5,9)/(2,4)", "text", (5, 9, 2, 4), 1),
        ("U(9,4)", "text", (1, 9, 1, 4), 1),
        ("E(512)", "embeddings", (512,), 1),
        ("R(200,20)x2", "rerank", (200, 20), 2),
        ("A(80)", "speech", (80,), 1),
        ("I(64,32)", "image", (64, 32, 1), 1),
        ("I(64,32,4)", "image", (64, 32, 4), 1),
        ("dataset", "dataset", (), 1),
        ("datasetx5", "dataset", (), 5),
    ],
)
def test_scenarios(text: str, task: str, numbers: tuple[int, ...], weight: int) -> None:
    """Every form of the grammar, with weights."""
    made = parse(text)
    assert (made.task, made.numbers, made.weight) == (task, numbers, weight)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("D(100, 50)", "no spaces"),
        ("D(100)", "D is written D(in,out)"),
        ("D(1.5,2)", "D is written"),
        ("D(0,5)", "at least 1"),
        ("N(5,1)", "N is written"),
        ("N(0,1)/(5,1)", "mean"),
        ("U(9,5)/(1,2)", "upwards"),
        ("E()", "E is written"),
        ("I(99999,1)", "sides"),
        ("P(1,2)", "one of: D(in,out)"),
        ("", "one of"),
        ("D(1,1)x0", "weight"),
        ("D(١,٢)", "one of"),
        ("D(99999999,1)", "exceed"),
    ],
)
def test_scenarios_that_are_none(text: str, said: str) -> None:
    """Each is refused with what would be right."""
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert said in str(caught.value)


@given(st.text(max_size=20))
def test_no_text_breaks_the_grammar(text: str) -> None:
    """A scenario or a ValueError."""
    try:
        made = parse(text)
    except ValueError:
        return
    assert parse(made.text) == made


def test_samples_follow_their_scenario() -> None:
    """Fixed sizes are fixed, ranges hold both ends, normal sizes have their mean and floors."""
    rng = random.Random(1)
    assert parse("D(100,50)").sample(rng) == Shape(100, 50)
    drawn = [parse("U(1,3)/(7,8)").sample(rng) for _ in range(200)]
    assert {shape.input_tokens for shape in drawn} == {1, 2, 3}
    assert {shape.output_tokens for shape in drawn} == {7, 8}
    normal = [parse("N(100,30)/(4,9)").sample(rng) for _ in range(3_000)]
    assert sum(shape.input_tokens for shape in normal) / 3_000 == pytest.approx(100, rel=0.03)
    assert min(shape.output_tokens for shape in normal) == 2


TARGET = parse_url("http://host:1", APIS["chat"])


def bodies(items: tuple[Item, ...]) -> list[dict[str, Any]]:
    """The JSON of requests."""
    return [json.loads(item.wire.partition(b"\r\n\r\n")[2]) for item in items]


def made(
    *texts: str, count: int = 20, words: Words | None = None, dataset: Any = None, **style: Any
) -> tuple[Item, ...]:
    """Prepared requests of scenarios."""
    scenarios = [parse(text) for text in texts]
    api = api_for(scenarios, style.pop("api", None))
    return prepare(scenarios, Style(api, "m", **style), TARGET, Words(), count=count, seed=4, dataset=dataset).items


def test_chat_requests() -> None:
    """Exact lengths in words, a stream with usage, lengths forced; the same seed gives the same bytes."""
    items = made("D(30,7)", parameters={"top_p": 0.9})
    body = bodies(items)[0]
    assert len(body["messages"][0]["content"].split()) == 30
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["top_p"]) == (7, 7, True, 0.9)
    assert body["stream_options"] == {"include_usage": True}
    assert items == made("D(30,7)", parameters={"top_p": 0.9})
    assert len({item.wire for item in items}) == 20
    head, _, sent = items[0].wire.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(sent)}".encode() in head
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: host:1\r\n")


def test_weights_mix_classes() -> None:
    """Three to one."""
    items = made("D(1,1)x3", "D(2,2)", count=2_000)
    assert sum(item.class_id == 0 for item in items) == pytest.approx(1_500, abs=100)


def test_shared_prefixes() -> None:
    """The first words are one of the groups' prefixes, the rest is each request's own."""
    texts = [
        body["messages"][0]["content"].split() for body in bodies(made("D(30,1)", prefix_tokens=20, prefix_groups=3))
    ]
    assert all(len(text) == 30 for text in texts)
    assert len({tuple(text[:20]) for text in texts}) == 3
    assert len({tuple(text[20:]) for text in texts}) == 20


def test_conversations() -> None:
    """Each turn repeats those before it, with an answer between, and follows its predecessor."""
    first = made("D(5,3)", count=1, turns=3)[0]
    assert first.follow is not None
    assert first.follow.follow is not None
    assert first.follow.follow.follow is None
    opening, last = bodies((first, first.follow.follow))
    assert [message["role"] for message in last["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert last["messages"][0] == opening["messages"][0]


def test_other_apis() -> None:
    """Embeddings and rerank in batches, images as data URLs that are PNGs."""
    assert len(bodies(made("E(4)", batch=3))[0]["input"]) == 3
    rerank = bodies(made("R(6,2)", batch=2))[0]
    assert (len(rerank["documents"]), len(rerank["query"].split())) == (2, 2)
    parts = bodies(made("I(8,4,2)", count=1))[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url"]
    image = png(8, 4, random.Random(1))
    assert image.startswith(b"\x89PNG")
    assert len(zlib.decompress(image[image.index(b"IDAT") + 4 : -16])) == 4 * (1 + 8 * 3)


def test_ollama_requests() -> None:
    """Sampling parameters are options, fields stay fields; a prompt for generate, images beside the text."""
    given = {"top_p": 0.5, "keep_alive": "5m", "options": {"num_ctx": 512}}
    chat = bodies(made("D(4,7)", count=1, api="ollama", parameters=given))[0]
    assert chat["options"] == {"num_predict": 7, "temperature": 0, "top_p": 0.5, "num_ctx": 512}
    assert (chat["keep_alive"], chat["stream"], "top_p" in chat) == ("5m", True, False)
    generate = bodies(made("D(4,7)", count=1, api="ollama-generate"))[0]
    assert len(generate["prompt"].split()) == 4
    assert "messages" not in generate
    (message,) = bodies(made("I(8,4,2)", count=1, api="ollama"))[0]["messages"]
    assert len(message["images"]) == 2
    assert len(bodies(made("I(8,4,2)", count=1, api="ollama-generate"))[0]["images"]) == 2
    embed = bodies(made("E(4)", count=1, batch=3, api="ollama-embed", parameters={"num_ctx": 9, "truncate": True}))[0]
    assert (len(embed["input"]), embed["options"], embed["truncate"]) == (3, {"num_ctx": 9}, True)


def test_classes_have_their_own_parameters() -> None:
    """A class's fields stand above those of all, in its requests alone."""
    words = ["--scenario", "D(1,1)", "--scenario", "D(2,2)x3", "--param", "top_p=0.9", "--param", "seed=1",
             "--class-param", "D(2,2)x3:top_p=0.1", "--class-param", "D(2,2)x3:stop=[x]"]  # fmt: skip
    prepared = order.order_of(asked("--model", "m", "--concurrency", "1", "--requests", "40", *words), AIM)
    items = prepared.workload.items
    for item, body in zip(items, bodies(items), strict=True):
        own = {"top_p": 0.1, "stop": ["x"]} if item.class_id else {"top_p": 0.9}
        assert {name: body[name] for name in ("top_p", "stop", "seed") if name in body} == own | {"seed": 1}
    assert {item.class_id for item in items} == {0, 1}
    assert prepared.asked.plan["class_parameters"] == {"D(2,2)x3": {"top_p": 0.1, "stop": ["x"]}}


def test_scenarios_and_apis_must_fit() -> None:
    """What an API cannot do is refused."""
    with pytest.raises(ValueError, match="several APIs"):
        api_for([parse("D(1,1)"), parse("E(1)")], None)
    with pytest.raises(ValueError, match="not embeddings"):
        api_for([parse("D(1,1)")], "embeddings")


def test_the_corpus_has_no_word_twice() -> None:
    """Each word is one of its own and plain ASCII."""
    assert len(set(WORDS)) == len(WORDS) > 300
    assert all(word.isascii() and word.isalpha() for word in WORDS)


ROWS = {
    "sharegpt.json": json.dumps([
        {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"},
                           {"from": "human", "value": "d"}]},
        {"conversations": []},
    ]),
    "hellaswag.jsonl": '{"ctx": "A man is", "endings": ["x"]}\n\n{"ctx": "", "endings": []}\n',
    "alpaca.json": json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}]),
    "own.jsonl": '{"prompt": "hi", "max_tokens": 9}\n',
    "chat.jsonl": '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n',
    "table.csv": "id,Prompt\n1,hello there\n",
    "plain.txt": "one\n\ntwo\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "turns", "left_out"),
    [
        ("sharegpt.json", "sharegpt", (("a b", "c"), ("d", "")), 1),
        ("hellaswag.jsonl", "hellaswag", (("A man is", ""),), 1),
        ("alpaca.json", "alpaca", (("Add\n\n1 2", "3"),), 0),
        ("own.jsonl", "jsonl", (("hi", ""),), 0),
        ("chat.jsonl", "jsonl", (("u", ""),), 0),
        ("table.csv", "csv", (("hello there", ""),), 0),
        ("plain.txt", "text", (("one", ""),), 0),
    ],
)
def test_datasets(tmp_path: Path, name: str, kind: str, turns: tuple[tuple[str, str], ...], left_out: int) -> None:
    """Each kind is told by its content; rows without a prompt are left out and counted."""
    (tmp_path / name).write_text(ROWS[name])
    read = datasets.read(str(tmp_path / name))
    assert (read.kind, read.rows[0].turns, read.left_out) == (kind, turns, left_out)


def test_rows_are_sent_as_they_are(tmp_path: Path) -> None:
    """The scenario `dataset` takes the rows in turn, with the lengths that they say."""
    (tmp_path / "own.jsonl").write_text(ROWS["own.jsonl"])
    body = bodies(made("dataset", count=1, dataset=datasets.read(str(tmp_path / "own.jsonl"))))[0]
    assert (body["messages"][0]["content"], body["max_tokens"]) == ("hi", 9)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "[" * 5_000])
def test_datasets_that_are_none(tmp_path: Path, text: str) -> None:
    """Refused with the file's name."""
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        datasets.read(str(tmp_path / "bad.json"))


TRACES = {
    "mooncake": '{"timestamp": 500, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]}\n'
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]}\n'
    '{"timestamp": 9, "input_length": 6, "output_length": 0, "hash_ids": []}\n',
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,x,10,4,14,a\n"
    "6.5,x,10,0,10,a\n",
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4,10\n2023-11-16 18:17:04.0,5,6\n",
}


@pytest.mark.parametrize(
    ("kind", "first", "left_out"),
    [
        ("mooncake", (0.0, 600, 5), 1),
        ("burstgpt", (5.0, 10, 4), 1),
        ("azure", (1700158623.97996, 4, 10), 0),
    ],
)
def test_traces(tmp_path: Path, kind: str, first: tuple[float, int, int], left_out: int) -> None:
    """Three formats, told by their first line, in order of time; failures left out."""
    (tmp_path / "t").write_text(TRACES[kind])
    read = traces.read(tmp_path / "t")
    begin = read.arrivals[0]
    assert (read.format, read.left_out) == (kind, left_out)
    assert (begin.at_s, begin.input_tokens, begin.output_tokens) == pytest.approx(first, abs=1e-6)


def test_traced_prompts_share_their_blocks(tmp_path: Path) -> None:
    """Of 512 words each: the same id, the same text; the recorded length."""
    (tmp_path / "t").write_text(TRACES["mooncake"])
    arrivals = traces.read(tmp_path / "t").arrivals
    items = prepare([], Style(APIS["chat"], "m"), TARGET, Words(), count=9, seed=1, trace=arrivals).items
    first, second = (body["messages"][0]["content"].split() for body in bodies(items))
    assert (len(first), len(second)) == (600, 700)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]


@pytest.mark.parametrize(
    "text", ["", "a,b\n", '{"timestamp": "x"}\n', "Timestamp,Request tokens,Response tokens\nx,1,1\n"]
)
def test_traces_that_are_none(tmp_path: Path, text: str) -> None:
    """Refused."""
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError):
        traces.read(tmp_path / "t")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:1", "/v1/chat/completions"),
        ("h:1/v1/", "/v1/chat/completions"),
        ("https://h/x/v1/chat/completions", "/x/v1/chat/completions"),
        ("http://h/proxy", "/proxy/v1/chat/completions"),
    ],
)
def test_urls(url: str, path: str) -> None:
    """A host, a base or the API itself."""
    assert parse_url(url, APIS["chat"]).path == path


@pytest.mark.parametrize(
    "url",
    ["postgresql://h/d", "http://u@h/d", "postgresql://u:p@h/d", "postgresql://u@h/d?sslmode=prefer",
     "postgresql://u@h:99999/d", "postgresql://u%00@h/d"],
)  # fmt: skip
def test_urls_that_are_no_database(url: str) -> None:
    """Refused; a password in a URL, too."""
    with pytest.raises(ValueError):
        parse_postgres(url, statement="SELECT 1")


def test_passwords_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named file's, else the first line of PGPASSFILE that fits, unless others can read it; never in a repr."""
    (tmp_path / "pass").write_text("# no:1:2:3:4\nother:5432:*:me:no\nh:*:shop:me:a\\:b\\\\c\n*:*:*:*:last\n")
    (tmp_path / "pass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pass"))

    def password(url: str, **given: Any) -> str | None:
        target = parse_postgres(url, statement="SELECT 1", **given)
        assert target.login is not None
        assert target.login.password is None or target.login.password not in repr(target)
        return target.login.password

    assert password("postgresql://me@h/shop") == "a:b\\c"
    assert password("postgresql://me@h:1/elsewhere") == "last"
    (tmp_path / "own").write_text("named\n")
    assert password("postgresql://me@h/shop", password_file=str(tmp_path / "own")) == "named"
    (tmp_path / "pass").chmod(0o644)
    assert password("postgresql://me@h/shop") is None


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://u:p@h", "http://h:99999", "http://h/a b"])
def test_urls_that_are_none(url: str) -> None:
    """Refused; a password in a URL, too."""
    with pytest.raises(ValueError):
        parse_url(url, APIS["chat"])


def test_headers_cannot_smuggle() -> None:
    """No line ends in headers, and none of our own."""
    for header in (("A", "b\r\nC: d"), ("A b", "c"), ("Content-Length", "5")):
        with pytest.raises(ValueError):
            parse_url("http://h", APIS["chat"], headers=[header])


def asked(*words: str) -> LoadSpec:
    """What `herder bench` makes of a command line."""
    given = dict(command.make_context("bench", ["http://127.0.0.1:1", *words]).params)
    fields = {name: given[name] for name in LoadSpec.__struct_fields__}
    return LoadSpec(**(fields | {"parameters": dict(given["parameters"])}))


AIM = order.Aim(("http://127.0.0.1:1",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model m --duration 5s", "rate (open loop)"),
        ("--model m --rate 5", "duration or requests"),
        ("--model m --rate 5 --concurrency 2 --duration 5s", "closed loop"),
        ("--rate 5 --duration 5s", "model"),
        ("--model m --rate 5 --duration 5s --arrivals gamma", "burstiness"),
        ("--model m --rate 5 --duration 5s --burstiness 2", "gamma"),
        ("--model m --rate 5 --duration 5s --arrivals ramp", "peak"),
        ("--model m --rate 5 --duration 5s --peak 9", "peak is for"),
        ("--model m --arrivals steps --duration 5s", "rate (open loop)"),
        ("--model m --step 10y5 --duration 5s", "10x30s"),
        ("--model m --rate 5 --duration 5s --slo ttft=5", "ttft:500"),
        ("--model m --concurrency 2 --workers 3 --requests 9", "more workers"),
        ("--model m --rate 5 --duration 5s --think 1s", "closed loop"),
        ("--model m --rate 0.001 --duration 1s", "no request"),
        ("--model m --rate 5 --duration 5s --arrivals burst", "burst_size"),
        ("--model m --rate 5 --duration 5s --burst-size 4", "burst_size"),
        ("--model m --arrivals offline --duration 5s", "needs requests"),
        ("--model m --arrivals offline --requests 5 --rate 3", "no rate"),
        ("--model m --arrivals offline --requests 5 --concurrency 3", "no rate"),
        ("--model m --arrivals offline --requests 5 --warmup 1s", "no warm-up"),
        ("--model m --concurrency 5 --requests 5 --in-flight 3", "in_flight"),
        ("--model m --rate 5 --requests 5 --in-flight 3 --workers 4", "more workers"),
        ("--model m --rate 5000 --duration 1h", "2,000,000"),
        ("--model m --rate 5 --requests 5 --turns 2 --scenario E(5)", "turns"),
        ("--model m --rate 5 --requests 5 --batch 2", "batch"),
        ("--model m --rate 5 --requests 5 --chunk-usage --no-stream", "chunk_usage"),
        ("--model m --rate 5 --requests 5 --body x --api chat", "body"),
        ("--model m --rate 5 --requests 5 --class-param D(1,1):a=1", "none of the scenarios"),
        ("--model m --rate 5 --requests 5 --scenario D(1,1) --scenario D(1,1)", "twice"),
        ("--model m --rate 5 --requests 5 --points 5", "qdrant and pgvector"),
        ("--api qdrant --rate 5 --requests 5", "needs one"),
        ("--api qdrant --rate 5 --requests 5 --collection a/b --vector-dim 3", "not a name"),
        ("--api qdrant --rate 5 --requests 5 --collection c", "vector_dim"),
        ("--api qdrant --rate 5 --requests 5 --collection c --vector-dim 3 --turns 2", "no turns"),
        ("--api qdrant --rate 5 --requests 5 --collection c --vectors v --points 3", "say their vector_dim"),
        ("--api pgvector --rate 5 --requests 5 --collection c; --vector-dim 3", "not a name"),
        ("--api pgvector --rate 5 --requests 5 --collection c --vector-dim 3", "postgresql://USER"),
        ("--model m --rate 5000 --requests 300000 --turns 10", "200,000"),
    ],
)
def test_orders_that_make_no_sense(words: str, said: str) -> None:
    """Refused with what to change."""
    with pytest.raises(ValueError) as caught:
        order.order_of(asked(*words.split()), AIM)
    assert said in str(caught.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_shares_are_the_order(workers: int) -> None:
    """Together the processes do exactly what was asked, in an open and in a closed loop."""
    made = order.order_of(asked("--model", "m", "--rate", "50", "--duration", "2s", "--workers", str(workers)), AIM)
    assert made.schedule is not None
    shares = order.shares_of(made)
    assert sorted(at for share in shares for at in share.times_ns) == list(made.schedule.times_ns)
    closed = order.order_of(
        asked("--model", "m", "--concurrency", "7", "--requests", "20", "--workers", str(workers)), AIM
    )
    shares = order.shares_of(closed)
    assert sum(share.slots for share in shares) == 7
    assert sum(share.requests or 0 for share in shares) == 20


def test_an_offline_run_shares_its_limit() -> None:
    """Everything is due at 0, and the requests on their way are limited over all processes of all nodes."""
    words = ["--model", "m", "--arrivals", "offline", "--requests", "90", "--in-flight", "7", "--workers", "2"]
    shares = [
        share for part in range(2) for share in order.shares_of(order.order_of(asked(*words), AIM, part=part, parts=2))
    ]
    assert [list(share.times_ns) for share in shares] == [[0] * 23, [0] * 23, [0] * 22, [0] * 22]
    assert sum(share.limits.in_flight for share in shares) == 7


def test_a_token_goes_to_its_own_head_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Herder's token is sent to the head that it is for, never to another server, and not beside a given one."""
    state = tmp_path / "state" / "head"
    state.mkdir(parents=True)
    (state / "admin.token").write_text("hdr_admin_x_secret\n")
    (state / "admin.token").chmod(0o600)
    monkeypatch.setenv("HERDER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HERDER_URL", "http://127.0.0.1:18470")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HERDER_TOKEN", "HERDER_TOKEN_FILE", "HERDER_CONTEXT", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    options = Globals()
    assert _token_for(options, "http://127.0.0.1:18470/v1", ()) == "hdr_admin_x_secret"
    assert _token_for(options, "127.0.0.1:18470", ()) == "hdr_admin_x_secret"
    for other in ("http://127.0.0.1:8000", "https://127.0.0.1:18470", "http://engine.example:18470"):
        assert _token_for(options, other, ()) == ""
    assert _token_for(options, "http://127.0.0.1:18470", ("authorization: Bearer mine",)) == ""
    named = tmp_path / "token"
    named.write_text("other\n")
    named.chmod(0o600)
    assert _token_for(Globals(token_file=str(named)), "http://engine.example:8000", ()) == "other"
    assert _token_for_all(options, ("http://127.0.0.1:18470", "http://127.0.0.1:8000"), ()) == ""
    assert _token_for_all(options, ("http://127.0.0.1:18470/a", "127.0.0.1:18470/b"), ()) == "hdr_admin_x_secret"


def test_a_head_is_trusted_by_its_own_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authority that other commands use for the head counts for load on its gateway, and for no other server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERDER_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("HERDER_URL", "https://127.0.0.1:18470")
    monkeypatch.setenv("HERDER_CA_FILE", "/etc/herder/ca.crt")
    for name in ("HERDER_TOKEN", "HERDER_TOKEN_FILE", "HERDER_CONTEXT", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert _own_ca_for_all(Globals(), ("https://127.0.0.1:18470/v1",)) == "/etc/herder/ca.crt"
    for others in (("https://127.0.0.1:18471",), ("http://127.0.0.1:18470",), ("https://127.0.0.1:18470", "https://x")):
        assert _own_ca_for_all(Globals(), others) is None


@pytest.mark.parametrize("url", ["http://host:word", "https://host:99999"])
def test_a_port_that_is_none_is_wrong_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said with the URL, and no traceback."""
    assert run(["bench", url, "--model", "m", "--rate", "1", "--duration", "1s"], Globals()) == 2
    assert url in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--model m --rate 50 --duration 2s", "--model m --concurrency 7 --requests 20"])
def test_parts_of_several_nodes_are_the_order(words: str) -> None:
    """Nodes that each draw the whole order and do their part of it do together exactly what one node would."""
    whole = order.order_of(asked(*words.split()), AIM)
    parts = [order.order_of(asked(*words.split(), "--workers", "2"), AIM, part=part, parts=3) for part in range(3)]
    assert {made.digest for made in parts} == {whole.digest}
    shares = [share for made in parts for share in order.shares_of(made)]
    (alone,) = order.shares_of(whole)
    assert sorted(at for share in shares for at in share.times_ns) == sorted(alone.times_ns)
    assert sorted(number for share in shares for number in share.indices) == sorted(alone.indices)
    assert sum(share.slots for share in shares) == alone.slots
    assert sum(share.requests or 0 for share in shares) == (alone.requests or 0)
    assert [share.slots_before for share in shares] == [
        sum(share.slots for share in shares[:number]) for number in range(len(shares))
    ]
