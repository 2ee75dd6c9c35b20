"""Parameter counts: exact against an independent implementation, and consistent in their parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from head.planner.model.architecture import Architecture, Attention, FeedForward, LayerGroup
from head.planner.model.parameters import ParameterCount, count
from head.planner.model.presets import architecture_of

_COUNTS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "planner_counts.json").read_bytes())


@pytest.mark.parametrize("row", _COUNTS["made"], ids=lambda row: str(row["config"]["model_type"]))
def test_counts_of_every_family_are_exact(row: dict[str, Any]) -> None:
    """A small invented model of each family has the parameters that its implementation allocates."""
    counted = count(architecture_of(row["config"]))
    assert (counted.total, counted.routed_experts) == (row["total"], row["routed_experts"])


@pytest.mark.parametrize("row", _COUNTS["published"], ids=lambda row: str(row["name"]))
@pytest.mark.parametrize("has_name", [True, False], ids=["named", "unnamed"])
def test_counts_of_published_models_are_exact(row: dict[str, Any], has_name: bool) -> None:
    """Published models count exactly in each part, from configurations reduced to their dimensions."""
    if not has_name and row["name"] == "zai-org/GLM-5.3":
        pytest.skip("it has GLM-5's dimensions: only the name says that layers share indexers")
    counted = count(architecture_of(row["config"], row["name"] if has_name else ""))
    assert counted.total == row["total"]
    assert counted.routed_experts == row["routed_experts"]
    if row["embedding"] is not None:
        assert counted.embedding == row["embedding"]
    if row["active"] is not None:
        assert counted.active == row["active"]


def test_three_conventions_of_active_parameters() -> None:
    """DeepSeek-V3's active parameters with both embeddings, without the input one, and without either."""
    row = next(row for row in _COUNTS["published"] if row["name"] == "deepseek-ai/DeepSeek-V3")
    counted = count(architecture_of(row["config"], row["name"]))
    assert counted.active == 37_552_282_624
    assert counted.active_no_input_embedding == 36_625_603_584
    assert counted.active_no_embeddings == 36_625_603_584 - 129_280 * 7_168


def test_the_extra_prediction_layer_is_counted_apart() -> None:
    """DeepSeek-V3's prediction layer adds about 11.6 billion that no total contains."""
    row = next(row for row in _COUNTS["published"] if row["name"] == "deepseek-ai/DeepSeek-V3")
    counted = count(architecture_of(row["config"], row["name"]))
    assert 11.5e9 < counted.mtp < 11.7e9
    assert counted.total == 671_026_404_352


_ATTENTIONS = st.builds(
    lambda kv, ratio, dim, bias, norm: Attention(
        heads=kv * ratio, kv_heads=kv, head_dim=dim, has_bias=bias, qk_norm=norm
    ),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([16, 64, 128]),
    st.booleans(),
    st.sampled_from(["none", "head", "full"]),
)
_FEEDS = st.one_of(
    st.builds(FeedForward, width=st.integers(1, 4096), is_gated=st.booleans(), has_bias=st.booleans()),
    st.builds(
        lambda experts, width, shared: FeedForward(
            kind="moe", experts=experts, active=max(1, experts // 3), width=width, shared_width=shared
        ),
        st.integers(1, 64),
        st.integers(1, 512),
        st.integers(0, 512),
    ),
)
_ARCHITECTURES = st.builds(
    lambda hidden, vocab, groups, tied: Architecture(
        name="made", hidden=hidden, vocab=vocab, groups=tuple(groups), is_tied=tied
    ),
    st.integers(1, 2048),
    st.integers(1, 50_000),
    st.lists(
        st.builds(LayerGroup, count=st.integers(1, 50), attention=_ATTENTIONS, feed_forward=_FEEDS),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)


def _parts(counted: ParameterCount) -> int:
    layers = sum(group.count * group.total for group in counted.groups)
    return counted.input_embedding + counted.positions + counted.head + layers + counted.final


@given(_ARCHITECTURES)
def test_the_whole_is_the_sum_of_its_parts(architecture: Architecture) -> None:
    """Totals, embeddings and active parameters add up for any architecture."""
    counted = count(architecture)
    assert counted.total == _parts(counted)
    assert counted.total == counted.embedding + counted.non_embedding
    assert 0 < counted.active_no_embeddings <= counted.active_no_input_embedding <= counted.active <= counted.total
    assert counted.active >= counted.total - counted.routed_experts


@given(_ARCHITECTURES)
def test_an_untied_head_is_one_more_table(architecture: Architecture) -> None:
    """Untying the output head adds the table once and changes nothing else."""
    tied = count(msgspec.structs.replace(architecture, is_tied=True))
    untied = count(msgspec.structs.replace(architecture, is_tied=False))
    assert untied.total - tied.total == architecture.vocab * architecture.hidden
    assert untied.non_embedding == tied.non_embedding
    assert untied.active_no_input_embedding == tied.active_no_input_embedding


@given(_ARCHITECTURES, st.integers(1, 10))
def test_more_layers_are_more_parameters(architecture: Architecture, more: int) -> None:
    """Each further layer adds exactly one layer's parameters."""
    first = architecture.groups[0]
    grown = msgspec.structs.replace(
        architecture, groups=(msgspec.structs.replace(first, count=first.count + more), *architecture.groups[1:])
    )
    before, after = count(architecture), count(grown)
    assert after.total - before.total == more * before.groups[0].total
    assert after.total > before.total
