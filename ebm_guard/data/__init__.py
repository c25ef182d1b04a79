"""Images and labels: source specs, preprocessing, batches, roles, splits, the embedded demo."""

from ebm_guard.data.batches import Batch, batches
from ebm_guard.data.sources import ImageSource, Spec, open_source, parse_spec
from ebm_guard.data.splits import match_classes, two_folds

__all__ = [
    "Batch",
    "ImageSource",
    "Spec",
    "batches",
    "match_classes",
    "open_source",
    "parse_spec",
    "two_folds",
]
