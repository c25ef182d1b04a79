"""A source whose images are synthetic outliers of another source's, for report and predict."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageOps

from ebm_guard.data.images import plain
from ebm_guard.data.outliers.kinds import SHIFT_KINDS, Partners, get_kind
from ebm_guard.data.sources.base import ImageSource, StreamSource
from ebm_guard.errors import DataError, InvalidInputError

MARK = "synthetic"


class OutlierSource(ImageSource):
    """One synthetic outlier of each image of a source, in its order.

    The image of a row depends on the kind, the seed, the row and the source, and on nothing else:
    not on the batch size, on the number of workers, or on which rows were asked for before.
    Outliers have no labels; shifts keep theirs. The pixels are changed before the preprocessing,
    as those of any other image.

    Args:
        base: where the images come from; its labels, if any, make blends and pastes cross classes.
        kind: a name of ``TRAINING_KINDS``, ``GUARD_KINDS`` or ``SHIFT_KINDS``.
        seed: with the row, of each image's own generator.

    Raises:
        InvalidInputError: an unknown kind, a stream (no row of it can be asked for alone), or a
            kind that needs two images of a source that has one image, or one class.

    Example:
        >>> from ebm_guard.data import open_source
        >>> source = OutlierSource(open_source("demo:"), "patch_shuffle")
        >>> source.spec, source.load(0).size
        ('synthetic:patch_shuffle of demo:', (8, 8))
    """

    def __init__(self, base: ImageSource, kind: str, seed: int = 0) -> None:
        chosen = get_kind(kind)
        if isinstance(base, StreamSource):
            raise InvalidInputError(
                f"got {base.spec}, a stream; synthetic outliers need a source whose rows can be "
                "asked for alone: give a folder, a list or an npz file"
            )
        shift = kind in SHIFT_KINDS
        super().__init__(
            f"{MARK}:{kind} of {base.spec}",
            base.ids,
            base.labels if shift else None,
            base.classes,
            base.groups,
        )
        self.kind, self.seed = kind, seed
        self.is_array = base.is_array
        self.sorted_classes, self.class_map = base.sorted_classes, base.class_map
        self._base = base
        self._partners = Partners(len(base), base.labels) if chosen.partner else None

    def load(self, index: int) -> Image.Image:
        """Make one outlier.

        Raises:
            DataError: the image or its partner cannot be read, or this kind leaves it as it is.
        """
        key = [self.seed, zlib.crc32(self.kind.encode()), index]
        generator = np.random.default_rng(key)
        image = _eight_bit(self._base.load(index))
        partner = None
        if self._partners is not None:
            other = _eight_bit(self._base.load(self._partners.draw(index, generator)))
            # Of another size in folders: its centre, scaled to cover the same frame.
            other = other if other.size == image.size else ImageOps.fit(other, image.size)
            partner = np.asarray(other.convert(image.mode))
        try:
            made = get_kind(self.kind).make(np.asarray(image), partner, generator)
        except InvalidInputError as error:
            raise DataError(f"image {self.ids[index]} of {self._base.spec}: {error}") from None
        return Image.fromarray(made)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return RGB, or L where the image is grey."""
    image = plain(image)
    return image if image.mode == "L" else image.convert("RGB")
