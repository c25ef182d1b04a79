"""Show what a classifier believes: chains down the energy of each class, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.model.isolation import Forward, pixel_forward, untouched
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.origins import image_shape, origin_of, probe_pixels, starting_points
from ebm_guard.sampling.sampler import Sampler, Trace
from ebm_guard.sampling.starts import Start
from ebm_guard.sampling.subject import (
    check_labels,
    class_energy,
    class_name,
    class_numbers,
    classifier_of,
    joined_trace,
    logits_of,
    pixel_sampler,
)


@dataclass(frozen=True, eq=False)
class SampleSheet:
    """Samples by class: rows ``k * per_class`` to ``(k + 1) * per_class`` are of ``classes[k]``.

    Args:
        pixels: (N, C, H, W) float32 in [0, 1], on the CPU.
        labels: (N,) int64, the class that a chain was made for.
        energy: (N,) E(x) of the user's own net at the pixels.
        joint_energy: (N,) E(x, y) there, y the label.
        predicted: (N,) int64, the most likely class there.
        start: (N, C, H, W), where the chains started.
        trace: energies (of what was sampled), gradient norms and more along the way.
        classes: the classes on the sheet.
        names: their names, where the model has them, else the numbers as text.
        settings: as JSON types.
    """

    pixels: Tensor
    labels: Tensor
    energy: Tensor
    joint_energy: Tensor
    predicted: Tensor
    start: Tensor
    trace: Trace
    classes: tuple[int, ...]
    names: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def per_class(self) -> int:
        """Samples of each class."""
        return len(self.labels) // len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, without the images, as JSON types."""
        rows = [
            {
                "class": label,
                "name": name,
                "n": int(mine.sum()),
                "energy": float(self.energy[mine].mean()),
                "joint_energy": float(self.joint_energy[mine].mean()),
                "predicted_as_wanted": float((self.predicted[mine] == label).float().mean()),
            }
            for label, name in zip(self.classes, self.names, strict=True)
            for mine in [self.labels == label]
        ]
        return {
            "n": len(self.labels),
            "classes": rows,
            "trace": self.trace.to_dict(),
            "settings": self.settings,
        }


def sample(
    model: Any,
    *,
    classes: Sequence[int | str] | None = None,
    per_class: int = 8,
    sampler: str | Sampler = "sgld:short_run",
    num_steps: int | None = None,
    start: str | Start | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    image_size: tuple[int, int] | None = None,
    conditional: bool = True,
    batch_size: int = 128,
    seed: int = 0,
) -> SampleSheet:
    """Run chains on a classifier's energy, class by class, and collect where they end.

    Chains go down E(x, y) = -f(x)[y] of their class. The energy of a net that no energy term has
    trained is no density: its samples show what the net reacts to, and are no images to expect
    much of. The model is left as it was, also after an exception.

    Args:
        model: a Guard, an EnergyClassifier, or a model as ``ebm_guard.wrap`` takes it; its
            normalisation must be known.
        classes: numbers or names; default: all, or the first 10 where there are more.
        per_class: chains of each class.
        sampler: see :func:`~ebm_guard.sampling.making.make_sampler`. ``mala`` and ``hmc`` given by
            name bounce off the walls of [0, 1].
        num_steps: default: the sampler's own.
        start: ``gaussian`` (a Gaussian of each class, fitted on the images), ``data`` (the images
            themselves), ``uniform`` (noise), or a :class:`~ebm_guard.sampling.starts.Start`.
            Default: ``gaussian`` with images and labels, else ``uniform``.
        images: (M, C, H, W) in [0, 1], for ``gaussian`` and ``data``.
        labels: (M,) int64.
        image_size: (H, W), where neither images nor the model's preprocessing tell.
        conditional: False: chains go down E(x) of no class; the start alone knows the class.
        batch_size: chains that run together.
        seed: of all random numbers, >= 0.

    Raises:
        InvalidInputError: settings that do not fit, or the normalisation is not known.
        ModelOutputError: an energy or a gradient is not finite.

    References:
        Grathwohl et al., ICLR 2020, section 5.1: samples of p(x|y).

    Example:
        >>> from ebm_guard.model import EnergyClassifier, Preprocessing
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> sheet = sample(classifier, per_class=2, num_steps=3, image_size=(4, 4))
        >>> sheet.pixels.shape, sheet.labels.tolist()
        (torch.Size([6, 1, 4, 4]), [0, 0, 1, 1, 2, 2])
    """
    classifier = classifier_of(model)
    per_class, seed = check_whole("per_class", per_class, 1), check_whole("seed", seed)
    batch_size = check_whole("batch_size", batch_size, 1)
    runner = pixel_sampler(sampler)
    steps = runner.num_steps if num_steps is None else check_whole("num_steps", num_steps)
    check_labels(images, labels)
    labels = None if labels is None else labels.long()
    shape = image_shape(classifier, images, image_size)
    forward = pixel_forward(classifier)
    generator = torch.Generator(device=classifier.device or "cpu").manual_seed(seed)
    with untouched(classifier.model, seed):
        probe = probe_pixels(images, shape, generator)
        with torch.no_grad():
            count = forward(probe).logits.shape[1]
        wanted = class_numbers(classes, classifier, count)
        ids = torch.tensor(wanted).repeat_interleave(per_class)
        origin = origin_of(start, shape, images, labels, count)
        points = starting_points(origin, images, labels, ids, generator)
        net = SamplingNet(classifier, probe)
        samples = [
            runner.run(
                class_energy(net, part_ids if conditional else None),
                part,
                generator,
                num_steps=steps,
            )
            for part, part_ids in zip(
                torch.split(points, batch_size),
                torch.split(ids.to(points.device), batch_size),
                strict=True,
            )
        ]
        pixels = torch.cat([part.points for part in samples]).clamp(0, 1)
        energy, joint, predicted = _judged(forward, pixels, ids, batch_size)
    return SampleSheet(
        pixels=pixels.cpu().contiguous(),
        labels=ids,
        energy=energy,
        joint_energy=joint,
        predicted=predicted,
        start=points.cpu(),
        trace=joined_trace(samples),
        classes=tuple(wanted),
        names=tuple(class_name(classifier, label) for label in wanted),
        settings={
            **runner.settings(),
            "num_steps": steps,
            "start": origin if isinstance(origin, str) else origin.settings()["start"],
            "conditional": conditional,
            "per_class": per_class,
            "seed": seed,
            "net": net.settings(),
        },
    )


def _judged(
    forward: Forward, pixels: Tensor, ids: Tensor, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E(x), E(x, y) and the prediction by the user's own net."""
    logits = logits_of(forward, pixels, batch_size)
    joint = formulas.joint_energy(logits).gather(1, ids[:, None]).squeeze(1)
    return formulas.energy(logits), joint, logits.argmax(dim=1)
