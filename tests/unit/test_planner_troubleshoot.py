"""Real messages of real programs are recognised; ordinary sentences, however near, are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import BodyTooLarge, NotFound
from head.planner.advice.troubleshoot import (
    EVIDENCE_LIMIT,
    TEXT_LIMIT_BYTES,
    Topic,
    diagnose,
    topic,
    topics,
    troubleshoot,
)

CORPUS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "troubleshooting.json").read_text())
MESSAGES: list[dict[str, str]] = CORPUS["messages"]
ORDINARY: list[str] = CORPUS["ordinary"]
REPEAT_LIMIT = 400  # the most often that any part of a pattern may repeat
SEED_IDS = (
    *("cuda_oom", "nccl_timeout", "nccl_init_failed", "tp_mismatch"),
    *("pp_imbalance", "low_gpu_util", "gradient_overflow", "checkpoint_oom"),
)


def found(text: str) -> list[str]:
    """Ids of the topics in a text."""
    return [issue.topic.id for issue in diagnose(text)]


def test_the_corpus_is_large_enough_to_mean_something() -> None:
    """At least 60 messages, each with where it is from, over all topics, and 200 different sentences."""
    assert len(MESSAGES) >= 60
    assert len(set(ORDINARY)) >= 200
    assert all(message["source"] for message in MESSAGES)
    assert {message["topic"] for message in MESSAGES} == {entry.id for entry in topics() if entry.patterns}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["text"][:60])
def test_a_real_message_is_recognised(message: dict[str, str]) -> None:
    """The topic of each message is the first that is named."""
    assert found(message["text"])[:1] == [message["topic"]]


@pytest.mark.parametrize("sentence", ORDINARY)
def test_an_ordinary_sentence_raises_no_alarm(sentence: str) -> None:
    """News, manuals and talk that mention memory, nodes, timeouts and nan are not errors."""
    assert found(sentence) == []
    assert found(sentence.upper()) == []


def test_this_project_s_own_pages_raise_no_alarm() -> None:
    """Prose about storage, memory and GPUs, a few thousand lines of it, is not taken for errors."""
    docs = Path(__file__).parents[2] / "docs"
    pages = [page for page in docs.glob("*.md") if page.name != "planner.md"]
    prose = [line for page in pages for line in page.read_text().splitlines() if not line.startswith("    ")]
    assert len(prose) > 1000
    assert [line for line in prose if "`" not in line and found(line)] == []


def test_a_message_is_found_in_a_long_log() -> None:
    """The line is given by number, its text cut, colours removed, repetitions counted."""
    noise = [f"step {number} loss 2.{number} tokens/s 51234" for number in range(500)]
    error = "\x1b[31mtorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB\x1b[0m" + "x" * 5000
    issues = diagnose("\n".join([*noise, error, *noise, error]))
    assert [(issue.topic.id, issue.line, issue.count) for issue in issues] == [("cuda_oom", 501, 2)]
    assert issues[0].evidence.startswith("torch.OutOfMemoryError")
    assert len(issues[0].evidence) <= EVIDENCE_LIMIT


def test_the_gravest_comes_first_and_launchers_last() -> None:
    """A lost GPU stands before the timeout it caused, and torchrun's summary after both."""
    log = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)\n"
        "NVRM: Xid (PCI:0000:4e:00): 79, GPU has fallen off the bus.\n"
    )
    assert found(log) == ["gpu_lost", "nccl_timeout", "child_failed"]


def test_too_long_a_text_is_refused() -> None:
    """Beyond the limit the answer is 413, not a long wait."""
    assert diagnose("x" * TEXT_LIMIT_BYTES) == []
    with pytest.raises(BodyTooLarge):
        diagnose("x" * (TEXT_LIMIT_BYTES + 1))


@pytest.mark.parametrize("entry", topics(), ids=lambda entry: entry.id)
def test_patterns_cannot_run_away(entry: Topic) -> None:
    """No pattern repeats a group, or anything without an upper limit except simple classes: time stays linear."""
    for pattern in (*entry.patterns, *entry.also):
        assert not re.search(r"\)[*+{]", pattern), pattern
        assert not re.search(r"(?<!\\)\.[*+]", pattern), pattern
        for bound in re.findall(r"\{\d*,(\d*)\}", pattern):
            assert 0 < int(bound or 0) <= REPEAT_LIMIT, pattern
        assert len(re.findall(r"(?<!\\)[+*]", pattern)) <= 6, pattern


def test_every_topic_says_what_to_do() -> None:
    """Each has causes, solutions and a source; ids and aliases name one topic each; what is hidden exists."""
    names = [name for entry in topics() for name in (entry.id, *entry.aliases)]
    assert len(names) == len(set(names))
    for entry in topics():
        assert entry.root_causes, entry.id
        assert entry.solutions, entry.id
        assert entry.source, entry.id
        assert set(entry.hides) <= {other.id for other in topics()} - {entry.id}


def test_the_seed_s_topics_and_the_alias_oom_are_there() -> None:
    """All ids that the seed knew, and the name that its documents used."""
    for name in SEED_IDS:
        assert topic(name).id == name
    assert topic("OOM").id == "cuda_oom"
    assert topic("nvlink").id == "nvlink_error"


def test_an_unknown_topic_is_not_found_with_near_ones() -> None:
    """404 with the topics there are."""
    with pytest.raises(NotFound) as caught:
        topic("cuda_omm")
    assert "cuda_oom" in caught.value.details["near"]
    assert "disk_full" in caught.value.details["available_topics"]


def test_the_answer_has_the_seed_s_shape() -> None:
    """A diagnosis, one topic, or the list of topics; a text that says nothing known says so."""
    answer = troubleshoot(error_message="OSError: [Errno 28] No space left on device")
    assert answer["diagnosis"]["issues_found"] == 1
    issue = answer["diagnosis"]["issues"][0]
    assert {"category", "severity", "title", "description", "root_causes", "solutions", "code_fix"} <= set(issue)
    assert troubleshoot(topic_name="oom")["topic"] == "cuda_oom"
    assert len(troubleshoot()["topics"]) == len(topics())
    nothing = troubleshoot(error_message="some info about finance")["diagnosis"]
    assert (nothing["issues_found"], nothing["issues"]) == (0, [])
    assert nothing["hint"]
