"""ImageNet-C's fifteen standard corruptions, through the optional package imagecorruptions-imaug.

At 224 pixels they come close to ImageNet-C (which was made with other versions of its libraries,
and stored as JPEG). At 32 pixels they are **not** CIFAR-10-C, whose constants are milder: load the
published arrays for that, see :mod:`ebm_guard.robustness.corruptions.published`.
"""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ebm_guard.data.outliers.pixels import Image, as_floats
from ebm_guard.errors import EbmGuardError, InvalidInputError
from ebm_guard.robustness.corruptions.builtin import blurred, check_severity, salt_and_pepper

LABEL = "imagecorruptions: close to ImageNet-C at 224 pixels, not CIFAR-10-C"
PREFIX = "imagecorruptions:"
IMAGENET_C = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SMALLEST = 32
_PACKAGE = "imagecorruptions-imaug"
_INSTALL = 'pip install "ebm-guard[corruptions]"'
# ImageNet-C's constants: share of the values; and (deviation, reach, rounds) of the glass.
_IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
_GLOBAL_STATE = threading.Lock()


def imagecorruptions(
    image: Image, name: str, severity: int, generator: np.random.Generator
) -> Image:
    """Apply one of ImageNet-C's fifteen corruptions.

    The package draws from numpy's global random numbers. They are seeded from ``generator`` for
    the call and put back; other threads that draw from them meanwhile are disturbed. Its
    ``impulse_noise`` and ``glass_blur`` draw from elsewhere and cannot be repeated, so they are
    ours, with ImageNet-C's constants. A grey image is repeated to three channels, and the first
    channel of the result is returned.

    Args:
        image: uint8 (H, W), (H, W, 1) or (H, W, 3), 32 pixels a side at least.
        name: one of ``IMAGENET_C``.
        severity: 1..5.
        generator: source of the random numbers.

    Raises:
        EbmGuardError: the package is not installed, or cannot be loaded.
        InvalidInputError: a smaller image, another name or severity.

    References:
        Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations, ICLR 2019, section 3.1.

    Example:
        >>> image = np.full((32, 32, 3), 128, np.uint8)
        >>> rng = np.random.default_rng(0)
        >>> imagecorruptions(image, "fog", 1, rng).shape  # doctest: +SKIP
        (32, 32, 3)
    """
    check_severity(severity)
    if name not in IMAGENET_C:
        raise InvalidInputError(f"got corruption {name!r}; needed one of {', '.join(IMAGENET_C)}")
    if min(image.shape[:2]) < SMALLEST:
        raise InvalidInputError(
            f"got an image of {image.shape[0]} x {image.shape[1]} pixels; {PREFIX}{name} needs "
            f"{SMALLEST} a side. The built-in corruptions take any size"
        )
    colour = image if image.ndim == 3 and image.shape[2] == 3 else _repeated(image)
    if name == "impulse_noise":
        found = salt_and_pepper(colour, _IMPULSE[severity - 1], generator)
    elif name == "glass_blur":
        found = _glass_blur(colour, severity, generator)
    else:
        found = _foreign(colour, name, severity, generator)
    return found if colour is image else found[..., 0].reshape(image.shape)


def package_version() -> str:
    """Return the version of the package.

    Raises:
        EbmGuardError: it is not installed.
    """
    _package()
    return version(_PACKAGE)


def _repeated(image: Image) -> Image:
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)


def _foreign(image: Image, name: str, severity: int, generator: np.random.Generator) -> Image:
    package = _package()
    seed = int(generator.integers(2**32, dtype=np.uint64))
    with _GLOBAL_STATE:
        # The package knows no other source of random numbers.
        state = np.random.get_state()  # noqa: NPY002
        try:
            np.random.seed(seed)  # noqa: NPY002
            found = package.corrupt(image, severity=severity, corruption_name=name)
        finally:
            np.random.set_state(state)  # noqa: NPY002
    return np.array(found, dtype=np.uint8)


def _glass_blur(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Blur, let pixels look like a random neighbour, round after round, and blur again.

    ImageNet-C's code means to swap neighbours, and copies one over the other instead; so do we.
    """
    deviation, reach, rounds = _GLASS[severity - 1]
    height, width = image.shape[:2]
    soft = (blurred(as_floats(image), deviation) * 255).astype(np.uint8)
    visited = max(0, height - 2 * reach) * max(0, width - 2 * reach)
    offsets = generator.integers(-reach, reach, size=(rounds * visited, 2))
    order = looked_at(height, width, reach, offsets)
    shifted = soft.reshape(height * width, -1)[order].reshape(soft.shape)
    return (np.clip(blurred(as_floats(shifted), deviation), 0, 1) * 255).astype(np.uint8)


def looked_at(height: int, width: int, reach: int, offsets: Any) -> list[int]:
    """Return which pixel is seen at each place after all rounds.

    From the lower right to the upper left, each place takes what its neighbour shows by then.

    Args:
        height: of the image.
        width: of the image.
        reach: pixels at the border that look at nobody.
        offsets: (R, 2) integers, columns (dx, dy), in the order of the visits; all rounds.

    Returns:
        height * width numbers of pixels.

    Example:
        >>> looked_at(3, 3, 1, np.array([[-1, 0]]))
        [0, 1, 2, 3, 4, 5, 6, 7, 7]
    """
    places = [
        row * width + column
        for row in range(height - reach, reach, -1)
        for column in range(width - reach, reach, -1)
    ]
    jumps = (offsets[:, 1] * width + offsets[:, 0]).tolist()
    order = list(range(height * width))
    for visit, jump in enumerate(jumps):
        place = places[visit % len(places)]
        order[place] = order[place + jump]
    return order


def _package() -> Any:
    try:
        version(_PACKAGE)
    except PackageNotFoundError:
        raise EbmGuardError(
            f"ImageNet-C's corruptions need the package {_PACKAGE}: {_INSTALL}. (The older package "
            "imagecorruptions has the same module name and fails on numpy 2: uninstall it first.) "
            "The built-in corruptions need nothing"
        ) from None
    try:
        return import_module("imagecorruptions")
    except ImportError as error:
        raise EbmGuardError(
            f"cannot load {_PACKAGE}: {error}. Where a library such as libGL.so.1 is missing, as "
            "on servers without a screen, replace OpenCV: pip uninstall opencv-python, then pip "
            "install opencv-python-headless (or install the system's libgl1 and libglib2.0-0)"
        ) from None
