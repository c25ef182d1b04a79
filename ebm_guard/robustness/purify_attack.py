"""Attack a purified classifier along one of the three gradients, and judge by fresh draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebm_guard.attacks import PGD, Examples, Misclassify, Query, climb
from ebm_guard.attacks.goals import wrong
from ebm_guard.attacks.rows import Answer, Outcome, joined
from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.robustness.purify import Purification, Purifier
from ebm_guard.robustness.subject import inside


@dataclass(frozen=True)
class PurifyBudget:
    """How hard a purified classifier is attacked.

    Args:
        images: at most.
        num_steps: of PGD.
        eot_samples: gradients that are averaged in each step, at random inference.
        success_draws: fresh predictions; an image counts as fooled where most are wrong.
        bare_samples: gradients of the bare classifier that are averaged in each step.
    """

    images: int
    num_steps: int
    eot_samples: int = 20
    success_draws: int = 11
    bare_samples: int = 1

    @classmethod
    def of(cls, preset: str) -> PurifyBudget:
        """Return the budget of a preset.

        Example:
            >>> PurifyBudget.of("quick").eot_samples
            20
        """
        return {"quick": cls(32, 10), "standard": cls(128, 20), "full": cls(512, 50)}[preset]

    def needed(self, settings: Purification, bare_samples: int = 1) -> PurifyBudget:
        """Return what is needed: without random numbers one draw says all.

        Args:
            settings: of the purification.
            bare_samples: gradients per step where the bare classifier is attacked; more than one
                says that it answers at random itself.

        Example:
            >>> PurifyBudget.of("quick").needed(Purification(noise_std=0.0)).success_draws
            1
        """
        if settings.random or bare_samples > 1:
            return replace(self, bare_samples=bare_samples)
        return replace(self, eot_samples=1, success_draws=1)

    def cost(self, settings: Purification, mode: str) -> dict[str, float]:
        """Return the passes of one answer about one image under attack.

        Example:
            >>> PurifyBudget(1, 10).cost(Purification(4), "transfer")
            {'gradients': 45, 'forwards': 11}
        """
        steps, chains = settings.num_steps, settings.chains
        draws = max(self.success_draws, 2) if mode == "transfer" else self.success_draws
        asked = draws if draws > 1 else 0
        if mode == "transfer":
            gradients = self.bare_samples
        else:
            gradients = self.eot_samples * (steps + 1) * chains
        return {
            "gradients": gradients + asked * steps * chains,
            "forwards": asked * chains,
        }


@dataclass(frozen=True)
class Attacked:
    """What an attack of the purified classifier found.

    Args:
        pixels: (N, C, H, W) the image of each row that the verdict is about.
        fooled: (N,) bool, most fresh predictions on it are wrong, and it is in ball and box.
        outcome: of the search.
    """

    pixels: Tensor
    fooled: Tensor
    outcome: Outcome


class DrawnTogether(Query):
    """Ask like :class:`~ebm_guard.attacks.Query`, with the draws of an image in one batch.

    A few images that still stand fill the batch with their draws: on a small net most of the time
    goes into calls, not into arithmetic. Every pass of the forward hook must draw its own random
    numbers for each row.

    Example:
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> query = DrawnTogether(lambda x: ClassifierOutput(x.flatten(1), None), Misclassify(),
        ...                       eot_samples=3)
        >>> examples = Examples.of(torch.full((1, 2, 1, 1), 0.5), torch.tensor([0]))
        >>> query.answer(examples.pixels, examples, gradient=True).gradient.flatten()
        tensor([-0.5000,  0.5000])
    """

    def answer(self, pixels: Tensor, examples: Examples, *, gradient: bool) -> Answer:
        """Ask about images (B, C, H, W); with the gradient of the objective where wanted."""
        if not gradient:
            return self._mean(pixels, examples, self.success_draws, gradient=False)
        found = self._mean(pixels, examples, self.eot_samples, gradient=True)
        if self.success_draws == 1:
            return found
        votes = self._mean(pixels, examples, self.success_draws, gradient=False)
        return replace(found, success=votes.success)

    def _mean(self, pixels: Tensor, examples: Examples, draws: int, *, gradient: bool) -> Answer:
        one = Query(self.forward, self.goal, batch_size=max(self.batch_size, draws))
        parts, size = [], max(1, self.batch_size // draws)
        for start in range(0, len(pixels), size):
            rows = torch.arange(start, min(start + size, len(pixels))).repeat_interleave(draws)
            found = one.answer(pixels[rows], examples.select(rows), gradient=gradient)
            parts.append(_over_draws(found, draws))
        return joined(parts)


def _over_draws(found: Answer, draws: int) -> Answer:
    """Average the draws of each image; success in more than half of them."""

    def mean(values: Tensor) -> Tensor:
        return values.reshape(-1, draws, *values.shape[1:]).mean(dim=1)

    return Answer(
        mean(found.objective),
        mean(found.success.double()) > 0.5,
        mean(found.logits),
        None if found.gradient is None else mean(found.gradient),
    )


def attack_purified(
    purifier: Purifier,
    examples: Examples,
    epsilon: float,
    mode: str,
    budget: PurifyBudget,
    *,
    norm: str = "linf",
    batch_size: int = 64,
    seed: Sequence[int] = (0,),
) -> Attacked:
    """Run PGD on the margin along one of the gradients of :meth:`Purifier.hook`.

    Every iterate is judged by the purified classifier, in all modes. What the search found is
    judged once more by fresh draws: the search stops at the first lucky vote. Images that fail
    there are stepped on to the end, and judged at their highest objective.

    Args:
        purifier: the classifier with its purification.
        examples: the images.
        epsilon: radius in pixel units of [0, 1].
        mode: ``identity``, ``unrolled`` or ``transfer``.
        budget: steps, gradients per step, and draws.
        norm: ``linf`` or ``l2``.
        batch_size: images per pass.
        seed: of PGD's random start.

    Raises:
        InvalidInputError: unknown mode, or no gradient reaches the pixels.
        UnsupportedModelError: the unrolled gradient needs a second derivative that the model lacks.

    Example:
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> forward = lambda x: ClassifierOutput(
        ...     4 * torch.cat([x.flatten(1), 1 - x.flatten(1)], dim=1), None)
        >>> examples = Examples.of(torch.full((1, 1, 1, 1), 0.6), torch.tensor([0]))
        >>> purifier = Purifier(forward, Purification(2, noise_std=0.0))
        >>> attack_purified(purifier, examples, 0.2, "identity", PurifyBudget(1, 5, 1, 1)).fooled
        tensor([True])
    """
    rule = PGD(budget.num_steps, norm=norm)
    # The gradient of the bare classifier says nothing of the purified one: two draws judge it.
    draws = max(budget.success_draws, 2) if mode == "transfer" else budget.success_draws
    # A bare classifier that answers at random may draw once for a whole batch.
    together = budget.bare_samples == 1
    query = (DrawnTogether if together else Query)(
        purifier.hook(mode),
        Misclassify("margin"),
        batch_size=batch_size,
        eot_samples=budget.bare_samples if mode == "transfer" else budget.eot_samples,
        success_draws=draws,
    )

    def judged(outcome: Outcome, part: Examples) -> Tensor:
        voted = majority_wrong(
            purifier, outcome.pixels, part.labels, draws, batch_size, together=together
        )
        return voted & inside(outcome.pixels, part, norm, epsilon)

    try:
        outcome = climb(rule, query, examples, epsilon, seed=seed)
        fooled = judged(outcome, examples)
        rows = torch.nonzero(outcome.success.cpu() & ~fooled).squeeze(1)
        if len(rows):
            part, start = examples.select(rows), outcome.pixels[rows]
            again = climb(rule, query, part, epsilon, start=start, until="best", seed=seed)
            outcome = outcome.with_rows(rows, again)
            fooled[rows] = judged(again, part)
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the model cannot be differentiated twice, as the unrolled gradient needs: {error}"
        ) from error
    return Attacked(outcome.pixels, fooled, outcome)


def majority_wrong(
    purifier: Purifier,
    pixels: Tensor,
    labels: Tensor,
    draws: int,
    batch_size: int = 64,
    *,
    together: bool = True,
) -> Tensor:
    """Tell where most of some fresh predictions are wrong, (N,) bool.

    Args:
        purifier: the classifier with its purification.
        pixels: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        draws: predictions of each image.
        batch_size: images per pass.
        together: the draws of an image may lie in one batch: its rows are drawn independently.

    Raises:
        InvalidInputError: no draw.
    """
    if draws < 1:
        raise InvalidInputError(f"got {draws} draws; needed at least one")
    inside_batch, passes = (draws, 1) if together else (1, draws)
    found, size = [], max(1, batch_size // inside_batch)
    for start in range(0, len(pixels), size):
        rows = torch.arange(start, min(start + size, len(pixels))).repeat_interleave(inside_batch)
        votes = torch.stack(
            [wrong(purifier(pixels[rows]).logits, labels[rows]).long() for _ in range(passes)]
        ).sum(dim=0)
        found.append(votes.reshape(-1, inside_batch).sum(dim=1) * 2 > draws)
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.bool)
