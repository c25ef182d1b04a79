"""What an evaluation of robustness is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ebm_guard.attacks.geometry import ball_of
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.robustness.corruptions import BUILTIN, IMAGECORRUPTIONS
from ebm_guard.robustness.purify import Purification
from ebm_guard.robustness.threat import Threat

CORRUPTION_SETS: dict[str, tuple[str, ...]] = {
    "builtin": BUILTIN,
    "imagecorruptions": IMAGECORRUPTIONS,
    "none": (),
}


@dataclass(frozen=True)
class AttackOptions:
    """Choices of an evaluation.

    Args:
        preset: ``quick``, ``standard`` or ``full``.
        threats: norms with their budgets; default: those of the literature for the images' size.
        norm: only this one of the default norms.
        images: attacked images, at most; default: the preset's.
        time_budget: seconds; fewer images are attacked, and what does not fit is not run.
        seed: of the draw of the images and of all random numbers.
        batch_size: images per forward pass.
        attackers: further attacks, run last: callables ``attack(model, x, y, epsilon) -> x_adv``
            by name; see :func:`ebm_guard.attacks.foreign.judge_callable`.
        state: folder that keeps the results of finished stages, or None.
        resume: go on from what the folder holds.
        corruptions: ``builtin``, ``imagecorruptions`` (the extra ``corruptions``) or ``none``.
        purify: also attack the classifier with this SGLD-refined inference, or None.
    """

    preset: str = "quick"
    threats: tuple[Threat, ...] | None = None
    norm: str | None = None
    images: int | None = None
    time_budget: float | None = None
    seed: int = 0
    batch_size: int = 64
    attackers: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    state: Path | None = None
    resume: bool = False
    corruptions: str = "builtin"
    purify: Purification | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.time_budget is not None and not 0 < self.time_budget < float("inf"):
            raise InvalidInputError(
                f"got a time budget of {self.time_budget!r}; needed seconds > 0"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidInputError(f"got seed {self.seed!r}; needed a whole number >= 0")
        if self.norm is not None:
            ball_of(self.norm)
        if self.images is not None and self.images < 1:
            raise InvalidInputError(f"got {self.images} images to attack; needed at least 1")
        if self.corruptions not in CORRUPTION_SETS:
            raise InvalidInputError(
                f"got corruptions {self.corruptions!r}; known are {', '.join(CORRUPTION_SETS)}"
                f"{suggest(self.corruptions, CORRUPTION_SETS)}"
            )
        if self.resume and self.state is None:
            raise InvalidInputError("got resume=True without a state folder; give state=")


@dataclass(frozen=True)
class Images:
    """The images that an evaluation may use.

    Args:
        pixels: (N, C, H, W) in [0, 1], at the model's input size.
        labels: (N,) int64, or None: then the predicted classes stand for them.
        ids: (N,) int64, their numbers in the set they come from; default: 0, 1, ...
        of: images in that set; default: N.
    """

    pixels: Tensor
    labels: Tensor | None = None
    ids: Tensor | None = None
    of: int | None = None
