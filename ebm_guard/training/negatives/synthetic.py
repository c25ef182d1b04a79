"""Negatives made from the batch itself: synthetic outliers of the training kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.data.outliers import TRAINING_KINDS, get_kind
from ebm_guard.data.outliers.kinds import Partners
from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_whole
from ebm_guard.training.class_losses import UNLABELLED
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives


class Synthetic(Negatives):
    """Make one synthetic outlier of each image of the batch, of a kind drawn for each image.

    The kinds take turns over the images, in a random order, so that each has its share of every
    batch. An image that a kind leaves as it is (one colour) goes to the next kind; one that all
    kinds leave is replaced by the outlier of another image.

    Args:
        kinds: names of outlier kinds; default: those for training, which share none with the
            kinds that choose checkpoints and that are reported as unseen.
        per_image: outliers for each image of the batch.

    Raises:
        InvalidInputError: an unknown kind, none, or ``per_image`` below 1.

    Example:
        >>> Synthetic().kinds
        ('patch_shuffle', 'blend', 'smooth_noise')
    """

    name = "synthetic"

    def __init__(self, kinds: Sequence[str] = TRAINING_KINDS, per_image: int = 1) -> None:
        named = (kinds,) if isinstance(kinds, str) else kinds
        if not isinstance(named, Sequence) or not named:
            raise InvalidInputError(f"got kinds={kinds!r}; needed the names of at least one kind")
        self._kinds = tuple(get_kind(str(kind)) for kind in named)
        self.per_image = check_whole("per_image", per_image, 1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds."""
        return tuple(kind.name for kind in self._kinds)

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Make outliers (per_image * B, C, H, W) of the batch.

        Raises:
            InvalidInputError: no kind changes any of the images.
        """
        generator = context.generator("synthetic negatives")
        images = batch.pixels.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
        partners = _partners(batch.labels)
        made: list[np.ndarray[Any, Any] | None] = []
        for _ in range(self.per_image):
            order = generator.permutation(len(images))
            turns = np.empty(len(images), dtype=np.int64)
            turns[order] = np.arange(len(images)) + generator.integers(len(self._kinds))
            made += [
                self._one(images, row, int(turns[row]), partners, generator)
                for row in range(len(images))
            ]
        usable = [image for image in made if image is not None]
        if not usable:
            raise InvalidInputError(
                f"none of the kinds {', '.join(self.kinds)} changes an image of this batch: all "
                "have one colour, or there is one image alone. Give outliers of your own"
            )
        chosen = [
            usable[int(generator.integers(len(usable)))] if image is None else image
            for image in made
        ]
        stacked = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()
        return stacked.to(batch.pixels)

    def _one(
        self,
        images: np.ndarray[Any, Any],
        row: int,
        turn: int,
        partners: Partners | None,
        generator: np.random.Generator,
    ) -> np.ndarray[Any, Any] | None:
        """Make an outlier of one image by the first kind, from its turn on, that changes it."""
        for place in range(len(self._kinds)):
            kind = self._kinds[(turn + place) % len(self._kinds)]
            if kind.partner and partners is None:
                continue
            other = images[partners.draw(row, generator)] if kind.partner and partners else None
            try:
                return kind.make(images[row], other, generator)
            except InvalidInputError:
                # This image looks the same after this kind; the pixels were checked by the loop.
                continue
        return None

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"negatives": self.name, "kinds": list(self.kinds), "per_image": self.per_image}


def _partners(labels: Tensor) -> Partners | None:
    """Partners of another class; of any, where classes are not known; None for one image."""
    known = labels.detach().cpu().numpy().astype(np.int64)
    if len(known) < 2:
        return None
    told_apart = len(np.unique(known)) > 1 and bool((known != UNLABELLED).all())
    return Partners(len(known), known if told_apart else None)
