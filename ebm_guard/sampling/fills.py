"""What chains are compared with: fills and filters that know nothing of the classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_number, check_positive, check_whole
from ebm_guard.sampling.masked import check_mask


def centre_mask(height: int, width: int, share: float = 0.5) -> Tensor:
    """Return a mask with a hole in the middle, (1, 1, H, W) bool, True = known.

    Args:
        height: of the images.
        width: of the images.
        share: of each side that the hole takes, in (0, 1); at least one pixel.

    Raises:
        InvalidInputError: a size below 1, or a share outside of (0, 1).

    Example:
        >>> (~centre_mask(4, 4, 0.5)).int()[0, 0].tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    share = check_number("share", share, high=1.0, open_low=True, open_high=True)
    known = torch.ones(1, 1, check_whole("height", height, 1), check_whole("width", width, 1))
    top, tall = _middle(height, share)
    left, wide = _middle(width, share)
    known[..., top : top + tall, left : left + wide] = 0
    return known.bool()


def _middle(side: int, share: float) -> tuple[int, int]:
    size = max(1, round(side * share))
    return (side - size) // 2, size


@torch.no_grad()
def surroundings_fill(images: Tensor, known: Tensor) -> Tensor:
    """Fill holes smoothly from what surrounds them; values in the holes are not looked at.

    Each unknown value goes to the mean of its four neighbours, all at once and again and again
    (Jacobi's rule for Laplace's equation), from the mean of the known values of its image and
    channel, for four times as many rounds as the image has rows or columns.

    Args:
        images: (B, C, H, W), floating.
        known: bool, broadcastable to the images, True = known.

    Raises:
        InvalidInputError: a mask that does not fit.

    Example:
        >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> round(surroundings_fill(ramp, centre_mask(5, 5, 0.2))[0, 0, 2, 2].item(), 4)
        2.0
    """
    known = check_mask(known, images.shape)
    kept = torch.where(known, images, 0.0)
    count = known.flatten(2).sum(dim=2).clamp(min=1)
    mean = (kept.flatten(2).sum(dim=2) / count).view(*images.shape[:2], 1, 1)
    filled = torch.where(known, images, mean)
    for _ in range(4 * max(images.shape[2:])):
        edged = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = edged[..., :-2, 1:-1] + edged[..., 2:, 1:-1]
        around = around + edged[..., 1:-1, :-2] + edged[..., 1:-1, 2:]
        filled = torch.where(known, images, around / 4)
    return filled


@torch.no_grad()
def wiener_filter(images: Tensor, noise_std: float, window: int = 3) -> Tensor:
    """Filter noise of known size out, by the mean m and the variance v around each value.

    ::

        x = m + max(0, v - noise_std^2) / v (y - m)

    Args:
        images: (B, C, H, W), floating.
        noise_std: standard deviation of the noise, > 0.
        window: side of the square around a value, odd.

    Raises:
        InvalidInputError: a window that is even, or too large for the images.

    References:
        Lee, Digital Image Enhancement and Noise Filtering by Use of Local Statistics, IEEE PAMI
        1980; scipy.signal.wiener. Ours mirrors images at their edges and does not pad with zeros.

    Example:
        >>> flat = torch.full((1, 1, 6, 6), 0.5)
        >>> torch.equal(wiener_filter(flat, 0.1), flat)
        True
    """
    noise = check_positive("noise_std", noise_std) ** 2
    side = check_whole("window", window, 1)
    if side % 2 == 0 or side // 2 >= min(images.shape[2:]):
        raise InvalidInputError(
            f"got window={window} for images of {tuple(images.shape[2:])}; needed an odd side "
            "that fits into them"
        )
    edged = F.pad(images.double(), (side // 2,) * 4, mode="reflect")
    mean = F.avg_pool2d(edged, side, stride=1)
    spread = (F.avg_pool2d(edged.square(), side, stride=1) - mean.square()).clamp(min=0)
    kept = (spread - noise).clamp(min=0) / spread.clamp(min=noise)
    return (mean + kept * (images - mean)).to(images.dtype)
