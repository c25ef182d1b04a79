"""Where chains start: uniform noise, or a low-rank Gaussian of each class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError, NotFittedError
from ebm_guard.sampling.checks import check_number, check_whole

# Bytes of all classes' covariance factors; beyond it, the classes share one.
_FACTOR_BYTES = 2**26


class Start(ABC):
    """A distribution of points that chains start from.

    Attributes:
        name: a word for settings.
        shape: of one point, (C, H, W).
    """

    name = ""
    shape: tuple[int, ...]

    @abstractmethod
    def draw(self, labels: Tensor | int, generator: torch.Generator) -> Tensor:
        """Draw points in [0, 1], float32, on the device of the generator.

        Args:
            labels: (B,) int64 classes, or a number of points of no class in particular.
            generator: source of all random numbers.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was fitted: tensors and JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        del state


class UniformStart(Start):
    """Uniform noise in [0, 1], whatever the class (JEM).

    Args:
        shape: of one point, (C, H, W).

    Example:
        >>> UniformStart((1, 8, 8)).draw(4, torch.Generator()).shape
        torch.Size([4, 1, 8, 8])
    """

    name = "uniform"

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = check_shape(shape)

    def draw(self, labels: Tensor | int, generator: torch.Generator) -> Tensor:
        """Draw points in [0, 1]; see :meth:`Start.draw`."""
        count = labels if isinstance(labels, int) else len(labels)
        return torch.rand(count, *self.shape, generator=generator, device=generator.device)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"start": self.name}


