"""The web application around a :class:`~ebm_guard.deploy.serve.service.Service`."""

# FastAPI reads the annotations of its handlers: they are not postponed here, because it is
# imported inside a function.

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ebm_guard.deploy.serve.parsing import FORM, NPY
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.service import Service
from ebm_guard.deploy.serve.settings import ServeSettings, require_extra
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
        front.close()

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
        batcher = service.batcher
        well = batcher is not None and (batcher.alive or batcher.closing)
        return _json(200 if well else 503, {"healthy": well})

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether to send requests here."""
        batcher = service.batcher
        able = batcher is not None and batcher.alive and not batcher.closing
        return _json(200 if able else 503, {"ready": able, **service.identity.to_dict()})

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
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="ebm-guard-image")

    async def predict(self, request: "Request") -> "Response":
        start, metrics = time.perf_counter(), self.service.metrics
        headers = {}
        try:
            status, content = 200, await self._decisions(request)
        except RefusedError as refused:
            metrics.refused(refused.reason)
            status, content = refused.status, {"error": refused.reason, "message": str(refused)}
            if status == 503:
                headers["Retry-After"] = str(self.settings.retry_after)
        except Exception as error:  # noqa: BLE001 - every request gets an answer and a count
            self.service.log("a request failed", error)
            metrics.refused("failed")
            status, content = 500, {"error": "failed", "message": type(error).__name__}
        metrics.answered(status, time.perf_counter() - start)
        return _json(status, content, headers)

    def close(self) -> None:
        """Let the threads that decode images go."""
        self._decoders.shutdown(wait=False)

    async def _decisions(self, request: "Request") -> dict[str, Any]:
        with self.service.require_batcher().ticket() as ticket:
            body = await self._body(request)
            content_type = request.headers.get("content-type", "")
            kind = request.query_params.get("input", "model")

            def submit() -> tuple[int, Future[list[Any]]]:
                inputs = self.service.parser.rows(content_type, body, kind)
                return len(inputs), ticket.submit(inputs)

            loop = asyncio.get_running_loop()
            count, future = await loop.run_in_executor(self._decoders, submit)
            try:
                rows = await asyncio.wrap_future(future)
            except Exception as error:  # noqa: BLE001 - the user's model may raise anything
                rows = self.service.failed(count, error)
            return {"artifact": f"sha256:{self.service.identity.sha256}", "decisions": rows}

    async def _body(self, request: "Request") -> bytes:
        from starlette.requests import ClientDisconnect

        limit = self.settings.max_bytes
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_long(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise _too_long(limit)
        except TimeoutError:
            raise RefusedError(
                "timeout", f"the body did not come within {self.settings.body_timeout:g} seconds"
            ) from None
        except ClientDisconnect:
            raise RefusedError("unreadable", "the client went away before the body came") from None
        return bytes(body)


def _too_long(limit: int) -> RefusedError:
    return RefusedError("too_large", f"the body is longer than {limit:,} bytes; send a smaller one")


def _json(
    status: int, content: dict[str, Any], headers: dict[str, str] | None = None
) -> "Response":
    from fastapi import Response

    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers=headers, media_type="application/json")
