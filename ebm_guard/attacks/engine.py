"""The engine of all attacks: only images that still stand are stepped.

An attack is a :class:`StepRule`: from the answers at the current images to the next images. The
:class:`Query` asks the model, through three hooks: ``forward`` (the model, a purified or an
averaged one), and the ``objective`` and ``success`` of a :class:`Goal` (what the attacker wants,
with or without a gate). :func:`climb` brings them together. Nothing here knows norms or classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ebm_guard.attacks.rows import Answer, Examples, Outcome, State, joined, usable
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import Forward

# Rows whose pixels and states are held at once; 2^24 values are 64 MB for each state.
_HELD = 2**24
Until = Literal["success", "last", "best"]
UNTIL = ("success", "last", "best")


class Goal(ABC):
    """What the attacker wants: an objective to climb, and a test of success."""

    name = ""

    @abstractmethod
    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute what is climbed, (B,), differentiable in the output, larger = nearer."""

    @abstractmethod
    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell for each image whether the attacker has what they want, (B,) bool."""

    def gradient(
        self, output: ClassifierOutput, pixels: Tensor, examples: Examples
    ) -> tuple[Tensor, Tensor]:
        """Return objective (B,) and its gradient (B, C, H, W).

        The sum over images is differentiated, never the mean: a mean makes steps depend on the
        batch and underflows in half precision.
        """
        objective = self.objective(output, examples)
        return objective.detach(), differentiate(objective, pixels)

    def prepare(self, forward: Forward, examples: Examples) -> Examples:
        """Fix what hangs on the clean images before the attack, such as target classes."""
        del forward
        return examples


def differentiate(objective: Tensor, pixels: Tensor, *, retain: bool = False) -> Tensor:
    """Differentiate the sum of (B,) with respect to the pixels alone; no ``.grad`` is written.

    Raises:
        InvalidInputError: no gradient reaches the pixels.
    """
    if not objective.requires_grad:
        raise InvalidInputError(
            "no gradient reaches the pixels: the model detaches its input or runs under no_grad. "
            "Gradient attacks cannot judge it; use the square attack, which needs none"
        )
    (found,) = torch.autograd.grad(objective.sum(), pixels, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(pixels) if found is None else found


class Query:
    """Ask the model about images, in batches.

    Args:
        forward: from pixels in [0, 1] to the output; see
            :func:`ebm_guard.model.isolation.pixel_forward`.
        goal: what the attacker wants.
        batch_size: images per forward pass.
        eot_samples: forward and backward passes that a gradient is averaged over, for models with
            random inference (expectation over transformation, Athalye et al. 2018).
        success_draws: fresh forward passes; success means in more than half of them. Never "in any
            of them": one lucky draw would count.
    """

    def __init__(
        self,
        forward: Forward,
        goal: Goal,
        *,
        batch_size: int = 64,
        eot_samples: int = 1,
        success_draws: int = 1,
    ) -> None:
        if min(batch_size, eot_samples, success_draws) < 1:
            raise InvalidInputError(
                f"got batch_size {batch_size}, eot_samples {eot_samples}, success_draws "
                f"{success_draws}; each must be at least 1"
            )
        self.forward, self.goal, self.batch_size = forward, goal, batch_size
        self.eot_samples, self.success_draws = eot_samples, success_draws

    @property
    def forwards_per_answer(self) -> tuple[int, int]:
        """Forward passes per image of an answer without and with a gradient."""
        draws = self.success_draws if self.success_draws > 1 else 0
        return 1 + draws, self.eot_samples + draws

    def answer(self, pixels: Tensor, examples: Examples, *, gradient: bool) -> Answer:
        """Ask about images (B, C, H, W); with the gradient of the objective where wanted."""
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            ask = self._with_gradient if gradient else self._plain
            parts.append(ask(pixels[rows], examples.select(rows)))
        return joined(parts)

    def _plain(self, pixels: Tensor, examples: Examples) -> Answer:
        with torch.no_grad():
            output = self.forward(pixels)
            objective = self.goal.objective(output, examples)
            return Answer(objective, self._success(output, pixels, examples), output.logits)

    def _with_gradient(self, pixels: Tensor, examples: Examples) -> Answer:
        objectives, gradients, first = [], [], None
        for _ in range(self.eot_samples):
            with torch.inference_mode(mode=False), torch.enable_grad():
                leaf = pixels.detach().clone().requires_grad_()
                output = self.forward(leaf)
                objective, gradient = self.goal.gradient(output, leaf, usable(examples))
            objectives.append(objective.detach())
            gradients.append(gradient.detach())
            first = first or _detached(output)
        if first is None:  # eot_samples >= 1
            raise InvalidInputError("got no gradient samples; needed at least one")
        mean = torch.stack(gradients).mean(dim=0) if len(gradients) > 1 else gradients[0]
        # One non-finite entry would carry into every later image of this row.
        mean = torch.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0)
        success = self._success(first, pixels, examples)
        return Answer(torch.stack(objectives).mean(dim=0), success, first.logits, mean)

    @torch.no_grad()
    def _success(self, output: ClassifierOutput, pixels: Tensor, examples: Examples) -> Tensor:
        if self.success_draws == 1:
            return self.goal.success(output, examples)
        votes = sum(
            self.goal.success(self.forward(pixels), examples).long()
            for _ in range(self.success_draws)
        )
        return torch.as_tensor(votes * 2 > self.success_draws)


S = TypeVar("S", bound=State)


class StepRule(ABC, Generic[S]):
    """How an attack moves: one subclass for each.

    Attributes:
        name: the registered name.
        norm: ``linf`` or ``l2``.
        num_steps: moves after the start.
        needs_gradient: whether answers carry gradients.
    """

    name = ""
    norm: str
    num_steps: int
    needs_gradient = True

    @abstractmethod
    def begin(
        self, examples: Examples, epsilon: float, start: Tensor | None, seed: Sequence[int]
    ) -> S:
        """Return the state at the first images.

        Args:
            examples: the rows.
            epsilon: radius of the ball, in pixel units.
            start: (B, C, H, W) where to start, or None for the rule's own start.
            seed: whole numbers >= 0 that :func:`image_generators` mixes with each image's id.
        """

    @abstractmethod
    def step(self, state: S, answer: Answer, examples: Examples, epsilon: float, index: int) -> S:
        """Return the state at the next images; ``index`` counts from 0."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types, for the report."""
        return {"norm": self.norm, "num_steps": self.num_steps}


