"""Measure what tells masked gradients, where an attack does not show it by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ebm_guard.attacks.engine import Query, climb
from ebm_guard.attacks.goals import Misclassify, wrong
from ebm_guard.attacks.gradient import PGD
from ebm_guard.attacks.rows import Examples
from ebm_guard.errors import UnsupportedModelError, first_line
from ebm_guard.model.classifier import check_kind
from ebm_guard.model.isolation import Forward

LARGE_EPSILONS = (16 / 255, 32 / 255, 64 / 255)
CLOSED = "no gradient reaches the pixels"
_PROBE = 32
# Two passes on a GPU may differ by this share of the largest logit.
_ROUNDING = 1e-4
_OWN_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


@dataclass(frozen=True)
class Count:
    """How many of how many images.

    Args:
        count: 0 <= count <= n.
        n: images looked at.
    """

    count: int
    n: int


@dataclass(frozen=True)
class CurvePoint:
    """Images still right at one budget.

    Args:
        epsilon: in pixel units.
        standing: images that are still right.
        n: images right without attack.
    """

    epsilon: float
    standing: int
    n: int


@dataclass(frozen=True)
class StepsGain:
    """What twice the steps gained.

    Args:
        num_steps: K.
        gained: images that 2K steps fooled and K steps did not.
        n: images right without attack.
    """

    num_steps: int
    gained: int
    n: int


@torch.no_grad()
def random_forward(forward: Forward, examples: Examples) -> bool:
    """Tell whether two forward passes of the same images (up to 32) differ.

    By more than 1e-4 of the largest logit: kernels of a GPU may add numbers in another order.

    Args:
        forward: the attacked function.
        examples: real images.
    """
    pixels = examples.pixels[:_PROBE]
    one, two = forward(pixels).logits.double(), forward(pixels).logits.double()
    largest = one.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()
    apart = (one - two).abs()
    changed = torch.isfinite(one) != torch.isfinite(two)
    return bool(((apart > _ROUNDING * largest) | changed).any())


@torch.no_grad()
def output_problem(forward: Forward, examples: Examples) -> str:
    """Say that the outputs are probabilities or log-probabilities, or '' for logits."""
    try:
        check_kind(forward(examples.pixels[:_PROBE]).logits)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def forward_problem(forward: Forward, examples: Examples) -> str:
    """Say why no gradient reaches the pixels, or that the model computes its own, or ''.

    A model that differentiates in its forward pass (purification, test-time training) chooses its
    answer by what it is shown; attacks see the derivative of that choice or nothing of it.

    Args:
        forward: the attacked function.
        examples: real images; up to 32 are used.
    """
    watch = _Watch()
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = examples.pixels[:_PROBE].detach().clone().requires_grad_()
        try:
            with watch:
                logits = forward(leaf).logits
        except RuntimeError as error:
            return f"{CLOSED}: the model fails with gradients switched on ({first_line(error)})"
        found: Tensor | None = None
        if logits.requires_grad:
            (found,) = torch.autograd.grad(logits.double().sum(), leaf, allow_unused=True)
    if found is None:
        return f"{CLOSED}: the model detaches its input, leaves torch, or runs under no_grad"
    if watch.seen:
        return "the model computes gradients of its own inside its forward pass"
    return ""


def zero_gradient_count(
    forward: Forward, examples: Examples, loss: str = "ce", batch_size: int = 64
) -> Count:
    """Count the images on which an attack cannot start: gradient zero everywhere, or not finite.

    Args:
        forward: the attacked function; gradients must pass (:func:`forward_problem`).
        examples: the images, unattacked.
        loss: ``ce``, ``margin`` or ``dlr``; the cross-entropy of float32 logits underflows on sure
            nets where the margin does not.
        batch_size: images per pass.

    Raises:
        InvalidInputError: no gradient reaches the pixels at all, or an unknown loss.
    """
    query = Query(forward, Misclassify(loss), batch_size=batch_size)
    gradient = query.answer(examples.pixels, examples, gradient=True).gradient
    # The engine has replaced entries that are not finite by zero, as every attack then does.
    still = 0 if gradient is None else int((gradient == 0).flatten(1).all(dim=1).sum())
    return Count(still, len(examples))


def large_epsilon_accuracy(
    forward: Forward,
    examples: Examples,
    epsilons: Sequence[float] = LARGE_EPSILONS,
    *,
    num_steps: int = 20,
    batch_size: int = 64,
    seed: Sequence[int] = (0,),
) -> tuple[CurvePoint, ...]:
    """Attack by linf PGD at large budgets; each on the images that the smaller ones left.

    For images of which 64/255 is a usual budget, such as digits, add 0.5: within it every image
    can become the same grey one.

    Args:
        forward: the attacked function.
        examples: images; those wrong without attack are left out.
        epsilons: budgets in pixel units, in any order.
        num_steps: of PGD, on the margin loss.
        batch_size: images per pass.
        seed: of the random starts.

    Returns:
        One point for each budget, ascending.
    """
    left = _right(forward, examples, batch_size)
    n, points = len(left.labels), []
    query = Query(forward, Misclassify("margin"), batch_size=batch_size)
    for epsilon in sorted(epsilons):
        if len(left):
            found = climb(PGD(num_steps), query, left, epsilon, seed=seed)
            left = left.select(~found.success.to(left.labels.device))
        points.append(CurvePoint(float(epsilon), len(left), n))
    return tuple(points)


def more_steps_gain(
    forward: Forward,
    examples: Examples,
    epsilon: float,
    *,
    num_steps: int = 20,
    loss: str = "margin",
    batch_size: int = 64,
    seed: Sequence[int] = (0,),
) -> StepsGain:
    """Compare linf PGD of K and of 2K steps, from the same random starts.

    Args:
        forward: the attacked function.
        examples: images; those wrong without attack are left out.
        epsilon: budget in pixel units.
        num_steps: K.
        loss: that both climb.
        batch_size: images per pass.
        seed: of the random starts.
    """
    left = _right(forward, examples, batch_size)
    n, gained = len(left), 0
    query = Query(forward, Misclassify(loss), batch_size=batch_size)
    if n:
        first = climb(PGD(num_steps), query, left, epsilon, seed=seed)
        left = left.select(~first.success.to(left.labels.device))
    if len(left):
        second = climb(PGD(2 * num_steps), query, left, epsilon, seed=seed)
        gained = int(second.success.sum())
    return StepsGain(num_steps, gained, n)


@torch.no_grad()
def _right(forward: Forward, examples: Examples, batch_size: int) -> Examples:
    found = [
        ~wrong(forward(part.pixels).logits, part.labels).cpu()
        for start in range(0, len(examples), batch_size)
        for part in [examples.select(slice(start, start + batch_size))]
    ]
    return examples.select(torch.cat(found).to(examples.labels.device))


class _Watch(TorchFunctionMode):
    """Notice backward passes inside a block, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func in _OWN_GRADIENTS
        return func(*args, **(kwargs or {}))
