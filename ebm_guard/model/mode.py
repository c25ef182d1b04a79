"""Run a module in eval mode without leaving a trace, also under concurrent calls."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from ebm_guard.errors import EbmGuardWarning
from ebm_guard.model.wrappers import is_exported


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
    allows concurrent use. Exported programs and frozen TorchScript keep the mode they were made in.

    Args:
        module: the user's model.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluation_mode(model.eval()):
        ...     model.training
        False
    """
    before, switched = _switch.generation, _switch.parts
    parts = _with_modes(module)
    training = any(part.training for part in parts)
    crossing = before % 2 == 1 and not switched.isdisjoint(parts)
    if not training and not crossing and _switch.generation == before:
        yield
        return
    with _switch.lock:
        flags = [(part, part.training) for part in parts]
        if not any(flag for _, flag in flags):
            yield
            return
        _warn_once(module)
        # Re-entrant: a model may call a guard around another one, and both stay switched.
        outer = _switch.parts
        _switch.parts = outer.union(parts)
        _switch.generation += not outer
        try:
            for part, _ in flags:
                part.training = False
            yield
        finally:
            for part, flag in flags:
                part.training = flag
            _switch.generation += not outer
            _switch.parts = outer


def _with_modes(module: nn.Module) -> list[nn.Module]:
    """List the parts whose ``training`` flag means something."""
    # A frozen TorchScript module has no flag; an exported program's mode is a part of its graph.
    parts = [part for part in module.modules() if hasattr(part, "training")]
    fixed = {inner for part in parts if is_exported(part) for inner in part.modules()}
    return [part for part in parts if part not in fixed] if fixed else parts


def _warn_once(module: nn.Module) -> None:
    if module not in _warned:
        _warned.add(module)
        warnings.warn(
            "the model is in train mode; each call switches it to eval mode, holds a lock, and "
            "restores it. Call model.eval() once to allow concurrent calls",
            EbmGuardWarning,
            stacklevel=6,
        )
