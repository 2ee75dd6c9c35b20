"""`AsyncClient`: every path of the head's API as a typed method.

Methods raise HerderApiError with the head's own code, HerderConnectionError when it cannot be reached, and
HerderTimeoutError when there is no answer in time. Long operations answer with a JobView at once, or after at most
`wait_s`; `wait_job` and `watch_job` follow a job to its end. Changes are made once even when an answer is lost: each
carries an Idempotency-Key, drawn here unless the caller gives one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import msgspec

from herder import following, log_reading, types
from herder.client_benchmarks import BenchmarkCalls
from herder.errors import HerderError, HerderJobError
from herder.files import write_whole
from herder.following import ChatChunk
from herder.listing import Listing
from herder.settings import Settings, discover
from herder.transport import ATTEMPTS, PREFIX, Transport, segment

BACKUP_IDLE_S = 300.0
CHAT_IDLE_S = 600.0  # a long prompt on a slow machine says nothing for long
DeviceKind = Literal["disk", "dram", "gpu"]


class _GatewayModel(msgspec.Struct, frozen=True):
    id: str


class _GatewayModels(msgspec.Struct, frozen=True):
    data: tuple[_GatewayModel, ...] = ()


_PLAN_READS = ("", "accuracy", "health", "presets", "topology")  # questions of the planner without a body


class AsyncClient(BenchmarkCalls):
    """A head's API, for asyncio. Use it in `async with`, or call `aclose` at the end."""

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        context: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        timeout_s: float = 30.0,
        attempts: int = ATTEMPTS,
        settings: Settings | None = None,
    ) -> None:
        """What is left out is found as docs/client.md says: environment, contexts, the local state directory.

        timeout_s: for one answer, beside what `wait_s` adds. attempts: tries of one request, the first included.
        settings: used as they are, nothing is looked up. Raises: HerderConfigError.
        """
        self.settings = settings or discover(
            url=url,
            token=token,
            token_file=token_file,
            context=context,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
        )
        self._http = Transport(self.settings, timeout_s=timeout_s, attempts=attempts)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.close()

    # the planner
    async def plan(
        self, endpoint: str, question: Mapping[str, Any] | None = None, *, method: str = ""
    ) -> dict[str, Any]:
        """The planner's answer to a question: `plan("recommend", {"model": "llama-3.1-70b", "gpu": "h100"})`.

        method: POST, except for the index, accuracy, health, presets and topology. docs/planner.md lists endpoints
        and fields.
        """
        path = f"/plan/{endpoint}" if endpoint else "/plan"
        if (method or ("GET" if endpoint in _PLAN_READS else "POST")) == "GET":
            return await self._http.request("GET", path, dict[str, Any], query=dict(question or {}))
        return await self._http.request("POST", path, dict[str, Any], body=dict(question or {}))

    # the head
    async def health(self) -> types.Health:
        """How the head is, and how much it looks after."""
        return await self._http.request("GET", "/health", types.Health)

    async def openapi(self) -> dict[str, Any]:
        """The API's OpenAPI 3.1 document."""
        return await self._http.request("GET", "/openapi.json", dict[str, Any])

    async def prometheus_targets(self) -> list[types.TargetGroup]:
        """What Prometheus should scrape, as HTTP service discovery wants it."""
        return await self._http.request("GET", "/prometheus/targets", list[types.TargetGroup])

    async def backup(self, path: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None) -> int:
        """Writes a consistent backup of the head to a 0600 file; returns its bytes. Needs an admin's token.

        The file appears under its name once it is whole and on the disk; `disk_full` when it does not fit there.
        progress: called with the bytes so far.
        """
        return await write_whole(
            Path(path),
            lambda expect: self._http.stream("GET", f"{PREFIX}/backup", idle_timeout_s=BACKUP_IDLE_S, expect=expect),
            progress=progress,
        )

    # models
    def models(self, *, type: types.ModelType | None = None, search: str = "") -> Listing[types.ModelView]:
        """Registered models, by name. search: only names that hold this."""
        return Listing(self._http, "/models", types.ModelView, {"type": type, "search": search})

    async def model(self, name: str) -> types.ModelView:
        """One model. Raises: HerderApiError `model_not_found`."""
        return await self._http.request("GET", f"/models/{segment(name)}", types.ModelView)

    async def register_model(
        self,
        name: str,
        *,
        type: types.ModelType = "llm",
        source: str | None = None,
        sources: Sequence[str] = (),
        revision: str = "main",
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> types.ModelView:
        """Makes a model known. sources: file://, http(s)://, hf://org/name[@rev], ssh://; `source` is short for one.

        Raises: HerderApiError `already_exists`, `invalid_name`, `invalid_source`.
        """
        body = types.RegisterModel(
            name=name,
            type=type,
            source_url=source,
            sources=tuple(sources),
            revision=revision,
            metadata=dict(metadata or {}),
        )
        return await self._http.request("POST", "/models", types.ModelView, body=body, idempotency_key=idempotency_key)

    async def update_model(
        self,
        name: str,
        *,
        type: types.ModelType | None = None,
        sources: Sequence[str] | None = None,
        revision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> types.ModelView:
        """Changes what is given. metadata is merged; a None value removes its key."""
        body = types.UpdateModel(
            type=type,
            sources=None if sources is None else tuple(sources),
            revision=revision,
            metadata=None if metadata is None else dict(metadata),
        )
        return await self._http.request("PATCH", f"/models/{segment(name)}", types.ModelView, body=body)

    async def delete_model(self, name: str, *, force: bool = False) -> types.Deleted:
        """Forgets a model and drops its copies. force: also pinned ones and those in use."""
        query = {"force": force}
        return await self._http.request("DELETE", f"/models/{segment(name)}", types.Deleted, query=query)

    def model_locations(self, name: str) -> Listing[types.CopyView]:
        """Every copy of a model, with state and progress."""
        return Listing(self._http, f"/models/{segment(name)}/locations", types.CopyView, {})

    async def model_manifest(self, name: str, *, revision: str = "") -> types.ManifestView:
        """The files of a model, once a first copy is verified. revision "": the model's present one."""
        path = f"/models/{segment(name)}/manifest"
        return await self._http.request("GET", path, types.ManifestView, query={"revision": revision})

    # operations
    async def _operate(
        self, path: str, body: types.Request, wait_s: float, idempotency_key: str | None
    ) -> types.JobView:
        return await self._http.request(
            "POST", path, types.JobView, body=body, wait_s=wait_s, idempotency_key=idempotency_key
        )

    async def download(
        self,
        model: str,
        device: str,
        *,
        source: str | None = None,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Fetches a model to a device. source: a URL instead of the registered ones."""
        body = types.Download(model_name=model, target_device=device, source_url=source)
        return await self._operate("/download", body, wait_s, idempotency_key)

    async def move(
        self,
        model: str,
        device: str,
        *,
        source_device: str | None = None,
        keep_source: bool = False,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Copies a model to another device and drops the source unless `keep_source`."""
        body = types.Move(model_name=model, target_device=device, source_device=source_device, keep_source=keep_source)
        return await self._operate("/move", body, wait_s, idempotency_key)

    async def copy(
        self,
        model: str,
        device: str,
        *,
        source_device: str | None = None,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Copies a model to another device, from the nearest copy unless `source_device` names one."""
        body = types.Copy(model_name=model, target_device=device, source_device=source_device)
        return await self._operate("/copy", body, wait_s, idempotency_key)

    async def serve(
        self,
        model: str,
        device: str,
        *,
        port: int = 0,
        config: Mapping[str, Any] | None = None,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Runs one engine for a model on a device. port 0: the node chooses.

        config: recipe, name (of the service), args, env, and what the recipe lists under `config`.
        """
        body = types.Serve(model_name=model, device=device, port=port, config=dict(config or {}))
        return await self._operate("/serve", body, wait_s, idempotency_key)

    async def stop(
        self, model: str, device: str, *, wait_s: float = 0.0, idempotency_key: str | None = None
    ) -> types.JobView:
        """Stops the engine that serves a model on a device."""
        body = types.StopServe(model_name=model, device=device)
        return await self._operate("/stop", body, wait_s, idempotency_key)

    async def delete_copy(
        self,
        model: str,
        device: str,
        *,
        force: bool = False,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Removes a copy. force: also a pinned one, or the last of a model without a source."""
        body = types.DeleteCopy(model_name=model, device=device, force=force)
        return await self._operate("/delete", body, wait_s, idempotency_key)

    async def health_check(
        self,
        model: str | None = None,
        device: str | None = None,
        *,
        target_url: str | None = None,
        check_timeout_s: float = 5.0,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Asks an engine (by model and device) or a URL, from a node, once. The job's step holds the outcome."""
        body = types.HealthCheck(model_name=model, device=device, target_url=target_url, timeout_s=check_timeout_s)
        return await self._operate("/health_check", body, wait_s, idempotency_key)

    async def pin(self, model: str, device: str, *, name: str = "operator", ttl_s: int = 0) -> types.CopyView:
        """Keeps a copy from eviction until unpinned, or for `ttl_s` seconds."""
        body = types.Pin(model_name=model, device=device, name=name, ttl_s=ttl_s)
        return await self._http.request("POST", "/pin", types.CopyView, body=body)

    async def unpin(self, model: str, device: str, *, name: str = "operator") -> types.CopyView:
        """Removes the pin of that name."""
        body = types.Pin(model_name=model, device=device, name=name)
        return await self._http.request("POST", "/unpin", types.CopyView, body=body)

    def copies(
        self, *, model: str = "", node: str = "", device: str = "", state: types.CopyState | None = None
    ) -> Listing[types.CopyView]:
        """Copies of all models on all devices, or of those given."""
        query = {"model": model, "node": node, "device": device, "state": state}
        return Listing(self._http, "/copies", types.CopyView, query)

    # nodes
    def nodes(self, *, state: types.NodeState | None = None, label: str = "") -> Listing[types.NodeView]:
        """Nodes, by id. label: `name` or `name=value`."""
        return Listing(self._http, "/nodes", types.NodeView, {"state": state, "label": label})

    async def node(self, node: str) -> types.NodeView:
        """One node. Raises: HerderApiError `node_not_found`."""
        return await self._http.request("GET", f"/nodes/{segment(node)}", types.NodeView)

    async def label_node(self, node: str, labels: Mapping[str, str | None]) -> types.NodeView:
        """Sets labels; None removes one."""
        body = types.UpdateNode(labels=dict(labels))
        return await self._http.request("PATCH", f"/nodes/{segment(node)}", types.NodeView, body=body)

    async def remove_node(self, node: str, *, force: bool = False) -> types.Deleted:
        """Forgets a node with its copies and replicas. force: also one that is online or holds last copies."""
        path = f"/nodes/{segment(node)}"
        return await self._http.request("DELETE", path, types.Deleted, query={"force": force})

    async def reset_node_identity(self, node: str) -> types.NodeView:
        """Lets a node whose agent lost its state directory come with a new secret. Needs an admin's token."""
        return await self._http.request("POST", f"/nodes/{segment(node)}/reset-identity", types.NodeView)

    async def cordon(self, node: str) -> types.NodeView:
        """Places nothing new on a node."""
        return await self._http.request("POST", f"/nodes/{segment(node)}/cordon", types.NodeView)

    async def uncordon(self, node: str) -> types.NodeView:
        """Lets a node take new work again; also ends a drain."""
        return await self._http.request("POST", f"/nodes/{segment(node)}/uncordon", types.NodeView)

    async def drain(self, node: str, *, deadline_s: int = 3_600, reason: str = "") -> types.NodeView:
        """Moves services away and places nothing new. At the deadline what is left is stopped."""
        body = types.DrainNode(deadline_s=deadline_s, reason=reason)
        return await self._http.request("POST", f"/nodes/{segment(node)}/drain", types.NodeView, body=body)

    def devices(self, *, node: str = "", kind: DeviceKind | None = None) -> Listing[types.DeviceView]:
        """Devices, with bytes in all, used, reserved and free."""
        return Listing(self._http, "/devices", types.DeviceView, {"node": node, "kind": kind})

    # services
    def services(self, *, model: str = "", state: types.ServiceState | None = None) -> Listing[types.ServiceView]:
        """Services, by name."""
        return Listing(self._http, "/services", types.ServiceView, {"model": model, "state": state})

    async def service(self, name: str) -> types.ServiceView:
        """One service with its replicas. Raises: HerderApiError `service_not_found`."""
        return await self._http.request("GET", f"/services/{segment(name)}", types.ServiceView)

    async def create_service(
        self, service: types.CreateService, *, wait_s: float = 0.0, idempotency_key: str | None = None
    ) -> types.ServiceView:
        """Makes a service: so many replicas of a recipe with a model. wait_s: until it is ready, or has failed."""
        return await self._http.request(
            "POST", "/services", types.ServiceView, body=service, wait_s=wait_s, idempotency_key=idempotency_key
        )

    async def delete_service(self, name: str, *, wait_s: float = 0.0) -> types.ServiceView:
        """Stops a service's replicas and forgets it. wait_s: until its engines are gone."""
        path = f"/services/{segment(name)}"
        return await self._http.request("DELETE", path, types.ServiceView, wait_s=wait_s)

    async def wait_service(self, name: str, *, timeout_s: float | None = None) -> types.ServiceView:
        """Waits until a service is ready, failed or stopped, and answers how it is. Raises: HerderTimeoutError."""
        last: types.ServiceView | None = None
        async with aclosing(following.watch_service(self._http, name, timeout_s=timeout_s)) as views:
            async for view in views:
                last = view
        assert last is not None
        return last

    def replicas(
        self,
        *,
        service: str = "",
        model: str = "",
        node: str = "",
        state: types.ReplicaState | None = None,
    ) -> Listing[types.ReplicaView]:
        """Engines, of all services or of those given."""
        query = {"service": service, "model": model, "node": node, "state": state}
        return Listing(self._http, "/replicas", types.ReplicaView, query)

    async def logs(
        self, replica: str, *, follow: bool = False, tail: int = 100, run: int = 0
    ) -> AsyncGenerator[str, None]:
        """An engine's log, as pieces of text. run 0: the present run, 1: the one before."""
        async with aclosing(following.log_text(self._http, replica, follow=follow, tail=tail, run=run)) as pieces:
            async for text in pieces:
                yield text

    async def log_batches(self, **wanted: Unpack[types.LogsWanted]) -> AsyncGenerator[list[types.LogEntry], None]:
        """As `log_entries`, in the batches in which entries come, and with those that hold neither line nor note."""
        async with aclosing(log_reading.log_batches(self._http, dict(wanted))) as batches:  # type: ignore[arg-type]
            async for batch in batches:
                yield batch

    async def log_entries(self, **wanted: Unpack[types.LogsWanted]) -> AsyncGenerator[types.LogEntry, None]:
        """Lines of logs, merged by time, with their source; a broken connection is taken up again where it was.

        Which logs: `target` (any of the following by its name), `service`, `replica`, `run`, `benchmark`, `job`,
        `node`, `source`. Which lines: `since`, `until`, `search` with `regex`, `ignore_case`, `tail`, `back`, `follow`.
        Raises: HerderApiError, as `not_found` or `node_unreachable`.
        """
        async with aclosing(self.log_batches(**wanted)) as batches:
            async for batch in batches:
                for entry in batch:
                    if entry.line is not None or entry.note:
                        yield entry

    # jobs
    def jobs(self, *, status: types.JobState | None = None, name: str = "") -> Listing[types.JobView]:
        """Jobs, newest first."""
        return Listing(self._http, "/jobs", types.JobView, {"status": status, "name": name})

    async def job(self, job_id: str) -> types.JobView:
        """One job. Raises: HerderApiError `job_not_found`."""
        return await self._http.request("GET", f"/jobs/{segment(job_id)}", types.JobView)

    async def create_job(
        self, job: types.CreateJob, *, wait_s: float = 0.0, idempotency_key: str | None = None
    ) -> types.JobView:
        """Starts a job. Raises: HerderApiError `invalid_job`, `job_cycle`."""
        return await self._operate("/jobs", job, wait_s, idempotency_key)

    async def create_job_from_text(
        self,
        text: str | bytes,
        *,
        format: Literal["yaml", "json"] = "yaml",
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.JobView:
        """Starts the job that a file's text describes, in either dialect; the head reads it."""
        content = text.encode() if isinstance(text, str) else text
        return await self._http.request(
            "POST",
            "/jobs",
            types.JobView,
            content=content,
            content_type=f"application/{format}",
            wait_s=wait_s,
            idempotency_key=idempotency_key,
        )

    async def cancel_job(self, job_id: str, *, wait_s: float = 0.0) -> types.JobView:
        """Stops a job. wait_s: until its steps have really stopped."""
        return await self._http.request("POST", f"/jobs/{segment(job_id)}/cancel", types.JobView, wait_s=wait_s)

    async def watch_job(self, job_id: str, *, timeout_s: float | None = None) -> AsyncGenerator[types.JobView, None]:
        """The job now and whenever it differs, until it has ended.

        A head that restarts meanwhile is waited for. Raises: HerderTimeoutError after timeout_s; the job runs on.
        """
        async with aclosing(following.watch_job(self._http, job_id, timeout_s=timeout_s)) as views:
            async for view in views:
                yield view

    async def wait_job(
        self,
        job: str | types.JobView,
        *,
        timeout_s: float | None = None,
        progress: Callable[[types.JobView], None] | None = None,
    ) -> types.JobView:
        """Waits for a job's success. progress: called with each view that differs.

        Raises: HerderJobError when it failed or was cancelled; HerderTimeoutError.
        """
        last = job if isinstance(job, types.JobView) else None
        job_id = job if isinstance(job, str) else job.id
        async with aclosing(self.watch_job(job_id, timeout_s=timeout_s)) as views:
            async for view in views:
                last = view
                if progress:
                    progress(view)
        assert last is not None
        return succeeded(last)

    # what happened, and why
    async def events(
        self, *, after: int | None = None, kind: str = "", key: str = "", resume: bool = True
    ) -> AsyncGenerator[types.Event, None]:
        """Every change as it becomes durable, without end. after: an event's id to go on from; None: from now.

        kind: `job`, or several as `job,copy`. key: only that object. resume: a broken connection is taken up where
        it was. An event with `what` "reset" says that some were missed for good: read anew what you show.
        """
        feed = following.events(self._http, after=after, kind=kind, key=key, is_resuming=resume)
        async with aclosing(feed):
            async for event in feed:
                yield event

    def story(self, id: str, *, kind: str = "") -> Listing[types.StoryLine]:
        """What happened to something: the first page holds the latest lines, oldest first; later ones go back."""
        return Listing(self._http, f"/story/{segment(id)}", types.StoryLine, {"kind": kind})

    async def why(self, kind: str, id: str) -> types.Why:
        """Why a service, replica, job, copy, model or node is as it is."""
        return await self._http.request("GET", f"/why/{segment(kind)}/{segment(id)}", types.Why)

    # keys and recipes
    def keys(self, *, role: types.Role | None = None) -> Listing[types.KeyView]:
        """Keys, without their tokens."""
        return Listing(self._http, "/keys", types.KeyView, {"role": role})

    async def create_key(self, role: types.Role, name: str, *, ttl_s: int = 0, node: str = "") -> types.KeyView:
        """Makes a key; `token` is in this answer and nowhere else. ttl_s 0: no end. node: an agent key's only node."""
        body = types.CreateKey(role=role, name=name, ttl_s=ttl_s, node=node)
        key = await self._http.request("POST", "/keys", types.KeyView, body=body)
        if not key.token:
            raise HerderError(
                "token_lost",
                f"the key {key.id} was made, but the answer with its token was lost on the way",
                hint=f"`herder keys revoke {key.id}`, then create another",
            )
        return key

    async def revoke_key(self, key_id: str) -> types.KeyView:
        """Revokes a key, at once."""
        return await self._http.request("DELETE", f"/keys/{segment(key_id)}", types.KeyView)

    def recipes(self, *, category: str = "") -> Listing[types.RecipeView]:
        """What the head knows to run."""
        return Listing(self._http, "/recipes", types.RecipeView, {"category": category})

    # the gateway
    async def gateway_models(self) -> list[str]:
        """Names that the gateway at /v1 answers to."""
        answer = await self._http.request("GET", "/v1/models", _GatewayModels, prefix="")
        return [model.id for model in answer.data]

    async def chat(
        self, model: str, messages: str | Sequence[Mapping[str, Any]], /, **options: Any
    ) -> AsyncGenerator[ChatChunk, None]:
        """A streamed answer of a served model. messages: a prompt, or messages in OpenAI's form.

        options: further fields of the request (temperature, max_tokens, ...), passed to the engine.
        """
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        body = {"model": model, "messages": asked, "stream_options": {"include_usage": True}, **options}
        async with aclosing(following.chat(self._http, body, idle_timeout_s=CHAT_IDLE_S)) as answer:
            async for chunk in answer:
                yield chunk


def succeeded(job: types.JobView) -> types.JobView:
    """The job if it completed. Raises: HerderJobError with the first failed step's error."""
    if job.status == "completed":
        return job
    failed = next((step for step in job.steps if step.state == "failed" and step.error), None)
    error = job.error or (failed.error if failed else None)
    if failed is not None and failed.error is not None:
        error = failed.error
    code = error.code if error else job.status
    reason = f"{error.message}" if error else "no reason was given"
    place = f"step {failed.id}: " if failed is not None and len(job.steps) > 1 else ""
    if job.status == "cancelled":
        raise HerderJobError("cancelled", f"{job.id} was cancelled", job)
    raise HerderJobError(code, f"{job.id} {job.status}: {place}{reason}", job, hint=error.hint if error else "")