class ClassGaussian(Start):
    """Each class' mean, plus a Gaussian on a coarse grid, plus small noise.

    ::

        x = clamp(mean_y + upsample(L_y z) + noise_std xi, 0, 1),    L_y L_y^T = S_y

    S_y is the covariance of the residuals averaged down to the grid: 192 x 192 for colour on
    8 x 8, where the covariance of all 32 x 32 values is 3072 x 3072. A class of n_y images gets
    S_y = w (own covariance) + (1 - w) (covariance within all classes), w = n_y / (n_y + D), D the
    values on the grid: small classes borrow from the others.

    Args:
        grid: side of the grid; images with a smaller side use their own.
        noise_std: standard deviation of the noise on each value.

    References:
        Yang and Ji, JEM++, ICCV 2021, section 4.2: a Gaussian of each class. Ours is of low rank
        and shrunk, draws only the chains that are needed, and holds no loop over them.

    Example:
        >>> pixels = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> start = ClassGaussian().fit(pixels, torch.arange(40) % 2)
        >>> start.draw(torch.tensor([0, 1, 1]), torch.Generator()).shape
        torch.Size([3, 1, 8, 8])
    """

    name = "class_gaussian"

    def __init__(self, grid: int = 8, noise_std: float = 0.02) -> None:
        self.grid, self.noise_std = (
            check_whole("grid", grid, 1),
            check_number("noise_std", noise_std),
        )
        self.shape: tuple[int, ...] = ()
        self._means = self._factors = torch.empty(0)
        self._counts = torch.empty(0, dtype=torch.int64)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 before :meth:`fit`."""
        return len(self._means)

    @torch.no_grad()
    def fit(self, pixels: Tensor, labels: Tensor, num_classes: int | None = None) -> ClassGaussian:
        """Measure means and covariances.

        Args:
            pixels: (N, C, H, W) in [0, 1].
            labels: (N,) int64; rows with label -1 are left out.
            num_classes: default: the highest label + 1. A class without images gets the mean of
                all.

        Raises:
            InvalidInputError: wrong shapes, values outside [0, 1], or fewer than two labelled rows.
        """
        _check_fit(pixels, labels)
        kept = labels >= 0
        values, labels = pixels[kept].detach().float(), labels[kept]
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if classes <= int(labels.max()):
            raise InvalidInputError(
                f"got label {int(labels.max())} with num_classes={classes}; labels are 0.."
                f"{classes - 1}"
            )
        self.shape = tuple(values.shape[1:])
        counts = torch.bincount(labels, minlength=classes)
        means = values.new_zeros(classes, *self.shape).index_add_(0, labels, values)
        means = means / counts.clamp(min=1).view(-1, 1, 1, 1)
        means[counts == 0] = values.mean(dim=0)
        side = self._side()
        coarse = F.adaptive_avg_pool2d(values - means[labels], side).flatten(1).double()
        self._means, self._counts = means, counts
        self._factors = _factors(coarse, labels, counts).to(means.dtype)
        return self

    def _side(self) -> tuple[int, int]:
        return min(self.grid, self.shape[1]), min(self.grid, self.shape[2])

    @torch.no_grad()
    def draw(self, labels: Tensor | int, generator: torch.Generator) -> Tensor:
        """Draw points in [0, 1]; see :meth:`Start.draw`.

        Without labels, classes are drawn in proportion to the images that they were fitted on.

        Raises:
            NotFittedError: :meth:`fit` has not run.
            InvalidInputError: a label outside the classes.
        """
        if not self.num_classes:
            raise NotFittedError("this start has no class means yet; call .fit(pixels, labels)")
        device = generator.device
        means, factors = self._means.to(device), self._factors.to(device)
        if isinstance(labels, int):
            shares = self._counts.double().to(device)
            labels = torch.multinomial(shares, labels, replacement=True, generator=generator)
        labels = labels.to(device)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise InvalidInputError(
                f"got labels {int(labels.min())}..{int(labels.max())}; this start knows the "
                f"classes 0..{self.num_classes - 1}"
            )
        z = torch.randn(len(labels), factors.shape[-1], generator=generator, device=device)
        own = factors[labels] if len(factors) > 1 else factors.expand(len(labels), -1, -1)
        coarse = torch.bmm(own, z.unsqueeze(2)).view(len(labels), self.shape[0], *self._side())
        smooth = F.interpolate(coarse, self.shape[1:], mode="bilinear", align_corners=False)
        noise = torch.randn(smooth.shape, generator=generator, device=device)
        return (means[labels] + smooth).add_(noise, alpha=self.noise_std).clamp_(0, 1)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "start": self.name,
            "grid": self.grid,
            "noise_std": self.noise_std,
            "images": int(self._counts.sum()),
            "shared_covariance": self.num_classes > 1 and len(self._factors) == 1,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return means, factors of the covariances, and counts."""
        return {
            "means": self._means.clone(),
            "factors": self._factors.clone(),
            "counts": self._counts.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            DataError: the state is not one of this start.
        """
        if missing := {"means", "factors", "counts"} - set(state):
            raise DataError(
                f"the state of a class_gaussian start lacks {', '.join(sorted(missing))}"
            )
        self._means, self._factors = state["means"].clone(), state["factors"].clone()
        self._counts = state["counts"].clone()
        self.shape = tuple(self._means.shape[1:])


def start_from_state(
    settings: Mapping[str, Any], shape: Sequence[int], state: Mapping[str, Any]
) -> Start:
    """Build a start from its settings and state.

    Raises:
        DataError: no start of this name.

    Example:
        >>> start_from_state({"start": "uniform"}, (1, 4, 4), {}).shape
        (1, 4, 4)
    """
    name = settings.get("start")
    start: Start
    if name == UniformStart.name:
        start = UniformStart(shape)
    elif name == ClassGaussian.name:
        start = ClassGaussian(settings["grid"], settings["noise_std"])
    else:
        raise DataError(f"got the state of a start {name!r}; known are uniform and class_gaussian")
    start.load_state_dict(state)
    return start


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one point as whole numbers, or refuse it.

    Raises:
        InvalidInputError: empty, or a size below 1.

    Example:
        >>> check_shape([1, 8, 8])
        (1, 8, 8)
    """
    if not isinstance(shape, Sequence) or not shape:
        raise InvalidInputError(
            f"got shape {shape!r}; needed the shape of one point, such as (3, 32, 32)"
        )
    return tuple(check_whole("shape", size, 1) for size in shape)


def _check_fit(pixels: Tensor, labels: Tensor) -> None:
    if not isinstance(pixels, Tensor) or not isinstance(labels, Tensor):
        raise InvalidInputError(
            f"got pixels as {type(pixels).__name__} and labels as {type(labels).__name__}; needed "
            "two tensors"
        )
    if pixels.ndim != 4 or not pixels.is_floating_point() or labels.shape != (len(pixels),):
        raise InvalidInputError(
            f"got pixels {tuple(pixels.shape)} {pixels.dtype} and labels {tuple(labels.shape)}; "
            "needed floating pixels (N, C, H, W) in [0, 1] and one label per image"
        )
    if int((labels >= 0).sum()) < 2:
        raise InvalidInputError("got fewer than two labelled images; a Gaussian needs more")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(f"got pixels in [{low:.4g}, {high:.4g}]; needed [0, 1]")


def _factors(residuals: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Factor the covariances: (K, D, D), or (1, D, D) where K of them would be too many."""
    size = residuals.shape[1]
    freedom = max(1, len(residuals) - int((counts > 0).sum()))
    pooled = residuals.T @ residuals / freedom
    shared = len(counts) * size * size * 4 > _FACTOR_BYTES
    covariances = [] if not shared else [pooled]
    for label in range(0 if shared else len(counts)):
        own = residuals[labels == label]
        weight = len(own) / (len(own) + size) if len(own) > 1 else 0.0
        mine = own.T @ own / max(1, len(own) - 1)
        covariances.append(weight * mine + (1 - weight) * pooled)
    # Not Cholesky: values that never change make a covariance singular.
    spread, axes = torch.linalg.eigh(torch.stack(covariances))
    factors: Tensor = axes * spread.clamp(min=0).sqrt().unsqueeze(1)
    return factors
