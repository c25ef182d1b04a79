"""One pass over a data set: logits, features, labels, and where they came from.

Everything after this room works on :class:`Predictions` and never sees the model again, so a
report from saved logits equals the report from the model.
"""

from ebm_guard.predictions.head import LinearHead
from ebm_guard.predictions.passes import as_batch, hash_inputs, predict
from ebm_guard.predictions.record import Predictions, check_labels, chunks
from ebm_guard.predictions.stored import stored_predictions

__all__ = [
    "LinearHead",
    "Predictions",
    "as_batch",
    "check_labels",
    "chunks",
    "hash_inputs",
    "predict",
    "stored_predictions",
]
