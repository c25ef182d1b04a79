"""Run a module in eval mode without leaving a trace, also under concurrent calls."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from ebm_guard.errors import EbmGuardWarning


class _Switch:
    """The lock of one module, and a counter that is odd while its flags are switched."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self.warned = False


_switches: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()
_switches_lock = threading.Lock()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode for one forward pass, and restore every flag after it.

    A module already in eval mode is neither locked nor touched. A module with any part in train
    mode is locked for the whole pass, so concurrent calls take turns; a call that finds eval
    flags only because another call has switched them waits as well (the generation counter tells
    the two apart). The first such call warns that ``model.eval()`` allows concurrent use.

    Args:
        module: the user's model.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluation_mode(model.eval()):
        ...     model.training
        False
    """
    switch = _switch_of(module)
    before = switch.generation
    training = any(part.training for part in module.modules())
    if not training and before % 2 == 0 and switch.generation == before:
        yield
        return
    with switch.lock:
        flags = [(part, part.training) for part in module.modules()]
        if not any(flag for _, flag in flags):
            yield
            return
        _warn_once(switch)
        switch.generation += 1
        try:
            for part, _ in flags:
                part.training = False
            yield
        finally:
            for part, flag in flags:
                part.training = flag
            switch.generation += 1


def _switch_of(module: nn.Module) -> _Switch:
    switch = _switches.get(module)
    if switch is None:
        with _switches_lock:
            switch = _switches.setdefault(module, _Switch())
    return switch


def _warn_once(switch: _Switch) -> None:
    if not switch.warned:
        switch.warned = True
        warnings.warn(
            "the model is in train mode; each call switches it to eval mode, holds a lock, and "
            "restores it. Call model.eval() once to allow concurrent calls",
            EbmGuardWarning,
            stacklevel=6,
        )
