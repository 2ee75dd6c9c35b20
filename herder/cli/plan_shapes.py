"""Objects that many answers of the planner hold, each in the few lines that people need of it; -o json has the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from herder.cli.plan_numbers import amount, number, percent, plain, quantity, title

Row = Mapping[str, Any]
Lines = list[tuple[str, str]]  # (title, text); an empty title continues


def layout(row: Row) -> str:
    """A layout in a line."""
    if row.get("schedule") == "none":  # serving
        return f"{row['name']}, {_count(row['world_size'], 'GPU')}, {row['precision']}"
    parts = [row["name"], _count(row["world_size"], "GPU")]
    if row["virtual_stages"] > 1:
        parts.append(f"{row['virtual_stages']} virtual stages")
    parts.append(f"micro-batch {row['micro_batch_size']} x {row['num_micro_batches']}")
    parts += [f"global batch {row['global_batch']:,}", f"sequences of {row['seq_length']:,}", row["precision"]]
    parts += [row["optimizer"], row["sharding"], f"recompute {row['activation_checkpointing']}"]
    if row["offload"] != "none":
        parts.append(f"offload {row['offload']}")
    return ", ".join(parts)


def machine(row: Row) -> str:
    """A machine in a line."""
    where = f"{_count(row['nodes'], 'node')} of {row['gpus_per_node']}"
    text = f"{row['gpus']:,} x {row['accelerator']} ({amount(row['memory_gb'], 'GB')}), {where} [{row['source']}]"
    return "; ".join((text, *row["notes"]))


def searched(row: Row) -> str:
    """What a search looked through, in a line."""
    dropped = ", ".join(f"{drop['count']:,} {drop['reason']}" for drop in row["dropped"][:4])
    text = f"{row['feasible']:,} of {row['examined']:,} layouts can run"
    return "; ".join((f"{text} (dropped: {dropped})" if dropped else text, *row["notes"]))


def memory(row: Row) -> str:
    """The parts of a memory, largest first, those that are there."""
    parts = sorted(((name, value) for name, value in row.items() if name != "total"), key=lambda part: -part[1])
    return ", ".join(f"{title(name)} {value:.3g}" for name, value in parts if value >= 0.005)


def recommendation(row: Row) -> Lines:
    """One layout: what it is, how fast, how large, why."""
    found, serving = row["analysis"], row.get("serving")
    lines: Lines = [("layout", layout(row["strategy"]))]
    if serving:
        lines += serving_choice(serving)[1:]
    else:
        lines.append(("speed", f"{quantity(found['throughput'])}, step {quantity(found['step_s'])}"))
        lines.append(("MFU", quantity(found["mfu"])))
        room = found["memory_per_gpu_gb"] + found["memory_headroom_gb"]
        chance = f"fits with {100 * found['fit_probability']:.0f} %"
        lines.append(("memory", f"{found['memory_per_gpu_gb']:.3g} of {room:.3g} GB per GPU, {chance}"))
        lines.append(("", memory(found["memory"])))
        lines.append(("cost", f"{amount(found['cost_per_million_tokens_usd'], '$')} per million tokens"))
        waits = f"exchange {_percent(found['communication_overhead'])}"
        waits += f", bubble {_percent(found['pipeline_bubble_fraction'])}"
        lines.append(("bound by", f"{found['bottleneck']}; {waits} of the step"))
    for name, word in (("rationale", "why"), ("warnings", "care"), ("optimizations", "try")):
        lines += [(word if not at else "", f"- {text}") for at, text in enumerate(row[name])]
    return lines


def recommendation_row(row: Row) -> dict[str, Any]:
    """One layout as a row of a table."""
    strategy, found = row["strategy"], row["analysis"]
    if row.get("serving"):
        return serving_row(row["serving"])
    virtual = f" VPP{strategy['virtual_stages']}" if strategy["virtual_stages"] > 1 else ""
    return {
        "layout": strategy["name"] + virtual,
        "micro": strategy["micro_batch_size"],
        "recompute": strategy["activation_checkpointing"],
        "sharding": strategy["sharding"],
        "tokens/s": number(found["estimated_throughput_tps"]),
        "MFU": _percent(found["mfu"]["value"]),
        "GB": f"{found['memory_per_gpu_gb']:.3g}",
        "fits": _percent(found["fit_probability"]),
    }


def serving_choice(row: Row) -> Lines:
    """One configuration of an engine."""
    lines: Lines = [("engine", f"{row['name']} on {_count(row['gpus'], 'GPU')}, {_weights(row)}")]
    lines.append(("first token", quantity(row["ttft_s"])))
    lines.append(("between", f"{quantity(row['tpot_s'])} from token to token"))
    rate = f"{number(row['output_tokens_per_s'])} tokens/s, {number(row['requests_per_s'])} requests/s"
    lines.append(("output", f"{rate}, {number(row['concurrency'])} in flight"))
    lines.append(("", f"{quantity(row['output_tokens_per_s_per_gpu'])}"))
    used = f"weights {row['weights_gb']:.3g} and cache {row['kv_gb']:.3g} of {row['memory_gb']:.3g} GB used"
    lines.append(("memory", f"{used}; room for {number(row['max_concurrent'])} sequences"))
    if row["usd_per_million_tokens"] is not None:
        lines.append(("cost", f"{amount(row['usd_per_million_tokens'], '$')} per million output tokens"))
    lines.append(("bound by", row["bottleneck"]))
    if row["misses"]:
        lines.append(("misses", ", ".join(row["misses"])))
    return lines + [("care", text) for text in row["notes"]]


def serving_row(row: Row) -> dict[str, Any]:
    """One configuration of an engine as a row of a table."""
    return {
        "engine": row["name"],
        "weights": _weights(row),
        "seqs": row["max_num_seqs"],
        "first": amount(row["ttft_s"]["value"], "s"),
        "between": amount(row["tpot_s"]["value"], "s"),
        "tokens/s": number(row["output_tokens_per_s"]),
        "GPUs": row["gpus"],
        "best at": row["objective"],
    }


def architecture(row: Row) -> Lines:
    """A model's dimensions, without those that it does not have."""
    counts = f"{row['total_params']:,} parameters ({row['total_params_billion']:.4g} billion)"
    if row["active_params"] != row["total_params"]:
        counts += f", {row['active_params']:,} active"
    heads = f"{row['num_attention_heads']} heads of {row['head_dim']}, {row['num_key_value_heads']} for keys and values"
    widths = (
        f"hidden {row['hidden_size']:,}, feed-forward {row['intermediate_size']:,}, vocabulary {row['vocab_size']:,}"
    )
    lines: Lines = [
        ("counts", counts),
        ("", f"active without input embedding {row['active_params_no_input_embedding']:,}"),
        ("", f"active without embeddings {row['active_params_no_embeddings']:,}"),
        ("kind", f"{row['model_type']}, {row['num_layers']} layers, {row['dtype']} [{row['source']}]"),
        ("attention", f"{row['attention_type']}, {heads}"),
        ("widths", widths),
    ]
    if row["num_experts"]:
        experts = f"{row['num_experts']}, {row['num_experts_per_token']} for a token, in {row['num_moe_layers']} layers"
        lines.append(("experts", f"{experts}, {row['routed_expert_params']:,} parameters"))
    if row["max_position_embeddings"]:
        lines.append(("context", f"{row['max_position_embeddings']:,} tokens"))
    return lines + [("note", text) for text in row["notes"]]


