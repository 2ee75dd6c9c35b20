"""A cluster's own calibration: strict rows, a bounded correction that bad rows cannot wreck, a file that keeps it."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidConfig, InvalidValue
from head.config import HeadConfig, PlannerConfig, check
from head.planner import second_opinion, worker
from head.planner.calibration.active import Active, active, using
from head.planner.calibration.own import OwnCalibration, base, read
from head.planner.calibration.own_fit import ABSURD, LIMIT, solve
from head.planner.endpoints.base import ask
from head.planner.endpoints.calibrating import CalibrateAnswer
from head.planner.endpoints.measured import rows_of, rows_of_csv
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import BY_PATH
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.presets import lookup
from head.planner.serving.estimate import EngineSettings, Workload
from head.planner.training.constants import current, shipped
from head.planner.training.step_time import estimate
from herder.cli.command import Globals
from herder.cli.main import run

SLOWER = 1.25
PLAN = {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 16, "tp": 2, "seq_length": 4096, "stack": "megatron"}
SERVE = {"model": "llama-3.1-8b", "gpu": "H100", "engine": "vllm", "version": "0.10.1", "isl": 1024, "osl": 256}


def steps(factor: float = SLOWER) -> list[dict[str, Any]]:
    """Six training rows of a cluster that is `factor` slower than the shipped calibration says."""
    found = []
    for tp, seq, micro in ((1, 4096, 1), (2, 4096, 2), (4, 8192, 1), (8, 4096, 4), (2, 8192, 1), (4, 2048, 4)):
        row = {**PLAN, "tp": tp, "seq_length": seq, "micro_batch": micro, "batch_size": 16}
        asked = rows_of([{**row, "step_s": 1e5}], "", Desk()).training[0]
        told = estimate(asked.architecture, asked.topology(), asked.layout, asked.stack).step_s.value
        found.append({**row, "step_s": told * factor})
    return found


def calibrated(rows: list[dict[str, Any]], **fields: Any) -> CalibrateAnswer:
    """The answer to measured rows."""
    found = ask(BY_PATH["calibrate"], {"rows": rows, "machine": "rack-3", **fields}, Desk())
    assert isinstance(found, CalibrateAnswer)
    return found


def own(answer: CalibrateAnswer) -> Active:
    """The answer's file, as it is read."""
    return read(msgspec.json.encode(answer.document))


def step_of(calibration: Active | None) -> Any:
    """The answer to a question near the rows."""
    return ask(BY_PATH["bottleneck"], PLAN, Desk(), calibration)


def tpot_of(calibration: Active | None, concurrency: int = 16) -> float:
    """Seconds per token of the served model, asked directly."""
    from head.planner.serving.estimate import estimate_serving

    load = Workload(isl=1024, osl=256, concurrency=concurrency)
    settings_ = EngineSettings(backend="vllm", version="0.10.1")
    with using(calibration):
        found = estimate_serving(lookup("llama-3.1-8b"), topology_of_preset("H100", 1), settings_, load)
    return found.tpot_s.value


def serving(factor: float) -> list[dict[str, Any]]:
    """Serving rows of a cluster whose tokens take `factor` times what the shipped calibration says."""
    return [
        {**SERVE, "concurrency": load, "tpot_ms": 1e3 * factor * tpot_of(None, load), "ttft_ms": 90.0}
        for load in (1, 4, 8, 16, 32, 64)
    ]


def test_rows_of_a_slower_cluster_make_the_planner_slower() -> None:
    """Estimates near the rows move to what was measured, rows predict each other, and the answer names the file."""
    answer = calibrated(steps())
    (table,) = answer.errors
    assert table.mape_before == pytest.approx(1 - 1 / SLOWER, rel=0.01)
    assert table.mape_after < 0.05
    before, after = step_of(None), step_of(own(answer))
    assert after.step_s.value / before.step_s.value == pytest.approx(SLOWER, rel=0.08)
    assert after.calibration == answer.name
    assert before.calibration == ""
    assert answer.name in after.step_s.calibration
    assert any(near.id.startswith("own:") for near in after.step_s.near)
    assert math.fsum(after.parts_s.values()) == pytest.approx(after.step_s.value)


def test_serving_rows_correct_serving_answers() -> None:
    """Tokens that take a fifth longer everywhere are predicted so, and at loads that were not measured."""
    answer = calibrated(serving(1.2))
    tpot = next(line for line in answer.errors if line.what == "TPOT")
    assert tpot.mape_after < 0.04 < tpot.mape_before
    found = own(answer)
    assert tpot_of(found, 24) / tpot_of(None, 24) == pytest.approx(1.2, rel=0.06)
    assert tpot_of(None, 24) == tpot_of(None, 24)


