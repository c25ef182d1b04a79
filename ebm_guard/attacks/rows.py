"""What attacks pass around, row by row: images, answers, states and outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True)
class Examples:
    """Images under attack.

    Args:
        pixels: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64, the true classes (or, where there are none, the predicted ones).
        ids: (N,) int64 >= 0, the number of each image in its set: random numbers hang on it.
        targets: (N,) int64, the classes a targeted attack aims at, or None.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    targets: Tensor | None = None

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor, ids: Tensor | None = None) -> Examples:
        """Check and build.

        Raises:
            InvalidInputError: shapes, dtypes or the range of the pixels.

        Example:
            >>> len(Examples.of(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])))
            2
        """
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
            raise InvalidInputError(
                "attacks need a floating tensor of pixels (N, C, H, W) in [0, 1], got "
                f"{getattr(pixels, 'dtype', type(pixels).__name__)} of shape "
                f"{tuple(getattr(pixels, 'shape', ()))}; divide uint8 images by 255"
            )
        if not len(pixels):
            raise InvalidInputError("got no images to attack; needed at least one")
        low, high = float(pixels.min()), float(pixels.max())
        # Written so that NaN is refused as well.
        if not (low >= 0 and high <= 1):
            raise InvalidInputError(
                f"got pixels in [{low:.4g}, {high:.4g}]; needed [0, 1]. {_guess(low, high)}"
            )
        ids = torch.arange(len(pixels)) if ids is None else ids
        for name, values in (("labels", labels), ("ids", ids)):
            _check_numbers(name, values, len(pixels))
        return cls(pixels.detach().float().contiguous(), labels, ids)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | slice) -> Examples:
        """Return these rows (a boolean mask, numbers, or a slice)."""
        return selected(self, rows)


@dataclass(frozen=True)
class Answer:
    """What the model said about some images.

    Args:
        objective: (B,) what the attacker climbs.
        success: (B,) bool, whether the attacker has what they want.
        logits: (B, C).
        gradient: (B, C, H, W) of the objective with respect to the pixels, or None.
    """

    objective: Tensor
    success: Tensor
    logits: Tensor
    gradient: Tensor | None = None

    def select(self, rows: Tensor | slice) -> Answer:
        """Return these rows."""
        return selected(self, rows)


@dataclass(frozen=True)
class Outcome:
    """What an attack found.

    Args:
        pixels: (N, C, H, W) the image of each row that the verdict is about.
        success: (N,) bool.
        objective: (N,) at these images.
        step: (N,) int64, the step they were found at; 0 is the start.
        gradients: (N,) int64, gradients that each image cost.
        forwards: (N,) int64, forward passes that each image cost.
        zero_gradients: (N,) int64, steps whose gradient was zero everywhere.
    """

    pixels: Tensor
    success: Tensor
    objective: Tensor
    step: Tensor
    gradients: Tensor
    forwards: Tensor
    zero_gradients: Tensor

    def select(self, rows: Tensor | slice) -> Outcome:
        """Return these rows."""
        return selected(self, rows)

    def with_rows(self, rows: Tensor, found: Outcome) -> Outcome:
        """Return this outcome with some rows attacked once more; costs add up."""
        parts: dict[str, Tensor] = {}
        for item in fields(self):
            own, new = getattr(self, item.name).clone(), getattr(found, item.name)
            where = rows.to(own.device)
            own[where] = own[where] + new if item.name in _COSTS else new
            parts[item.name] = own
        return Outcome(**parts)

    @staticmethod
    def concatenate(parts: Sequence[Outcome]) -> Outcome:
        """Join the outcomes of several groups of rows."""
        return joined(parts)


_COSTS = ("gradients", "forwards", "zero_gradients")


@dataclass(frozen=True)
class State:
    """What a rule remembers of each image; rules extend it with further (B, ...) tensors.

    Args:
        pixels: (B, C, H, W) the images to ask about next.
    """

    pixels: Tensor

    def select(self, rows: Tensor) -> State:
        """Return these rows; lists of generators are selected too."""
        return selected(self, rows)


def selected(record: R, rows: Tensor | slice) -> R:
    """Select rows of every tensor or list of a record."""
    found: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            # Masks may lie on a GPU beside counts that lie on the CPU.
            where = rows.to(value.device) if isinstance(rows, Tensor) else rows
            found[item.name] = value[where]
        elif isinstance(value, list):
            mask = torch.arange(len(value))[rows.cpu() if isinstance(rows, Tensor) else rows]
            found[item.name] = [value[int(number)] for number in mask]
    return replace(record, **found)


def joined(parts: Sequence[R]) -> R:
    """Join records of the same kind, tensor by tensor."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    values = {item.name: [getattr(part, item.name) for part in parts] for item in fields(first)}
    return replace(
        first,
        **{name: torch.cat(rows) for name, rows in values.items() if isinstance(rows[0], Tensor)},
    )


def usable(record: R) -> R:
    """Clone tensors made under ``torch.inference_mode()``, which autograd refuses to save."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return replace(
        record,
        **{
            name: value.clone()
            for name, value in values.items()
            if isinstance(value, Tensor) and value.is_inference()
        },
    )


def _check_numbers(name: str, values: Any, n: int) -> None:
    shape, dtype = tuple(getattr(values, "shape", ())), getattr(values, "dtype", None)
    if not isinstance(values, Tensor) or shape != (n,) or dtype != torch.int64 or values.min() < 0:
        raise InvalidInputError(
            f"got {name} {type(values).__name__} {shape} {dtype} for {n} images; needed a tensor "
            "(N,) int64 >= 0, one number for each image"
        )


def _guess(low: float, high: float) -> str:
    if low < -0.1:
        return "They look normalised already: undo the normalisation, the attack applies its own"
    if high > 1.5:
        return "They look like 0..255: divide by 255"
    return "Clamp them to [0, 1], and look for NaN"
