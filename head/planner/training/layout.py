"""How one training step is spread over GPUs."""

from __future__ import annotations

from typing import Literal

import msgspec

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "interleaved", "zero_bubble", "gpipe"]
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp", "hsdp"]
Tuning = Literal["full", "lora", "qlora"]


class TrainingLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Degrees of parallelism, batch and memory savers. tp*pp*cp*dp GPUs; ep divides dp*cp (and tp, by `expert_tp`).

    `global_batch` and `micro_batch` are sequences of `seq` tokens.
    """

    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 0  # 0: as tp when ep is 1, otherwise 1
    dp: int = 1
    has_sequence_parallel: bool = True
    sharding: Sharding = "zero1"
    shard_group: int = 0  # hsdp: GPUs that share one copy of the states; 0: one node
    schedule: Schedule = "1f1b"
    global_batch: int = 1
    micro_batch: int = 1
    seq: int = 4096
    precision: str = "bf16"  # of the matrix products: fp32, tf32, fp16, bf16, fp8, mxfp8, nvfp4
    grad_bytes: int = 4
    optimizer: str = "adamw"  # adamw, adamw_8bit, adafactor, sgd, lion, ...
    recompute: Recompute = "none"
    has_flash_attention: bool = True
    tuning: Tuning = "full"
    lora_rank: int = 16
    has_double_quant: bool = False  # qlora: the scales of the 4-bit weights are 8-bit too
    offload: Literal["none", "optimizer", "optimizer_and_weights", "activations"] = "none"
    expert_imbalance: float = 1.0  # tokens at the busiest expert rank over the mean
    partition: Literal["layers", "layers_and_embedding"] = "layers"

    @property
    def gpus(self) -> int:
        """GPUs that take part."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def microbatches(self) -> int:
        """Micro-batches that each pipeline runs in a step."""
        return max(1, self.global_batch // (self.micro_batch * self.dp))
