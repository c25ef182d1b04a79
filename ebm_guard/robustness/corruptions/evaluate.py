"""Run a classifier over corrupted images, and measure it with its gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebm_guard.attacks import Examples
from ebm_guard.data.sources import ImageSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate.deciding import Parts
from ebm_guard.model.isolation import Forward
from ebm_guard.predictions import Predictions
from ebm_guard.progress import track
from ebm_guard.robustness.corruptions.alexnet import why_no_mce
from ebm_guard.robustness.corruptions.builtin import check_severity
from ebm_guard.robustness.corruptions.catalogue import (
    BUILTIN,
    corrupt_pixels,
    corruption_facts,
    get_corruption,
)
from ebm_guard.robustness.corruptions.measure import (
    CLEAN,
    check_same_images,
    corruption_cell,
    deployed_rows,
    summarise,
)
from ebm_guard.robustness.corruptions.published import PublishedSet
from ebm_guard.robustness.corruptions.table import CorruptionTable

LIMIT = 200
CHOSEN_SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class CorruptionPlan:
    """What an evaluation will run.

    Args:
        names: of the corruptions.
        severities: of each.
        n: images of each cell.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    n: int

    @property
    def cells(self) -> tuple[tuple[str, int], ...]:
        """Names and severities, severities of one corruption together."""
        return tuple((name, severity) for name in self.names for severity in self.severities)

    @property
    def forwards(self) -> int:
        """Images that go through the model: (names x severities + 1 for the clean ones) x n."""
        return (len(self.cells) + 1) * self.n

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "names": list(self.names),
            "severities": list(self.severities),
            "n": self.n,
            "forwards": self.forwards,
        }


def plan_corruptions(
    available: int,
    names: Sequence[str] = BUILTIN,
    severities: Sequence[int] = CHOSEN_SEVERITIES,
    limit: int | None = LIMIT,
) -> CorruptionPlan:
    """Check names and severities, and say what will be run; nothing is run.

    Corrupting takes time too: about 5 ms for an image of 224 pixels with the built-in set, 15 ms
    with the optional package, and a tenth of that at 32 pixels.

    Args:
        available: images there are.
        names: corruptions, see :data:`~ebm_guard.robustness.corruptions.catalogue.NAMES`.
        severities: of 1..5.
        limit: images at most, or None for all.

    Raises:
        InvalidInputError: an unknown name or severity, none at all, or no images.

    Example:
        >>> plan_corruptions(10_000).forwards
        5000
    """
    if not names or not severities or available < 1 or (limit is not None and limit < 1):
        raise InvalidInputError(
            f"got {len(names)} corruptions, {len(severities)} severities, {available} images and "
            f"the limit {limit}; needed at least one of each"
        )
    for severity in severities:
        check_severity(severity)
    known = tuple(dict.fromkeys(get_corruption(name).name for name in names))
    n = available if limit is None else min(limit, available)
    return CorruptionPlan(known, tuple(sorted(set(severities))), n)


def choose_rows(labels: NDArray[np.int64], limit: int | None, seed: int = 0) -> NDArray[np.int64]:
    """Choose the rows that all cells are measured on, stratified by label.

    Args:
        labels: (N,).
        limit: rows at most, or None for all.
        seed: of the choice's own generator.

    Returns:
        Row numbers, sorted; every class has its share, to within one row.

    Example:
        >>> rows = choose_rows(np.repeat([0, 1], 50), limit=10)
        >>> int((rows < 50).sum())
        5
    """
    if limit is None or limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # Every (N / limit)-th row of the classes one after the other, from a random start.
    places = (np.arange(limit) + generator.random()) * len(labels) / limit
    return np.sort(order[places.astype(np.int64)])


