"""What a net is looked at on: rows of its own for choosing, for accepting, and for the new guard.

Checkpoints are chosen and temperatures fitted on the selection rows; the acceptance rows are used
once, at the end; the refit rows make the new guard. Outliers are made from these rows once, of
kinds that the negatives do not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.calibration.calibrators.base import rows_of
from ebm_guard.calibration.calibrators.temperature import BestTemperature, best_temperature
from ebm_guard.calibration.metrics import ece
from ebm_guard.calibration.rows import row_statistics
from ebm_guard.data.outliers import GUARD_KINDS
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate.choice import made_outliers
from ebm_guard.intervals import Metric
from ebm_guard.model.isolation import Forward
from ebm_guard.ood.metrics import auroc
from ebm_guard.training.image_stores import Rows
from ebm_guard.training.images import TrainingImages
from ebm_guard.training.temperatures import CONVERGED, STATUSES

Array = NDArray[np.float64]
_CHUNK = 128
# Of every four validation rows: one for selection, two for acceptance, one for the new guard.
_DEAL = ("acceptance", "selection", "acceptance", "refit")


@dataclass(frozen=True)
class ValidationParts:
    """The validation rows, dealt out.

    Args:
        selection: checkpoints are chosen and temperatures fitted on them.
        acceptance: the acceptance test's, used for nothing else.
        refit: the new guard's.
        rows: row numbers in the validation set, by part.
    """

    selection: TrainingImages
    acceptance: TrainingImages
    refit: TrainingImages
    rows: Mapping[str, Rows]

    def sizes(self) -> dict[str, int]:
        """Return the number of rows by part."""
        return {name: len(part) for name, part in self.rows.items()}


def split_validation(images: TrainingImages, seed: int = 0) -> ValidationParts:
    """Deal validation rows out: a quarter to choose on, half to accept on, a quarter for the guard.

    Every class is dealt out evenly. An image that occurs twice counts once, so that no part holds
    an image of another.

    Args:
        images: labelled.
        seed: of the deal's own generator.

    Raises:
        DataError: fewer than 8 different images, or no labels.

    Example:
        >>> pixels = torch.arange(40.0)[:, None, None, None] / 40
        >>> parts = split_validation(TrainingImages(pixels, torch.arange(40) % 2))
        >>> parts.sizes()
        {'selection': 10, 'acceptance': 20, 'refit': 10}
    """
    if images.labels is None:
        raise DataError(f"{images.source} has no labels; validation rows need them")
    _, unique = np.unique(images.hashes(), return_index=True)
    rows = np.sort(unique).astype(np.int64)
    if len(rows) < 8:
        raise DataError(
            f"got {len(rows)} different validation images from {images.source}; needed at least "
            "8, and some hundreds for a useful test"
        )
    order = rows[np.random.default_rng([seed, 23]).permutation(len(rows))]
    # A stable sort of a random order, dealt out in turn, balances every class.
    order = order[np.argsort(images.labels.numpy()[order], kind="stable")]
    turns = np.array(_DEAL)[np.arange(len(order)) % len(_DEAL)]
    dealt = {name: np.sort(order[turns == name]) for name in ("selection", "acceptance", "refit")}
    chosen = {name: images.select(part) for name, part in dealt.items()}
    return ValidationParts(**chosen, rows=dealt)


def half(images: TrainingImages, seed: int, which: int) -> TrainingImages:
    """Return one half, 0 or 1, of a set, drawn at random.

    An image that occurs twice counts once, so that no image is in both halves.
    """
    _, unique = np.unique(images.hashes(), return_index=True)
    order = np.random.default_rng([seed, 29]).permutation(np.sort(unique)).astype(np.int64)
    return images.select(np.sort(order[which::2]))


def at_most(images: TrainingImages, most: int, seed: int) -> TrainingImages:
    """Return all images, or ``most`` of them drawn at random."""
    if len(images) <= most:
        return images
    order = np.random.default_rng([seed, 31]).permutation(len(images)).astype(np.int64)
    return images.select(np.sort(order[:most]))


@dataclass(frozen=True)
class Look:
    """What a net says about the rows of a panel.

    Args:
        logits: (N, C) of the ID rows.
        labels: (N,).
        energies: (N,) of the ID rows.
        outside: energies of each OOD set.
    """

    logits: Array
    labels: NDArray[np.int64]
    energies: Array
    outside: Mapping[str, Array]

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        parts = (self.logits, *self.outside.values())
        return all(bool(np.isfinite(part).all()) for part in parts)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether the predicted class is right."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)

    @cached_property
    def fit(self) -> BestTemperature:
        """T fitted on these rows; the status says whether one was found."""
        return best_temperature(rows_of(self.logits, self.labels))

    def nll(self, temperature: float) -> Array:
        """Return -log p(y|x) after temperature, (N,)."""
        return row_statistics(self.logits, self.labels, temperature).nll

    def aurocs(self) -> dict[str, Metric]:
        """Return the energy's AUROC on each OOD set."""
        return {name: auroc(self.energies, part) for name, part in self.outside.items()}


