"""Run an application on a port until a signal comes, and let no answer fall on the way out."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ebm_guard.deploy.serve.settings import require_extra
from ebm_guard.errors import InvalidInputError, ModelOutputError

if TYPE_CHECKING:
    from fastapi import FastAPI

_BACKLOG = 2048


def run_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    shutdown_timeout: float = 30.0,
    started: Callable[[str], Any] = lambda _: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no new connection and answer what came.

    Args:
        app: made by :func:`~ebm_guard.deploy.serve.make_app`.
        host: address to listen on; 127.0.0.1 is this machine only.
        port: 0 takes a free one.
        shutdown_timeout: seconds that requests in the server have to be answered in.
        started: called with the URL once the port is open.

    Raises:
        InvalidInputError: the address cannot be used.
        ModelOutputError: the model does not run on what the guard was fitted on.
    """
    require_extra()
    import uvicorn

    class Server(uvicorn.Server):
        """Say when the port is open: not before the model has run once."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started(url)

    with _listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
        )
        server = Server(config)
        with _quiet_end():
            server.run([listener])
    if not server.started:
        raise ModelOutputError(
            "the server did not start, because the model failed on the inputs that the guard was "
            "fitted on; the error is above"
        )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol left open, asyncio does not switch Nagle's algorithm off, and each answer
    # waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InvalidInputError(
                f"cannot listen on {host} port {port}: {error}. Choose another --port, or 0 for a "
                "free one"
            ) from None
        listener.listen(_BACKLOG)
        yield listener


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Make a signal that asked for the end no error: uvicorn raises it again when it is done."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    except ValueError:
        # Not the main thread, which no signal reaches: whoever started it stops it.
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
