"""`herder plan` at the terminal: verbs within 80 columns, main numbers first, mistakes that explain themselves."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from head.planner.endpoints.table import BY_VERB
from herder.cli import plan, plan_numbers, plan_view
from herder.cli.command import Globals
from herder.cli.main import run

GOLDEN = Path(__file__).parent.parent / "golden" / "plan"
VERBS = [verb for verb in BY_VERB if verb not in ("accuracy", "calibrate")]  # these have views of their own
Shown = tuple[int, str, str]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shown]:
    """Runs a command in 80 columns: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: str) -> Shown:
        code = run(["plan", *words], Globals())
        out, err = capsys.readouterr()
        return code, out, err

    return call


def words_of(verb: str) -> list[str]:
    """The example of a verb, as its help shows it."""
    return shlex.split(plan._example(BY_VERB[verb]))[2:]


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_the_help_runs(verb: str, shell: Callable[..., Shown]) -> None:
    """Every verb's own example answers, in a page or two that are no wider than the terminal."""
    code, out, err = shell(*words_of(verb))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert 0 < len(lines) <= 100
    if verb != "slurm":  # a script is not wrapped
        assert max(len(line) for line in lines) <= 80, max(lines, key=len)
    assert "'" not in out or "{'" not in out  # no Python in sight


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_the_whole_answer(verb: str, shell: Callable[..., Shown]) -> None:
    """-o json is what the API answers, fields that the page leaves out included."""
    code, out, _ = shell(*words_of(verb), "-o", "json")
    assert code == 0
    assert set(json.loads(out)) <= set(BY_VERB[verb].answer_type.__struct_fields__)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_text_and_its_default(verb: str) -> None:
    """The help of an option says what it is, and what it is when it is left out."""
    command = plan.command.get_command(click.Context(plan.command), verb)
    assert command is not None
    fields = {field.name: field for field in msgspec.structs.fields(BY_VERB[verb].question)}
    for option in command.params:
        field = fields.get(option.name or "")
        if field is None or not isinstance(option, click.Option):
            continue
        assert option.help
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[{field.default}]" in option.help


@pytest.mark.parametrize("name", ["recommend", "inference", "launch"])
def test_pages_are_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded answer is shown as the recorded page."""
    monkeypatch.setenv("COLUMNS", "80")
    answer = json.loads((GOLDEN / f"{name}.json").read_text())
    assert plan_view.render(answer, Globals(), name) + "\n" == (GOLDEN / f"{name}.txt").read_text()


def test_commands_can_be_copied() -> None:
    """A command over several lines is the same words to a shell."""
    command = "A=b C='d e' torchrun --nnodes=2 --name 'two words' --lr 0.1 'train it.py' --flag --out a/b " * 3
    lines = plan_numbers.shell_lines(command, 60)
    assert all(len(line) <= 60 for line in lines)
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(command)


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        ({"value": 0.0231, "low": 0.0183, "high": 0.0285, "unit": "s"}, "23.1 ms (18.3-28.5)"),
        ({"value": 63_611.4, "low": 40_446.2, "high": 87_871.0, "unit": "tokens/s"}, "63,611 tokens/s (40,446-87,871)"),
        ({"value": 0.427, "low": 0.2715, "high": 0.59, "unit": "ratio"}, "42.7 % (27.2-59)"),
        ({"value": 3 * 2**30, "low": 2.5 * 2**30, "high": 2**32, "unit": "bytes"}, "3 GiB (2.5-4)"),
        ({"value": 0.0, "low": 0.0, "high": 0.0, "unit": "s"}, "0 s (0-0)"),
    ],
)
def test_quantities_read_well(quantity: dict[str, Any], text: str) -> None:
    """One unit for the value and its interval."""
    assert plan_numbers.quantity(quantity) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory_per_gpu_gb", 65.72, "65.72 GB"),
        ("latency_ms", 1_234.5, "1,234 ms"),
        ("cost_per_million_tokens_usd", 0.8356, "$0.8356"),
        ("total_params_billion", 70.55, "70.55 billion"),
        ("requests_per_s", 8.587, "8.587 /s"),
        ("fit_probability", 0.994, "99.4 %"),
        ("fit_probability", 4e-7, "<0.1 %"),
        ("throughput_change_pct", -3.25, "-3.25 %"),
        ("total_params", 70_553_706_496, "70,553,706,496"),
        ("master_port", 29_500, "29500"),
        ("fits", True, "yes"),
        ("hostile", "a\x1b[2Jb", "a [2Jb"),
    ],
)
def test_plain_values_take_the_unit_of_their_name(name: str, value: Any, text: str) -> None:
    """GB, ms, dollars and per cent stand behind the number, not in the title."""
    assert plan_numbers.plain(value, name) == text


def test_mistakes_explain_themselves(shell: Callable[..., Shown], tmp_path: Path) -> None:
    """What is wrong, and what would be right; nothing with a traceback."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1, 2]")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "huge.json").write_text(" " * (2 << 20))
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    mistakes: list[tuple[list[str], int, str]] = [
        (["recomend", "llama-3.1-8b"], 2, "Did you mean recommend"),
        (["analyze"], 2, "Missing argument 'MODEL'"),
        (["compare"], 2, "Missing argument 'MODELS"),
        (["analyze", "llama-3.1-8c"], 5, "lama-3.1-8B"),
        (["memory", "llama-3.1-8b", "--gpu", "H1000"], 5, "did you mean H100"),
        (["memory", "llama-3.1-8b", "--gpus", "8x"], 2, "not a valid integer"),
        (["memory", "llama-3.1-8b", "--tp", "0"], 1, "tp: Expected"),
        (["memory", "llama-3.1-8b", "--optimizer", "adamwat"], 1, "one of adamw"),
        (["recommend", "llama-3.1-405b", "--gpu", "H100", "--gpus", "8", "--training"], 1, "use 128 GPUs"),
        (["analyze", str(tmp_path / "none" / "config.json")], 1, "No such file"),
        (["analyze", str(tmp_path)], 2, "neither a config.json nor weights"),
        (["analyze", str(tmp_path / "list")], 2, "not a config.json"),
        (["analyze", str(tmp_path / "deep.json")], 2, "not a config.json"),
        (["analyze", str(tmp_path / "huge.json")], 2, "at most 1 MiB"),
        (["analyze", str(tmp_path / "binary.json")], 2, "not a config.json"),
        (["analyze", str(tmp_path / "empty.json")], 1, "hidden_size"),
        (["analyze", "llama-3.1-8b", "--cluster", "--url", "http://127.0.0.1:9"], 3, "cannot reach a head"),
    ]
    for words, code, text in mistakes:
        found, out, err = shell(*words)
        assert (found, out) == (code, ""), words
        assert text in err, (words, err)
        assert "Traceback" not in err


