"""The limits of a server, each with a default that is safe on a small machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise

from PIL import Image

from ebm_guard.errors import InvalidInputError

# Two units wide where the energies of usual classifiers lie; the same for every replica and every
# artefact, so that histograms add up and can be compared over a roll-out.
ENERGY_EDGES = (-1000.0, -300.0, -100.0, -60.0, *(float(e) for e in range(-40, 12, 2)), 30.0, 100.0)
ON_ERROR = ("invalid", "raise")
_DAY = 86400.0
# A wait without an end would be an error in the thread that runs the model.
_SECONDS = {
    "max_delay": (0.0, 60.0),
    "retry_after": (0.0, _DAY),
    "body_timeout": (0.001, _DAY),
    "decode_timeout": (0.001, _DAY),
    "model_timeout": (0.001, _DAY),
}
_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


@dataclass(frozen=True)
class ServeSettings:
    """How much a server takes, and what it does when the model fails.

    Memory for requests is bounded by three sums. Bodies that arrive or wait to be decoded: at most
    ``queue_size * max_bytes``, twice that for the one that is just complete. Rows that wait for the
    model, where the body is let go: a prepared image is 4 bytes for each value of the model's
    input, an array as many bytes as its body, or up to 2 times (float16 to float32; 8 times for
    int8 to int64). Images that are decoded: ``decoders * max_pixels`` times up to 24 bytes (8 bytes
    for RGB, 12 for RGBA, CMYK and progressive JPEG, 21 for 16-bit grey).

    Args:
        max_batch: rows of one forward pass, and the most rows of one request, >= 1.
        max_delay: seconds that a request waits for others to share its forward pass, 0 to 60. It
            waits only for requests that are in the server already: a lone one never waits.
        queue_size: requests in the server at once (being read, waiting, or in the model), >= 1;
            the next one is told 503.
        max_bytes: of a request's body.
        max_pixels: of an image, as its header says and as it would be after resizing.
        body_timeout: seconds to send a whole body in.
        retry_after: seconds, what a 503 tells the client in ``Retry-After``.
        decoders: threads that decode images.
        decode_timeout: seconds that a request waits for its body to be decoded. A decoder cannot
            be stopped: its thread stays busy until it is done.
        model_timeout: seconds that one batch may run; longer, and ``/health`` answers 503.
        max_failures: batches in a row on which the model raised. Then, if it also raises on an
            input that the guard was fitted on (or none is known), ``/ready`` answers 503 until 30
            seconds after the last failure.
        on_error: ``invalid`` answers a row on which the model raises with the status INVALID;
            ``raise`` answers 500.
        autocast: run the model under autocast, where the guard was fitted so.
        energy_edges: increasing edges of the energy histogram.

    Raises:
        InvalidInputError: a setting out of its range.

    Example:
        >>> ServeSettings(max_batch=8).queue_size
        128
    """

    max_batch: int = 32
    max_delay: float = 0.005
    queue_size: int = 128
    max_bytes: int = 10 * 2**20
    max_pixels: int = 32_000_000
    body_timeout: float = 30.0
    retry_after: int = 1
    decoders: int = 2
    decode_timeout: float = 10.0
    model_timeout: float = 60.0
    max_failures: int = 10
    on_error: str = "invalid"
    autocast: bool = False
    energy_edges: tuple[float, ...] = ENERGY_EDGES

    def __post_init__(self) -> None:
        """Refuse settings that no server could run with."""
        counts = ("max_batch", "queue_size", "max_bytes", "max_pixels", "decoders", "max_failures")
        for name in counts:
            if getattr(self, name) < 1:
                raise InvalidInputError(f"got {name} {getattr(self, name)!r}; needed >= 1")
        for name, (least, most) in _SECONDS.items():
            check_seconds(name, getattr(self, name), least, most)
        if self.on_error not in ON_ERROR:
            raise InvalidInputError(
                f"got on_error {self.on_error!r}; needed {' or '.join(ON_ERROR)}"
            )
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and self.max_pixels > limit:
            raise InvalidInputError(
                f"got max_pixels {self.max_pixels:,}; Pillow's own limit is {limit:,}. Raise "
                "PIL.Image.MAX_IMAGE_PIXELS first if you trust your clients"
            )
        edges = self.energy_edges
        if not edges or any(a >= b for a, b in pairwise(edges)):
            raise InvalidInputError("got energy_edges that do not increase; needed fixed edges")


def check_seconds(name: str, value: float, least: float = 0.001, most: float = _DAY) -> None:
    """Check a duration.

    Raises:
        InvalidInputError: not a number from ``least`` to ``most``.

    Example:
        >>> check_seconds("wait", 1.5)
    """
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidInputError(f"got {name} {value!r}; needed {least:g} to {most:g} seconds")


def require_extra() -> None:
    """Check that what the server needs is installed.

    Raises:
        InvalidInputError: something is missing; the message names the extra.
    """
    for name in _EXTRA:
        try:
            import_module(name)
        except ImportError:
            raise InvalidInputError(
                f"serving needs {name}, which is not installed: pip install 'ebm-guard[serve]'"
            ) from None