def _weights(row: Row) -> str:
    return "16-bit" if row["weights"] == "as the model is" else str(row["weights"])


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _count(value: int, word: str) -> str:
    return f"{value:,} {word}{'' if value == 1 else 's'}"


def gpus(rows: Sequence[Row]) -> str:
    """GPUs that are alike, counted."""
    found: dict[str, int] = {}
    for row in rows:
        name = f"{row['name']} ({plain(row['memory_gb'], 'memory_gb')}, {row['architecture']})"
        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in found.items())


def state(row: Row) -> str:
    """A layout as it would run, in a line."""
    text = f"{row['config']} on {row['num_gpus']:,} x {row['gpu_type']}, global batch {row['global_batch']:,}, "
    text += f"sequences of {row['seq_length']:,}, {row['precision']}: {number(row['throughput'])} tokens/s, step "
    text += f"{amount(row['step_s'], 's')}, MFU {percent(row['efficiency'])}, {row['memory_per_gpu']:.3g} GB per GPU, "
    return text + ("fits" if row["fits"] else "does not fit")


def compared_row(row: Row) -> dict[str, Any]:
    """One model of a comparison as a row of a table."""
    if row["error"]:
        return {"model": row["model"], "error": row["error"]}
    return {
        "model": row["model"],
        "layout": row["best_config"],
        "tokens/s": number(row["throughput_tps"]),
        "score": f"{row['score']:.3g}",
        "GB": f"{row['memory_per_gpu_gb']:.3g}",
        "$/M tokens": number(row["cost_per_million_tokens_usd"] or 0.0),
    }


def sharding_row(row: Row) -> dict[str, Any]:
    """One way of sharding as a row of a table."""
    found = row["analysis"]
    return {
        "strategy": row["config"]["strategy"],
        "GB": f"{found['memory']['total_gb']:.3g}",
        "verdict": found["verdict"],
        "step": amount(found["step_s"], "s"),
        "tokens/s": number(found["tokens_per_s"]),
        "exchange": f"{found['communication']['overhead_pct']:.3g} %",
        "host GB": f"{found['host_memory_gb_per_node']:.3g}" if found["host_memory_gb_per_node"] else "",
        "score": f"{row['score']:.3g}",
    }


# Objects by the fields that give them away.
INLINE: tuple[tuple[frozenset[str], Callable[[Row], str]], ...] = (
    (frozenset({"config", "gpu_type", "efficiency", "throughput"}), state),
    (frozenset({"name", "architecture"}), lambda row: str(row["name"])),
    (frozenset({"world_size", "micro_batch_size", "virtual_stages"}), layout),
    (frozenset({"source", "accelerator", "gpus_per_node", "num_nodes"}), machine),
    (frozenset({"examined", "feasible", "dropped"}), searched),
    (frozenset({"parameters", "optimizer_states", "fragmentation", "total"}), memory),
)
BLOCKS: tuple[tuple[frozenset[str], Callable[[Row], Lines]], ...] = (
    (frozenset({"strategy", "analysis", "rationale"}), recommendation),
    (frozenset({"ttft_s", "tpot_s", "replicas", "kv_tokens"}), serving_choice),
    (frozenset({"attention_type", "total_params", "num_layers"}), architecture),
)
ROWS: tuple[tuple[frozenset[str], Callable[[Row], dict[str, Any]]], ...] = (
    (frozenset({"strategy", "analysis", "rationale"}), recommendation_row),
    (frozenset({"ttft_s", "tpot_s", "replicas", "kv_tokens"}), serving_row),
    (frozenset({"config", "analysis", "score", "fsdp_config"}), sharding_row),
    (frozenset({"best_config", "throughput_tps", "params_b", "error"}), compared_row),
)
