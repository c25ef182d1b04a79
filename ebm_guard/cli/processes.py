"""Commands in several processes, started by ``torchrun``: each runs its share of the data."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import torch

from ebm_guard.distributed import World, local_device, working_together
from ebm_guard.errors import InvalidInputError, first_line

_SIGNALLED = 128


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Join the processes of this command, or stand alone; only the first one prints.

    Args:
        device: the command's ``--device``.
    """
    own = torch.device("cpu") if device is None else usable_device(device)
    with working_together(own) as world, _ended_cleanly(world):
        if world.first:
            yield world
            return
        with (
            Path(os.devnull).open("w") as nothing,
            redirect_stdout(nothing),
            redirect_stderr(nothing),
        ):
            yield world


@contextmanager
def _ended_cleanly(world: World) -> Iterator[None]:
    """Leave no scratch files when ``torchrun`` ends this process because another one died."""
    if world.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(_SIGNALLED + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def usable_device(name: str) -> torch.device:
    """Return a device of this process that a tensor can be put on.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        device = local_device(torch.device(name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"got --device {name!r}, which cannot be used: {first_line(error)}"
        ) from None
    return device
