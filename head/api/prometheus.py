"""/prometheus/targets and /metrics: where the agents' metrics are, and the head's own."""

from __future__ import annotations

from aiohttp import web

from head.api.call import Call
from head.api.routes import PREFIX, ListOf, Media, Route
from head.metrics import CONTENT_TYPE
from herder import types as api

TAG = "monitoring"
METRICS_PATH = "/metrics"


async def targets(call: Call) -> web.StreamResponse:
    """Every agent that has said where its /metrics is; an unreachable one too, so that Prometheus sees it down."""
    state = await call.read()
    groups = []
    for _, node_id in call.lists["node"].order():
        node = state.nodes[node_id]
        if not node.http_port or not node.advertise or node.status == "left":
            continue
        host = f"[{node.advertise}]" if ":" in node.advertise else node.advertise
        labels = {"node": node.id, "__metrics_path__": "/metrics"}
        groups.append(api.TargetGroup((f"{host}:{node.http_port}",), labels))
    return call.answer(groups)


async def metrics(call: Call) -> web.StreamResponse:
    """The head's own metrics."""
    await call.read()
    return web.Response(body=await call.context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/prometheus/targets",
        targets,
        "viewer",
        TAG,
        "Prometheus service discovery",
        ListOf(api.TargetGroup),
        description="For `http_sd_configs`: the agents' exporters.",
    ),
    Route(
        "GET",
        METRICS_PATH,
        metrics,
        "viewer",
        TAG,
        "The head's metrics",
        Media("text/plain", "Prometheus text format."),
        description="Open without a token where `metrics_open` is set.",
    ),
)
