"""Morphing from one class into another by interpolated joint energies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.model.isolation import Forward, pixel_forward, untouched
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.origins import image_shape, origin_of, probe_pixels, starting_points
from ebm_guard.sampling.sampler import EnergyFunction, Sampler, Trace
from ebm_guard.sampling.starts import Start
from ebm_guard.sampling.subject import (
    check_labels,
    class_name,
    class_numbers,
    classifier_of,
    joined_trace,
    logits_of,
    pixel_sampler,
)

# Of distances: the fast way rounds small ones.
_EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True, eq=False)
class Morph:
    """Chains on their way from class a to class b.

    Args:
        frames: (F, N, C, H, W) float32 in [0, 1], on the CPU: where the chains ended at each t.
        t: (F,), from 0 to 1.
        start: (N, C, H, W), where they started.
        energy: (F, N), E(x) of the user's own net.
        joint_energy_a: (F, N), E(x, a).
        joint_energy_b: (F, N), E(x, b).
        probability_a: (F, N), p(a|x) = softmax, not calibrated.
        probability_b: (F, N).
        predicted: (F, N) int64, the most likely class.
        nearest_b: (N,) RMSE from each start to its nearest image of b, or None without images.
        nearest_b_end: (N,) the same from where each chain ended.
        traces: of the chains, for each t.
        a: the class that chains come from.
        b: the class that they go to.
        names: of the two, where the model has them, else the numbers as text.
        settings: as JSON types.
    """

    frames: Tensor
    t: Tensor
    start: Tensor
    energy: Tensor
    joint_energy_a: Tensor
    joint_energy_b: Tensor
    probability_a: Tensor
    probability_b: Tensor
    predicted: Tensor
    nearest_b: Tensor | None
    nearest_b_end: Tensor | None
    traces: tuple[Trace, ...]
    a: int
    b: int
    names: tuple[str, str]
    settings: dict[str, Any]

    @property
    def moved(self) -> Tensor:
        """RMSE of each chain (F, N) from its start, in units of [0, 1] pixels."""
        gap = (self.frames.double() - self.start.double()).square()
        return gap.flatten(2).mean(dim=2).sqrt()


def morph(
    model: Any,
    a: int | str,
    b: int | str,
    *,
    num_chains: int = 8,
    num_frames: int = 9,
    sampler: str | Sampler = "sgld:short_run",
    num_steps: int | None = None,
    start: str | Start | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Morph:
    """Lead chains from class a to class b, each frame starting where the last one ended.

    At t = 0, ..., 1 chains run on::

        E_t(x) = (1 - t) E(x, a) + t E(x, b) = -(1 - t) f(x)[a] - t f(x)[b]

    the product of experts with the weights 1 - t and t. How far the pixels go until the class
    changes, and whether they come nearer to real images of b, tells whether the net reacts to what
    b looks like. The model is left as it was, also after an exception.

    Args:
        model: a Guard, an EnergyClassifier, or a model as ``ebm_guard.wrap`` takes it; its
            normalisation must be known.
        a: number or name of the class to come from.
        b: of the class to go to.
        num_chains: how many.
        num_frames: values of t, >= 2.
        sampler: see :func:`~ebm_guard.sampling.making.make_sampler`. ``mala`` and ``hmc`` given by
            name bounce off the walls of [0, 1].
        num_steps: of each frame; default: the sampler's own.
        start: ``data`` (images of class a), ``gaussian``, ``uniform`` or a start. Default: ``data``
            with images and labels, else ``uniform``.
        images: (M, C, H, W) in [0, 1]; those of b are what distances are compared with.
        labels: (M,) int64.
        image_size: (H, W), where neither images nor the model's preprocessing tell.
        batch_size: chains that run together.
        seed: of all random numbers, >= 0.

    Raises:
        InvalidInputError: settings that do not fit, one class twice, or too few images of a.
        ModelOutputError: an energy or a gradient is not finite.

    References:
        Du, Li and Mordatch, Compositional Visual Generation with Energy Based Models, NeurIPS 2020,
        for sums of energies; the weights and the walk are ours.

    Example:
        >>> from ebm_guard.model import EnergyClassifier, Preprocessing
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> way = morph(classifier, 0, 2, num_chains=2, num_frames=3, image_size=(4, 4))
        >>> way.frames.shape, way.t.tolist()
        (torch.Size([3, 2, 1, 4, 4]), [0.0, 0.5, 1.0])
    """
    classifier = classifier_of(model)
    chains, seed = check_whole("num_chains", num_chains, 1), check_whole("seed", seed)
    count, size = check_whole("num_frames", num_frames, 2), check_whole("batch_size", batch_size, 1)
    runner = pixel_sampler(sampler)
    steps = runner.num_steps if num_steps is None else check_whole("num_steps", num_steps)
    check_labels(images, labels)
    labels = None if labels is None else labels.long()
    shape = image_shape(classifier, images, image_size)
    forward = pixel_forward(classifier)
    generator = torch.Generator(device=classifier.device or "cpu").manual_seed(seed)
    weights = torch.linspace(0, 1, count)
    with untouched(classifier.model, seed):
        probe = probe_pixels(images, shape, generator)
        with torch.no_grad():
            classes = forward(probe).logits.shape[1]
        one, two = class_numbers([a, b], classifier, classes)
        given = images is not None and labels is not None
        origin = origin_of(
            "data" if start is None and given else start, shape, images, labels, classes
        )
        ids = torch.full((chains,), one)
        points = starting_points(origin, images, labels, ids, generator)
        net = SamplingNet(classifier, probe)
        frames, traces = [], []
        here = points
        for t in weights.tolist():
            energy = between(net, one, two, t)
            samples = [
                runner.run(energy, part, generator, num_steps=steps)
                for part in torch.split(here, size)
            ]
            # Not clamped: a sampler without a box goes on from where it is.
            here = torch.cat([part.points for part in samples])
            frames.append(here.clamp(0, 1).float().cpu())
            traces.append(joined_trace(samples))
        figures = _figures(forward, torch.stack(frames), one, two, size)
    return Morph(
        frames=torch.stack(frames),
        t=weights,
        start=points.cpu(),
        **figures,
        nearest_b=_nearest(points.cpu(), images, labels, two),
        nearest_b_end=_nearest(frames[-1], images, labels, two),
        traces=tuple(traces),
        a=one,
        b=two,
        names=(class_name(classifier, one), class_name(classifier, two)),
        settings={
            **runner.settings(),
            "num_steps": steps,
            "num_frames": count,
            "start": origin if isinstance(origin, str) else origin.settings()["start"],
            "seed": seed,
            "net": net.settings(),
        },
    )


def between(net: Callable[[Tensor], Any], a: int, b: int, t: float) -> EnergyFunction:
    """Return (1 - t) E(x, a) + t E(x, b) as a function of pixels.

    Args:
        net: from pixels to an output with ``logits`` (B, C).
        a: the class at t = 0.
        b: the class at t = 1.
        t: in [0, 1].
    """

    def energy(pixels: Tensor) -> Tensor:
        table = formulas.joint_energy(net(pixels).logits)
        return (1 - t) * table[:, a] + t * table[:, b]

    return energy


def _figures(
    forward: Forward, frames: Tensor, a: int, b: int, batch_size: int
) -> dict[str, Tensor]:
    """Measure every frame by the user's own net."""
    count, chains = frames.shape[:2]
    logits = logits_of(forward, frames.flatten(0, 1), batch_size)
    joint, log_p = formulas.joint_energy(logits), formulas.log_probabilities(logits)

    def shaped(values: Tensor) -> Tensor:
        return values.view(count, chains)

    return {
        "energy": shaped(formulas.energy(logits)),
        "joint_energy_a": shaped(joint[:, a]),
        "joint_energy_b": shaped(joint[:, b]),
        "probability_a": shaped(log_p[:, a].exp()),
        "probability_b": shaped(log_p[:, b].exp()),
        "predicted": shaped(logits.argmax(dim=1)),
    }


def _nearest(pixels: Tensor, images: Tensor | None, labels: Tensor | None, b: int) -> Tensor | None:
    """Return the RMSE (N,) from each row to its nearest image of class b; None without any."""
    if images is None or labels is None or not bool((labels == b).any()):
        return None
    others = images[labels.to(images.device) == b].cpu().double().flatten(1)
    found: Tensor = torch.cdist(pixels.double().flatten(1), others, compute_mode=_EXACT)
    return found.amin(dim=1).div(pixels[0].numel() ** 0.5)
