"""Run a module in eval mode without leaving a trace, also under concurrent calls."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from ebm_guard.errors import EbmGuardWarning


class _Switch:
    """Which modules are switched right now, for the whole process.

    One lock for all models: a model and a wrapper around it share their parts. ``generation`` is
    odd while flags are switched.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self.parts: frozenset[nn.Module] = frozenset()


_switch = _Switch()
_warned: WeakSet[nn.Module] = WeakSet()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode for one forward pass, and restore every flag after it.

    A module already in eval mode is neither locked nor touched. A module with any part in train
    mode is locked for the whole pass, so concurrent calls take turns; a call that finds eval
    flags only because another call has switched them waits as well (the generation counter and
    the set of switched parts tell the two apart). The first such call warns that ``model.eval()``
    allows concurrent use.

    Args:
        module: the user's model.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluation_mode(model.eval()):
        ...     model.training
        False
    """
    before, switched = _switch.generation, _switch.parts
    parts = list(module.modules())
    training = any(part.training for part in parts)
    crossing = before % 2 == 1 and not switched.isdisjoint(parts)
    if not training and not crossing and _switch.generation == before:
        yield
        return
    with _switch.lock:
        flags = [(part, part.training) for part in parts]
        # Re-entrant: a model that calls a guard on a part of itself is switched already.
        if _switch.generation % 2 == 1 or not any(flag for _, flag in flags):
            yield
            return
        _warn_once(module)
        _switch.parts = frozenset(parts)
        _switch.generation += 1
        try:
            for part, _ in flags:
                part.training = False
            yield
        finally:
            for part, flag in flags:
                part.training = flag
            _switch.generation += 1
            _switch.parts = frozenset()


def _warn_once(module: nn.Module) -> None:
    if module not in _warned:
        _warned.add(module)
        warnings.warn(
            "the model is in train mode; each call switches it to eval mode, holds a lock, and "
            "restores it. Call model.eval() once to allow concurrent calls",
            EbmGuardWarning,
            stacklevel=6,
        )
