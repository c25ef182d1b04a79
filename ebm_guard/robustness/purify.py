"""Purification: move an image down its energy by SGLD, then classify what it became (JEM-k).

A classifier that refines its input is hard to attack by accident: its answers are random, and its
gradient runs through all steps of the sampler. An honest attack tries three gradients (see
:meth:`Purifier.hook`), each averaged over many draws, and takes the worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import Forward, pixel_forward, untouched
from ebm_guard.sampling.checks import check_number, check_whole
from ebm_guard.sampling.sampler import Chains, check_finite
from ebm_guard.sampling.sgld import SGLD, UNIT_BOX, noise_like

MODES = ("identity", "unrolled", "transfer")


@dataclass(frozen=True)
class Purification:
    """Settings of SGLD-refined inference.

    x_0 = x + s·xi_0,  x_{t+1} = P(x_t - clip(a·dE/dx(x_t)) + n·xi_t),  xi ~ N(0, 1): s
    ``start_noise_std``, a ``step_size``, n ``noise_std``, P onto the box [0, 1] and, with
    ``radius``, onto the pixels within ``radius`` of x. E(x) = -logsumexp f(x).

    The defaults are those of :meth:`ebm_guard.sampling.sgld.SGLD.short_run`: JEM's, rescaled to
    [0, 1] pixels, with a clip. They suit a net whose energy was trained; on any other they may
    wash the image out.

    Args:
        num_steps: k >= 0; 0 is the classifier as it is.
        step_size: a > 0, in pixel units.
        noise_std: n >= 0, in pixel units.
        start_noise_std: s >= 0, in pixel units.
        clip: largest change of a pixel by the gradient in one step, or None.
        radius: largest change of a pixel in all, or None for the box alone.
        num_chains: chains from every image; their logits are averaged.

    Raises:
        InvalidInputError: a number out of its range.

    References:
        Grathwohl et al., Your Classifier is Secretly an Energy Based Model, ICLR 2020, on
        robustness; Hill et al., Stochastic Security, ICLR 2021, which runs far longer chains.

    Example:
        >>> Purification(num_steps=0).random
        False
    """

    num_steps: int = 10
    step_size: float = 0.25
    noise_std: float = 0.005
    start_noise_std: float = 0.0
    clip: float | None = 0.1
    radius: float | None = None
    num_chains: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in (("num_steps", 0), ("num_chains", 1)):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        for name in ("step_size", "noise_std", "start_noise_std", "clip", "radius"):
            size, positive = getattr(self, name), name in ("step_size", "clip", "radius")
            if size is None and name in ("clip", "radius"):
                continue
            object.__setattr__(self, name, check_number(name, size, open_low=positive))

    @property
    def random(self) -> bool:
        """Whether two runs on one image may differ."""
        return self.start_noise_std > 0 or (self.num_steps > 0 and self.noise_std > 0)

    @property
    def chains(self) -> int:
        """Chains that are run; without random numbers they would all be the same."""
        return self.num_chains if self.random else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Refined:
    """What purification made of some images.

    Args:
        pixels: (B, chains, C, H, W) where the chains ended.
        logits: (B, classes), the mean over the chains.
    """

    pixels: Tensor
    logits: Tensor


class Purifier:
    """Refine pixels (B, C, H, W) by SGLD, then classify them.

    Every call draws fresh random numbers from a generator of its own; with the same seed the same
    sequence of calls repeats. Logits of several chains are averaged. The output has no features:
    those of several chains have no common meaning.

    Args:
        forward: from pixels in [0, 1] to the output of the bare classifier.
        settings: of the sampler.
        seed: whole numbers >= 0.
        device: where the model runs; default: the CPU.

    Example:
        >>> def forward(pixels):
        ...     return ClassifierOutput(torch.cat([pixels, 1 - pixels], dim=1).flatten(1), None)
        >>> purifier = Purifier(forward, Purification(2, noise_std=0.0))
        >>> purifier(torch.full((1, 1, 1, 1), 0.6)).logits.argmax(dim=1)
        tensor([0])
    """

    def __init__(
        self,
        forward: Forward,
        settings: Purification,
        *,
        seed: Sequence[int] = (0,),
        device: torch.device | None = None,
    ) -> None:
        self.forward, self.settings = forward, settings
        self._device = torch.device("cpu") if device is None else device
        self._generator = torch.Generator(self._device)
        self._sampler = SGLD(
            settings.num_steps, settings.step_size, settings.noise_std, clip=settings.clip
        )
        self.reseed(*seed)

    def reseed(self, *seed: int) -> None:
        """Start the random numbers anew."""
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        self._generator.manual_seed(int(state) % 2**63)

    def __call__(self, pixels: Tensor) -> ClassifierOutput:
        """Classify as deployed: refine by SGLD, then run the classifier; no gradient flows."""
        with torch.no_grad():
            return self.classify(self.refine(pixels))

    def refine(self, pixels: Tensor) -> Tensor:
        """Run the chains; return where they end, (B·chains, C, H, W), chains of an image adjacent.

        Raises:
            InvalidInputError: no gradient reaches the pixels.
            ModelOutputError: an energy or a gradient is not finite.
        """
        centre = self._copies(pixels.detach())
        points = self._start(centre)
        for _ in range(self.settings.num_steps):
            chains, _ = self._sampler.step(self._energy, Chains(points), self._generator)
            points = self._inside(chains.points, centre)
        return points

    def classify(self, points: Tensor) -> ClassifierOutput:
        """Classify refined images (B·chains, C, H, W): the mean logits of each image's chains."""
        logits = self.forward(points).logits
        if self.settings.chains > 1:
            logits = _by_image(logits, self.settings.chains).mean(dim=1)
        return ClassifierOutput(logits, None)

    def hook(self, mode: str) -> Forward:
        """Return the forward that an attack of this classifier asks.

        Without a gradient it is the deployed classifier, whatever the mode. Asked for a gradient:

        - ``identity``: the gradient at the refined image is taken for that at the image (BPDA);
        - ``unrolled``: the gradient runs through all steps of the sampler;
        - ``transfer``: the gradient of the bare classifier at the image.

        References:
            Athalye et al., Obfuscated Gradients Give a False Sense of Security, ICML 2018.

        Raises:
            InvalidInputError: unknown mode.
        """
        known = {"identity": self._identity, "unrolled": self._unrolled, "transfer": self.forward}
        if mode not in known:
            raise InvalidInputError(
                f"got mode {mode!r}; known are {', '.join(known)}{suggest(mode, known)}"
            )
        through = known[mode]

        def forward(pixels: Tensor) -> ClassifierOutput:
            wanted = torch.is_grad_enabled() and pixels.requires_grad
            return through(pixels) if wanted else self(pixels)

        return forward

    def _identity(self, pixels: Tensor) -> ClassifierOutput:
        points, copies = self.refine(pixels), self._copies(pixels)
        # The difference is 0 to the last bit, and its gradient the identity.
        return self.classify(points + (copies - copies.detach()))

    def _unrolled(self, pixels: Tensor) -> ClassifierOutput:
        centre = self._copies(pixels)
        with _plain_attention():
            points = self._start(centre)
            for _ in range(self.settings.num_steps):
                points = self._inside(self._moved(points), centre)
            return self.classify(points)

    def _moved(self, points: Tensor) -> Tensor:
        """Make the step of SGLD so that it can be differentiated."""
        values = self._energy(points)
        if not values.requires_grad:
            raise InvalidInputError(
                "no gradient reaches the pixels: the model detaches its input or runs under "
                "no_grad. Purification moves along dE/dx and needs one"
            )
        (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        check_finite(gradient, "gradients")
        change, clip = self.settings.step_size * gradient, self.settings.clip
        moved = points - (change if clip is None else change.clamp(-clip, clip))
        if self.settings.noise_std:
            moved = moved + self.settings.noise_std * noise_like(points, self._generator)
        return moved.clamp(*UNIT_BOX)

    def _start(self, centre: Tensor) -> Tensor:
        if not self.settings.start_noise_std:
            return centre
        noisy = centre + self.settings.start_noise_std * noise_like(centre, self._generator)
        return self._inside(noisy.clamp(*UNIT_BOX), centre)

    def _inside(self, points: Tensor, centre: Tensor) -> Tensor:
        radius = self.settings.radius
        if radius is None:
            return points
        return torch.maximum(torch.minimum(points, centre + radius), centre - radius)

    def _copies(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device).repeat_interleave(self.settings.chains, dim=0)

    def _energy(self, points: Tensor) -> Tensor:
        return formulas.energy(self.forward(points).logits)


def refine(
    classifier: EnergyClassifier,
    pixels: Tensor,
    settings: Purification | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Refined:
    """Classify images after refining them by SGLD; the user's model is left untouched.

    No protection by itself: robustness that purification seemed to give was broken by adaptive
    attacks before. Measure it with ``evaluate_robustness(..., AttackOptions(purify=settings))``.

    Args:
        classifier: the wrapped model.
        pixels: (B, C, H, W) in [0, 1], at the model's input size.
        settings: of the sampler; default: :class:`Purification`'s.
        seed: of all random numbers.
        batch_size: images per pass.

    Raises:
        InvalidInputError: pixels outside [0, 1], or no gradient reaches them.

    Example:
        >>> from ebm_guard.data.demo import demo_classifier
        >>> images = torch.rand(2, 1, 8, 8)
        >>> refine(EnergyClassifier(demo_classifier()), images, Purification(1)).logits.shape
        torch.Size([2, 8])
    """
    settings = settings or Purification()
    seed, batch_size = check_whole("seed", seed), check_whole("batch_size", batch_size, 1)
    classifier.pixels(pixels)  # refuses what is outside [0, 1]
    points, logits = [], []
    with untouched(classifier.model, seed):
        purifier = Purifier(
            pixel_forward(classifier), settings, seed=(seed,), device=classifier.device
        )
        for part in torch.split(pixels.detach(), batch_size):
            refined = purifier.refine(part)
            with torch.no_grad():
                logits.append(purifier.classify(refined).logits)
            points.append(_by_image(refined, settings.chains))
    return Refined(torch.cat(points), torch.cat(logits))


def _by_image(rows: Tensor, chains: int) -> Tensor:
    """Shape (B·chains, ...) as (B, chains, ...)."""
    return rows.reshape(-1, chains, *rows.shape[1:])


def _plain_attention() -> AbstractContextManager[None]:
    """Let attention run by plain operations: the fused ones have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
