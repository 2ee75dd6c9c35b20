"""/download, /move, /copy, /serve, /delete, /health_check, /stop: one call, one job of one step.

The paths and fields of the model store that Herder replaces keep their names.
"""

from __future__ import annotations

from typing import Literal

from aiohttp import web
from msgspec.structs import replace

from common.errors import InvalidValue
from head.api import jobs
from head.api.call import Call
from head.api.routes import MODEL, PREFIX, Handler, Route, WaitQuery
from herder import types as api

TAG = "operations"


async def _one_step(call: Call, step: api.JobAction) -> web.StreamResponse:
    """A job of this step alone, which bears the name of its action."""
    step = replace(step, action_id=step.action_type)
    name = f"{step.action_type} {step.model_name or step.target_url or ''}".strip()[:128]
    return await jobs.run(call, api.CreateJob(name=name, actions=(step,)))


async def download(call: Call) -> web.StreamResponse:
    body = call.body(api.Download)
    devices = (body.target_device,)
    return await _one_step(
        call,
        api.JobAction(action_type="download", model_name=body.model_name, source_url=body.source_url, devices=devices),
    )


async def move(call: Call) -> web.StreamResponse:
    body = call.body(api.Move)
    step = _from_to("move", body)
    return await _one_step(call, replace(step, keep_source=body.keep_source))


async def copy(call: Call) -> web.StreamResponse:
    return await _one_step(call, _from_to("copy", call.body(api.Copy)))


def _from_to(action: Literal["move", "copy"], body: api.Move | api.Copy) -> api.JobAction:
    return api.JobAction(
        action_type=action, model_name=body.model_name, from_=body.source_device, to=body.target_device
    )


async def serve(call: Call) -> web.StreamResponse:
    body = call.body(api.Serve)
    step = _on("serve", body.model_name, body.device)
    return await _one_step(call, replace(step, port=body.port, config=body.config))


async def delete(call: Call) -> web.StreamResponse:
    body = call.body(api.DeleteCopy)
    return await _one_step(call, replace(_on("delete", body.model_name, body.device), force=body.force))


async def health_check(call: Call) -> web.StreamResponse:
    body = call.body(api.HealthCheck)
    if not body.target_url and not (body.model_name and body.device):
        raise InvalidValue("nothing to check", hint="give model_name and device, or target_url")
    step = _on("health_check", body.model_name, body.device)
    config = {"timeout_s": body.timeout_s}
    return await _one_step(call, replace(step, target_url=body.target_url, config=config, retries=0))


async def stop(call: Call) -> web.StreamResponse:
    body = call.body(api.StopServe)
    return await _one_step(call, _on("stop_serve", body.model_name, body.device))


async def stop_by_path(call: Call) -> web.StreamResponse:
    return await _one_step(call, _on("stop_serve", call.path("model"), call.path("device")))


def _on(
    action: Literal["serve", "stop_serve", "delete", "health_check"], model: str | None, device: str | None
) -> api.JobAction:
    return api.JobAction(action_type=action, model_name=model, device=device)


_CODES = ("model_not_found", "node_not_found", "device_not_found", "invalid_device", "invalid_name", "too_many")


def _route(
    path: str, handler: Handler, summary: str, body: type[api.Request] | None, *codes: str, more: str = ""
) -> Route:
    return Route(
        "POST",
        f"{PREFIX}{path}",
        handler,
        "operator",
        TAG,
        summary,
        api.JobView,
        body=body,
        query=WaitQuery,
        status=202,
        codes=(*_CODES, *codes),
        description=f"{more} Makes a job of one step; answers 200 when it ended within `wait`.".strip(),
    )


ROUTES = (
    _route("/download", download, "Fetch a model to a device", api.Download, "invalid_source"),
    _route("/move", move, "Move a copy to another device", api.Move, "copy_not_found", "last_copy"),
    _route("/copy", copy, "Copy to another device", api.Copy, "copy_not_found"),
    _route("/serve", serve, "Run an engine for a model on a device", api.Serve, "invalid_recipe"),
    _route("/delete", delete, "Remove a copy", api.DeleteCopy, "copy_not_found", "in_use", "last_copy"),
    _route("/health_check", health_check, "Ask an engine or a URL whether it is healthy", api.HealthCheck),
    _route("/stop", stop, "Stop the engine of a model on a device", api.StopServe, "service_not_found"),
    _route(
        f"/stop/{{model:{MODEL}}}/{{device}}",
        stop_by_path,
        "Stop the engine of a model on a device",
        None,
        "service_not_found",
    ),
)
