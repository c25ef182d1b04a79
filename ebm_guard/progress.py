"""A progress bar on stderr: rate and time left; silent unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def track(description: str, total: int | None, *, enabled: bool) -> Iterator[Advance]:
    """Show the progress of a loop.

    Args:
        description: what is being done.
        total: rows in all, or None where unknown.
        enabled: False shows nothing.

    Yields:
        A function that is called with the number of rows just done.

    Example:
        >>> with track("reading", 10, enabled=False) as advance:
        ...     advance(10)
    """
    if not enabled:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(TextColumn):
        """Rows per second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f}/s", style="progress.data.speed")

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(""),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(description, total=total)
        yield lambda rows: progress.advance(task, rows)
