"""Common corruptions: images that got worse on their way, at five severities."""

from ebm_guard.robustness.corruptions.catalogue import (
    BUILTIN,
    IMAGECORRUPTIONS,
    Corruption,
    corrupt_images,
    corrupt_pixels,
    corruption_facts,
    get_corruption,
)
from ebm_guard.robustness.corruptions.evaluate import (
    CorruptionPlan,
    choose_rows,
    corruption_table,
    evaluate_corruptions,
    evaluate_published,
    plan_corruptions,
    predict_corrupted,
)
from ebm_guard.robustness.corruptions.published import (
    CorruptedImages,
    PublishedSet,
    open_cifar10_c,
    open_corrupted,
    open_imagenet_c,
)
from ebm_guard.robustness.corruptions.table import CorruptionCell, CorruptionTable

__all__ = [
    "BUILTIN",
    "IMAGECORRUPTIONS",
    "CorruptedImages",
    "Corruption",
    "CorruptionCell",
    "CorruptionPlan",
    "CorruptionTable",
    "PublishedSet",
    "choose_rows",
    "corrupt_images",
    "corrupt_pixels",
    "corruption_facts",
    "corruption_table",
    "evaluate_corruptions",
    "evaluate_published",
    "get_corruption",
    "open_cifar10_c",
    "open_corrupted",
    "open_imagenet_c",
    "plan_corruptions",
    "predict_corrupted",
]
