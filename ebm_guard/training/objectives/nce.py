"""Noise-contrastive estimation: learn energy and normaliser by telling data from known noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_number, check_whole
from ebm_guard.sampling.densities import KnownDensity
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.density.contrast import contrastive_loss, fit_constant
from ebm_guard.training.density.spaces import Space, make_space
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item, warmed_up

# Of the optimiser of c, in nats of the first steps.
_CONSTANT_RATE = 0.03


class Nce(Objective):
    """Tell data from noise of known density; what is learned on the way is a normalised density.

    The model is p(x) = q(x) exp(-E(x) - c), with q known, E the energy of the classifier and
    c = log Z learned as one more weight. With n the density of the noise and M = ratio B draws of
    it, the logit of "this row is data" is

    u(x) = log q(x) - E(x) - c - log n(x) - log ratio

    and L = L_class + r w / (B + M) (sum softplus(-u(x+)) + sum softplus(u(x-))), r rising from 0
    to 1. Where the model can be the density of the data, the minimum is that density, with
    c = log Z.

    On ``features`` x is the input h of the last linear layer, which alone is trained (scope
    ``head``), so that the features stay where q and n were fitted. n is a mixture with one
    Gaussian for each class and one shrunk covariance S. By default q is n itself (``mixture``):
    the energy is then the log-ratio of the data to that mixture, a correction on top of it, and
    the given head is trained on. Or q is one Gaussian with the covariance S
    (``base="gaussian"``): p is then a mixture of N(m + S w_k, S), and to classify and to be the
    density of the data ask the same of the head. Both have a closed-form log Z, which the check
    after the run uses beside the sampled one.

    A head from cross-entropy is far from such a density, so with ``gaussian`` the run starts from
    the head of linear discriminant analysis (``head="discriminant"``), for which q exp(-E) is n.
    It is another classifier than the one given, and often not as good a one: the acceptance test
    then returns the start.

    On ``pixels`` (at most 1,024 values; the whole net may move) x is the image with noise inside
    the cells of its grid of bytes, and q = n a mixture over the classes of products of normals
    cut off at the edges of [0, 1]. The learning rate is then that of a whole net, 3e-4.

    q and n are fitted on labelled training rows, some of every class, about 4,096 in all, with the
    classes weighted as they occur. Energies of features are computed in float32 at least.

    Args:
        weight: w >= 0.
        space: ``features`` or ``pixels``.
        base: q on features: ``mixture`` (default) or ``gaussian``; not to be given for pixels.
        head: ``discriminant`` or ``given``: what the head starts from; default: the first where
            the base is ``gaussian``. It needs a plain linear layer with a bias that is trained as
            a whole.
        ratio: draws of noise for each image, whole, >= 1.
        warm_up: share of the run over which r rises from 0 to 1.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Gutmann and Hyvärinen, Noise-Contrastive Estimation of Unnormalized Statistical Models,
        with Applications to Natural Image Statistics, JMLR 2012, section 2. Differs: the model
        is a tilt of a known density, the class loss is minimised with it, c has an optimiser of
        its own, and the loss is a mean over all rows.

    Example:
        >>> Nce(ratio=2).settings()["space"]
        'features'
    """

    name = "nce"
    default_scope = "head"
    default_learning_rate = 3e-3

    def __init__(
        self,
        weight: float = 1.0,
        space: str = "features",
        base: str | None = None,
        head: str | None = None,
        ratio: int = 4,
        warm_up: float = 0.1,
    ) -> None:
        self.weight = check_number("weight", weight)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)
        self.ratio = check_whole("ratio", ratio, 1)
        by_discriminant = space == "features" and base == "gaussian"
        self.head = head or ("discriminant" if by_discriminant else "given")
        self.space: Space = make_space(space, base, self.head)
        self.base = base or "mixture"
        if space == "pixels":
            self.default_scope = "all"  # type: ignore[misc]
            # That of a head alone is too high for a whole net.
            self.default_learning_rate = Objective.default_learning_rate  # type: ignore[misc]
        self._constant: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._seen: Tensor | None = None

    @property
    def constant(self) -> float | None:
        """The learned c in nats, or None before the first update."""
        return None if self._constant is None else float(self._constant.detach())

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Fit q and n on labelled rows, and set the head where it starts from a discriminant.

        Raises:
            InvalidInputError: several processes, features that would move, or a head that cannot
                be set.
        """
        if context.world > 1:
            raise InvalidInputError(
                f"got {context.world} processes for the objective {self.name!r}: its normaliser "
                "is learned beside the net, from all rows of an update, and is not shared "
                "between processes. Run it in one"
            )
        self._constant = self._optimizer = None
        self.begun(context, self.space.begin(context, batch))

    def begun(self, context: Context, points: Tensor) -> None:
        """Look at the points that q and n were fitted on."""
        del context, points

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the class loss and the contrast from one forward pass; c takes its step."""
        drawn = self.draw(self.ratio * len(batch), context.torch_generator("noise"))
        found = self.space.contrast(context, batch, drawn)
        self._seen = found.points
        data = self.log_ratio(found.points) - found.energy_data.double()
        noise = self.log_ratio(drawn) - found.energy_noise.double()
        constant = self._step(data.detach(), noise.detach())
        shift = constant + math.log(self.ratio)
        contrast = contrastive_loss(data - shift, noise - shift)
        terms = {
            "class": context.class_loss(found.logits, batch.labels),
            "contrast": self.weight * warmed_up(context, self.warm_up) * contrast,
        }
        terms["contrast"] = terms["contrast"].to(terms["class"].dtype)
        return LossTerms(
            terms["class"] + terms["contrast"],
            {name: item(term) for name, term in terms.items()},
            energy_data=found.energy_data.detach(),
            energy_negatives=found.energy_noise.detach(),
        )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of the noise, float64."""
        return self.space.noise.draw(n, generator)

    def log_ratio(self, points: Tensor) -> Tensor:
        """Compute log q - log n, (N,) float64, without gradients."""
        with torch.no_grad():
            return self.space.log_ratio(points)

    def final_noise(self) -> KnownDensity | None:
        """Return the noise at the end of the run where it is not the space's own, or None."""
        return None

    def _step(self, data: Tensor, noise: Tensor) -> float:
        """Return c for this update, and let it take one step on the same rows."""
        constant, optimizer = self._constant, self._optimizer
        if constant is None or optimizer is None:
            # The fit's own c takes the logarithm of the ratio in.
            start = fit_constant(data, noise).value - math.log(self.ratio)
            constant, optimizer = self._remember(start)
        now = float(constant.detach())
        with torch.enable_grad():
            shift = constant + math.log(self.ratio)
            loss = contrastive_loss(data.cpu() - shift, noise.cpu() - shift)
            (constant.grad,) = torch.autograd.grad(loss, [constant])
        optimizer.step()
        return now

    def _remember(self, value: float) -> tuple[Tensor, torch.optim.Optimizer]:
        constant = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([constant], lr=_CONSTANT_RATE)
        self._constant, self._optimizer = constant, optimizer
        return constant, optimizer

    def rolled_back(self, context: Context) -> None:
        """Fit c anew at the next update: the weights are old again."""
        self._constant = self._optimizer = None

    def settings(self) -> dict[str, Any]:
        """Return the settings, c included, as JSON types."""
        return {**self.identity(), "constant": self.constant}

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        return {
            "objective": self.name,
            "weight": self.weight,
            "space": self.space.name,
            "base": self.base,
            "head": self.head if self.space.name == "features" else None,
            "ratio": self.ratio,
            "warm_up": self.warm_up,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return c, its optimiser, and the known densities."""
        return {
            "constant": self.constant,
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "space": self.space.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back c, its optimiser, and the known densities."""
        self.space.load_state_dict(state["space"])
        self._constant = self._optimizer = None
        if state["constant"] is not None:
            _, optimizer = self._remember(state["constant"])
            optimizer.load_state_dict(state["optimizer"])