@dataclass(frozen=True)
class Panel:
    """Rows that nets are looked at on; their outliers are made once.

    Args:
        images: ID rows, labelled.
        outside: pixels of OOD rows by name.
        roles: ``guard`` (synthetic, of kinds that are not trained on) or ``given``, by name.
    """

    images: TrainingImages
    outside: Mapping[str, Tensor]
    roles: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def look(self, forward: Forward) -> Look:
        """Run a net over all rows.

        Args:
            forward: from pixels to the classifier's output.
        """
        rows = np.arange(len(self.images), dtype=np.int64)
        parts = [
            _logits(forward, self.images.pixels(rows[at : at + _CHUNK]))
            for at in range(0, len(rows), _CHUNK)
        ]
        logits = torch.cat(parts)
        labels = self.images.labels
        if labels is None:
            raise InvalidInputError("got rows without labels; a panel needs them")
        outside = {
            name: torch.cat([_energies(forward, part) for part in torch.split(pixels, _CHUNK)])
            for name, pixels in self.outside.items()
        }
        return Look(
            logits.numpy(),
            labels.numpy(),
            formulas.energy(logits).numpy(),
            {name: part.numpy() for name, part in outside.items()},
        )


def make_panel(
    images: TrainingImages,
    given: Mapping[str, TrainingImages],
    trained_kinds: Sequence[str],
    *,
    outlier_rows: int,
    seed: int,
) -> Panel:
    """Make the outliers of a panel, of each guard kind that is not trained on.

    Args:
        images: ID rows, labelled.
        given: the user's OOD sets by name.
        trained_kinds: kinds of the negatives, which are left out.
        outlier_rows: most rows of each set.
        seed: of the outliers.

    Raises:
        DataError: no OOD set is left.
    """
    kinds = [kind for kind in GUARD_KINDS if kind not in trained_kinds]
    base = at_most(images, outlier_rows, seed)
    pixels = base.all_pixels()
    labels = None if base.labels is None else base.labels.numpy()
    outside = {}
    for number, kind in enumerate(kinds):
        generator = np.random.default_rng([seed, 37, number])
        made = made_outliers(pixels, kind, generator, labels)
        # Two rows at least, for an interval.
        if len(made) > 1:
            outside[kind] = made
    roles = dict.fromkeys(outside, "guard")
    for name, part in given.items():
        outside[name] = at_most(part, outlier_rows, seed).all_pixels()
        roles[name] = "given"
    if not outside:
        raise DataError(
            "no outliers are left to choose a checkpoint on: every guard kind is trained on, or "
            "none changes these images. Train on other kinds, or give ood_validation="
        )
    return Panel(images, outside, roles)


@dataclass(frozen=True)
class Evaluation:
    """How a net does on the selection rows.

    Args:
        accuracy: share of right predictions.
        nll: mean after temperature.
        ece: after temperature.
        temperature: T of NLL and ECE.
        auroc: of the energy on each OOD set.
        energy_mean: over the ID rows.
        temperature_status: of the fit of T on these rows; anything but ``converged`` means that T
            is 1, or that of the net that this one is compared with.
    """

    accuracy: float
    nll: float
    ece: float
    temperature: float
    auroc: Mapping[str, float]
    energy_mean: float
    temperature_status: str = CONVERGED

    @classmethod
    def of(cls, look: Look, temperature: float | None = None) -> Evaluation:
        """Measure a look, which must be finite.

        Args:
            look: on the selection rows.
            temperature: T of NLL and ECE; None fits it on these rows.
        """
        fit = look.fit
        temperature = fit.temperature if temperature is None else temperature
        rows = row_statistics(look.logits, look.labels, temperature)
        return cls(
            accuracy=float(rows.correct.mean()),
            nll=float(rows.nll.mean()),
            # One draw: only the value is wanted here, and intervals cost more than it.
            ece=ece(rows, draws=1).value,
            temperature=temperature,
            auroc={name: metric.value for name, metric in look.aurocs().items()},
            energy_mean=float(look.energies.mean()),
            temperature_status=fit.status,
        )

    @property
    def fit(self) -> BestTemperature:
        """The fit of T, to be paired with that of another net."""
        return BestTemperature(self.temperature, self.temperature_status)

    def numbers(self) -> list[float]:
        """Return all of it as numbers, which processes can exchange."""
        status = float(STATUSES.index(self.temperature_status))
        own = (self.accuracy, self.nll, self.ece, self.temperature, self.energy_mean)
        return [status, *own, *self.auroc.values()]

    def with_numbers(self, numbers: Sequence[float]) -> Evaluation:
        """Return the evaluation, of the same OOD sets, that :meth:`numbers` came from."""
        status, accuracy, nll, ece_, temperature, energy_mean, *aurocs = numbers
        return Evaluation(
            accuracy=accuracy,
            nll=nll,
            ece=ece_,
            temperature=temperature,
            auroc=dict(zip(self.auroc, aurocs, strict=True)),
            energy_mean=energy_mean,
            temperature_status=STATUSES[int(status)],
        )

    @property
    def mean_auroc(self) -> float:
        """Mean over the OOD sets."""
        return float(np.mean(list(self.auroc.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "accuracy": self.accuracy,
            "nll": self.nll,
            "ece": self.ece,
            "temperature": self.temperature,
            "temperature_status": self.temperature_status,
            "auroc": dict(self.auroc),
            "mean_auroc": self.mean_auroc,
            "energy_mean": self.energy_mean,
        }


def _logits(forward: Forward, pixels: Tensor) -> Tensor:
    return forward(pixels).logits.detach().cpu().double()


def _energies(forward: Forward, pixels: Tensor) -> Tensor:
    return formulas.energy(_logits(forward, pixels))
