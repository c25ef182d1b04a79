"""What inpainting and denoising give back: images by stage, and their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.sampler import Trace

# Of a PSNR: an image that is equal to the truth has none.
_MOST_PSNR = 100.0


@dataclass(frozen=True, eq=False)
class Edited:
    """Damaged images, and what two methods made of them.

    Stages are named ``truth`` (where it is known), ``given`` (what chains started from),
    ``trivial`` (a fill or a filter that knows nothing of the classifier) and ``chains``.

    Args:
        pixels: by stage, (N, C, H, W) float32 in [0, 1], on the CPU.
        energy: by stage, (N,) E(x) of the user's own net.
        predicted: by stage, (N,) int64, the most likely class.
        labels: (N,) int64, or None.
        trace: of the chains; its energy is of what was sampled.
        frames: (F, N, C, H, W), the chains along their way, None where none were asked for.
        frame_steps: the step of each frame.
        settings: as JSON types.
    """

    pixels: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    predicted: Mapping[str, Tensor]
    labels: Tensor | None
    trace: Trace
    frames: Tensor | None
    frame_steps: tuple[int, ...]
    settings: dict[str, Any]

    def errors(self, stage: str) -> Tensor:
        """Return the RMSE of each image (N,) against the truth, in units of [0, 1] pixels."""
        truth = self.pixels.get("truth")
        if truth is None:
            raise InvalidInputError("the truth is not known here, so no error can be measured")
        gap = (self.pixels[stage].double() - truth.double()).square().flatten(1)
        weights = self._counted(gap)
        return (gap * weights).sum(dim=1).div(weights.sum(dim=1)).sqrt()

    def _counted(self, gap: Tensor) -> Tensor:
        """Return the weight of each value in an error, (N, D)."""
        return torch.ones_like(gap)


@dataclass(frozen=True, eq=False)
class Inpainted(Edited):
    """Images with holes, filled by chains; errors are of the values in the holes.

    Args:
        known: (N, C, H, W) bool, True where a value was known.
    """

    known: Tensor

    def _counted(self, gap: Tensor) -> Tensor:
        return (~self.known).flatten(1).to(gap.dtype)


@dataclass(frozen=True, eq=False)
class Denoised(Edited):
    """Noisy images, and chains that were held near them.

    Args:
        noise_std: of the noise, in units of [0, 1] pixels.
    """

    noise_std: float

    def psnr(self, stage: str) -> Tensor:
        """Return the peak signal-to-noise ratio of each image (N,) in decibel, 100 at most.

        PSNR = -20 log10 RMSE, the peak being 1.
        """
        return (-20 * self.errors(stage).log10()).clamp(max=_MOST_PSNR)


def frame_steps(num_steps: int, num_frames: int) -> tuple[int, ...]:
    """Choose steps to keep a picture of, from the start to the end, evenly.

    Raises:
        InvalidInputError: a number of frames below 0.

    Example:
        >>> frame_steps(20, 5), frame_steps(2, 5), frame_steps(20, 0)
        ((0, 5, 10, 15, 20), (0, 1, 2), ())
    """
    count = min(check_whole("num_frames", num_frames), num_steps + 1)
    if count < 2:
        return (num_steps,) if count else ()
    return tuple(round(place * num_steps / (count - 1)) for place in range(count))
