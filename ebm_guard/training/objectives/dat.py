"""Binary cross-entropy on the energy against negatives that grow harder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.sampling.checks import check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives import Negatives, make_negatives
from ebm_guard.training.negatives.descent import Descent
from ebm_guard.training.objectives.adversarial import Attack, share_of_loss
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item, warmed_up


class Dat(Objective):
    """Tell data from negatives by the energy, with negatives found by descent on it.

    L = L_class + w (mean softplus((E(x+) - c) / s) + mean softplus((c - E(x-)) / s)) / 2: the
    binary cross-entropy of the logit (c - E) / s, "this is data". x- come from
    :class:`~ebm_guard.training.negatives.descent.Descent`, whose walks grow by the AUROC.

    The centre c = E0 + centre * s0 and the scale s = scale * s0 are set from the given net's own
    energies on training images (mean E0, standard deviation s0), so that the loss neither moves
    the data's energies as a whole nor hangs on the net's units.

    Args:
        weight: w >= 0.
        centre: c in units of s0 from E0.
        scale: s in units of s0, > 0.
        negatives: a source of negatives, or its registered name; unless it is a ``Descent``, it
            gives the starts of the walks.
        max_steps: largest number of steps of a walk.
        epsilon: radius of the adversarial images that a share of the cross-entropy is taken on,
            in [0, 1] pixels; None: none, the cross-entropy is taken on augmented images alone.
        norm: of the ball, ``linf`` or ``l2``.
        num_steps: steps of the attack.
        adversarial_share: of the batch that is attacked.
        warm_up: share of the run over which the weight rises from 0.

    Raises:
        InvalidInputError: settings out of range.

    References:
        DAT, arXiv 2510.13872 (dual adversarial training: the adversarial cross-entropy, the
        binary cross-entropy on -E, the step curriculum). Differs: starts are synthetic outliers
        or the user's, where the paper takes a large auxiliary set; centre and scale are measured,
        where the paper uses -E as it is; adversarial images are off until asked for.

    Example:
        >>> Dat(epsilon=4 / 255).settings()["attack"]["num_steps"]
        3
    """

    name = "dat"

    def __init__(
        self,
        weight: float = 0.5,
        centre: float = 1.0,
        scale: float = 0.5,
        negatives: str | Negatives = "synthetic",
        max_steps: int = 10,
        epsilon: float | None = None,
        norm: str = "linf",
        num_steps: int = 3,
        adversarial_share: float = 0.5,
        warm_up: float = 0.1,
    ) -> None:
        self.weight = check_number("weight", weight)
        self.scale = check_number("scale", scale, open_low=True)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)
        self.centre = check_number("centre", centre, low=-math.inf)
        source = make_negatives(negatives)
        ready = isinstance(source, Descent)
        self.negatives = source if ready else Descent(source, max_steps=max_steps)
        self.attack = None
        if epsilon is not None:
            self.attack = Attack(epsilon, num_steps, norm, adversarial_share)

    @property
    def negative_kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds among the negatives."""
        return self.negatives.kinds

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Prepare the negatives."""
        self.negatives.begin(context, batch)

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the class loss and the energy's binary cross-entropy from one forward pass."""
        negatives = self.negatives.draw(context, batch)
        attacked = 0
        seen = batch.augmented
        if self.attack is not None:
            attacked = self.attack.count(len(batch))
            moved = self.attack.apply(context, seen[:attacked], batch.labels[:attacked])
            seen = torch.cat([moved, seen[attacked:]])
        logits = context.together(augmented=seen, data=batch.pixels, negatives=negatives)
        data, off = (formulas.energy(logits[name]) for name in ("data", "negatives"))
        centre = context.measured.mean + self.centre * context.measured.std
        scale = self.scale * context.measured.std
        weight = self.weight * warmed_up(context, self.warm_up) / 2
        terms = {
            "class": context.class_loss(logits["augmented"], batch.labels),
            "data": weight * F.softplus((data - centre) / scale).mean(),
            "negatives": weight * F.softplus((centre - off) / scale).mean(),
        }
        parts = {name: item(term) for name, term in terms.items()}
        if attacked:
            parts["attacked"] = share_of_loss(
                context.class_loss, logits["augmented"], batch.labels, attacked
            )
            parts["class"] -= parts["attacked"]
        energies = data.detach(), off.detach()
        self.negatives.observe(*energies)
        total: Tensor = terms["class"] + terms["data"] + terms["negatives"]
        return LossTerms(total, parts, *energies, saturation=self.negatives.saturation())

    def rolled_back(self, context: Context) -> None:
        """Go one step back in the curriculum."""
        self.negatives.rolled_back(context)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "objective": self.name,
            "weight": self.weight,
            "centre": self.centre,
            "scale": self.scale,
            "warm_up": self.warm_up,
            "attack": None if self.attack is None else self.attack.settings(),
            "negatives": self.negatives.settings(),
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        return {**self.settings(), "negatives": self.negatives.identity()}

    def state_dict(self) -> dict[str, Any]:
        """Return the curriculum."""
        return {"negatives": self.negatives.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the curriculum."""
        self.negatives.load_state_dict(state["negatives"])
