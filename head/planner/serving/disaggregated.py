"""Prefill and decode on separate engines: who is the bottleneck, and what moving the cache costs.

The decode engines see no prompts; the prefill engines see nothing else. A request's keys and values travel once, from
the ranks of one to the ranks of the other, over the network unless both lie in one scale-up domain.
"""

from __future__ import annotations

import msgspec

from head.planner.model.architecture import Architecture
from head.planner.serving.engine_step import Device, Precision, ServingLayout
from head.planner.serving.memory import kv_bytes_of_sequence

TRANSFER_SHARE = 0.7  # of the links' rate that cache transfers reach (NIXL, many small blocks); an assumption


class Disaggregated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The prefill side, and how many engines of each kind there are. The decode layout is the estimate's own.

    0 workers: not known; one of each is computed, and the answer leans on measured rows that did not say it either.
    """

    prefill_layout: ServingLayout = ServingLayout()
    prefill_workers: int = 1
    decode_workers: int = 1
    is_same_domain: bool = False

    def gpus(self, decode: ServingLayout) -> int:
        """GPUs of the whole deployment."""
        return self.prefill_layout.gpus * max(1, self.prefill_workers) + decode.gpus * max(1, self.decode_workers)

    @property
    def is_known(self) -> bool:
        """Whether both numbers of engines are said."""
        return self.prefill_workers > 0 and self.decode_workers > 0


def transfer_s(
    arch: Architecture, plan: Disaggregated, decode: ServingLayout, precision: Precision, device: Device, prompt: float
) -> float:
    """Seconds to move one prompt's cache. Ranks send in parallel; the side with fewer ranks bounds it."""
    whole = kv_bytes_of_sequence(arch, ServingLayout(), precision, prompt)
    lanes = max(1, min(plan.prefill_layout.tp, decode.tp))
    rate = device.link_bw if plan.is_same_domain else device.nic_bw
    return whole / (lanes * rate * TRANSFER_SHARE)


def balanced_workers(prompt_s: float, decode_rate: float, output: float, *, limit: int = 64) -> tuple[int, int]:
    """Smallest numbers of prefill and decode engines whose rates match best.

    prompt_s: a prefill engine's seconds for a prompt. decode_rate: output tokens per second of one decode engine.
    """
    wanted = prompt_s * decode_rate / max(output, 1.0)  # prefill engines for each decode engine
    best = (1, 1)
    waste = float("inf")
    for decode in range(1, limit + 1):
        prefill = max(1, round(wanted * decode))
        if prefill > limit:
            break
        have = prefill / decode
        lost = abs(have / wanted - 1) + 0.01 * (prefill + decode) if wanted > 0 else 0.0
        if lost < waste:
            best, waste = (prefill, decode), lost
    return best
