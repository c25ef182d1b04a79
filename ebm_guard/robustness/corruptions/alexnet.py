"""The mean corruption error of ImageNet-C, which is relative to AlexNet's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric, mean
from ebm_guard.robustness.corruptions.builtin import SEVERITIES
from ebm_guard.robustness.corruptions.extra import IMAGENET_C

# Top-1 errors on ImageNet-C, means over the five severities, as published by the benchmark's
# authors (github.com/hendrycks/robustness) and used by AugMix's evaluation.
ALEXNET_ERRORS = dict(
    zip(
        IMAGENET_C,
        (
            0.886428,
            0.894468,
            0.922640,
            0.819880,
            0.826268,
            0.785948,
            0.798360,
            0.866816,
            0.826572,
            0.819324,
            0.564592,
            0.853204,
            0.646056,
            0.717840,
            0.606500,
        ),
        strict=True,
    )
)
_CLASSES = 1000


def why_no_mce(
    title: str, names: Sequence[str], severities: Sequence[int], num_classes: int
) -> str:
    """Say why AlexNet's errors do not apply, or '' where they do.

    Example:
        >>> why_no_mce("ImageNet-C", IMAGENET_C, SEVERITIES, 1000)
        ''
        >>> why_no_mce("ImageNet-C", IMAGENET_C, (1, 3, 5), 1000)
        'not mCE: it needs all five severities of all fifteen types'
    """
    if title != "ImageNet-C":
        return "not mCE: AlexNet's errors are known for ImageNet-C's own files alone"
    if num_classes != _CLASSES:
        return f"not mCE: {num_classes} classes, AlexNet's errors are for ImageNet's 1,000"
    if set(names) != set(IMAGENET_C) or set(severities) != set(SEVERITIES):
        return "not mCE: it needs all five severities of all fifteen types"
    return ""


def mean_corruption_error(wrong: Mapping[tuple[str, int], NDArray[np.bool_]]) -> Metric:
    """Compute mCE = mean_c (sum_s E_{s,c} / sum_s E^AlexNet_{s,c}), top-1 errors E; AlexNet has 1.

    Papers print it in percent. Student's t interval over images, all cells of an image together.

    Args:
        wrong: by (type, severity), (N,) which of the same images are wrong; all fifteen types and
            all five severities.

    Raises:
        InvalidInputError: a type or severity is missing.

    References:
        Hendrycks and Dietterich, ICLR 2019, section 4.1.

    Example:
        >>> everything = {(c, s): np.ones(4, bool) for c in IMAGENET_C for s in SEVERITIES}
        >>> round(mean_corruption_error(everything).value, 3)
        1.293
    """
    if set(wrong) != {(name, severity) for name in IMAGENET_C for severity in SEVERITIES}:
        raise InvalidInputError(
            f"got {len(wrong)} cells; mCE needs all fifteen types at all five severities"
        )
    relative = [
        np.mean([wrong[name, severity] for severity in SEVERITIES], axis=0) / ALEXNET_ERRORS[name]
        for name in IMAGENET_C
    ]
    return mean(np.mean(relative, axis=0))
