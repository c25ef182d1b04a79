"""The density that a run offers, or the reason why it offers none."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import DataError, InvalidInputError, NotFittedError, UnsupportedModelError
from ebm_guard.files import replace_file
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import untouched
from ebm_guard.sampling.densities import KnownDensity, density_from_state
from ebm_guard.training.density.spaces import FeatureSpace, PixelSpace, Space

OFFERED, NOT_OFFERED = "offered", "not offered"
DENSITY_FILE = "density.safetensors"
SCHEMA = "ebm_guard.density/1"
_BASE = "base."


@dataclass(frozen=True)
class EnergyDensity:
    """log p(x) = log q(x) - E(x) - c of a fine-tuned net, where its checks agree.

    Args:
        status: ``offered`` or ``not offered``.
        reason: why, in one sentence.
        space: ``features`` or ``pixels``.
        base: q.
        constant: c, nats, refitted for these weights.
        checks: what was measured, as JSON types; see
            :func:`ebm_guard.training.density.checks.check_density`.
        weights: hash of the net's weights.
        head: W (C, D) and b (C,) on features; None on pixels.
        classifier: around the net, for images; None where it was loaded without.

    Example:
        >>> from ebm_guard.sampling.densities import GaussianMixture
        >>> normal = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.eye(1))
        >>> head = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
        >>> constant = math.log(2) + 0.5  # log of the integral, in closed form
        >>> density = EnergyDensity("offered", "", "features", normal, constant, {}, None, head)
        >>> round(float(density.log_density(torch.zeros(1, 1))), 4)  # two normals at -1 and 1
        -1.4189
    """

    status: str
    reason: str
    space: str
    base: KnownDensity
    constant: float
    checks: dict[str, Any] = field(repr=False)
    weights: str | None
    head: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    classifier: EnergyClassifier | None = field(default=None, repr=False, compare=False)

    @property
    def offered(self) -> bool:
        """Whether log densities may be asked for."""
        return self.status == OFFERED

    @torch.no_grad()
    def log_density(self, points: Tensor) -> Tensor:
        """Compute log p in nats, (N,) float64.

        Args:
            points: features (N, D), or images (N, C, H, W) in [0, 1] or uint8. A density of pixels
                takes an image at the middle of its cell on the grid of bytes,
                (round(255 x) + 1/2) / 256.

        Raises:
            NotFittedError: the density is not offered, with the reason; or images without a net.
            InvalidInputError: points of another shape, not of a floating type, or not finite;
                images outside [0, 1].
        """
        if not self.offered:
            raise NotFittedError(f"this run offers no density: {self.reason}")
        if points.ndim == 4 and points.dtype == torch.uint8:
            points = points.float() / 255
        if not points.is_floating_point() or not bool(torch.isfinite(points).all()):
            raise InvalidInputError(
                f"got points of {points.dtype}"
                + (", some NaN or infinite" if points.is_floating_point() else "")
                + f"; needed finite {self.space} of a floating type, or images (N, C, H, W) in "
                "[0, 1] or uint8"
            )
        if points.ndim == 4:
            points = self._of_images(points)
        if points.shape[1:] != self.base.shape:
            raise InvalidInputError(
                f"got points {tuple(points.shape)}; needed {self.space} (N, "
                f"{', '.join(map(str, self.base.shape))}), or images (N, C, H, W)"
            )
        energies = self._energy(points)
        logs: Tensor = self.base.log_density(points) - energies.double() - self.constant
        return logs

    def bits_per_dim(self, points: Tensor) -> Tensor:
        """Compute -log2 p(x) / D, (N,); of images, 8 more: bits of a byte.

        On features the figure hangs on their unit, and features that never change count with the
        width that was set for them: compare it with another density's on the same q only.

        Args:
            points: as for :meth:`log_density`.
        """
        return in_bits(self.log_density(points), self.base.dim, self.space)

    def _of_images(self, images: Tensor) -> Tensor:
        classifier = self._net()
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise InvalidInputError(
                f"got images from {float(images.min()):g} to {float(images.max()):g}; needed "
                "pixels in [0, 1] (before the model's normalisation), or uint8"
            )
        if self.space == "pixels":
            return ((images.double() * 255).round() + 0.5) / 256
        with untouched(classifier.model):
            if classifier.head is None or not classifier.head.found:
                # One image of the user's would prove nothing about a layer.
                classifier.probe_head(classifier.pixels(_made_up(images)))
            generator = torch.Generator(device=classifier.device or "cpu")
            return space_of(self.space).points(classifier, images, generator)

    def _energy(self, points: Tensor) -> Tensor:
        if self.head is not None:
            weight, bias = (part.double().to(points.device) for part in self.head)
            return formulas.energy(points.double() @ weight.T + bias)
        classifier = self._net()
        with untouched(classifier.model):
            return space_of(self.space).energy(classifier)(points)

    def _net(self) -> EnergyClassifier:
        if self.classifier is None:
            raise NotFittedError(
                "this density was loaded without its net; for images give it: "
                "load_density(path, classifier)"
            )
        return self.classifier

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types."""
        return {
            "status": self.status,
            "reason": self.reason,
            "space": self.space,
            "dim": self.base.dim,
            "base": self.base.name,
            "constant": self.constant,
            "checks": self.checks,
        }

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file: the known density, the head, c and the facts.

        Raises:
            NotFittedError: the density is not offered.
            DataError: the place cannot be written.
        """
        from safetensors.torch import save_file

        if not self.offered:
            raise NotFittedError(f"this run offers no density to save: {self.reason}")
        tensors = {f"{_BASE}{key}": part for key, part in self.base.state_dict().items()}
        if self.head is not None:
            tensors |= {"head.weight": self.head[0], "head.bias": self.head[1]}
        tensors = {key: part.detach().cpu().contiguous() for key, part in tensors.items()}
        facts = {"schema": SCHEMA, "weights": self.weights, **self.to_dict()}
        with replace_file(path) as new:
            save_file(tensors, new, {"facts": json.dumps(facts, allow_nan=False)})
        return Path(path)


def load_density(path: str | Path, classifier: EnergyClassifier | None = None) -> EnergyDensity:
    """Read what :meth:`EnergyDensity.save` wrote.

    Args:
        path: a ``density.safetensors``.
        classifier: around the fine-tuned net, for log densities of images; its weights are
            compared with those that the density belongs to.

    Raises:
        DataError: missing, damaged, of another schema, or of other weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        schema = facts["schema"]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"cannot read the density {path}: {error}") from None
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    try:
        made = _from_facts(facts, tensors, classifier)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the density {path} is damaged: {error}") from None
    if classifier is not None and classifier.weights_hash() != made.weights:
        raise DataError(
            f"the density {path} belongs to a net with other weights; load the "
            "weights.safetensors of the same folder into the model first"
        )
    return made


