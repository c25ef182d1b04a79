"""The web application around a :class:`~ebm_guard.deploy.serve.service.Service`."""

# FastAPI reads the annotations of its handlers: they are not postponed here, because it is
# imported inside a function.

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ebm_guard.deploy.serve.batching import Ticket
from ebm_guard.deploy.serve.bodies import Body
from ebm_guard.deploy.serve.parsing import FORM, NPY
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.service import Service
from ebm_guard.deploy.serve.settings import ServeSettings, require_extra
from ebm_guard.deploy.serve.workers import CallError, Workers
from ebm_guard.gate import Guard

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/*", "application/octet-stream", NPY)
        }
        | {
            FORM: {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            }
        },
    },
    "parameters": [
        {
            "name": "input",
            "in": "query",
            "schema": {"enum": ["model", "pixels"], "default": "model"},
            "description": "What an array holds: the model's input, or pixels in [0, 1].",
        }
    ],
}


def make_app(
    guard: Guard, *, shadow: Guard | None = None, settings: ServeSettings | None = None
) -> "FastAPI":
    """Build the web application that serves a guard.

    ``POST /predict`` takes an image file (the body itself, or the field ``file`` of a form) or an
    array of rows (``application/x-npy``), and answers ``{"artifact": ..., "decisions": [...]}``
    with one row for each input. ``GET /health``, ``/ready`` and ``/metrics`` are for the operator.
    It has no login and no TLS: those are the work of the proxy in front of it.

    Args:
        guard: fitted, with its model.
        shadow: a second guard that decides on the same rows; it is counted and never answers.
        settings: the limits.

    Raises:
        InvalidInputError: a guard without a model, or the extra ``serve`` is not installed.
        NotFittedError: the guard was not fitted.

    Example:
        >>> import ebm_guard
        >>> guard = ebm_guard.Guard.load("guard.safetensors", model)  # doctest: +SKIP
        >>> make_app(guard).title  # doctest: +SKIP
        'ebm-guard'
    """
    require_extra()
    from fastapi import FastAPI, Request, Response

    limits = settings or ServeSettings()
    service = Service(guard, shadow, limits)
    front = _Front(service, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, service.start)
        yield
        await loop.run_in_executor(None, service.stop)

    app = FastAPI(
        title="ebm-guard", version=service.identity.version, docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.state.service = service

    @app.post("/predict", openapi_extra=_BODY)
    async def predict(request: Request) -> Response:
        """Decide on an image, or on the rows of an array."""
        return await front.predict(request)

    @app.get("/health")
    async def health() -> Response:
        """Say whether the process is to be kept: 503 means restart it."""
        reason = service.sick()
        return _json(503 if reason else 200, {"healthy": not reason, "reason": reason})

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether to send requests here."""
        reason = service.unready()
        facts = {"ready": not reason, "reason": reason, **service.identity.to_dict()}
        return _json(503 if reason else 200, facts)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters and histograms in Prometheus' text format."""
        from prometheus_client import CONTENT_TYPE_LATEST

        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(None, service.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return app


class _Front:
    """Answer ``/predict``: limits, parsing, the queue, and the counters of all that."""

    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings

    async def predict(self, request: "Request") -> "Response":
        start, metrics = time.perf_counter(), self.service.metrics
        body = Body(request, self.settings.max_bytes, self.settings.body_timeout)
        headers = {}
        try:
            status, content = 200, await self._decisions(request, body)
        except RefusedError as refused:
            metrics.refused(refused.reason)
            status, content = refused.status, {"error": refused.reason, "message": str(refused)}
            if status == 503:
                headers["Retry-After"] = str(self.settings.retry_after)
        except Exception as error:  # noqa: BLE001 - every request gets an answer and a count
            cause = error.error if isinstance(error, CallError) else error
            self.service.log("a request failed", cause)
            metrics.refused("failed")
            status, content = 500, {"error": "failed", "message": type(cause).__name__}
        metrics.answered(status, time.perf_counter() - start)
        await body.skip_small()
        return (
            _json(status, content, headers) if body.ended else _last(status, content, headers, body)
        )

    async def _decisions(self, request: "Request", body: Body) -> dict[str, Any]:
        batcher, decoders = self.service.require()
        with batcher.ticket() as ticket:
            count, future = await self._queued(request, body, ticket, decoders)
            try:
                rows = await asyncio.wrap_future(future)
            except CallError as failed:
                rows = self.service.failed(count, failed.error)
            return {"artifact": f"sha256:{self.service.identity.sha256}", "decisions": rows}

    async def _queued(
        self, request: "Request", body: Body, ticket: Ticket, decoders: Workers
    ) -> tuple[int, "Future[list[Any]]"]:
        """Read, parse and queue; the bytes are let go here, before the model is waited for."""
        content = await body.read()
        content_type = request.headers.get("content-type", "")
        kind = request.query_params.get("input", "model")

        def submit() -> tuple[int, Future[list[Any]]]:
            inputs = self.service.parser.rows(content_type, content, kind)
            return len(inputs), ticket.submit(inputs)

        queued: tuple[int, Future[list[Any]]] = await decoders.run(
            submit, seconds=self.settings.decode_timeout
        )
        return queued


def _json(
    status: int, content: dict[str, Any], headers: dict[str, str] | None = None
) -> "Response":
    from fastapi import Response

    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers=headers, media_type="application/json")


def _last(status: int, content: dict[str, Any], headers: dict[str, str], body: Body) -> "Response":
    """Answer before the body is read, read on, and close the connection after it."""
    from fastapi import Response

    class Last(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            start = {"type": "http.response.start", "status": status, "headers": self.raw_headers}
            part = {"type": "http.response.body", "body": self.body, "more_body": True}
            await send(start)
            await send(part)
            await body.drain()
            await send(part | {"body": b"", "more_body": False})

    text = json.dumps(content, allow_nan=False)
    return Last(text, status, headers | {"Connection": "close"}, media_type="application/json")
