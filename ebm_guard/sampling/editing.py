"""Inpainting and denoising by chains: what a classifier's energy does to a damaged image.

Both ask one question about the energy: does going down it from a damaged image lead to the image
that was damaged? Each answer is measured against the truth, beside a method that knows nothing of
the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward, untouched
from ebm_guard.sampling.checks import check_choice, check_positive, check_whole
from ebm_guard.sampling.edited import Denoised, Inpainted, frame_steps
from ebm_guard.sampling.fills import surroundings_fill, wiener_filter
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.masked import check_mask, run_masked
from ebm_guard.sampling.sampler import Chains, EnergyFunction, Sampler, Samples, Trace
from ebm_guard.sampling.sgld import SGLD, noise_like
from ebm_guard.sampling.subject import (
    check_labels,
    check_range,
    class_energy,
    classifier_of,
    joined_trace,
    logits_of,
    pixel_sampler,
)

HOLE_STARTS = ("surroundings", "noise")
_PROBE = 8


def inpaint(
    model: Any,
    images: Tensor,
    known: Tensor,
    labels: Tensor | None = None,
    *,
    conditional: bool = False,
    sampler: str | Sampler = "sgld:short_run",
    num_steps: int | None = None,
    start: str = "surroundings",
    truth: bool = True,
    num_frames: int = 0,
    batch_size: int = 128,
    seed: int = 0,
) -> Inpainted:
    """Fill holes in images by chains on the unknown pixels, the known ones held fixed.

    Chains follow p(u | k), u the values in the hole and k the others; see
    :func:`~ebm_guard.sampling.masked.run_masked`. What was in the hole before is used for the
    measurement alone. The model is left as it was, also after an exception.

    Args:
        model: a Guard, an EnergyClassifier, or a model as ``ebm_guard.wrap`` takes it; its
            normalisation must be known.
        images: (N, C, H, W) in [0, 1].
        known: bool, (N, C, H, W), or broadcastable to it such as (N, 1, H, W); True = known.
        labels: (N,) int64, the true classes.
        conditional: go down E(x, y) of the labels, not E(x). Then the share named as the label
            tells little: the chains are told the answer.
        sampler: see :func:`~ebm_guard.sampling.making.make_sampler`. ``mala`` and ``hmc`` given by
            name bounce off the walls of [0, 1].
        num_steps: default: the sampler's own.
        start: ``surroundings`` (the smooth fill that chains are compared with: they can only change
            it) or ``noise`` (uniform).
        truth: False: what the images hold in the hole is not the truth; nothing is measured
            against it, and it may be anything.
        num_frames: pictures of the chains along their way to keep, 0 for none.
        batch_size: chains that run together.
        seed: of all random numbers, >= 0.

    Raises:
        InvalidInputError: settings, images, mask or labels that do not fit.
        ModelOutputError: an energy or a gradient is not finite.

    References:
        Du and Mordatch, Implicit Generation and Modeling with Energy-Based Models, NeurIPS 2019:
        inpainting by Langevin dynamics. Ours measures it beside a fill without a model.

    Example:
        >>> from ebm_guard.model import Preprocessing
        >>> from ebm_guard.sampling.fills import centre_mask
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> filled = inpaint(classifier, images, centre_mask(4, 4), num_steps=3)
        >>> torch.equal(filled.pixels["chains"][:, :, 0], images[:, :, 0])
        True
    """
    check_choice("start", start, HOLE_STARTS)
    if not isinstance(images, Tensor):
        raise InvalidInputError(f"got images as {type(images).__name__}; needed a tensor")
    known = check_mask(known, images.shape)
    if not truth:
        images = torch.where(known, images, 0.0)
    run = _Run(model, images, labels, conditional, sampler, num_steps, num_frames, seed)
    known, generator = known.cpu(), run.generator
    fill = surroundings_fill(images.float(), known.to(images.device)).to(generator.device)
    given = fill
    if start == "noise":
        noise = torch.rand(fill.shape, generator=generator, device=generator.device)
        given = torch.where(known.to(fill.device), fill, noise)

    def batch(rows: Tensor, energy: EnergyFunction, observe: Callable[..., None]) -> Samples:
        place = rows.to(generator.device)
        return run_masked(
            run.sampler, energy, given[place], known[rows].to(generator.device), generator,
            num_steps=run.steps, observe=observe,
        )  # fmt: skip

    stages = {"truth": images} if truth else {}
    found = run(batch, stages | {"given": given, "trivial": fill}, _batches(known, batch_size))
    hidden = (~known).float().mean()
    settings = run.settings() | {"start": start, "hidden_share": float(hidden)}
    return Inpainted(**found, labels=run.labels, settings=settings, known=known.contiguous())


def denoise(
    model: Any,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    noise_std: float = 0.1,
    noisy: Tensor | None = None,
    conditional: bool = False,
    sampler: str | Sampler = "sgld:short_run",
    num_steps: int | None = None,
    num_frames: int = 0,
    batch_size: int = 128,
    seed: int = 0,
) -> Denoised:
    """Take noise of known size out of images, the energy being the prior.

    Chains start at the noisy images y and go down the energy of the posterior::

        E(x) + |x - y|^2 / (2 noise_std^2)

    Args:
        model: as in :func:`inpaint`.
        images: (N, C, H, W) in [0, 1], the truth; None where it is not known.
        labels: (N,) int64, the true classes.
        noise_std: standard deviation of the noise, > 0, in units of [0, 1] pixels.
        noisy: (N, C, H, W), the images with their noise, not clamped; default: noise is added to
            ``images``. One of the two is needed.
        conditional: go down E(x, y) of the labels, not E(x).
        sampler: as in :func:`inpaint`. The pull has the curvature 1 / noise_std^2; a sampler given
            by name gets a step that fits it where its own is larger: noise_std^2 / 2 for SGLD (with
            ``sgld:langevin``: noise_std^2), noise_std^2 / 10 for MALA, noise_std / 10 for HMC.
        num_steps: default: the sampler's own.
        num_frames: pictures of the chains along their way to keep, 0 for none.
        batch_size: chains that run together.
        seed: of all random numbers, >= 0.

    Raises:
        InvalidInputError: settings or images that do not fit, or an SGLD whose step is too large
            for the pull.
        ModelOutputError: an energy or a gradient is not finite.

    References:
        The posterior of x given y = x + noise_std xi by Bayes' rule, with exp(-E) as prior. The
        filter beside it: Lee, IEEE PAMI 1980, which is told noise_std too.

    Example:
        >>> from ebm_guard.model import Preprocessing
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> denoised = denoise(classifier, torch.full((2, 1, 4, 4), 0.5), noise_std=0.1)
        >>> denoised.psnr("given").shape
        torch.Size([2])
    """
    std = check_positive("noise_std", noise_std)
    base = noisy if images is None else images
    if base is None:
        raise InvalidInputError("got neither images nor noisy images; needed one of them")
    _check_noisy(images, noisy)
    checked = base.clamp(0, 1) if images is None else base
    chosen = _fitting(sampler, std)
    run = _Run(model, checked, labels, conditional, chosen, num_steps, num_frames, seed)
    generator = run.generator
    if noisy is None:
        clean = base.to(generator.device, torch.float32)
        pulled = clean + std * noise_like(clean, generator)
    else:
        pulled = noisy.to(generator.device, torch.float32)
    given = pulled.clamp(0, 1)

    def batch(rows: Tensor, energy: EnergyFunction, observe: Callable[..., None]) -> Samples:
        centre = pulled[rows.to(generator.device)]

        def posterior(x: Tensor) -> Tensor:
            gap = (x - centre).square().flatten(1).sum(dim=1)
            return energy(x) + gap.to(x.device) / (2 * std**2)

        start = given[rows.to(generator.device)]
        return run.sampler.run(posterior, start, generator, num_steps=run.steps, observe=observe)

    stages = {} if images is None else {"truth": images}
    filtered = wiener_filter(pulled, std).clamp(0, 1)
    rows = torch.split(torch.arange(len(base)), check_whole("batch_size", batch_size, 1))
    found = run(batch, stages | {"given": given, "trivial": filtered}, iter(rows))
    settings = run.settings() | {"noise_std": std}
    return Denoised(**found, labels=run.labels, settings=settings, noise_std=std)


class _Run:
    """What inpainting and denoising share: checks, the lean net, frames, the verdict."""

    def __init__(
        self,
        model: Any,
        images: Tensor,
        labels: Tensor | None,
        conditional: bool,
        sampler: str | Sampler,
        num_steps: int | None,
        num_frames: int,
        seed: int,
    ) -> None:
        self.classifier: EnergyClassifier = classifier_of(model)
        self.forward = pixel_forward(self.classifier)
        if self.classifier.preprocessing is not None:
            self.classifier.preprocessing.check_pixels(images)
        if not len(images):
            raise InvalidInputError("got no images; needed at least one")
        check_labels(images, labels)
        labels = None if labels is None else labels.long()
        if conditional and labels is None:
            raise InvalidInputError("conditional=True needs labels=: the class of each image")
        self.images, self.labels, self.conditional = images, labels, conditional
        self.sampler = pixel_sampler(sampler)
        default = self.sampler.num_steps
        self.steps = default if num_steps is None else check_whole("num_steps", num_steps)
        self.seed = check_whole("seed", seed)
        self.wanted = frame_steps(self.steps, num_frames)
        device = self.classifier.device or torch.device("cpu")
        self.generator = torch.Generator(device=device).manual_seed(self.seed)
        self.net_settings: dict[str, Any] = {}

    def __call__(
        self,
        batch: Callable[[Tensor, EnergyFunction, Callable[..., None]], Samples],
        stages: Mapping[str, Tensor],
        rows: Iterator[Tensor],
    ) -> dict[str, Any]:
        """Run all batches, and measure every stage; return fields of :class:`Edited`."""
        pixels = {name: part.detach().float().cpu() for name, part in stages.items()}
        ends = torch.empty_like(pixels["given"])
        frames = torch.empty(len(self.wanted), *ends.shape) if self.wanted else None
        with untouched(self.classifier.model, self.seed):
            net = SamplingNet(self.classifier, self.images[:_PROBE].float())
            check_range(self.labels, net(self.images[:1].float()).logits.shape[1])
            order, parts = [], []
            for mine in rows:
                ids = None if self.labels is None else self.labels.cpu()[mine]
                energy = class_energy(net, ids if self.conditional else None)
                samples = batch(mine, energy, self._watch(frames, mine))
                ends[mine] = samples.points.detach().float().cpu()
                order.append(mine)
                parts.append(samples)
            pixels["chains"] = ends.clamp(0, 1)
            logits = {
                name: logits_of(self.forward, part, _batch_of(parts))
                for name, part in pixels.items()
            }
        self.net_settings = net.settings()
        back = torch.argsort(torch.cat(order))
        trace = joined_trace(parts)
        return {
            "pixels": pixels,
            "energy": {name: formulas.energy(part) for name, part in logits.items()},
            "predicted": {name: part.argmax(dim=1) for name, part in logits.items()},
            "trace": Trace(
                trace.energy[:, back], trace.gradient_norm[:, back], trace.saturation,
                trace.acceptance,
            ),
            "frames": frames,
            "frame_steps": self.wanted,
        }  # fmt: skip

    def _watch(self, frames: Tensor | None, rows: Tensor) -> Callable[[int, Chains], None]:
        def watch(step: int, chains: Chains) -> None:
            if frames is not None and step in self.wanted:
                frames[self.wanted.index(step), rows] = chains.points.detach().float().cpu()

        return watch

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            **self.sampler.settings(),
            "num_steps": self.steps,
            "conditional": self.conditional,
            "seed": self.seed,
            "net": self.net_settings,
        }


def _batches(known: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the rows of each batch: those that hide equally many values run together."""
    size = check_whole("batch_size", batch_size, 1)
    hidden = (~known).flatten(1).sum(dim=1)
    for count in sorted(set(hidden.tolist())):
        yield from torch.split(torch.nonzero(hidden == count).flatten(), size)


