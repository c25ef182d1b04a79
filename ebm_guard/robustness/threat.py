"""What the attacker may change: a norm, and budgets in pixel units of [0, 1]."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from ebm_guard.attacks.geometry import NORMS, ball_of
from ebm_guard.errors import EbmGuardWarning, InvalidInputError

# Below this an 8-bit image does not change; above it a grey image can be anything.
_SMALLEST, _LARGEST = 1 / 1020, 0.5
_NUMBER = re.compile(r"\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Epsilon:
    """One budget.

    Args:
        value: in pixel units of [0, 1], > 0.
        text: as people write it, such as ``8/255``.
    """

    value: float
    text: str


@dataclass(frozen=True)
class Threat:
    """A norm with its budgets, smallest first.

    Args:
        norm: ``linf`` or ``l2``.
        epsilons: budgets, ascending.
        reference: the budget that the verdict speaks of, one of ``epsilons``.
    """

    norm: str
    epsilons: tuple[Epsilon, ...]
    reference: Epsilon

    @classmethod
    def of(cls, norm: str, texts: Iterable[str], reference: str | None = None) -> Threat:
        """Build from budgets as text.

        Args:
            norm: ``linf`` or ``l2``.
            texts: such as ``8/255``, ``0.3``.
            reference: one of them; default: the largest.

        Raises:
            InvalidInputError: unknown norm, no budget, or one that is not a number > 0.

        Example:
            >>> Threat.of("linf", ["8/255", "1/255"]).reference.text
            '8/255'
        """
        ball_of(norm)
        found = {item.value: item for item in (parse_epsilon(text, norm) for text in texts)}
        if not found:
            raise InvalidInputError("got no epsilon; give at least one, such as 8/255")
        for epsilon in found.values():
            _warn_odd(epsilon, norm)
        ordered = tuple(found[value] for value in sorted(found))
        chosen = ordered[-1] if reference is None else parse_epsilon(reference, norm)
        if chosen.value not in found:
            raise InvalidInputError(f"got reference {reference!r}, which is none of the epsilons")
        return cls(norm, ordered, found[chosen.value])


def parse_epsilon(text: str, norm: str = "linf") -> Epsilon:
    """Read a budget: ``8/255``, or a number in [0, 1] pixel units.

    ``8`` alone is refused for linf: no pixel can change by more than 1.

    Raises:
        InvalidInputError: not a number > 0, or one above 1 for linf.

    Example:
        >>> parse_epsilon("8/255").value
        0.03137254901960784
    """
    text = text.strip()
    above, slash, below = text.partition("/")
    parts = (above, below) if slash else (above,)
    if not all(_NUMBER.fullmatch(part.strip()) for part in parts) or (slash and not float(below)):
        raise InvalidInputError(
            f"got epsilon {text!r}; needed a number such as 0.3, or a fraction such as 8/255"
        )
    value = float(Fraction(above.strip())) / (float(Fraction(below.strip())) if slash else 1.0)
    if not 0 < value < float("inf"):
        raise InvalidInputError(f"got epsilon {text!r}; needed a number > 0 in pixel units")
    if norm == "linf" and value > 1:
        raise InvalidInputError(
            f"got epsilon {text!r} for linf; pixels are in [0, 1], so write {text}/255 for {text} "
            "of 255 grey values"
        )
    return Epsilon(value, text)


def default_threats(channels: int, *, with_l2: bool) -> tuple[Threat, ...]:
    """Return the budgets of the literature: of 255 for colour images, tenths for grey ones.

    Grey images of digits and the like are attacked with far larger budgets (Madry et al. 2018).

    Example:
        >>> [epsilon.text for epsilon in default_threats(3, with_l2=False)[0].epsilons]
        ['0.5/255', '1/255', '2/255', '4/255', '8/255']
    """
    if channels == 1:
        linf = Threat.of("linf", ["0.05", "0.1", "0.15", "0.2", "0.3"])
        l2 = Threat.of("l2", ["0.5", "1", "2"])
    else:
        linf = Threat.of("linf", ["0.5/255", "1/255", "2/255", "4/255", "8/255"])
        l2 = Threat.of("l2", ["0.25", "0.5", "1"])
    return (linf, l2) if with_l2 else (linf,)


def _warn_odd(epsilon: Epsilon, norm: str) -> None:
    if norm == NORMS[0] and epsilon.value > _LARGEST:
        message = "a grey image lies within it, so no classifier can withstand it"
    elif norm == NORMS[0] and epsilon.value < _SMALLEST:
        message = "an image of 8 bits does not change by so little"
    else:
        return
    warnings.warn(f"epsilon {epsilon.text}: {message}", EbmGuardWarning, stacklevel=4)
