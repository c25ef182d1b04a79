"""Show what a classifier believes: chains down the energy of each class, on one sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import Forward, pixel_forward, untouched
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.making import make_sampler
from ebm_guard.sampling.sampler import EnergyFunction, Sampler, Samples, Trace
from ebm_guard.sampling.starts import ClassGaussian, Start, UniformStart

STARTS = ("gaussian", "uniform", "data")
# Classes on a sheet where none are named: more rows are not looked at.
_DEFAULT_CLASSES = 10
_PROBE = 8


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
        >>> from ebm_guard.model import Preprocessing
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
        >>> classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> sheet = sample(classifier, per_class=2, num_steps=3, image_size=(4, 4))
        >>> sheet.pixels.shape, sheet.labels.tolist()
        (torch.Size([6, 1, 4, 4]), [0, 0, 1, 1, 2, 2])
    """
    classifier = _classifier(model)
    per_class, seed = check_whole("per_class", per_class, 1), check_whole("seed", seed)
    batch_size = check_whole("batch_size", batch_size, 1)
    runner = _sampler(sampler)
    steps = runner.num_steps if num_steps is None else check_whole("num_steps", num_steps)
    _check_labels(images, labels)
    shape = _shape(classifier, images, image_size)
    forward = pixel_forward(classifier)
    generator = torch.Generator(device=classifier.device or "cpu").manual_seed(seed)
    with untouched(classifier.model, seed):
        probe = _probe(images, shape, generator)
        with torch.no_grad():
            count = forward(probe).logits.shape[1]
        wanted = _wanted(classes, classifier, count)
        ids = torch.tensor(wanted).repeat_interleave(per_class)
        origin = _origin(start, shape, images, labels, count)
        points = _points(origin, images, labels, ids, generator)
        net = SamplingNet(classifier, probe)
        samples = [
            runner.run(_energy(net, part_ids, conditional), part, generator, num_steps=steps)
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
        trace=_joined(samples),
        classes=tuple(wanted),
        names=tuple(_name(classifier, label) for label in wanted),
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


def _classifier(model: Any) -> EnergyClassifier:
    """Find the classifier in a guard, which this room may not import."""
    if isinstance(model, EnergyClassifier):
        return model
    inner = getattr(model, "classifier", None)
    if isinstance(inner, EnergyClassifier):
        return inner
    if inner is None and hasattr(model, "threshold") and hasattr(model, "calibrator"):
        raise InvalidInputError(
            "this guard holds no model (it was fitted on stored logits); samples need one"
        )
    return EnergyClassifier(model)


def _sampler(sampler: str | Sampler) -> Sampler:
    if sampler in ("mala", "hmc"):
        return make_sampler(sampler, box=(0.0, 1.0), boundary="reflect")
    return make_sampler(sampler)


def _shape(
    classifier: EnergyClassifier, images: Tensor | None, image_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    if image_size is not None:
        _check_size(image_size)
    preprocessing = classifier.preprocessing
    if images is not None and preprocessing is not None:
        preprocessing.check_pixels(images)
        channels, height, width = images.shape[1:]
        if image_size is not None and tuple(image_size) != (height, width):
            raise InvalidInputError(
                f"got image_size={tuple(image_size)} and images of {(height, width)}; give one of "
                "the two"
            )
        return int(channels), int(height), int(width)
    size = image_size or (None if preprocessing is None else preprocessing.image_size)
    if preprocessing is None or size is None:
        raise InvalidInputError(
            "the size or the normalisation of this model's images is not known; give image_size= "
            "or images=, and wrap the model with mean= and std="
        )
    return preprocessing.channels, int(size[0]), int(size[1])


def _check_size(image_size: Any) -> None:
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise InvalidInputError(f"got image_size={image_size!r}; needed (height, width)")
    for side in image_size:
        check_whole("image_size", side, 1)


def _check_labels(images: Any, labels: Any) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        came = (
            f"{labels.dtype} of shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise InvalidInputError(f"got labels as {came}; needed a tensor (M,) of whole numbers")
    if isinstance(images, Tensor) and len(images) != len(labels):
        raise InvalidInputError(
            f"got {len(images)} images and {len(labels)} labels; needed one label per image"
        )


def _probe(
    images: Tensor | None,
    shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Tensor:
    if images is not None and len(images):
        return images[:_PROBE].float()
    return UniformStart(shape).draw(_PROBE, generator)


def _wanted(
    classes: Sequence[int | str] | None, classifier: EnergyClassifier, count: int
) -> list[int]:
    if classes is None:
        return list(range(min(count, _DEFAULT_CLASSES)))
    names = classifier.classes or ()
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise InvalidInputError(f"got classes={classes!r}; needed a list of numbers or names")
    found = []
    for given in classes:
        if isinstance(given, str) and given in names:
            found.append(names.index(given))
        elif str(given).isdecimal() and int(given) < count:
            found.append(int(given))
        else:
            hint = suggest(str(given), names)
            raise InvalidInputError(
                f"got class {given!r}; the classes are 0..{count - 1}, or their names{hint}"
            )
    if not found or len(set(found)) != len(found):
        raise InvalidInputError(f"got classes {list(classes)}; needed at least one, none twice")
    return found


def _origin(
    start: str | Start | None,
    shape: tuple[int, ...],
    images: Tensor | None,
    labels: Tensor | None,
    count: int,
) -> Start | str:
    """Return the distribution that chains start from, or ``data``."""
    if isinstance(start, Start):
        if start.shape != shape:
            raise InvalidInputError(f"got a start of shape {start.shape}; images are {shape}")
        return start
    known = start is None or start in STARTS
    if not known:
        raise InvalidInputError(
            f"got start={start!r}; known are {', '.join(STARTS)}{suggest(str(start), STARTS)}"
        )
    given = images is not None and labels is not None
    if start == "uniform" or (start is None and not given):
        return UniformStart(shape)
    if images is None or labels is None:
        raise InvalidInputError(f"start={start!r} needs images= and labels=; or use 'uniform'")
    return "data" if start == "data" else ClassGaussian().fit(images, labels, count)


def _points(
    origin: Start | str,
    images: Tensor | None,
    labels: Tensor | None,
    ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    if isinstance(origin, Start):
        return origin.draw(ids, generator)
    if images is None or labels is None:
        raise InvalidInputError("start='data' needs images= and labels=")
    rows = torch.empty_like(ids)
    for label in sorted(set(ids.tolist())):
        mine, own = ids == label, torch.nonzero(labels.cpu() == label).flatten()
        need = int(mine.sum())
        if len(own) < need:
            raise InvalidInputError(
                f"got {len(own)} images of class {label} for {need} chains; give more images, or "
                "lower per_class"
            )
        order = torch.randperm(len(own), generator=generator, device=generator.device).cpu()
        rows[mine] = own[order[:need]]
    return images[rows.to(images.device)].to(generator.device, torch.float32)


def _energy(net: SamplingNet, ids: Tensor, conditional: bool) -> EnergyFunction:
    def joint(pixels: Tensor) -> Tensor:
        table = formulas.joint_energy(net(pixels).logits)
        return table.gather(1, ids[:, None]).squeeze(1)

    return joint if conditional else net.energy


@torch.no_grad()
def _judged(
    forward: Forward, pixels: Tensor, ids: Tensor, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E(x), E(x, y) and the prediction by the user's own net."""
    logits = torch.cat([forward(part).logits for part in torch.split(pixels, batch_size)]).cpu()
    joint = formulas.joint_energy(logits).gather(1, ids[:, None]).squeeze(1)
    return formulas.energy(logits), joint, logits.argmax(dim=1)


def _joined(samples: Sequence[Samples]) -> Trace:
    """Put the traces of several batches side by side; shares are weighted by their chains."""
    weights = np.array([len(part.energy) for part in samples], dtype=np.float64)
    traces = [part.trace for part in samples]

    def mean(parts: list[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        shares = torch.from_numpy(weights / weights.sum()).float()
        return (torch.stack(known) * shares[:, None]).sum(dim=0)

    return Trace(
        energy=torch.cat([trace.energy for trace in traces], dim=1),
        gradient_norm=torch.cat([trace.gradient_norm for trace in traces], dim=1),
        saturation=mean([trace.saturation for trace in traces]),
        acceptance=mean([trace.acceptance for trace in traces]),
    )


def _name(classifier: EnergyClassifier, label: int) -> str:
    names = classifier.classes
    return str(label) if names is None or label >= len(names) else names[label]
