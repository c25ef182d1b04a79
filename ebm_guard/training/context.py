"""What an objective and its negatives may ask of the net that is being trained.

Random numbers hang on the seed, the number of the update and what they are for, never on a state
that grows: an interrupted run goes on bit by bit, and a rollback draws afresh under a new attempt.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import Forward, pixel_forward
from ebm_guard.training.class_losses import ClassLoss, make_class_loss


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of one update.

    Args:
        pixels: (B, C, H, W) in [0, 1], as they are: what energies are computed on.
        labels: (B,) int64 classes; -1 for an image without label, which the class loss leaves out
            and every term on images alone takes in.
        augmented: (B, C, H, W) in [0, 1] for the class loss; the very same tensor as ``pixels``
            where nothing is augmented.
        rows: (B,) int64, numbers in the training set.
    """

    pixels: Tensor
    labels: Tensor
    augmented: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Measured:
    """Energies of the given net on its own training images, before any update.

    A constant added to all logits moves every energy and no prediction, so a margin that was read
    off one net means nothing on another: margins start from these figures.

    Args:
        mean: E0, the mean energy.
        std: standard deviation, > 0.
        n: images measured.
    """

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, energies: Tensor) -> Measured:
        """Measure (N,) energies.

        Raises:
            InvalidInputError: fewer than two, or not finite.

        Example:
            >>> Measured.of(torch.tensor([-1.0, -3.0])).mean
            -2.0
        """
        values = energies.detach().double().flatten()
        if len(values) < 2 or not bool(torch.isfinite(values).all()):
            raise InvalidInputError(
                f"got {len(values)} energies; needed at least two, all finite, to set margins from"
            )
        return cls(float(values.mean()), max(float(values.std()), 1e-6), len(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {"mean": self.mean, "std": self.std, "n": self.n}


class PixelNet(nn.Module):
    """A classifier with its normalisation inside: [0, 1] pixels to logits.

    Args:
        classifier: around the working copy that is trained, in eval mode.
        autocast: dtype of convolutions and matrix products, such as bfloat16; None for that of
            the weights. Logits are float32 in any case.

    Raises:
        InvalidInputError: the normalisation is not known.
    """

    def __init__(self, classifier: EnergyClassifier, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(classifier.model, nn.Module):
            raise InvalidInputError(
                f"got a {type(classifier.model).__name__} as model; training needs an nn.Module"
            )
        self.model = classifier.model
        # Through a function: a module held as an attribute would be registered twice.
        self._forward = pixel_forward(classifier)
        self._classifier = classifier
        self._autocast = autocast

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, C) in float32 or better."""
        plain = self._autocast is None
        logits = self._forward(pixels).logits if plain else self._in_half(pixels)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _in_half(self, pixels: Tensor) -> Tensor:
        classifier = self._classifier
        if classifier.preprocessing is None:
            raise InvalidInputError("the normalisation is not known; give mean and std")
        inputs = classifier.preprocessing.normalize(pixels)
        with torch.autocast(pixels.device.type, dtype=self._autocast):
            return classifier.forward(inputs).logits


@dataclass
class Context:
    """The net of one training run, as an objective sees it.

    Args:
        net: pixels to logits, with gradients to the weights; may be wrapped for several processes.
        forward: pixels to output for gradients with respect to pixels: attacks and samplers. May
            be a folded copy of the net; see :class:`ebm_guard.sampling.folding.SamplingNet`.
        num_classes: C.
        measured: energies before training.
        updates: updates of the whole run.
        seed: of the run, >= 0.
        update: number of the present update, from 0.
        attempt: how often the run was rolled back.
        rank: of this process.
        world: number of processes.
        device: of the net.
        class_loss: from logits and labels to the mean over the labelled rows.
        classifier: around the net that is trained, for its features and its head; None where there
            is none.
    """

    net: Callable[[Tensor], Tensor]
    forward: Forward
    num_classes: int
    measured: Measured
    updates: int
    seed: int = 0
    update: int = 0
    attempt: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    class_loss: ClassLoss = field(default_factory=make_class_loss)
    classifier: EnergyClassifier | None = None

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute logits (B, C) with gradients to the weights."""
        return self.net(pixels)

    def together(self, **pixels: Tensor) -> dict[str, Tensor]:
        """Compute the logits of several sets of pixels in one forward pass, by name.

        Batch-norm statistics are fixed, so no set sees another. The same tensor under two names
        is run once. One pass is fewer kernels, and all that several processes have to agree on.

        Args:
            pixels: (B_i, C, H, W) by name; all of one image size.
        """
        unique: dict[int, Tensor] = {id(part): part for part in pixels.values()}
        logits = self.logits(torch.cat(list(unique.values())))
        parts = torch.split(logits, [len(part) for part in unique.values()])
        split = dict(zip(unique, parts, strict=True))
        return {name: split[id(part)] for name, part in pixels.items()}

    @torch.no_grad()
    def energies(self, pixels: Tensor) -> Tensor:
        """Compute energies (B,) without gradients, of the net as it is now."""
        return formulas.energy(self.forward(pixels).logits)

    @property
    def progress(self) -> float:
        """Share of the run that is behind, in [0, 1)."""
        return self.update / max(1, self.updates)

    def generator(self, purpose: str, *, shared: bool = False) -> np.random.Generator:
        """Return numpy's generator for this update and purpose.

        Args:
            purpose: a word; other words give other numbers.
            shared: the same on every process.
        """
        return np.random.default_rng(self._key(purpose, shared=shared))

    def torch_generator(self, purpose: str, *, shared: bool = False) -> torch.Generator:
        """Return torch's generator, on the device of the net, for this update and purpose."""
        state = np.random.SeedSequence(self._key(purpose, shared=shared)).generate_state(2)
        seed = (int(state[0]) << 32 | int(state[1])) & (2**63 - 1)
        return torch.Generator(device=self.device).manual_seed(seed)

    def _key(self, purpose: str, *, shared: bool) -> list[int]:
        rank = 0 if shared else self.rank
        return [self.seed, self.attempt, self.update, rank, zlib.crc32(purpose.encode())]
