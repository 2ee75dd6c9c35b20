"""The process in which aiconfigurator is asked: one question on stdin, the last line of stdout is the answer."""

from __future__ import annotations

import contextlib
import io
import math
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from head.planner.second_opinion import Asked, Said


def _no_network(*_: Any, **__: Any) -> NoReturn:
    raise OSError("no network here")


def answer(asked: Asked) -> Said:
    """Its estimate. Whatever it raises becomes the reason."""
    for name in ("getaddrinfo", "create_connection"):
        setattr(socket, name, _no_network)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            if asked.config is not None:
                Path(folder, "config.json").write_bytes(msgspec.json.encode(asked.config))
            return _estimated(asked, folder if asked.config is not None else asked.model)
    except Exception as error:  # noqa: BLE001 - another package: whatever goes wrong in it is why there is no opinion
        return Said(error=f"{type(error).__name__}: {' '.join(str(error).split())[:240]}")


def _estimated(asked: Asked, model: str) -> Said:
    from aiconfigurator.cli.api import cli_estimate

    formats = {"gemm_quant_mode": asked.gemm, "moe_quant_mode": asked.moe, "kvcache_quant_mode": asked.kv}
    found = cli_estimate(
        model,
        asked.system,
        mode="agg",
        backend_name=asked.backend,
        isl=asked.isl,
        osl=asked.osl,
        batch_size=asked.batch,
        tp_size=asked.tp,
        pp_size=asked.pp,
        attention_dp_size=asked.dp,
        moe_tp_size=asked.moe_tp,
        moe_ep_size=asked.moe_ep,
        prefix=asked.prefix,
        **{name: value for name, value in formats.items() if value},
    )
    numbers = [float(found.ttft), float(found.tpot), float(found.raw.get("tokens/s", 0.0))]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return Said(error="its numbers are not finite")
    return Said(
        ttft_ms=numbers[0], tpot_ms=numbers[1], tokens_per_s=numbers[2], backend_version=str(found.backend_version)
    )


if __name__ == "__main__":
    said = answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Asked))
    sys.stdout.write("\n" + msgspec.json.encode(said).decode())
