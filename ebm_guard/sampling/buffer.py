"""The memory of persistent chains: where they stopped, so that they go on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.sampling.checks import check_choice, check_number, check_whole
from ebm_guard.sampling.starts import Start, UniformStart, check_shape, start_from_state

DTYPES = {"uint8": torch.uint8, "float16": torch.float16}


@dataclass(frozen=True)
class Drawn:
    """Chains taken out of a buffer.

    Args:
        points: (B, *shape) float32 in [0, 1].
        slots: (B,) int64, where they go back to; no slot twice.
        labels: (B,) int64 classes of the chains, or None for a buffer without classes.
        fresh: (B,) bool, whether the chain starts anew.
    """

    points: Tensor
    slots: Tensor
    labels: Tensor | None
    fresh: Tensor

    def __len__(self) -> int:
        return len(self.slots)


class ReplayBuffer:
    """Keep where chains are, by class where wanted; a share of them starts anew at each draw.

    A draw holds no slot twice, so no chain's work is thrown away. Empty slots start anew when they
    are first drawn: nothing is drawn in advance. All random numbers come from a generator of the
    buffer's own, whose state is a part of :meth:`state_dict`. Several processes have a buffer
    each, apart by ``rank``.

    As uint8, points are rounded at random to one of the two neighbouring levels, so that what is
    kept is right on average: SGLD's noise is about one level, and rounding to the nearest would
    undo small steps for good.

    Args:
        shape: of one point, such as (C, H, W).
        capacity: chains, rounded up to a multiple of the classes; default: 10,000, or as many as
            fit into ``max_bytes``.
        max_bytes: bound on the memory of the points; default: 256 MiB where no capacity is given.
        num_classes: keep the chains of each class apart, or None.
        dtype: ``uint8`` or ``float16``.
        start: where fresh chains start; default: uniform noise.
        reinit_prob: probability that a drawn chain starts anew.
        seed: of the random numbers, >= 0.
        rank: of this process.
        device: where the points are kept and drawn.

    Raises:
        InvalidInputError: a setting is out of range, or ``max_bytes`` holds no chain of each class.

    References:
        Du and Mordatch, Implicit Generation and Modeling with Energy-Based Models, NeurIPS 2019,
        section 3.2; Grathwohl et al., ICLR 2020, appendix A. Their code may draw a slot twice and
        keeps float32.

    Example:
        >>> buffer = ReplayBuffer((1, 4, 4), capacity=100)
        >>> drawn = buffer.draw(8)
        >>> buffer.store(drawn.slots, drawn.points)
        >>> len(buffer)
        8
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        capacity: int | None = None,
        max_bytes: int | None = None,
        num_classes: int | None = None,
        dtype: str = "uint8",
        start: Start | None = None,
        reinit_prob: float = 0.05,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = check_shape(shape)
        self.dtype = check_choice("dtype", dtype, tuple(DTYPES))
        self.reinit_prob = check_number("reinit_prob", reinit_prob, high=1.0)
        self.num_classes = _optional("num_classes", num_classes)
        self.seed, self.rank = check_whole("seed", seed), check_whole("rank", rank)
        self.start: Start = UniformStart(self.shape) if start is None else start
        if self.start.shape != self.shape:
            raise InvalidInputError(
                f"got a start of shape {self.start.shape} (an unfitted one has none) for a buffer "
                f"of shape {self.shape}"
            )
        self.per_class = self._slots_per_class(
            _optional("capacity", capacity), _optional("max_bytes", max_bytes)
        )
        self.device = torch.device(device)
        self._points = torch.zeros(
            self.capacity, *self.shape, dtype=DTYPES[dtype], device=self.device
        )
        self._filled = torch.zeros(self.capacity, dtype=torch.bool, device=self.device)
        self._attempt = 0
        self._generator = self._seeded()

    def _slots_per_class(self, capacity: int | None, max_bytes: int | None) -> int:
        classes = self.num_classes or 1
        each = int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize
        if capacity is None and max_bytes is None:
            max_bytes = 2**28
        wanted = 10_000 if capacity is None else capacity
        slots = -(-wanted // classes)
        if max_bytes is not None:
            slots = min(slots, max_bytes // (each * classes))
        if slots < 1:
            raise InvalidInputError(
                f"got max_bytes={max_bytes}; one chain of each of {classes} classes takes "
                f"{each * classes} bytes"
            )
        return slots

    def _seeded(self) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, self.rank, self._attempt]).generate_state(2)
        seed = (int(state[0]) << 32 | int(state[1])) & (2**63 - 1)
        return torch.Generator(device=self.device).manual_seed(seed)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.per_class * (self.num_classes or 1)

    @property
    def nbytes(self) -> int:
        """Bytes that the points take."""
        return self._points.numel() * self._points.element_size()

    def __len__(self) -> int:
        """Return the number of slots that hold a chain."""
        return int(self._filled.sum())

    def draw(self, n: int, labels: Tensor | None = None) -> Drawn:
        """Take chains out, to be stored again after they have moved.

        Args:
            n: chains, at most the slots there are (of a class).
            labels: (n,) int64 classes wanted; default: drawn at random. Only for a buffer with
                classes.

        Raises:
            InvalidInputError: more chains of a class than slots, or labels that do not fit.
        """
        wanted = self._wanted_labels(n, labels)
        slots = self._choose(n, wanted)
        lottery = torch.rand(n, generator=self._generator, device=self.device) < self.reinit_prob
        fresh = lottery | ~self._filled[slots]
        points = self._points[slots].float()
        if self.dtype == "uint8":
            points /= 255
        count = int(fresh.sum())
        if count:
            which = count if wanted is None else wanted[fresh]
            points[fresh] = self.start.draw(which, self._generator).to(points)
        return Drawn(points, slots, wanted, fresh)

    def _wanted_labels(self, n: int, labels: Tensor | None) -> Tensor | None:
        check_whole("n", n, 1)
        if self.num_classes is None:
            if labels is not None:
                raise InvalidInputError("got labels; this buffer was made without num_classes")
            return None
        if labels is None:
            size = self.num_classes
            return torch.randint(size, (n,), generator=self._generator, device=self.device)
        if labels.shape != (n,) or labels.is_floating_point():
            raise InvalidInputError(
                f"got labels {tuple(labels.shape)} {labels.dtype}; needed {n} whole numbers"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise InvalidInputError(
                f"got labels {int(labels.min())}..{int(labels.max())}; this buffer has the "
                f"classes 0..{self.num_classes - 1}"
            )
        return labels.to(self.device, torch.int64)

    def _choose(self, n: int, labels: Tensor | None) -> Tensor:
        """Choose slots at random, none twice; slot s belongs to class s // per_class."""
        need = n if labels is None else int(torch.bincount(labels).max())
        if need > self.per_class:
            per = "" if labels is None else " of one class"
            raise InvalidInputError(
                f"got {need} chains{per} to draw from {self.per_class} slots{per}; raise capacity "
                f"to at least {need * (self.num_classes or 1)}, or draw fewer"
            )
        if labels is None:
            return self._order()[:n]
        slots = torch.empty_like(labels)
        for label in sorted(set(labels.tolist())):
            mine = labels == label
            slots[mine] = label * self.per_class + self._order()[: int(mine.sum())]
        return slots

    def _order(self) -> Tensor:
        return torch.randperm(self.per_class, generator=self._generator, device=self.device)

    def store(self, slots: Tensor, points: Tensor) -> None:
        """Put chains back.

        Args:
            slots: (B,) as drawn.
            points: (B, *shape) in [0, 1].

        Raises:
            InvalidInputError: shapes that do not fit, a slot twice, or values outside [0, 1].
        """
        if tuple(points.shape) != (len(slots), *self.shape):
            raise InvalidInputError(
                f"got points {tuple(points.shape)} for {len(slots)} slots; needed "
                f"{(len(slots), *self.shape)}"
            )
        slots = slots.to(self.device)
        if len(set(slots.tolist())) != len(slots):
            raise InvalidInputError("got a slot twice; one of the two chains would be lost")
        if not len(slots):
            return
        values = points.detach().to(self.device, torch.float32)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise InvalidInputError(
                "got points outside [0, 1], or not finite; run the sampler with box=(0, 1)"
            )
        if self.dtype == "uint8":
            level = torch.rand(values.shape, generator=self._generator, device=self.device)
            values = level.add_(values, alpha=255).floor_().clamp_(max=255)
        self._points[slots] = values.to(self._points.dtype)
        self._filled[slots] = True

    def reseed(self, attempt: int | None = None) -> None:
        """Let all chains start anew, with other random numbers: after a rollback.

        Args:
            attempt: number of the attempt, which the numbers hang on; default: one more.
        """
        self._attempt = self._attempt + 1 if attempt is None else int(attempt)
        self._filled.zero_()
        self._points.zero_()
        self._generator = self._seeded()

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "shape": list(self.shape),
            "capacity": self.capacity,
            "num_classes": self.num_classes,
            "dtype": self.dtype,
            "start": self.start.settings(),
            "reinit_prob": self.reinit_prob,
            "seed": self.seed,
            "rank": self.rank,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return chains, generator and start: tensors and JSON types."""
        return {
            "settings": self.settings(),
            "points": self._points.clone(),
            "filled": self._filled.clone(),
            "generator": self._generator.get_state(),
            "attempt": self._attempt,
            "start": self.start.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; the next draw is bit-equal.

        Raises:
            DataError: the state is that of another buffer; says what differs.
        """
        mine, theirs = self._identity(self.settings()), self._identity(state.get("settings", {}))
        if differs := [key for key in mine if mine[key] != theirs.get(key)]:
            raise DataError(
                "the state is of another buffer: "
                + ", ".join(f"{key} {theirs.get(key)!r}, here {mine[key]!r}" for key in differs)
            )
        self._points.copy_(state["points"])
        self._filled.copy_(state["filled"])
        self._generator.set_state(state["generator"].cpu())
        self._attempt = int(state["attempt"])
        self.start.load_state_dict(state["start"])

    @staticmethod
    def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out what the state itself brings: the figures of a fitted start."""
        return {**settings, "start": settings.get("start", {}).get("start")}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> ReplayBuffer:
        """Build a buffer, with its start, from what :meth:`state_dict` gave.

        Example:
            >>> buffer = ReplayBuffer((1, 4, 4), capacity=10)
            >>> again = ReplayBuffer.from_state(buffer.state_dict())
            >>> torch.equal(again.draw(3).points, buffer.draw(3).points)
            True
        """
        settings = dict(state["settings"])
        shape = settings.pop("shape")
        start = start_from_state(settings.pop("start"), shape, state["start"])
        buffer = cls(shape, start=start, device=device, **settings)
        buffer.load_state_dict(state)
        return buffer


def _optional(name: str, value: int | None) -> int | None:
    return None if value is None else check_whole(name, value, 1)
