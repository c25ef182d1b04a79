"""What the commands over a classifier share: the classifier, its classes, its verdict on pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import Forward
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.making import make_sampler
from ebm_guard.sampling.sampler import EnergyFunction, Sampler, Samples, Trace

# Classes where none are named: more rows are not looked at.
_DEFAULT_CLASSES = 10


def classifier_of(model: Any) -> EnergyClassifier:
    """Find the classifier in a guard, which this room may not import.

    Raises:
        InvalidInputError: a guard without a model.

    Example:
        >>> classifier_of(torch.nn.Linear(2, 3).eval()).model
        Linear(in_features=2, out_features=3, bias=True)
    """
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


def pixel_sampler(sampler: str | Sampler, **settings: Any) -> Sampler:
    """Build a sampler for pixels: ``mala`` and ``hmc`` by name bounce off the walls of [0, 1].

    Example:
        >>> pixel_sampler("mala").box
        (0.0, 1.0)
    """
    if sampler in ("mala", "hmc"):
        return make_sampler(sampler, box=(0.0, 1.0), boundary="reflect", **settings)
    return make_sampler(sampler, **settings)


def class_numbers(
    classes: Sequence[int | str] | None, classifier: EnergyClassifier, count: int
) -> list[int]:
    """Turn numbers or names into numbers; None: all, or the first 10.

    Raises:
        InvalidInputError: no such class, none, or one twice.

    Example:
        >>> class_numbers(["2", 0], EnergyClassifier(torch.nn.Linear(2, 3).eval()), 3)
        [2, 0]
    """
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


def class_name(classifier: EnergyClassifier, label: int) -> str:
    """Return the name of a class where the model has one, else its number as text.

    Example:
        >>> class_name(EnergyClassifier(torch.nn.Linear(2, 3).eval()), 1)
        '1'
    """
    names = classifier.classes
    return str(label) if names is None or label >= len(names) else names[label]


def check_labels(images: Any, labels: Any) -> None:
    """Refuse what is no label for each image; None is no labels.

    Raises:
        InvalidInputError: no whole numbers (M,), or another number than there are images.

    Example:
        >>> check_labels(None, torch.tensor([0, 1]))
    """
    if labels is None:
        return
    whole = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if not whole or labels.ndim != 1:
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


def check_range(labels: Tensor | None, count: int) -> None:
    """Refuse labels that are no class of the model.

    Raises:
        InvalidInputError: outside 0..C-1, such as the -1 of an image without label.

    Example:
        >>> check_range(torch.tensor([0, 2]), 3)
    """
    if labels is None or not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise InvalidInputError(
            f"got labels in {low}..{high}; the classes are 0..{count - 1}"
            + (". A label of -1 means none: leave these images out" if low < 0 else "")
        )


def class_energy(net: SamplingNet, ids: Tensor | None) -> EnergyFunction:
    """Return E(x, y) of each chain's own class, or E(x) where ``ids`` is None.

    Args:
        net: what runs the classifier.
        ids: (B,) int64, on the device of the chains.
    """
    if ids is None:
        return net.energy
    own = ids[:, None]

    def joint(pixels: Tensor) -> Tensor:
        table = formulas.joint_energy(net(pixels).logits)
        return table.gather(1, own.to(table.device)).squeeze(1)

    return joint


@torch.no_grad()
def logits_of(forward: Forward, pixels: Tensor, batch_size: int) -> Tensor:
    """Return the logits (N, C) of the user's own net, on the CPU."""
    return torch.cat([forward(part).logits for part in torch.split(pixels, batch_size)]).cpu()


def joined_trace(samples: Sequence[Samples]) -> Trace:
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
