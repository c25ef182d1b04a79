"""One row of the registry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """One registered method.

    Args:
        name: the word used in code, command line, JSON and docs.
        family: one of ``ebm_guard.registry.FAMILIES``.
        target: ``module:attribute`` of its code.
        paper: authors, title or venue, year.
        equation: the formula, with the project's symbols.
        needs: what it must be given, such as ``logits`` or ``features``.
        differs: how ours departs from the paper or from common code, or ''.
        default: whether it is used when nothing is asked for.
    """

    name: str
    family: str
    target: str
    paper: str
    equation: str
    needs: tuple[str, ...]
    differs: str = ""
    default: bool = False

    def load(self) -> Any:
        """Import and return the code of this method."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types."""
        return asdict(self) | {"needs": list(self.needs)}