def image_generators(ids: Tensor, seed: Sequence[int]) -> list[np.random.Generator]:
    """Return one generator for each image, from the seed and its id: independent of the batch.

    Example:
        >>> one, two = image_generators(torch.tensor([3, 4]), (0,))
        >>> (again,) = image_generators(torch.tensor([4]), (0,))
        >>> two.random() == again.random()
        True
    """
    return [np.random.default_rng([*seed, int(number)]) for number in ids]


Observe = Callable[[int, Tensor, Answer], None]


def climb(
    rule: StepRule[Any],
    query: Query,
    examples: Examples,
    epsilon: float,
    *,
    start: Tensor | None = None,
    until: Until = "success",
    seed: Sequence[int] = (0,),
    observe: Observe | None = None,
) -> Outcome:
    """Run an attack.

    Args:
        rule: how it moves.
        query: the model and the goal.
        examples: the images.
        epsilon: radius in pixel units of [0, 1].
        start: (N, C, H, W) images to start from, such as the best of a smaller epsilon.
        until: ``success`` judges every image on the way and drops those that the attacker has;
            the others are given at their highest objective. ``last`` steps all images to the end
            and judges the last one, as most libraries do. ``best`` steps all to the end and
            judges the image with the highest objective.
        seed: whole numbers >= 0; random numbers hang on them and on the ids of the images.
        observe: called with (step, numbers of the rows, answer) before rows are dropped.

    Returns:
        One outcome for each image, in order.

    Raises:
        InvalidInputError: epsilon is negative or not finite, or ``until`` is unknown.

    Example:
        >>> from ebm_guard.attacks import PGD, Misclassify
        >>> forward = lambda pixels: ClassifierOutput(
        ...     torch.cat([pixels.flatten(1), 1 - pixels.flatten(1)], dim=1), None)
        >>> examples = Examples.of(torch.full((1, 1, 1, 1), 0.6), torch.tensor([0]))
        >>> climb(PGD(), Query(forward, Misclassify()), examples, 0.2).success
        tensor([True])
    """
    if not 0 <= epsilon < float("inf"):
        raise InvalidInputError(f"got epsilon {epsilon!r}; needed a number >= 0 in pixel units")
    if until not in UNTIL:
        raise InvalidInputError(f"got until={until!r}; known are {', '.join(UNTIL)}")
    held = max(query.batch_size, _HELD // examples.pixels[0].numel())
    found = []
    for first in range(0, len(examples), held):
        rows = slice(first, first + held)
        part, asked = _prepared(query, examples.select(rows))
        begin = None if start is None else start[rows]
        state = rule.begin(part, epsilon, begin, seed)
        watch = None if observe is None else _shifted(observe, first)
        outcome = _climb(rule, query, part, epsilon, state, until, watch)
        found.append(replace(outcome, forwards=outcome.forwards + asked))
    return Outcome.concatenate(found)


def _prepared(query: Query, examples: Examples) -> tuple[Examples, int]:
    """Prepare the goal; also return the forward passes that each image took."""
    asked = 0

    def counted(pixels: Tensor) -> ClassifierOutput:
        nonlocal asked
        asked += len(pixels)
        return query.forward(pixels)

    return query.goal.prepare(counted, examples), asked // len(examples)


def _climb(
    rule: StepRule[Any],
    query: Query,
    examples: Examples,
    epsilon: float,
    state: Any,
    until: Until,
    observe: Observe | None,
) -> Outcome:
    book = _Book(examples, until)
    rows = torch.arange(len(examples))
    # A ball without radius holds one image.
    num_steps = rule.num_steps if epsilon > 0 else 0
    for index in range(num_steps + 1):
        last = index == num_steps
        gradient = rule.needs_gradient and not last
        answer = query.answer(state.pixels, examples, gradient=gradient)
        if observe is not None:
            observe(index, rows, answer)
        book.record(rows, state.pixels, answer, index, query)
        if last:
            break
        if until == "success" and bool(answer.success.any()):
            stands = ~answer.success
            rows, examples = rows[stands.cpu()], examples.select(stands)
            state, answer = state.select(stands), answer.select(stands)
            if not len(rows):
                break
        state = rule.step(state, answer, examples, epsilon, index)
    return book.outcome


class _Book:
    """Keep for each image the one that the verdict is about, and what it cost."""

    def __init__(self, examples: Examples, until: Until) -> None:
        n, device = len(examples), examples.pixels.device
        self._until = until

        def counts() -> Tensor:
            return torch.zeros(n, dtype=torch.int64)

        self.outcome = Outcome(
            pixels=examples.pixels.clone(),
            success=torch.zeros(n, dtype=torch.bool, device=device),
            objective=torch.full((n,), -torch.inf, device=device),
            step=counts(),
            gradients=counts(),
            forwards=counts(),
            zero_gradients=counts(),
        )

    def record(
        self, rows: Tensor, pixels: Tensor, answer: Answer, index: int, query: Query
    ) -> None:
        found = self.outcome
        asked = answer.gradient is not None
        found.forwards[rows] += query.forwards_per_answer[asked]
        found.gradients[rows] += query.eot_samples * asked
        if answer.gradient is not None:
            still = (answer.gradient == 0).flatten(1).all(dim=1)
            found.zero_gradients[rows] += still.cpu().long()
        # The answers lie where the model runs, the images where the user holds them.
        objective = answer.objective.to(found.objective)
        success = answer.success.to(found.success.device)
        better = objective > found.objective[rows.to(objective.device)]
        if self._until == "success":
            better = better | success
        # The first image always counts: an objective of NaN or -inf is never better.
        better = torch.ones_like(better) if self._until == "last" or index == 0 else better
        kept = rows[better.cpu()].to(found.pixels.device)
        found.pixels[kept] = pixels[better]
        found.success[kept] = success[better]
        found.objective[kept] = objective[better]
        found.step[kept.cpu()] = index


def _shifted(observe: Observe, first: int) -> Observe:
    return lambda step, rows, answer: observe(step, rows + first, answer)


def _detached(output: ClassifierOutput) -> ClassifierOutput:
    features = output.features
    return ClassifierOutput(output.logits.detach(), None if features is None else features.detach())