def test_one_absurd_row_is_set_aside() -> None:
    """A step fifty times too long changes nothing that the other rows say, and is named with its reason."""
    rows = steps()
    good, bad = calibrated(rows[:5]), calibrated([*rows[:5], {**rows[5], "step_s": rows[5]["step_s"] * 50}])
    (aside,) = [row for row in bad.rows if not row.is_used]
    assert aside.id == "own:6"
    assert "times what the other rows" in aside.reason
    assert step_of(own(bad)).step_s.value == pytest.approx(step_of(own(good)).step_s.value)


def test_an_absurd_row_alone_is_not_believed() -> None:
    """The only row of a kind, far from the estimate, leaves every estimate as it was."""
    (row,) = steps(factor=40.0)[:1]
    answer = calibrated([row])
    assert not answer.rows[0].is_used
    assert step_of(own(answer)).step_s.value == step_of(None).step_s.value


def test_few_rows_are_believed_less() -> None:
    """One row moves the estimate less than six that say the same, and the answer says that they are few."""
    one, six = calibrated(steps()[1:2]), calibrated(steps())
    moved = [step_of(own(answer)).step_s.value / step_of(None).step_s.value for answer in (one, six)]
    assert 1.0 < moved[0] < moved[1]
    assert any("few" in note for note in one.notes)
    assert not any("few" in note for note in six.notes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(0, 20), st.sampled_from(["a", "b"])), min_size=1, max_size=12))
def test_the_correction_is_bounded(rows: list[tuple[float, float, str]]) -> None:
    """Whatever remains at whichever rows, what a row is told by the others stays within the limit, and is finite."""
    left, places, groups = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def kernel(one: int, other: int) -> float:
        return 0.02 * (groups[one] == groups[other]) + 0.02 * math.exp(-abs(places[one] - places[other]))

    solved = solve(left, kernel, groups)
    assert all(math.isfinite(weight) for weight in solved.weights)
    assert all(abs(value) <= LIMIT for value in solved.others)
    lonely = [index for index, group in enumerate(groups) if groups.count(group) < 4 and abs(left[index]) > ABSURD]
    assert all(solved.weights[index] == 0 and solved.reasons[index] for index in lonely)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**PLAN}, "step_s or tokens_per_s"),
    ({**PLAN, "step_s": 1.0, "tokens_per_s": 5.0}, "step_s or tokens_per_s"),
    ({**PLAN, "step_s": 1e-6}, "faster than the GPUs' peak"),
    ({**PLAN, "step_s": -1.0}, "step_s"),
    ({**PLAN, "step_s": "1"}, "step_s"),
    ({**PLAN, "step_s": 1.0, "gpu": "H999"}, "H999"),
    ({**PLAN, "step_s": 1.0, "gpu": ""}, "say which accelerator"),
    ({**PLAN, "step_s": 1.0, "model": "llama-9"}, "llama-9"),
    ({**PLAN, "step_s": 1.0, "steps": 3}, "steps"),
    ({**SERVE, "concurrency": 4}, "ttft_ms, tpot_ms"),
    ({**SERVE, "tpot_ms": 5.0}, "concurrency"),
    ({**SERVE, "concurrency": 4, "tpot_ms": 1e-3}, "faster than the memory allows"),
    ({**SERVE, "concurrency": 4, "tpot_ms": 9.0, "engine": "abacus"}, "engine"),
    ({"kind": "guess"}, "neither training nor serving"),
]


