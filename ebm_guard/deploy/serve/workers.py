"""Threads for bodies: daemons, because a file that takes hours must not keep the process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from ebm_guard.deploy.serve.refusal import RefusedError


class CallError(Exception):
    """An error of code that is not the server's, such as the model's.

    A future that holds a StopIteration never tells asyncio that it is done, and one that holds a
    CancelledError says that nobody wants it; wrapped, they are errors like any other.

    Args:
        error: what was raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


class Workers:
    """Run calls on a few threads, and wait no longer than is said.

    Args:
        count: threads, >= 1.
        name: of the threads.

    Example:
        >>> workers = Workers(1, "example")
        >>> asyncio.run(workers.run(lambda: 2 + 2, seconds=30))
        4
        >>> workers.close()
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._began: list[float | None] = [None] * count
        for number in range(count):
            threading.Thread(
                target=self._work, args=(number,), name=f"{name}-{number}", daemon=True
            ).start()

    async def run(self, call: Callable[[], Any], *, seconds: float) -> Any:
        """Run a call on the next free thread.

        Args:
            call: what to run. It cannot be stopped: after ``seconds`` nobody waits for it.
            seconds: for waiting and running together.

        Raises:
            RefusedError: no thread was free in time, the call took longer, or it raised this.
            CallError: the call raised something else.
        """
        future: Future[Any] = Future()
        self._calls.put((future, call))
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.running():
                raise RefusedError(
                    "too_large",
                    f"the body was not decoded within {seconds:g} seconds; send a smaller image",
                ) from None
            raise RefusedError(
                "load", "all threads that decode are busy; try again later"
            ) from None

    def stuck(self, seconds: float) -> bool:
        """Say whether each thread has been at one call for longer than this."""
        now = time.monotonic()
        return all(began is not None and now - began > seconds for began in self._began)

    def close(self) -> None:
        """Let each thread go when it is free."""
        for _ in self._began:
            self._calls.put(None)

    def _work(self, number: int) -> None:
        while (task := self._calls.get()) is not None:
            self._began[number] = time.monotonic()
            _settle(*task)
            self._began[number] = None
            # Or it, and the body that belongs to it, would live until the next one comes.
            del task


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except RefusedError as refused:
        future.set_exception(refused)
    except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for an answer
        future.set_exception(CallError(error))
    else:
        future.set_result(result)
