"""Where a density lives: on the frozen features of the head, or on small images.

A space says which points a batch gives, what their energies are with gradients to the weights,
and which known densities stand beside them: the ``base`` q that the energy tilts, and the
``noise`` n near the data that draws are made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.head import capture_inputs
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.sampling.checks import check_choice
from ebm_guard.sampling.densities import (
    GaussianMixture,
    KnownDensity,
    TruncatedNormalMixture,
    density_from_state,
)
from ebm_guard.sampling.sampler import EnergyFunction
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.density.first_rows import class_counts, fitting_rows
from ebm_guard.training.density.heads import (
    check_fixed,
    classifier_of,
    features_of,
    found_head,
    head_weights,
    linear_energies,
    set_discriminant,
)

BASES = ("gaussian", "mixture")
HEADS = ("discriminant", "given")
# Above it neither the noise is near enough to images for its logistic loss to say anything, nor
# do chains of the check arrive.
MOST_PIXELS = 1024
_CHUNK = 128


@dataclass(frozen=True)
class Contrasted:
    """What one forward pass gives a contrast of data with noise.

    Args:
        logits: (B, C) of the images for the class loss.
        points: (B, ...) the data, float64, without gradients.
        energy_data: (B,) with gradients to the weights.
        energy_noise: (M,) with gradients to the weights.
    """

    logits: Tensor
    points: Tensor
    energy_data: Tensor
    energy_noise: Tensor


class Space(ABC):
    """Points, energies and known densities of one kind.

    Attributes:
        name: ``features`` or ``pixels``.
    """

    name: str = ""

    def __init__(self) -> None:
        self._base: KnownDensity | None = None
        self._noise: KnownDensity | None = None

    @property
    def base(self) -> KnownDensity:
        """The density q that the energy tilts."""
        return _fitted(self._base)

    @property
    def noise(self) -> KnownDensity:
        """The density n that draws stand against the data."""
        return _fitted(self._noise)

    @abstractmethod
    def begin(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Fit the known densities on a first batch, and return the points they were fitted on.

        Raises:
            InvalidInputError: this space and what is trained do not go together.
        """

    @abstractmethod
    def contrast(self, context: Context, batch: TrainingBatch, noise: Tensor) -> Contrasted:
        """Run the net once on a batch, and on the noise where it needs the net."""

    @abstractmethod
    def points(
        self, classifier: EnergyClassifier, pixels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the points of images (N, C, H, W) in [0, 1], float64, without gradients."""

    @abstractmethod
    def energy(self, classifier: EnergyClassifier) -> EnergyFunction:
        """Return the energy of points, (N, ...) to (N,), differentiable in them."""

    def log_ratio(self, points: Tensor) -> Tensor:
        """Compute log q - log n of points, (N,): 0 where both are one density."""
        if self._base is self._noise:
            return torch.zeros(len(points), dtype=torch.float64, device=points.device)
        return self.base.log_density(points) - self.noise.log_density(points)

    def state_dict(self) -> dict[str, Any]:
        """Return both densities; one where they are the same."""
        if self._base is None or self._noise is None:
            return {}
        parts = {"base": self._base}
        if self._noise is not self._base:
            parts["noise"] = self._noise
        return {
            key: {"name": part.name, "tensors": part.state_dict()} for key, part in parts.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the densities."""
        if not state:
            self._base = self._noise = None
            return
        made = {
            key: density_from_state(part["name"], part["tensors"]) for key, part in state.items()
        }
        self._base = made["base"]
        self._noise = made.get("noise", self._base)


class FeatureSpace(Space):
    """The input h of the verified head, while nothing but the head is trained.

    E(h) = -logsumexp(W h + b). With ``gaussian`` the base is one Gaussian at the mean of all
    features, as wide as a class: the tilted density is then a mixture of Gaussians with means
    m + S w_k, which is linear discriminant analysis read as a density. With ``mixture`` the base
    holds one Gaussian per class, and the energy tilts that. The noise is the mixture in both.

    A head that was trained by cross-entropy says little about the density of h: a term v h + a
    on all its logits changes E and no probability. With ``discriminant`` the run starts from the
    head for which q exp(-E) is the mixture n itself, w_k = S^-1 (m_k - m) and
    b_k = log pi_k - (m_k S^-1 m_k - m S^-1 m) / 2, which linear discriminant analysis has.

    Args:
        base: ``gaussian`` or ``mixture``.
        head: ``given`` or ``discriminant``, the latter for ``gaussian`` alone.

    Raises:
        InvalidInputError: other words, or words that do not go together.
    """

    name = "features"

    def __init__(self, base: str = "mixture", head: str = "given") -> None:
        super().__init__()
        self.kind = check_choice("base", base, BASES)
        self.head = check_choice("head", head, HEADS)
        if (base, head) == ("mixture", "discriminant"):
            raise InvalidInputError(
                "got head='discriminant' with base='mixture'; the head of the discriminant turns "
                "one Gaussian into that mixture: use base='gaussian'"
            )

    def begin(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Fit the densities on features.

        Raises:
            InvalidInputError: weights outside of the head are trained, so that features move; a
                head that a discriminant cannot take the place of.
            UnsupportedModelError: the head was not found.
        """
        classifier = classifier_of(context)
        head = found_head(classifier, batch.pixels)
        check_fixed(classifier, head)
        pairs = [
            (features_of(context, head, pixels), labels) for pixels, labels in fitting_rows(batch)
        ]
        features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        counts = class_counts(batch)
        self._noise = self._base = mixture = GaussianMixture.fit(features, labels, counts=counts)
        if self.kind == "gaussian":
            self._base = base = GaussianMixture.fit(
                features, labels, components="one", counts=counts
            )
            if self.head == "discriminant":
                set_discriminant(head, base, mixture, context.num_classes)
        return features

    def contrast(self, context: Context, batch: TrainingBatch, noise: Tensor) -> Contrasted:
        """Run the net on the batch; data and noise then pass the head alone."""
        head = found_head(classifier_of(context), batch.pixels)
        with capture_inputs(head.layers) as inputs:
            logits = context.together(augmented=batch.augmented, data=batch.pixels)
        # The data are the last rows, alone or after the augmented images.
        features = head.features(inputs).detach()[-len(batch) :]
        data, off = linear_energies(head, features, noise)
        return Contrasted(logits["augmented"], features.double(), data, off)

    @torch.no_grad()
    def points(
        self, classifier: EnergyClassifier, pixels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return features (N, D)."""
        found_head(classifier, pixels)
        forward = pixel_forward(classifier, features=True)
        parts = [forward(part).features for part in torch.split(pixels, _CHUNK)]
        return torch.cat([part.double() for part in parts if part is not None])

    def energy(self, classifier: EnergyClassifier) -> EnergyFunction:
        """Return E(h) of the head as it is now."""
        weight, bias = (part.double() for part in head_weights(classifier))
        return lambda points: formulas.energy(F.linear(points.double(), weight, bias))


class PixelSpace(Space):
    """Small images themselves, on the box [0, 1].

    Images of bytes are points on a grid, where a density may be as high as it likes; noise
    inside each cell of the grid makes them fill the box: x = (byte + u) / 256. The base and the
    noise are one density, a mixture over the classes of products of cut-off normals.
    """

    name = "pixels"

    def begin(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Fit the density.

        Raises:
            InvalidInputError: the images have more than 1,024 values.
        """
        values = batch.pixels[0].numel()
        if values > MOST_PIXELS:
            raise InvalidInputError(
                f"got images {tuple(batch.pixels.shape[1:])} of {values:,} values; a density of "
                f"pixels is for at most {MOST_PIXELS:,}: no known noise is near larger images, so "
                "telling it from them is too easy to teach a density. Use space='features'"
            )
        pixels, labels = (torch.cat(parts) for parts in zip(*fitting_rows(batch), strict=True))
        points = dequantised(pixels, context.torch_generator("points"))
        self._base = self._noise = TruncatedNormalMixture.fit(
            points, labels, counts=class_counts(batch)
        )
        return points

    def contrast(self, context: Context, batch: TrainingBatch, noise: Tensor) -> Contrasted:
        """Run the net once on the images, the points and the noise."""
        points = dequantised(batch.pixels, context.torch_generator("dequantise"))
        logits = context.together(
            augmented=batch.augmented,
            data=points.to(batch.pixels),
            noise=noise.to(batch.pixels),
        )
        return Contrasted(
            logits["augmented"],
            points,
            formulas.energy(logits["data"]),
            formulas.energy(logits["noise"]),
        )

    def points(
        self, classifier: EnergyClassifier, pixels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the images with noise inside the cells of their grid."""
        return dequantised(pixels, generator)

    def energy(self, classifier: EnergyClassifier) -> EnergyFunction:
        """Return E(x) of the net as it is now."""
        forward = pixel_forward(classifier)
        dtype = next(
            (part.dtype for part in _parameters(classifier.model) if part.is_floating_point()),
            torch.float32,
        )
        return lambda points: torch.cat(
            [formulas.energy(forward(part).logits) for part in torch.split(points.to(dtype), 512)]
        )


def make_space(space: str, base: str | None = None, head: str = "given") -> Space:
    """Make a space by its name; ``base`` is ``mixture`` by default, and of features alone.

    Raises:
        InvalidInputError: unknown names, or ones that do not go together.

    Example:
        >>> make_space("features", "gaussian").name
        'features'
    """
    if check_choice("space", space, ("features", "pixels")) == "features":
        return FeatureSpace(base or "mixture", head)
    if base is not None:
        raise InvalidInputError(
            f"got base={base!r} with space='pixels', where q is a mixture of cut-off normals and "
            "nothing else; leave base out, or use space='features'"
        )
    if check_choice("head", head, HEADS) == "discriminant":
        raise InvalidInputError("got head='discriminant' with space='pixels'; it is of features")
    return PixelSpace()


def dequantised(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return (round(255 x) + u) / 256 with u uniform on [0, 1), float64.

    Example:
        >>> ends = dequantised(torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0))
        >>> bool((ends * 256).floor().equal(torch.tensor([0.0, 255.0]).double()))
        True
    """
    bytes_ = (pixels.double() * 255).round()
    uniform = torch.rand(
        pixels.shape, generator=generator, device=generator.device, dtype=torch.float64
    )
    return (bytes_ + uniform.to(bytes_.device)) / 256


def _parameters(model: Any) -> list[nn.Parameter]:
    return list(model.parameters()) if isinstance(model, nn.Module) else []


def _fitted(density: KnownDensity | None) -> KnownDensity:
    if density is None:
        raise NotFittedError("the densities are not fitted yet; the run begins with it")
    return density