def _from_facts(
    facts: dict[str, Any], tensors: dict[str, Tensor], classifier: EnergyClassifier | None
) -> EnergyDensity:
    base = {key.removeprefix(_BASE): part for key, part in tensors.items() if key.startswith(_BASE)}
    constant = float(facts["constant"])
    if not math.isfinite(constant):
        raise ValueError(f"c is {constant}")
    made = density_from_state(facts["base"], base)
    head = _checked_head(tensors, made) if space_of(facts["space"]).name == "features" else None
    return EnergyDensity(
        status=facts["status"],
        reason=facts["reason"],
        space=facts["space"],
        base=made,
        constant=constant,
        checks=facts["checks"],
        weights=facts["weights"],
        head=head,
        classifier=classifier,
    )


def _checked_head(tensors: dict[str, Tensor], base: KnownDensity) -> tuple[Tensor, Tensor]:
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    if weight.ndim != 2 or weight.shape[1] != base.dim or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"its head has weights {tuple(weight.shape)} and biases {tuple(bias.shape)} for points "
            f"of {base.dim} values"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(bias).all()):
        raise ValueError("its head holds values that are not finite")
    return weight, bias


def _made_up(images: Tensor) -> Tensor:
    """Return 8 images of noise of this size, of different brightness."""
    generator = torch.Generator().manual_seed(0)
    made = torch.rand(8, *images.shape[1:], generator=generator)
    return made * torch.rand(8, 1, 1, 1, generator=generator)


def space_of(name: str) -> Space:
    """Return a space that is not fitted, for its points and energies.

    Raises:
        UnsupportedModelError: no space of this name.
    """
    spaces: dict[str, Space] = {"features": FeatureSpace(), "pixels": PixelSpace()}
    if name not in spaces:
        raise UnsupportedModelError(f"got a density on {name!r}; known are {', '.join(spaces)}")
    return spaces[name]


def in_bits(logs: Tensor, dim: int, space: str) -> Tensor:
    """Turn log densities in nats into bits per dimension.

    A density of bytes spread over cells of width 1/256 is 256^D times their probability: on
    pixels the figure is -log2 p / D + 8, and log p of a cell's points is at most, on average, that
    of the byte (Theis et al., A Note on the Evaluation of Generative Models, ICLR 2016, section 3).

    Example:
        >>> in_bits(torch.zeros(1), 4, "pixels")
        tensor([8.])
    """
    return -logs / (dim * math.log(2)) + (8 if space == "pixels" else 0)
