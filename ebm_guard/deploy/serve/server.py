"""Run an application on a port until a signal comes, and let no answer fall on the way out."""

from __future__ import annotations

import asyncio
import faulthandler
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from ebm_guard.deploy.serve.settings import check_seconds, require_extra
from ebm_guard.errors import InvalidInputError, ModelOutputError

if TYPE_CHECKING:
    from fastapi import FastAPI

_BACKLOG = 2048
# Seconds for the end itself, after those for the requests.
_GRACE = 10.0


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
        shutdown_timeout: seconds that requests in the server have to be answered in, >= 0.001. Then
            those that wait for the model are told 503. Where even that is not possible, because the
            model holds Python itself, the process ends 10 seconds later with exit code 1, and says
            on standard error where each thread was.
        started: called with the URL once the port is open.

    Raises:
        InvalidInputError: the address or the timeout cannot be used.
        ModelOutputError: the model does not run on what the guard was fitted on.
    """
    require_extra()
    check_seconds("shutdown_timeout", shutdown_timeout)
    import uvicorn

    class Server(uvicorn.Server):
        """Say when the port is open: not before the model has run once. End in time."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if early:
                self.should_exit = True
            elif self.started:
                started(url)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            give_up = app.state.service.give_up
            asyncio.get_running_loop().call_later(shutdown_timeout, give_up)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            _end_after(shutdown_timeout + _GRACE)

    with _listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            # After the requests were told: what is left then is cancelled.
            timeout_graceful_shutdown=math.ceil(shutdown_timeout) + 1,
        )
        server = Server(config)
        with _quiet_end() as early:
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
def _quiet_end() -> Iterator[list[int]]:
    """Make a signal that asked for the end no error: uvicorn raises it again when it is done.

    Yields those that came before uvicorn looked for them.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    early: list[int] = []
    try:
        before = {
            number: signal.signal(number, lambda number, _: early.append(number))
            for number in numbers
        }
    except ValueError:
        # Not the main thread, which no signal reaches: whoever started it stops it.
        yield early
        return
    try:
        yield early
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_after(seconds: float) -> None:
    """End the process then, from a thread that needs nothing of Python to be well."""
    # Standard error may be closed, or no file.
    if sys.__stderr__ is not None:
        with suppress(OSError, RuntimeError, ValueError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
