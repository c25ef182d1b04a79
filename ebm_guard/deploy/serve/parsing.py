"""A request's body to rows of the model's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ebm_guard.deploy.serve.forms import FIELD, file_of_form
from ebm_guard.deploy.serve.pictures import row_of_image
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.tensors import as_expected, rows_of_npy
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.model import Preprocessing

NPY = "application/x-npy"
FORM = "multipart/form-data"
RAW = "application/octet-stream"
INPUTS = ("model", "pixels")


@dataclass(frozen=True)
class Parser:
    """What the guard takes, and how much of it.

    Args:
        preprocessing: how an image becomes a row, or None for a model without one.
        example: (1, ...) a row that the guard was fitted on, or None.
        max_rows: of one request.
        max_pixels: of an image.
    """

    preprocessing: Preprocessing | None
    example: Tensor | None
    max_rows: int
    max_pixels: int

    @classmethod
    def of(cls, guard: Guard, max_rows: int, max_pixels: int) -> Parser:
        """Read from a guard what it takes."""
        classifier = guard.classifier
        preprocessing = None if classifier is None else classifier.preprocessing
        example = None if guard.canary is None else guard.canary.inputs[:1]
        return cls(preprocessing, example, max_rows, max_pixels)

    def rows(self, content_type: str, body: bytes, input_kind: str = "model") -> Tensor:
        """Parse a body.

        Args:
            content_type: the header: an image type or ``application/octet-stream`` (an image
                file), ``multipart/form-data`` with one field ``file`` (an image file), or
                ``application/x-npy`` (an array of rows).
            body: all of it.
            input_kind: of an array: ``model``, exactly what the model takes, or ``pixels``: (B, C,
                H, W) in [0, 1], normalised here. Images need none.

        Returns:
            (B, ...), what the model takes.

        Raises:
            RefusedError: damaged, too large, or of a kind that is not served.
        """
        if input_kind not in INPUTS:
            raise RefusedError(
                "unreadable", f"got input={input_kind!r}; needed {' or '.join(INPUTS)}"
            )
        kind = content_type.partition(";")[0].strip().lower()
        if kind == NPY:
            return self._array(body, input_kind)
        if kind == FORM:
            return self._image(file_of_form(content_type, body))
        if kind == RAW or kind.startswith("image/"):
            return self._image(body)
        raise RefusedError(
            "unsupported",
            f"got Content-Type {kind or 'none'}; needed image/jpeg or another image, {RAW} (an "
            f"image), {FORM} with the field {FIELD}, or {NPY} (an array)",
        )

    def _image(self, body: bytes) -> Tensor:
        if self.preprocessing is None:
            raise RefusedError(
                "unsupported",
                f"this model's preprocessing is not known, so it takes no images; send {NPY}",
            )
        return as_expected(row_of_image(body, self.preprocessing, self.max_pixels), self.example)

    def _array(self, body: bytes, input_kind: str) -> Tensor:
        rows = rows_of_npy(body, self.max_rows)
        if input_kind == "pixels":
            if self.preprocessing is None:
                raise RefusedError(
                    "unsupported", "this model's normalisation is not known; send input=model"
                )
            try:
                self.preprocessing.check_pixels(rows)
            except InvalidInputError as error:
                raise RefusedError("unreadable", str(error)) from None
            rows = self.preprocessing.normalize(rows)
        return as_expected(rows, self.example)
