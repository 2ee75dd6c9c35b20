"""Real processes, killed: what the journal acknowledged is there, whatever stood in the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from head.journal import Journal
from head.journal_schema import FILE_NAME

ROOT = Path(__file__).parents[2]
# Commits small batches for ever, concurrently, and prints the highest revision of each acknowledged batch.
WRITER = """
import asyncio, sys
from pathlib import Path
from head.journal import Journal, encode
from tests.doubles.head_shell import record

async def main():
    journal = Journal.open(Path(sys.argv[1]))
    start = journal.load().revision
    revision = start

    async def write(rows, last):
        await journal.commit(rows)
        sys.stdout.write(f"{last}\\n")
        sys.stdout.flush()

    while True:
        work = []
        for _ in range(8):
            rows = [encode(record(revision + n, f"m{(revision + n) % 500}", note=str(revision + n))) for n in (1, 2, 3)]
            revision += 3
            work.append(write(rows, revision))
        await asyncio.gather(*work)

asyncio.run(main())
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    """A process that writes to the journal until it is killed."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def acknowledged_until_killed(path: Path, lines: int) -> int:
    """Lets a writer acknowledge so many batches, kills it, and returns the highest revision it acknowledged."""
    with start_writer(path) as process:
        assert process.stdout is not None
        highest = 0
        for _ in range(lines):
            highest = max(highest, int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        rest = [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        return max([highest, *rest])


def check_kept(path: Path, highest: int) -> None:
    """Everything up to the highest acknowledged revision is there, and what lies beyond it is whole batches."""
    journal = Journal.open(path)
    state = journal.load()
    journal.close()
    assert state.revision >= highest
    assert state.revision % 3 == 0
    for revision in range(max(1, highest - 400), highest + 1):
        kept = int(state.models[f"m{revision % 500}"].metadata["note"])
        assert kept >= revision
        assert kept % 500 == revision % 500


def test_no_acknowledged_write_is_lost_to_kill_9(tmp_path: Path) -> None:
    """Ten times over the same journal: killed in the middle of writing, nothing acknowledged is missing."""
    path = tmp_path / FILE_NAME
    rng = random.Random(20_260)
    highest = 0
    for _ in range(10):
        highest = acknowledged_until_killed(path, rng.randint(1, 60))
        check_kept(path, highest)
    assert highest > 0


@pytest.mark.parametrize("torn", [1, 17, 2_000, 4_096 + 24])
def test_a_torn_wal_tail_costs_only_what_was_not_acknowledged(tmp_path: Path, torn: int) -> None:
    """Rubbish behind the last synced frame, as a power cut leaves it, is ignored at the next start."""
    path = tmp_path / FILE_NAME
    highest = acknowledged_until_killed(path, 20)
    wal = path.with_name(f"{FILE_NAME}-wal")
    assert wal.stat().st_size > 0
    with wal.open("ab") as file:
        file.write(random.Random(torn).randbytes(torn))
    check_kept(path, highest)


def test_a_wal_cut_in_the_middle_of_a_transaction_keeps_the_ones_before(tmp_path: Path) -> None:
    """A commit whose frames are not all there is no commit: the state before it loads, whole."""
    path = tmp_path / FILE_NAME
    acknowledged_until_killed(path, 5)
    wal = path.with_name(f"{FILE_NAME}-wal")
    os.truncate(wal, wal.stat().st_size - 100)
    journal = Journal.open(path)
    state = journal.load()
    journal.close()
    assert state.revision % 3 == 0


# A file-size limit makes every write past it fail with EFBIG: a disk error that SQLite sees as I/O, not as full.
LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from common.errors import StateReadOnly
from head.journal import Journal, encode
from tests.doubles.head_shell import record

async def main():
    journal = Journal.open(Path(sys.argv[1]))
    await journal.commit([encode(record(1, "kept"))])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        await journal.commit([encode(record(2, "lost", note="x" * 500_000))])
    except StateReadOnly as error:
        print("refused", error.details["sqlite"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await journal.commit(())
    await journal.commit([encode(record(2, "after"))])
    print(sorted(journal.load().models))
    journal.close()

asyncio.run(main())
"""


def test_an_io_error_is_refused_and_survived(tmp_path: Path) -> None:
    """A real failed write answers `state_read_only`, leaves nothing behind, and the journal goes on afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / FILE_NAME)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, models = done.stdout.splitlines()
    assert refused.split()[0] == "refused"
    assert refused.split()[1] in ("SQLITE_IOERR_WRITE", "SQLITE_FULL")
    assert models == "['after', 'kept']"
