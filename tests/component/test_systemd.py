"""The units, users and folders that are shipped, as systemd's own tools see them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "systemd"
UNITS = ("herder-head.service", "herder-agent.service")


def needs(program: str) -> pytest.MarkDecorator:
    """Skips where a tool of systemd is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program} on PATH")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool."""
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def section(unit: str, name: str) -> list[tuple[str, str]]:
    """The settings of a unit's section."""
    text = (SHIPPED / unit).read_text().partition(f"[{name}]\n")[2].partition("\n[")[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS)
def test_units_are_good(unit: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, the place of the programs aside."""
    text = re.sub(r"/opt/herder/bin/herder-\w+", "/bin/true", (SHIPPED / unit).read_text())
    copy = tmp_path / unit
    copy.write_text(text)
    done = run("systemd-analyze", "verify", "--man=no", str(copy))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs("systemd-analyze")
def test_verify_would_notice(tmp_path: Path) -> None:
    """A misspelt setting is reported, so that silence means something."""
    text = (SHIPPED / UNITS[0]).read_text().replace("StateDirectory=", "StatDirectory=")
    copy = tmp_path / UNITS[0]
    copy.write_text(re.sub(r"/opt/herder/bin/herder-\w+", "/bin/true", text))
    assert "StatDirectory" in run("systemd-analyze", "verify", "--man=no", str(copy)).stderr


@pytest.mark.parametrize(("unit", "module"), [(UNITS[0], "head"), (UNITS[1], "agent")])
def test_units_start_what_there_is(unit: str, module: str) -> None:
    """The programs are console scripts of the package, and know the options that the units give them."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    said = run(sys.executable, "-m", module, "--help").stdout
    commands = [shlex.split(value) for key, value in section(unit, "Service") if key.startswith("ExecStart")]
    assert len(commands) == 2
    for program, *words in commands:
        assert Path(program).name in scripts
        assert scripts[Path(program).name] == f"{module}.__main__:main"
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", said), f"{program} has no {option}"


def test_only_the_agent_leaves_its_children() -> None:
    """Engines outlive the agent, and both daemons are watched and run as the same unprivileged user."""
    head, agent = (dict(section(unit, "Service")) for unit in UNITS)
    assert agent["KillMode"] == "process"
    assert "KillMode" not in head
    for unit in (head, agent):
        assert (unit["Type"], unit["User"], unit["UMask"], unit["NoNewPrivileges"]) == (
            "notify",
            "herder",
            "0077",
            "yes",
        )
        assert int(unit["WatchdogSec"]) > 0
        assert unit["Environment"] == "PYTHONSAFEPATH=1"


@needs("systemd-sysusers")
def test_users_and_folders_can_be_made(tmp_path: Path) -> None:
    """systemd-sysusers and systemd-tmpfiles take the files, and make what the units need."""
    if os.geteuid() != 0:
        done = run("systemd-sysusers", "--dry-run", str(SHIPPED / "herder.sysusers.conf"))
        assert done.returncode == 0, done.stderr
        return
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", str(SHIPPED / "herder.sysusers.conf"))
    assert done.returncode == 0, done.stderr
    user = (tmp_path / "etc" / "passwd").read_text().split(":")
    assert (user[0], user[5]) == ("herder", "/var/lib/herder")
    groups = dict(line.split(":x:", 1) for line in (tmp_path / "etc" / "group").read_text().splitlines())
    assert groups["render"].endswith(":herder")
    assert groups["video"].endswith(":herder")
    done = run("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(SHIPPED / "herder.tmpfiles.conf"))
    assert (done.returncode, done.stderr) == (0, "")
    state, settings = (tmp_path / "var/lib/herder").stat(), (tmp_path / "etc/herder").stat()
    assert (state.st_mode & 0o777, state.st_uid) == (0o700, int(user[2]))
    assert (settings.st_mode & 0o777, settings.st_uid, settings.st_gid) == (0o750, 0, int(user[3]))
