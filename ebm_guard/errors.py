"""Errors and warnings that say what came, what is needed and what to do.

Every error carries the exit code that the command line returns for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class EbmGuardError(Exception):
    """Base of every error that ebm_guard raises on purpose."""

    exit_code: ClassVar[int] = 3


class InvalidInputError(EbmGuardError, ValueError):
    """An argument has the wrong type, shape or range."""

    exit_code = 2


class UnsupportedModelError(EbmGuardError):
    """The model does not give logits that can be read as energies."""

    exit_code = 4


class ModelOutputError(EbmGuardError):
    """A live model returned something that it must not, such as NaN logits."""

    exit_code = 4


class NotFittedError(EbmGuardError):
    """A guard, calibrator or threshold is used before it was fitted."""

    exit_code = 2


class ArtifactError(EbmGuardError):
    """A saved guard is damaged, was edited, or belongs to another model."""


class DataError(EbmGuardError):
    """A data source is missing, unreadable, or holds impossible values."""


class TooFewRowsError(InvalidInputError):
    """Too few calibration rows for what a threshold is asked to promise."""


class ProcessError(EbmGuardError):
    """Another process of the same run failed, or is gone."""


class EbmGuardWarning(UserWarning):
    """Something works, but the user should know about it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none.

    Example:
        >>> first_line(EOFError())
        'EOFError'
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' for names close to ``name``, or ''.

    Example:
        >>> suggest("enrgy", ["energy", "msp"])
        " (did you mean 'energy'?)"
    """
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(item) for item in near)}?)" if near else ""