@pytest.mark.parametrize(("row", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_row_is_named_with_its_number(row: dict[str, Any], words: str) -> None:
    """Each row that cannot be used is an error with its number and what is wrong; nothing is fitted."""
    with pytest.raises(InvalidValue) as caught:
        calibrated([steps()[0], row])
    (told,) = caught.value.details["rows"]
    assert told["row"] == 2
    assert words in told["message"]


def test_ids_are_used_once() -> None:
    """Two rows of one id are an error: the file tells rows apart by them."""
    rows = steps()[:2]
    with pytest.raises(InvalidValue, match="used before"):
        calibrated([{**row, "id": "x"} for row in rows])


def test_csv_has_the_same_rows() -> None:
    """A CSV file with the names of the fields gives the rows that JSON gives; numbers in text columns stay text."""
    text = "model,gpu,engine,version,isl,osl,concurrency,tpot_ms\nllama-3.1-8b,H100,vllm,0.10,1024,256,16,9\n"
    (row,) = rows_of_csv(text)
    assert row == {**SERVE, "version": "0.10", "concurrency": 16.0, "tpot_ms": 9.0}
    with pytest.raises(InvalidValue, match="row 2: tpot_ms"):
        rows_of_csv(text + "llama-3.1-8b,H100,vllm,0.10,1024,256,16,fast\n")
    with pytest.raises(InvalidValue, match="more cells"):
        rows_of_csv(text + "llama-3.1-8b,H100,vllm,0.10,1024,256,16,9,9\n")


def test_the_same_rows_make_the_same_file() -> None:
    """A calibration is deterministic, JSON-safe, and says who measured what, when and where."""
    fields = {"who": "Ada", "when": "2026-11-01"}
    files = [msgspec.json.encode(calibrated(steps(), **fields).document) for _ in range(2)]
    assert files[0] == files[1]
    found = json.loads(files[0], parse_constant=lambda word: pytest.fail(word))
    assert (found["who"], found["when"], found["machine"]) == ("Ada", "2026-11-01", "rack-3")
    assert found["versions"] == ["megatron"]
    assert found["base"] == base()


def test_a_changed_file_is_refused() -> None:
    """Rows that do not match their hash, other formats and what is no JSON are refused."""
    document = json.loads(msgspec.json.encode(calibrated(steps()).document))
    document["rows"]["training"][0]["step_s"] *= 2
    with pytest.raises(InvalidValue, match="not those"):
        read(json.dumps(document).encode())
    for data in (b"", b"[]", b'{"format": "another"}', b"[" * 100_000):
        with pytest.raises(InvalidValue, match="not a calibration file"):
            read(data)


def test_other_constants_make_the_correction_anew() -> None:
    """A file that corrects other constants is fitted again from its rows as it is read, and says so."""
    document = calibrated(steps()).document
    stale = msgspec.structs.replace(
        document, base="0" * 12, correction=msgspec.structs.replace(document.correction, step_shifts={"x": 9.0})
    )
    found = read(msgspec.json.encode(stale))
    assert "made anew" in found.note
    fresh = read(msgspec.json.encode(document))
    assert step_of(found).step_s.value == step_of(fresh).step_s.value
    assert "made anew" in step_of(found).calibration


def test_a_calibration_counts_only_while_its_question_is_answered() -> None:
    """Before and after a question with a calibration the shipped constants count."""
    found = own(calibrated(steps()))
    assert current() is shipped()
    with using(found):
        assert current() is found.training
        assert active() is found
    assert current() is shipped()


# the head's process
def test_the_worker_reads_its_file_once(tmp_path: Path) -> None:
    """The planner's process takes the file that it is given; a missing one is nothing, a bad one is named."""
    path = tmp_path / "planner-calibration.json"
    assert worker.own_calibration(path) is None
    path.write_bytes(msgspec.json.encode(calibrated(steps()).document))
    found = worker.own_calibration(path)
    assert found is not None
    assert found.training is not None
    asked = worker.Asked("bottleneck", msgspec.Raw(json.dumps(PLAN).encode()), Desk())
    answer = json.loads(bytes(worker.answered(asked, found).answer))
    assert answer["calibration"] == found.name
    path.write_bytes(b"{}")
    broken = worker.own_calibration(path)
    assert broken is not None
    assert broken.training is None
    told = json.loads(bytes(worker.answered(asked, broken).answer))["calibration"]
    assert "planner-calibration.json is not used" in told
    link = tmp_path / "link.json"
    link.symlink_to(path)
    for other in (link, tmp_path):
        refused = worker.own_calibration(other)
        assert refused is not None
        assert "is not used" in refused.name


def test_the_heads_file_is_below_its_state(tmp_path: Path) -> None:
    """planner.calibration cannot leave the state directory."""
    config = HeadConfig(state_dir=str(tmp_path))
    assert config.calibration_path == tmp_path / "planner-calibration.json"
    assert msgspec.structs.replace(config, planner=PlannerConfig(calibration="")).calibration_path is None
    for wrong in ("/etc/passwd", "../x.json", "a/../../x"):
        with pytest.raises(InvalidConfig, match="state directory"):
            check(msgspec.structs.replace(config, planner=PlannerConfig(calibration=wrong)))


# the command line
@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of settings of one's own."""
    monkeypatch.setenv("HERDER_CONFIG", str(tmp_path / "cfg" / "config.yaml"))
    return tmp_path


def test_calibrate_writes_a_file_that_answers_take(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command checks and fits rows of several files, writes 0600, and later answers use it until told not to."""
    rows = steps()
    (home / "a.json").write_text(json.dumps(rows[:3]))
    (home / "b.json").write_text(json.dumps({"rows": rows[3:]}))
    files = [str(home / "a.json"), str(home / "b.json")]
    assert run(["plan", "calibrate", *files, "--dry-run"], Globals()) == 0
    path = home / "cfg" / "planner-calibration.json"
    assert not path.exists()
    assert run(["plan", "calibrate", *files, "--who", "Ada", "--machine", "rack-3"], Globals()) == 0
    assert "MAPE AFTER" in capsys.readouterr().out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert msgspec.json.decode(path.read_bytes(), type=OwnCalibration).who == "Ada"
    question = ["plan", "bottleneck", "llama-3.1-8b", "--gpu", "H100", "--gpus", "16", "--stack", "megatron"]
    named = []
    for more in ([], ["--calibration", "none"], ["--calibration", str(path)]):
        assert run([*question, *more, "-o", "json"], Globals()) == 0
        named.append(json.loads(capsys.readouterr().out)["calibration"])
    assert "rack-3" in named[0]
    assert named == [named[0], "", named[0]]


def test_calibrate_names_the_file_and_row(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is told with the file and the row in it, and nothing is written."""
    (home / "a.json").write_text(json.dumps(steps()[:2]))
    (home / "b.json").write_text(json.dumps([{**PLAN, "step_s": 1e-9}]))
    assert run(["plan", "calibrate", str(home / "a.json"), str(home / "b.json")], Globals()) != 0
    assert f"{home / 'b.json'} row 1: a step of 1e-09 s" in " ".join(capsys.readouterr().err.split())
    assert not (home / "cfg").exists()


def test_a_broken_default_file_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A default file that cannot be used is an error that says how to answer without it."""
    (home / "cfg").mkdir()
    (home / "cfg" / "planner-calibration.json").write_text("{}")
    assert run(["plan", "analyze", "llama-3.1-8b"], Globals()) != 0
    shown = capsys.readouterr().err
    assert "planner-calibration.json" in shown
    assert run(["plan", "analyze", "llama-3.1-8b", "--calibration", "none"], Globals()) == 0


def test_accuracy_is_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`herder plan accuracy` shows each area with its bar and verdict, without any daemon."""
    assert run(["plan", "accuracy"], Globals()) == 0
    shown = capsys.readouterr().out
    for word in ("parameter counts", "training step time", "decode TPOT", "collectives", "bars are met"):
        assert word in shown


# aiconfigurator
def test_a_second_opinion_is_never_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package there is none; what it has no words for and what goes wrong in it are told as reasons."""
    arch, topology = lookup("llama-3.1-8b"), topology_of_preset("H100", 1)
    load = Workload(isl=1024, osl=256, concurrency=8)
    monkeypatch.setattr("head.planner.second_opinion.util.find_spec", lambda name: None)
    assert second_opinion.second_opinion(arch, topology, EngineSettings(), load) is None
    monkeypatch.setattr("head.planner.second_opinion.util.find_spec", lambda name: object())
    monkeypatch.setattr("head.planner.second_opinion.metadata.version", lambda name: "9.9")
    found = second_opinion.second_opinion(arch, topology, EngineSettings(backend="llamacpp"), load)
    assert found is not None
    assert found.reason == "it does not know the engine llamacpp"
    assert found.tpot_s is None


def test_a_second_opinion_that_hangs_or_dies_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is ended after the timeout, and a crash in it is a reason, not an error of ours."""
    program = tmp_path / "program"
    monkeypatch.setattr("head.planner.second_opinion.sys.executable", str(program))
    for script, words in (
        ("exec sleep 60", "did not answer"),
        ("exit 3", "status 3"),
        ('echo \'{"error": "no data"}\'', "no data"),
        ('echo \'{"ttft_ms": 0, "tpot_ms": 1}\'', "no latencies"),
    ):
        program.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(second_opinion, "TIMEOUT_S", 0.5 if "sleep" in script else 30.0)
        with pytest.raises(second_opinion.NoOpinion, match=words):
            second_opinion._said(b"{}")
