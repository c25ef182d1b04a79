"""Requests that come at the same time share a forward pass; one thread runs the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.workers import CallError

# The answers of a batch, one for each row, and what is left to do once they are given.
Result = tuple[list[Any], Callable[[], None]]


@dataclass(frozen=True)
class Job:
    """The rows of one request.

    Args:
        inputs: (B, ...), B >= 1.
        future: gets the list of B answers, or a CallError where the model raised.
        arrived: when, by ``time.monotonic``.
    """

    inputs: Tensor
    future: Future[list[Any]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal for two jobs to share a forward pass."""
        return (self.inputs.shape[1:], self.inputs.dtype)

    def answer(self, answers: list[Any]) -> None:
        """Give the answers, unless the job was given up before."""
        with suppress(InvalidStateError):
            self.future.set_result(answers)

    def fail(self, error: Exception) -> None:
        """Give an error, unless the job was given up before."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Ticket:
    """The right of one request to be answered; see :meth:`Batcher.ticket`."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.used = self.returned = False

    def submit(self, inputs: Tensor) -> Future[list[Any]]:
        """Queue rows, once for each ticket; from any thread."""
        return self._batcher._put(self, Job(inputs))


class Batcher:
    """Take jobs in order, run them in batches on one thread, and give each its own answers.

    A batch that raises is run again job by job, so that one bad request spoils no other. A job
    that is cancelled while it waits is not run.

    Args:
        run: from inputs (B, ...) to B answers, and what is left to do after they are given.
        max_batch: rows of one batch.
        max_delay: seconds that a job waits for others that hold a ticket already.
        capacity: tickets at once.

    Example:
        >>> batcher = Batcher(lambda x: (x.sum(dim=1).tolist(), lambda: None), max_batch=4)
        >>> batcher.start()
        >>> with batcher.ticket() as ticket:
        ...     ticket.submit(torch.ones(2, 3)).result()
        [3.0, 3.0]
        >>> batcher.close()
    """

    def __init__(
        self,
        run: Callable[[Tensor], Result],
        *,
        max_batch: int = 32,
        max_delay: float = 0.005,
        capacity: int = 128,
    ) -> None:
        self.run, self.max_batch, self.max_delay = run, max_batch, max_delay
        self.capacity = capacity
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._began: float | None = None
        self._changed = threading.Condition()
        self._inside = self._coming = 0
        self._closing = False
        self._broken: BaseException | None = None
        # A daemon: a model that hangs must not keep a process alive that was told to die.
        self._thread = threading.Thread(target=self._work, name="ebm-guard-model", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def inside(self) -> int:
        """Requests that hold a ticket."""
        return self._inside

    @property
    def depth(self) -> int:
        """Requests that wait for the model."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive() and self._broken is None

    @property
    def busy_for(self) -> float:
        """Seconds that the batch which runs now has taken; 0 where none runs."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def closing(self) -> bool:
        """Whether no new request is taken."""
        return self._closing

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Hold a place in the server for one request.

        Raises:
            RefusedError: all places are taken, or the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise RefusedError("closing", "the server is shutting down; ask another replica")
            if self._inside >= self.capacity:
                raise RefusedError(
                    "load", f"all {self.capacity} places of the queue are taken; try again later"
                )
            self._inside += 1
            self._coming += 1
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            with self._changed:
                ticket.returned = True
                self._inside -= 1
                self._coming -= not ticket.used
                self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Take no more tickets, answer all that hold one, and stop.

        Args:
            timeout: seconds to wait for the worker; then the jobs that are left are refused, and
                the thread, which cannot be stopped, is left alone. None waits for ever.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.give_up()

    def give_up(self) -> None:
        """Refuse all jobs that wait or run, because the server ends."""
        with self._changed:
            for job in (*self._running, *self._queue):
                job.fail(RefusedError("closing", "the server ended before the model answered"))

    def _put(self, ticket: Ticket, job: Job) -> Future[list[Any]]:
        with self._changed:
            if ticket.returned:
                # The request was given up while its image was decoded.
                job.future.cancel()
                return job.future
            self._coming -= not ticket.used
            ticket.used = True
            if self._broken is None:
                self._queue.append(job)
            else:
                job.fail(_stopped(self._broken))
            self._changed.notify_all()
        return job.future

    def _work(self) -> None:
        try:
            while self._next():
                self._began = time.monotonic()
                self._answer(self._running)
                self._began = None
                # Its inputs would live until the next batch comes.
                self._running = []
        except BaseException as error:  # noqa: BLE001 - even SystemExit must leave nobody waiting
            with self._changed:
                self._broken = error
                self._began = None
                for job in (*self._running, *self._queue):
                    job.fail(_stopped(error))
                self._running = []
                self._queue.clear()

    def _next(self) -> bool:
        """Wait for jobs and take those of the next batch; False when all is done."""
        with self._changed:
            while not self._running:
                if self._queue:
                    self._wait_for_others(self._queue[0].arrived + self.max_delay)
                    taken = [self._queue.popleft() for _ in range(self._fitting())]
                    # A future that runs cannot be cancelled: no answer comes too late for it.
                    self._running = [
                        job
                        for job in taken
                        if not job.future.done() and job.future.set_running_or_notify_cancel()
                    ]
                elif self._closing and not self._coming:
                    return False
                else:
                    self._changed.wait()
            return True

    def _wait_for_others(self, until: float) -> None:
        while self._coming and not self._closing:
            left = until - time.monotonic()
            if left <= 0 or self._is_full():
                return
            self._changed.wait(left)

    def _is_full(self) -> bool:
        count = self._fitting()
        rows = sum(len(self._queue[index].inputs) for index in range(count))
        return rows >= self.max_batch or count < len(self._queue)

    def _fitting(self) -> int:
        """Return how many of the first jobs make one batch, at least one."""
        rows, kind = 0, self._queue[0].kind
        for count, job in enumerate(self._queue):
            rows += len(job.inputs)
            if count and (job.kind != kind or rows > self.max_batch):
                return count
        return len(self._queue)

    def _answer(self, batch: list[Job]) -> None:
        try:
            inputs = torch.cat([job.inputs for job in batch]) if len(batch) > 1 else batch[0].inputs
            answers, rest = self.run(inputs)
        except Exception as error:  # noqa: BLE001 - the model is the user's, and may raise anything
            if len(batch) == 1:
                batch[0].fail(CallError(error))
                return
            for job in batch:
                self._answer([job])
            return
        start = 0
        for job in batch:
            job.answer(answers[start : start + len(job.inputs)])
            start += len(job.inputs)
        rest()


def _stopped(error: BaseException) -> RefusedError:
    return RefusedError(
        "stopped",
        f"the thread that runs the model has stopped ({type(error).__name__}); ask another replica",
    )
