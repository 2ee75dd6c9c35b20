"""Checked reads from a model's configuration, as machines wrote it: unknown fields are fine, absurd values are not.

Every refusal is InvalidValue (422) and names the field. Sizes are bounded, so that no count can grow beyond reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import InvalidValue

FIELDS = 2_000  # entries of one configuration
WIDTH = 1 << 24  # elements of a width, rows of a table
LAYERS = 4_096
HEADS = 1 << 16
EXPERTS = 1 << 16
TOKENS = 1 << 40

_LIMITS = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS,
    "max_position_embeddings": TOKENS,
    "sliding_window": TOKENS,
}

# The first name is the one that the rest of this package uses.
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "emb_dim"),
    "num_hidden_layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "decoder_layers",
    ),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "num_query_heads",
        "attention_heads",
        "decoder_attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels", "d_kv", "attention_head_dim", "head_size"),
    "intermediate_size": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "d_inner",
        "decoder_ffn_dim",
        "hidden_dim",
    ),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "max_seq_len",
        "max_sequence_length",
        "model_max_length",
        "n_ctx",
    ),
    "num_experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_moe_experts",
        "num_routed_experts",
        "n_experts",
    ),
    "num_experts_per_tok": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "router_topk",
        "n_experts_per_token",
    ),
    "moe_intermediate_size": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "expert_intermediate_size",
    ),
    "n_shared_experts": (
        "n_shared_experts",
        "num_shared_experts",
        "num_shared_expert",
        "moe_num_shared_experts",
        "n_shared_expert",
    ),
    "shared_expert_intermediate_size": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    ),
    "first_k_dense_replace": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "tie_word_embeddings": ("tie_word_embeddings", "tie_embeddings"),
    "hidden_act": (
        "hidden_act",
        "activation_function",
        "hidden_activation",
        "mlp_hidden_act",
        "feed_forward_proj",
        "activation",
    ),
}


class Fields:
    """A configuration with its family's defaults behind it. A missing, null or empty value is no value."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, Mapping):
            raise InvalidValue("the configuration is not an object", field="config")
        if len(config) > FIELDS:
            raise InvalidValue(f"the configuration has more than {FIELDS} fields", field="config")
        self._config = config
        self._defaults = defaults or {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Remember what was assumed."""
        if text not in self.notes:
            self.notes.append(text)

    def raw(self, name: str) -> Any:
        """The value as written, through the field's other names; None when there is none."""
        for candidate in ALIASES.get(name, (name,)):
            value = self._config.get(candidate)
            if value is not None:
                return value
        return self._defaults.get(name)

    def has(self, *names: str) -> bool:
        """Whether the configuration itself (not a default) says any of these."""
        return any(
            self._config.get(candidate) is not None for name in names for candidate in ALIASES.get(name, (name,))
        )

    def integer(self, name: str, default: int | None = None, *, low: int = 0, high: int = 0) -> int:
        """An integer in [low, high]. Raises: InvalidValue when absent without a default, of another type or outside."""
        value = self.raw(name)
        if value is None:
            if default is None:
                raise InvalidValue(f"the configuration does not say {name}", field=name)
            return default
        return integer(value, name, low=low, high=high or _LIMITS.get(name, WIDTH))

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in [low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidValue(f"{name} is not a number", field=name, value=shown(value))
        if not low <= value <= high:
            raise InvalidValue(f"{name} must lie between {low} and {high}", field=name, value=shown(value))
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value; 0 and 1 are taken too."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise InvalidValue(f"{name} is neither true nor false", field=name, value=shown(value))

    def text(self, name: str, default: str = "") -> str:
        """A short string."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 4_096:
            raise InvalidValue(f"{name} is not a short string", field=name, value=shown(value))
        return value

    def sequence(self, name: str) -> Sequence[Any] | None:
        """A list of at most LAYERS entries, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) > LAYERS:
            raise InvalidValue(f"{name} is not a list of at most {LAYERS} entries", field=name, value=shown(value))
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object of at most FIELDS entries, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, Mapping) or len(value) > FIELDS:
            raise InvalidValue(f"{name} is not an object", field=name, value=shown(value))
        return value

    def at(self, name: str, layer: int, default: int) -> int:
        """A number that may differ from layer to layer: the entry of a list, or the one value of all."""
        value = self.raw(name)
        if isinstance(value, (list, tuple)):
            if not value:
                return default
            entry = value[layer] if layer < len(value) else value[-1]
            return default if entry is None else integer(entry, name, low=0, high=_LIMITS.get(name, WIDTH))
        return self.integer(name, default)


def integer(value: Any, name: str, *, low: int, high: int) -> int:
    """`value` as an integer in [low, high]; 4096.0 is one, true is not. Raises: InvalidValue."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidValue(f"{name} is not an integer", field=name, value=shown(value))
    if not low <= value <= high:
        raise InvalidValue(f"{name} must lie between {low} and {high}", field=name, value=shown(value))
    return value


def shown(value: Any) -> str:
    """A refused value, short enough for an error's details."""
    if isinstance(value, (str, bytes)):
        return repr(value[:60])
    if isinstance(value, (bool, float)) or value is None:
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**30 else "a very large integer"
    return type(value).__name__
