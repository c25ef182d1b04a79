"""A normalising flow as noise: a known density that learns to lie where the data are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard.errors import DataError, InvalidInputError, ModelOutputError
from ebm_guard.sampling.densities import GaussianMixture, KnownDensity
from ebm_guard.training.density.contrast import contrastive_loss

_LAYERS = 3
_HIDDEN = (64, 64)
_RATE = 1e-4
_CLIP = 5.0
# Rows of a step of the likelihood start.
_BATCH = 128


class FlowDensity(KnownDensity):
    """q_a(h): affine coupling layers g_a around a mixture of Gaussians that is known.

    h = m + L g_a(z), with z drawn from the mixture in the coordinates where its covariance is I.
    At the start g_a is the identity, so that q_a is the mixture. The layers run in float32; draws
    take all random numbers from the generator that is given.

    Args:
        like: the mixture.
        seed: of the first weights; torch's global generator is left as it is.
        device: of the weights at first; they follow the points that are asked for, since a resumed
            run makes the flow on the CPU.

    Raises:
        InvalidInputError: zuko is not installed, or points of one value only.

    References:
        Dinh, Sohl-Dickstein and Bengio, Density Estimation using Real NVP, ICLR 2017 (zuko's MAF
        in two passes, which is its coupling). Differs: the base is a mixture, not N(0, I), and
        the last layers start at 0.
    """

    name = "flow"

    def __init__(
        self, like: GaussianMixture, seed: int = 0, device: torch.device | None = None
    ) -> None:
        require_zuko()
        import zuko  # type: ignore[import-untyped, unused-ignore]

        if like.dim < 2:
            raise InvalidInputError(
                "got points of one value; coupling layers need two or more. Use objective='nce'"
            )
        self._middle, self._scale = like.weights @ like.means, like.scale_tril
        self._log_volume = float(self._scale.diagonal().log().sum())
        around = GaussianMixture(like.weights, like.means - self._middle, like.scale_tril)
        self._base = around.whitened()
        # Seeding the CPU's generator alone: torch.manual_seed would reseed those of all devices.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            made = zuko.flows.MAF(like.dim, transforms=_LAYERS, hidden_features=_HIDDEN, passes=2)
        for part in made.modules():
            if isinstance(part, (zuko.nn.MLP, zuko.nn.MaskedMLP)):
                last = [layer for layer in part if isinstance(layer, nn.Linear)][-1]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        self.flow: nn.Module = made if device is None else made.to(device)
        self._optimizer = torch.optim.Adam(self.flow.parameters(), lr=_RATE)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (len(self._middle),)

    def log_density(self, points: Tensor) -> Tensor:
        """Compute log q_a(h), (N,) float64, with gradients to the points and the flow."""
        place = points.device
        self.to(place)
        rows = torch.linalg.solve_triangular(
            self._scale.to(place), (points.double() - self._middle.to(place)).T, upper=False
        ).T
        moved, volume = self.flow().transform.call_and_ladj(rows.float())
        logs: Tensor = self._base.log_density(moved) + volume.double()
        return logs - self._log_volume

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points, (n, D) float64, without gradients."""
        with torch.no_grad():
            return self._moved(self._base.draw(n, generator))

    def _moved(self, drawn: Tensor) -> Tensor:
        place = drawn.device
        self.to(place)
        rows: Tensor = self.flow().transform.inv(drawn.float()).double()
        return rows @ self._scale.T.to(place) + self._middle.to(place)

    def fit(self, points: Tensor, steps: int, generator: torch.Generator) -> None:
        """Maximise the likelihood of points (N, D) for some steps of Adam."""
        for _ in range(steps):
            rows = torch.randperm(len(points), generator=generator, device=generator.device)
            with torch.enable_grad():
                loss = -self.log_density(points[rows[:_BATCH]]).mean() / self.dim
            self._descend(loss)

    def contend(
        self,
        data: Tensor,
        log_model: Callable[[Tensor], Tensor],
        n: int,
        generator: torch.Generator,
    ) -> None:
        """Take one step that makes data and draws harder to tell apart: it raises the loss.

        Args:
            data: (B, D).
            log_model: log p of points, differentiable in them.
            n: draws.
            generator: of the draws.
        """
        with torch.enable_grad():
            drawn = self._moved(self._base.draw(n, generator))
            share = math.log(n / len(data))
            right = contrastive_loss(
                log_model(data).detach() - self.log_density(data) - share,
                log_model(drawn) - self.log_density(drawn) - share,
            )
        self._descend(-right)

    def _descend(self, loss: Tensor) -> None:
        parameters = list(self.flow.parameters())
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, parameters)
        for part, gradient in zip(parameters, gradients, strict=True):
            part.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
        if not bool(torch.isfinite(norm)):
            raise ModelOutputError("the gradient of the flow is not finite")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def restart(self, factor: float = 1.0) -> None:
        """Forget the optimiser's moments; its learning rate is the first one times a factor."""
        self._optimizer = torch.optim.Adam(self.flow.parameters(), lr=factor * _RATE)

    def to(self, device: torch.device) -> None:
        """Move weights and optimiser to a device, where they are not there yet."""
        wanted = torch.empty(0, device=device).device
        if next(self.flow.parameters()).device == wanted:
            return
        state = self._optimizer.state_dict()
        self.flow.to(wanted)
        self._optimizer = torch.optim.Adam(self.flow.parameters(), lr=_RATE)
        self._optimizer.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the weights and the optimiser."""
        return {
            "flow": {key: part.clone() for key, part in self.flow.state_dict().items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back weights and optimiser.

        Raises:
            DataError: weights of another flow.
        """
        try:
            self.flow.load_state_dict(state["flow"])
            self._optimizer.load_state_dict(copy.deepcopy(dict(state["optimizer"])))
        except (KeyError, RuntimeError, ValueError) as error:
            raise DataError(f"the state of this flow is damaged: {error}") from None


def require_zuko() -> None:
    """Refuse to go on without zuko.

    Raises:
        InvalidInputError: it is not installed, with the command that installs it.
    """
    if find_spec("zuko") is None:
        raise InvalidInputError(
            "the objective 'fce' needs zuko, which is not installed: "
            'pip install "ebm-guard[flow]". The objective nce needs nothing'
        )
