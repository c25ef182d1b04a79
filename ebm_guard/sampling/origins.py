"""Where chains of a classifier start: noise, around the mean of a class, or at images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model import EnergyClassifier
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.starts import ClassGaussian, Start, UniformStart

STARTS = ("gaussian", "uniform", "data")
_PROBE = 8


def image_shape(
    classifier: EnergyClassifier, images: Tensor | None, image_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Find the shape (C, H, W) of the images.

    Raises:
        InvalidInputError: it is not known, or two sources of it disagree.

    Example:
        >>> from ebm_guard.model import Preprocessing
        >>> classifier = EnergyClassifier(
        ...     torch.nn.Linear(4, 3).eval(), preprocessing=Preprocessing((0.0,), (1.0,))
        ... )
        >>> image_shape(classifier, torch.zeros(2, 1, 8, 6), None)
        (1, 8, 6)
    """
    if image_size is not None:
        _check_size(image_size)
    preprocessing = classifier.preprocessing
    if images is not None and preprocessing is not None:
        preprocessing.check_pixels(images)
        channels, height, width = images.shape[1:]
        if image_size is not None and tuple(image_size) != (height, width):
            raise InvalidInputError(
                f"got image_size={tuple(image_size)} and images of {(height, width)}; give one of "
                "the two"
            )
        return int(channels), int(height), int(width)
    size = image_size or (None if preprocessing is None else preprocessing.image_size)
    if preprocessing is None or size is None:
        raise InvalidInputError(
            "the size or the normalisation of this model's images is not known; give image_size= "
            "or images=, and wrap the model with mean= and std="
        )
    return preprocessing.channels, int(size[0]), int(size[1])


def _check_size(image_size: Any) -> None:
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise InvalidInputError(f"got image_size={image_size!r}; needed (height, width)")
    for side in image_size:
        check_whole("image_size", side, 1)


def probe_pixels(
    images: Tensor | None,
    shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Tensor:
    """Return a few images, or noise, to try a net on."""
    if images is not None and len(images):
        return images[:_PROBE].float()
    return UniformStart(shape).draw(_PROBE, generator)


def origin_of(
    start: str | Start | None,
    shape: tuple[int, ...],
    images: Tensor | None,
    labels: Tensor | None,
    count: int,
) -> Start | str:
    """Return the distribution that chains start from, or ``data``.

    Args:
        start: ``gaussian``, ``uniform``, ``data``, a start, or None for the default.
        shape: (C, H, W) of the images.
        images: (M, C, H, W) in [0, 1], for ``gaussian`` and ``data``.
        labels: (M,) int64.
        count: the number of classes.

    Raises:
        InvalidInputError: none of them, or images and labels are missing.

    Example:
        >>> origin_of(None, (1, 4, 4), None, None, 3).name
        'uniform'
    """
    if isinstance(start, Start):
        if start.shape != shape:
            raise InvalidInputError(f"got a start of shape {start.shape}; images are {shape}")
        return start
    known = start is None or start in STARTS
    if not known:
        raise InvalidInputError(
            f"got start={start!r}; known are {', '.join(STARTS)}{suggest(str(start), STARTS)}"
        )
    given = images is not None and labels is not None
    if start == "uniform" or (start is None and not given):
        return UniformStart(shape)
    if images is None or labels is None:
        raise InvalidInputError(f"start={start!r} needs images= and labels=; or use 'uniform'")
    return "data" if start == "data" else ClassGaussian().fit(images, labels, count)


def starting_points(
    origin: Start | str,
    images: Tensor | None,
    labels: Tensor | None,
    ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return where the chains start, (B, C, H, W) on the device of the generator.

    Args:
        origin: what :func:`origin_of` returned.
        images: (M, C, H, W) in [0, 1], for ``data``: each image starts one chain of its class.
        labels: (M,) int64.
        ids: (B,) int64, the class of each chain.
        generator: source of all random numbers.

    Raises:
        InvalidInputError: fewer images of a class than chains.
    """
    if isinstance(origin, Start):
        return origin.draw(ids, generator)
    if images is None or labels is None:
        raise InvalidInputError("start='data' needs images= and labels=")
    rows = torch.empty_like(ids)
    for label in sorted(set(ids.tolist())):
        mine, own = ids == label, torch.nonzero(labels.cpu() == label).flatten()
        need = int(mine.sum())
        if len(own) < need:
            raise InvalidInputError(
                f"got {len(own)} images of class {label} for {need} chains; give more images, or "
                "run fewer chains"
            )
        order = torch.randperm(len(own), generator=generator, device=generator.device).cpu()
        rows[mine] = own[order[:need]]
    return images[rows.to(images.device)].to(generator.device, torch.float32)
