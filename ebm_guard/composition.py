"""Composition of energies: products, mixtures, and classes joined by and, or and not.

An energy E stands for the unnormalised density exp(-E). Sums and soft minima of energies are again
energies, and no model is trained for them::

    product      sum_m w_m E_m                     exp(-E) = prod_m exp(-E_m)^w_m
    mixture      -log sum_m pi_m exp(-E_m)         exp(-E) = sum_m pi_m exp(-E_m)
    conjunction  E_a + E_b                         a and b
    disjunction  -log(exp(-E_a) + exp(-E_b))       a or b
    negation     E_a - alpha E_b                   a and not b

Pure, differentiable functions. Energies of different models have different offsets and units, on
which a mixture and a disjunction depend: standardise them first, as
:class:`ebm_guard.model.EnergyEnsemble` does.

References:
    Hinton, Training Products of Experts by Minimizing Contrastive Divergence, 2002 (product); Du,
    Li and Mordatch, Compositional Visual Generation with Energy Based Models, NeurIPS 2020
    (conjunction, disjunction, negation).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebm_guard.energy import joint_energy
from ebm_guard.errors import InvalidInputError


def product(energies: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Compute the energy of a product of experts, sum_m w_m E_m.

    Args:
        energies: M tensors of one shape.
        weights: M numbers w_m; default: 1 each. 1/M each gives the geometric mean of the experts.

    Returns:
        The shape of one energy.

    Raises:
        InvalidInputError: no energies, other shapes, or weights that are not M finite numbers.

    References:
        Hinton, 2002.

    Example:
        >>> product([torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])], [1.0, 2.0])
        tensor([2., 3.])
    """
    stacked = _stacked(energies)
    if weights is None:
        return stacked.sum(dim=0)
    found = _numbers(weights, len(stacked), "finite numbers", -math.inf)
    total: Tensor = torch.tensordot(stacked.new_tensor(found), stacked, dims=1)
    return total


def mixture(energies: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Compute the energy of a mixture, -log sum_m pi_m exp(-E_m).

    Args:
        energies: M tensors of one shape.
        weights: M positive numbers, divided by their sum to give pi_m; default: 1/M each.

    Returns:
        The shape of one energy.

    Raises:
        InvalidInputError: no energies, other shapes, or weights that are not M positive numbers.

    Example:
        >>> mixture([torch.tensor([1.0]), torch.tensor([1.0])])
        tensor([1.])
    """
    stacked = _stacked(energies)
    given = [1.0] * len(stacked) if weights is None else weights
    found = _numbers(given, len(stacked), "numbers > 0", 0.0)
    logs = stacked.new_tensor([math.log(weight / sum(found)) for weight in found])
    shape = (-1, *[1] * (stacked.ndim - 1))
    return -torch.logsumexp(logs.view(shape) - stacked, dim=0)


def conjunction(*energies: Tensor) -> Tensor:
    """Compute the energy of "all of these", E_1 + E_2 + ...

    Example:
        >>> conjunction(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([3.])
    """
    return product(energies)


def disjunction(*energies: Tensor) -> Tensor:
    """Compute the energy of "any of these", -log(exp(-E_1) + exp(-E_2) + ...).

    A sum of the densities as they are, where :func:`mixture` takes their mean: log M lower.

    Example:
        >>> round(float(disjunction(torch.tensor([0.0]), torch.tensor([0.0]))), 4)
        -0.6931
    """
    return -torch.logsumexp(-_stacked(energies), dim=0)


def negation(energy: Tensor, other: Tensor, alpha: float = 1.0) -> Tensor:
    """Compute the energy of "this and not the other", E - alpha E_other.

    The density exp(-E) / exp(-E_other)^alpha. It need not be bounded from below, so that
    it may have no normaliser: an order of inputs, and with a small alpha a target for chains.

    Args:
        energy: any shape.
        other: the same shape.
        alpha: strength > 0 of the negation.

    Raises:
        InvalidInputError: other shapes, or alpha is not a positive number.

    Example:
        >>> negation(torch.tensor([1.0]), torch.tensor([2.0]), alpha=0.5)
        tensor([0.])
    """
    first, second = _stacked([energy, other])
    found: Tensor = first - _numbers([alpha], 1, "number > 0", 0.0)[0] * second
    return found


def class_energy(
    logits: Tensor,
    *,
    all_of: Sequence[int] = (),
    any_of: Sequence[int] = (),
    none_of: Sequence[int] = (),
    alpha: float = 1.0,
) -> Tensor:
    """Compute the energy of a question about classes, such as "a and not b".

    E = sum_{a in all_of} E(x, a) - log sum_{o in any_of} exp(-E(x, o))
        - alpha sum_{n in none_of} E(x, n), with the joint energy E(x, y) = -f(x)[y].

    Works for the logits of any classifier, an ensemble among them. Low = the answer is yes. A
    softmax classifier was trained to tell its classes apart, never that an image may show two of
    them: use the order of images that it gives, and look at them.

    Args:
        logits: (B, C).
        all_of: classes that must all be there.
        any_of: classes of which one must be there.
        none_of: classes that must not be there.
        alpha: strength > 0 of the negation.

    Returns:
        (B,), float32 or float64.

    Raises:
        InvalidInputError: no class is asked for, only negations, or no such class.

    References:
        Du, Li and Mordatch, NeurIPS 2020, on the class energies of one classifier.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [3.0, 2.0, 1.0]])
        >>> class_energy(logits, all_of=[0], none_of=[1])
        tensor([-3., -1.])
    """
    energies = joint_energy(logits)
    count = logits.shape[1]
    every, some, none = (
        _labels(name, classes, count)
        for name, classes in (("all_of", all_of), ("any_of", any_of), ("none_of", none_of))
    )
    parts = [energies[:, label] for label in every]
    if some:
        parts.append(disjunction(*(energies[:, label] for label in some)))
    if not parts:
        raise InvalidInputError(
            "got no class in all_of and any_of; needed at least one: an energy of 'not b' alone "
            "has no bound from below"
        )
    found = conjunction(*parts)
    for label in none:
        found = negation(found, energies[:, label], alpha)
    return found


def _stacked(energies: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(energy.shape) for energy in energies]
    if not shapes or len(set(shapes)) > 1:
        raise InvalidInputError(f"got energies of shapes {shapes}; needed one or more of one shape")
    kinds = {energy.dtype for energy in energies if not energy.is_floating_point()}
    if kinds:
        raise InvalidInputError(f"got energies of dtype {kinds.pop()}; needed floating tensors")
    return torch.stack(list(energies))


def _labels(name: str, classes: Any, count: int) -> list[int]:
    """Return classes as a list of whole numbers; a tensor or an array may hold them too."""
    given = classes.tolist() if hasattr(classes, "tolist") else classes
    known = isinstance(given, (list, tuple, set, frozenset, range))
    listed: list[Any] = list(given) if known else [None]
    found = [
        operator.index(label)
        for label in listed
        if hasattr(label, "__index__") and not isinstance(label, bool)
    ]
    if len(found) < len(listed) or not all(0 <= label < count for label in found):
        raise InvalidInputError(
            f"got {name}={classes!r} for {count} classes; needed a list of labels in 0..{count - 1}"
        )
    return found


def _numbers(values: Sequence[float], count: int, words: str, above: float) -> list[float]:
    found = [float(value) for value in values]
    if len(found) != count or not all(above < value < math.inf for value in found):
        raise InvalidInputError(f"got {found}; needed {count} {words}")
    return found