@torch.no_grad()
def predict_corrupted(
    forward: Forward,
    examples: Examples,
    name: str = CLEAN,
    severity: int = 0,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Predictions:
    """Corrupt images and run them through the model, batch by batch.

    Args:
        forward: from [0, 1] pixels to logits and features, see
            :func:`ebm_guard.attacks.pixel_forward`.
        examples: the images, at the model's input size.
        name: of the corruption; ``clean`` leaves the images as they are.
        severity: 1..5.
        seed: of the corruption.
        batch_size: images per forward pass.

    Returns:
        Logits, labels and ids, and features where ``forward`` gives them.
    """
    logits, features = [], []
    for start in range(0, len(examples), batch_size):
        part = examples.select(slice(start, start + batch_size))
        pixels = part.pixels
        if name != CLEAN:
            pixels = corrupt_pixels(pixels, part.ids, name, severity, seed)
        output = forward(pixels)
        logits.append(_array(output.logits))
        if output.features is not None:
            features.append(_array(output.features))
    return Predictions(
        np.concatenate(logits),
        features=np.concatenate(features) if features else None,
        labels=examples.labels.cpu().numpy(),
        ids=tuple(str(number) for number in examples.ids.tolist()),
        source=name if name == CLEAN else f"{name} at severity {severity}",
    )


def evaluate_corruptions(
    forward: Forward,
    examples: Examples,
    names: Sequence[str] = BUILTIN,
    severities: Sequence[int] = CHOSEN_SEVERITIES,
    *,
    parts: Parts | None = None,
    limit: int | None = LIMIT,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> CorruptionTable:
    """Measure a classifier, and its gate, on corrupted images.

    Call it with the model held still: :func:`ebm_guard.attacks.untouched`.

    Args:
        forward: from [0, 1] pixels to logits, and features where the gate's score needs them.
        examples: the images, at the model's input size, with their labels and ids.
        names: corruptions.
        severities: of 1..5.
        parts: the gate; its calibrator, if any, gives the probabilities of ECE and NLL.
        limit: images at most, chosen once for all cells, stratified by label.
        seed: of the choice, the corruptions and the intervals.
        batch_size: images per forward pass.
        progress: show a bar on stderr.

    Raises:
        InvalidInputError: an unknown name or severity.
        EbmGuardError: a corruption needs the optional package, and it is not installed.

    Example:
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> def forward(pixels):  # dark is class 0, bright is class 1
        ...     light = pixels.mean(dim=(1, 2, 3)) - 0.5
        ...     return ClassifierOutput(torch.stack([-20 * light, 20 * light], dim=1), None)
        >>> pixels = torch.cat([torch.full((4, 1, 8, 8), 0.2), torch.full((4, 1, 8, 8), 0.8)])
        >>> examples = Examples.of(pixels, torch.tensor([0] * 4 + [1] * 4))
        >>> table = evaluate_corruptions(forward, examples, ["brightness"])
        >>> [round(cell.accuracy.value, 2) for cell in table.cells]
        [1.0, 1.0, 0.5]
    """
    plan = plan_corruptions(len(examples), names, severities, limit)
    facts = corruption_facts(plan.names) | {"seed": seed}
    rows = torch.from_numpy(choose_rows(examples.labels.cpu().numpy(), limit, seed))
    chosen = examples.select(rows)
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    with track("corruptions", plan.forwards, enabled=progress) as advance:

        def run(name: str, severity: int) -> Predictions:
            found = predict_corrupted(forward, chosen, name, severity, **settings)
            advance(plan.n)
            return found

        clean = run(CLEAN, 0)
        corrupted = ((*cell, run(*cell)) for cell in plan.cells)
        return corruption_table(
            clean, corrupted, parts, source="; ".join(facts["sources"]), facts=facts, seed=seed
        )


def evaluate_published(
    published: PublishedSet,
    run: Callable[[ImageSource], Predictions],
    clean: ImageSource,
    *,
    parts: Parts | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> CorruptionTable:
    """Measure a classifier, and its gate, on CIFAR-10-C or ImageNet-C.

    Args:
        published: see :func:`~ebm_guard.robustness.corruptions.open_cifar10_c` and
            :func:`~ebm_guard.robustness.corruptions.open_imagenet_c`.
        run: gives the predictions on a source, with labels numbered as the model's classes.
        clean: the images before corruption, with the same ids: the test set in its order, or the
            validation folder with its class folders. A part of them will do.
        parts: the gate.
        limit: images at most, chosen once for all cells; published numbers are of all images.
        seed: of the choice and the intervals.

    Raises:
        DataError: the clean images have no labels, or are not those of the corrupted set.
    """
    if clean.labels is None:
        raise DataError(f"{clean.spec} has no labels; accuracy on corrupted images needs them")
    rows = choose_rows(clean.labels, limit, seed)
    before = run(clean.subset(rows))
    wanted = [clean.ids[row] for row in rows]

    def corrupted() -> Iterator[tuple[str, int, Predictions]]:
        for name, severity, source in published:
            place = {key: number for number, key in enumerate(source.ids)}
            missing = [key for key in wanted if key not in place]
            if missing:
                raise DataError(
                    f"{source.spec} has no image {missing[0]!r}, which {clean.spec} has; needed "
                    "the clean images of the same set, in its order or with its file names"
                )
            chosen = np.array([place[key] for key in wanted], dtype=np.int64)
            yield name, severity, run(source.subset(chosen))

    return corruption_table(before, corrupted(), parts, source=published.title, seed=seed)


def corruption_table(
    clean: Predictions,
    corrupted: Iterable[tuple[str, int, Predictions]],
    parts: Parts | None = None,
    *,
    source: str,
    facts: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> CorruptionTable:
    """Build the table from predictions; only figures by row are kept of each.

    Args:
        clean: the images before corruption.
        corrupted: name, severity and the same images, in the same order.
        parts: the gate.
        source: which set of corruptions, in words; mCE is for ``ImageNet-C`` alone.
        facts: versions and settings, as JSON types.
        seed: of the intervals' own draws.

    Raises:
        DataError: rows that are not the same images, no labels, or missing features.
        InvalidInputError: nothing was corrupted.

    Example:
        >>> rows = Predictions(np.eye(2), labels=np.array([0, 1]))
        >>> corruption_table(rows, [("fog", 1, rows)], source="mine").summary.worst
        ('fog', 1)
    """
    base = deployed_rows(clean, parts)
    rows, cells = {}, []
    for name, severity, predictions in corrupted:
        check_same_images(clean, predictions, f"{name} at severity {severity}")
        rows[name, severity] = deployed_rows(predictions, parts)
        cells.append(corruption_cell(name, severity, rows[name, severity], base, seed))
    if not cells:
        raise InvalidInputError("got no corrupted images; needed at least one corruption")
    names = tuple(dict.fromkeys(name for name, _ in rows))
    severities = tuple(sorted({severity for _, severity in rows}))
    calibrator = None if parts is None else parts.calibrator
    return CorruptionTable(
        source=source,
        names=names,
        severities=severities,
        n=len(base),
        probabilities="softmax" if calibrator is None else calibrator.name,
        score=None if parts is None else parts.score.name,
        clean=corruption_cell(CLEAN, 0, base, None, seed),
        cells=tuple(cells),
        summary=summarise(cells, rows, why_no_mce(source, names, severities, clean.num_classes)),
        facts=dict(facts or {}),
    )


def _array(values: torch.Tensor) -> NDArray[Any]:
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.cpu().numpy()