def test_an_interrupt_is_no_error(shell: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a search ends with 130 and a sentence."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "_by_ourselves", interrupted)
    code, out, err = shell("health")
    assert (code, out) == (130, "")
    assert "Interrupted" in err


def test_a_comparison_takes_several_names(shell: Callable[..., Shown]) -> None:
    """Each argument is a model."""
    code, out, _ = shell("compare", "llama-3.1-8b", "qwen3-8b", "--gpu", "H100", "--gpus", "8", "-o", "json")
    assert code == 0
    assert set(json.loads(out)["comparison"]) == {"llama-3.1-8b", "qwen3-8b"}


def test_an_export_is_written(shell: Callable[..., Shown], tmp_path: Path) -> None:
    """The files of an export go into a folder, once: nothing is overwritten."""
    words = ["export", "llama-3.1-8b", "--gpu", "H100", "--dp", "8", "--framework", "deepspeed", "--write"]
    code, _, err = shell(*words, str(tmp_path / "run"))
    assert code == 0
    assert "ds_config.json" in err
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == 1
    compile((tmp_path / "run" / "train.py").read_text(), "train.py", "exec")
    (tmp_path / "run" / "job.sbatch").write_text("mine")
    code, _, err = shell(*words, str(tmp_path / "run"))
    assert code == 2
    assert "holds" in err
    assert (tmp_path / "run" / "job.sbatch").read_text() == "mine"


def test_a_batch_script_is_itself(shell: Callable[..., Shown]) -> None:
    """What `plan slurm` prints can go straight into a file."""
    code, out, _ = shell(*words_of("slurm"))
    assert code == 0
    assert out.startswith("#!/bin/bash\n#SBATCH")


def safetensors(path: Path, shapes: dict[str, list[int]]) -> int:
    """A file whose header names these tensors in bf16, its weights all zero; returns its parameters."""
    rows: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        rows[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(rows).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return at // 2


def test_a_file_of_weights_is_a_model(shell: Callable[..., Shown], tmp_path: Path) -> None:
    """Headers of safetensors give the architecture, of one file as of all in a folder; the counts are the tensors'."""
    layer = {"self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64], "self_attn.v_proj": [32, 64]}
    layer |= {"self_attn.o_proj": [64, 64], "mlp.gate_proj": [128, 64], "mlp.up_proj": [128, 64]}
    layer |= {"mlp.down_proj": [64, 128], "input_layernorm": [64], "post_attention_layernorm": [64]}
    shapes = {"model.embed_tokens.weight": [1000, 64], "model.norm.weight": [64], "lm_head.weight": [1000, 64]}
    shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in layer.items()}
    parameters = safetensors(tmp_path / "model.safetensors", shapes)
    for model in (tmp_path / "model.safetensors", tmp_path):
        code, out, err = shell("analyze", str(model), "-o", "json")
        assert (code, err) == (0, "")
        view = json.loads(out)["architecture"]
        assert (view["source"], view["total_params"], view["num_layers"]) == ("headers", parameters, 2)


def test_a_file_that_is_no_model_says_so(shell: Callable[..., Shown], tmp_path: Path) -> None:
    """A broken header, an empty folder, and a file for the head: wrong usage, one line and a hint."""
    (tmp_path / "bad.gguf").write_bytes(bytes(100))
    (tmp_path / "empty").mkdir()
    for words in (("bad.gguf",), ("empty",), ("bad.gguf", "--cluster")):
        code, out, err = shell("analyze", str(tmp_path / words[0]), *words[1:])
        assert (code, out) == (2, "")
        assert err.startswith("error[usage]:")
