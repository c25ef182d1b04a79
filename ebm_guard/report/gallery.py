"""The gallery: the rows that a person should look at first."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_guard.calibration import row_statistics
from ebm_guard.data.images import thumbnail
from ebm_guard.ood import Energy
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.record import NotRun, Record

_SHOWN = 8
Picture = Callable[[str, int], Image.Image | None]


@dataclass(frozen=True)
class Item(Record):
    """One row of the gallery."""

    set: str
    id: str
    label: str | None
    predicted: str
    confidence: float
    energy: float
    thumbnail: str | None


@dataclass(frozen=True)
class Gallery(Record):
    """The most confident errors, the strangest ID rows, and the OOD rows that look most at home."""

    confident_errors: list[Item]
    highest_energy: list[Item]
    lowest_energy_ood: list[Item]
    images: bool
    note: str


def gallery_section(
    evaluation: Predictions,
    ood: Mapping[str, Predictions],
    fitted: Fitted,
    picture: Picture | None,
) -> Gallery | NotRun:
    """Pick the rows and, where allowed and at hand, their thumbnails."""
    if evaluation.kind == "probs":
        return NotRun("the gallery sorts by energy, which needs logits")
    energy = Energy()
    values = {"evaluation": energy.of(evaluation)}
    values |= {name: energy.of(part) for name, part in ood.items()}
    sets = {"evaluation": evaluation, **ood}
    errors: list[tuple[str, int]] = []
    if evaluation.labels is not None:
        changes = fitted.calibrator is not None and not fitted.calibrator.keeps_prediction
        raw = row_statistics(evaluation.logits, evaluation.labels)
        rows = fitted.after if changes and fitted.after is not None else raw
        wrong = np.flatnonzero(~rows.correct)
        order = wrong[np.argsort(-rows.confidence[wrong], kind="stable")]
        errors = [("evaluation", int(row)) for row in order[:_SHOWN]]
    strange = np.argsort(-values["evaluation"], kind="stable")[:_SHOWN]
    foreign = [(name, int(row)) for name in ood for row in _lowest(values[name])]
    foreign.sort(key=lambda place: values[place[0]][place[1]])

    def items(places: list[tuple[str, int]]) -> list[Item]:
        return [_item(place, sets, values, fitted, picture) for place in places]

    groups = (
        items(errors),
        items([("evaluation", int(row)) for row in strange]),
        items(foreign[:_SHOWN]),
    )
    shown = any(item.thumbnail for group in groups for item in group)
    note = "" if shown else "thumbnails are off, or the images are not at hand"
    return Gallery(*groups, images=shown, note=note)


def _lowest(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(values, kind="stable")[:_SHOWN]


def _item(
    place: tuple[str, int],
    sets: Mapping[str, Predictions],
    values: Mapping[str, NDArray[np.float64]],
    fitted: Fitted,
    picture: Picture | None,
) -> Item:
    name, row = place
    part = sets[name]
    logits = part.logits[row : row + 1]
    calibrator = fitted.calibrator
    statistics = row_statistics(
        logits,
        np.zeros(1, dtype=np.int64),
        transform=None if calibrator is None else calibrator.transform,
        keeps_prediction=calibrator is None or calibrator.keeps_prediction,
    )
    labels = part.labels if name == "evaluation" else None
    return Item(
        set=name,
        id=part.names([row])[0],
        label=None if labels is None else _class_name(sets["evaluation"], int(labels[row])),
        predicted=_class_name(sets["evaluation"], int(statistics.predicted[0])),
        confidence=float(statistics.confidence[0]),
        energy=float(values[name][row]),
        thumbnail=None if picture is None else _data_uri(picture(name, row)),
    )


def _class_name(part: Predictions, index: int) -> str:
    if part.classes is not None and index < len(part.classes):
        return part.classes[index]
    return f"class {index}"


def _data_uri(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    buffer = io.BytesIO()
    thumbnail(image).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
