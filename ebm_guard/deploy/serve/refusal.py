"""Why a request gets no decision: a status code, a word for the counters, and what to do."""

from __future__ import annotations

# The words of the counter `ebm_guard_refused_total`, each with its HTTP status.
STATUS = {
    "unreadable": 400,
    "timeout": 408,
    "too_large": 413,
    "unsupported": 415,
    "failed": 500,
    "load": 503,
    "closing": 503,
    "stopped": 503,
}


class RefusedError(Exception):
    """A request that is answered without a decision.

    Args:
        reason: a key of ``STATUS``.
        message: what came, what is needed, what to do.

    Example:
        >>> RefusedError("load", "the queue is full; try again").status
        503
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.reason]
