"""Corruptions of images."""

from __future__ import annotations

from ebm_guard.registry.method import Method

_CORRUPTIONS = "ebm_guard.robustness.corruptions"
_PAPER = "Hendrycks and Dietterich, ICLR 2019, section 3"
_OWN = "own constants: comparable between models, not with ImageNet-C"

METHODS = (
    Method(
        "gaussian_noise",
        "corruption",
        f"{_CORRUPTIONS}.builtin:gaussian_noise",
        _PAPER,
        "x + s z, z ~ N(0, 1)",
        ("images",),
        _OWN,
        default=True,
    ),
    Method(
        "shot_noise",
        "corruption",
        f"{_CORRUPTIONS}.builtin:shot_noise",
        _PAPER,
        "Poisson(c x) / c",
        ("images",),
        _OWN,
        default=True,
    ),
    Method(
        "impulse_noise",
        "corruption",
        f"{_CORRUPTIONS}.builtin:impulse_noise",
        _PAPER,
        "a share of the values becomes 0 or 1",
        ("images",),
        _OWN,
        default=True,
    ),
    Method(
        "gaussian_blur",
        "corruption",
        f"{_CORRUPTIONS}.builtin:gaussian_blur",
        _PAPER,
        "x * N(0, s^2), s a share of the shorter side",
        ("images",),
        f"{_OWN}; one rule for all image sizes",
        default=True,
    ),
    Method(
        "brightness",
        "corruption",
        f"{_CORRUPTIONS}.builtin:brightness",
        _PAPER,
        "x + b",
        ("images",),
        f"{_OWN}; added to all channels, where ImageNet-C raises the value of HSV",
        default=True,
    ),
    Method(
        "contrast",
        "corruption",
        f"{_CORRUPTIONS}.builtin:contrast",
        _PAPER,
        "m + c (x - m), m the channel's mean",
        ("images",),
        _OWN,
        default=True,
    ),
    Method(
        "pixelate",
        "corruption",
        f"{_CORRUPTIONS}.builtin:pixelate",
        _PAPER,
        "means over cells of 1 + k s pixels, s the shorter side",
        ("images",),
        f"{_OWN}; one rule for all image sizes",
        default=True,
    ),
    Method(
        "jpeg",
        "corruption",
        f"{_CORRUPTIONS}.builtin:jpeg",
        _PAPER,
        "JPEG of quality 70 to 10",
        ("images",),
        f"{_OWN}; pixels hang on the version of libjpeg, which is recorded",
        default=True,
    ),
    Method(
        "imagecorruptions",
        "corruption",
        f"{_CORRUPTIONS}.extra:imagecorruptions",
        _PAPER,
        "the fifteen standard types of ImageNet-C, named imagecorruptions:TYPE",
        ("images of 32 pixels a side or more", "the extra `corruptions`"),
        "repeatable: seeded for each image, with our own impulse_noise and glass_blur of the same "
        "constants; close to ImageNet-C at 224 pixels, not CIFAR-10-C at 32",
    ),
    Method(
        "cifar10_c",
        "corruption",
        f"{_CORRUPTIONS}.published:open_cifar10_c",
        _PAPER,
        "the published arrays",
        ("the folder of CIFAR-10-C",),
    ),
    Method(
        "imagenet_c",
        "corruption",
        f"{_CORRUPTIONS}.published:open_imagenet_c",
        _PAPER,
        "the published images; mCE = mean_c (sum_s E_{s,c} / sum_s E^AlexNet_{s,c})",
        ("the folder of ImageNet-C",),
        "mCE only with all fifteen types, five severities and 1,000 classes",
    ),
)