def _batch_of(parts: list[Samples]) -> int:
    return max(len(part.energy) for part in parts)


def _fitting(sampler: str | Sampler, std: float) -> Sampler:
    """Build a sampler whose steps fit the pull to the noisy image."""
    built: Sampler
    if sampler == "sgld:langevin":
        return pixel_sampler(sampler, step_size=std**2)
    built = pixel_sampler(sampler)
    if isinstance(sampler, str):
        # SGLD: half of the largest curvature's inverse, so that the pull alone is gone after a
        # few steps. The others reject what overshoots in any of hundreds of values.
        most = {"mala": std**2 / 10, "hmc": std / 10}.get(sampler, std**2 / 2)
        return pixel_sampler(sampler, step_size=min(getattr(built, "step_size", math.inf), most))
    if isinstance(built, SGLD) and built.step_size >= 2 * std**2:
        raise InvalidInputError(
            f"got step_size={built.step_size:g} of SGLD with noise_std={std:g}; steps of "
            f"2 noise_std^2 = {2 * std**2:.3g} and more overshoot the pull to the noisy image. "
            "Take a smaller step, or give the sampler by name"
        )
    return built


def _check_noisy(images: Tensor | None, noisy: Tensor | None) -> None:
    if noisy is None:
        return
    if not isinstance(noisy, Tensor) or not noisy.is_floating_point() or noisy.ndim != 4:
        raise InvalidInputError("noisy images must be a floating tensor (N, C, H, W)")
    if not bool(torch.isfinite(noisy).all()):
        raise InvalidInputError("got noisy images with NaN or infinite values; needed finite ones")
    if images is not None and images.shape != noisy.shape:
        raise InvalidInputError(
            f"got images {tuple(images.shape)} and noisy images {tuple(noisy.shape)}; needed one "
            "noisy image for each"
        )
