"""Speculative decoding: how many tokens a step yields, and what drafting costs.

A drafter proposes `drafted` tokens, the model verifies them in one step with one more query per drafted token. Each
is accepted with probability `acceptance`, independently, up to the first refusal; the model's own token comes on top.
Source: Leviathan et al. 2023, equation 1.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.errors import InvalidValue
from head.planner.model.architecture import Architecture
from head.planner.model.parameters import count

DraftKind = Literal["mtp", "eagle", "ngram", "model"]

# Typical share of drafted tokens accepted at the first position; an assumption to be replaced by one's own measurement.
DEFAULT_ACCEPTANCE = {"mtp": 0.8, "eagle": 0.7, "ngram": 0.4, "model": 0.7}


class Speculative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`draft_share`: a draft step's cost as a share of the model's; 0: by kind."""

    kind: DraftKind = "mtp"
    drafted: int = 1
    acceptance: float = 0.0  # 0: the kind's usual one
    draft_share: float = 0.0


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Mean tokens of a step: (1 - a^(k+1)) / (1 - a)."""
    if acceptance >= 1.0:
        return drafted + 1.0
    return float((1 - acceptance ** (drafted + 1)) / (1 - acceptance))


def acceptance_of(speculative: Speculative) -> float:
    """The given acceptance or the kind's usual one. Raises: InvalidValue outside [0, 1] or for 0 drafted tokens."""
    acceptance = speculative.acceptance or DEFAULT_ACCEPTANCE[speculative.kind]
    if not 0 <= acceptance <= 1 or not 1 <= speculative.drafted <= 16 or not 0 <= speculative.draft_share < 1:
        raise InvalidValue(
            "acceptance is in [0, 1], drafted in [1, 16], draft_share in [0, 1)", fields=["acceptance", "drafted"]
        )
    return acceptance


def draft_share_of(speculative: Speculative, arch: Architecture) -> float:
    """Time of drafting one token over that of a step: one layer and the head for mtp and eagle, none for n-grams."""
    if speculative.draft_share:
        return speculative.draft_share
    if speculative.kind == "ngram":
        return 0.0
    if speculative.kind == "model":
        return 0.1
    whole = count(arch)
    layer = whole.active_no_embeddings / max(1, arch.layers)
    head = arch.vocab * arch.hidden if arch.has_head else 0
    return min(0.5, (layer + head) / max(1, whole.active_no_embeddings + head))


def break_even_acceptance(speculative: Speculative, arch: Architecture, verify_over_step: float) -> float:
    """Least acceptance at which speculation pays, when verifying takes `verify_over_step` times a plain step."""
    cost = verify_over_step + speculative.drafted * draft_share_of(speculative, arch)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, speculative.drafted) < cost else (low, middle)
    return high
