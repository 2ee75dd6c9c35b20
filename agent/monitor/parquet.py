"""The node's table as a Parquet file, where pyarrow is installed (the extra `monitor`).

Rows are gathered into row groups of a minute or so. A Parquet file is readable only once its footer is written, at
the end: after a kill -9 it is not, so a long run that must survive one writes CSV beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.monitor.columns import NodeTable, Value
from agent.monitor.node import NodeSample
from common.errors import ExtraMissing

GROUP_ROWS = 600
_TIME = "timestamp"


class ParquetSink:
    """Writes the columns of the CSV with their types; `timestamp` is a moment (milliseconds, UTC)."""

    def __init__(self, path: Path, table: NodeTable) -> None:
        """Raises: ExtraMissing, OSError."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ExtraMissing("Parquet files need pyarrow", hint="pip install 'herder[monitor]'") from None
        kinds = {float: pyarrow.float64(), int: pyarrow.int64(), str: pyarrow.string()}
        self.name, self.lost = str(path), 0
        self._table = table
        self._arrow: Any = pyarrow
        self._schema = pyarrow.schema(
            [
                (name, pyarrow.timestamp("ms", tz="UTC") if name == _TIME else kinds[kind])
                for name, kind in table.columns
            ]
        )
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[list[Value]] = []

    def write(self, samples: Sequence[NodeSample]) -> None:
        """Takes rows; writes them once there are enough. Raises: OSError."""
        self._rows += [self._table.row(sample) for sample in samples]
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Writes the rest and the footer. Raises: OSError."""
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)]
        columns[0] = [_moment(str(text)) for text in columns[0]]
        try:
            arrays = [
                self._arrow.array(column, type=field.type) for column, field in zip(columns, self._schema, strict=True)
            ]
            self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        except OSError:
            self.lost += len(rows)
            raise


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
