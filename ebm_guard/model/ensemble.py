"""Several classifiers of the same classes as one energy-based model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ebm_guard import composition
from ebm_guard import energy as formulas
from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    NotFittedError,
    UnsupportedModelError,
    suggest,
)
from ebm_guard.model.classifier import EnergyClassifier, check_kind
from ebm_guard.model.mode import evaluation_mode
from ebm_guard.model.pixels import Preprocessing
from ebm_guard.precision import KeepDouble

COMBINATIONS = ("product", "mixture")


class EnergyEnsemble(KeepDouble):
    """Compose the energies of several classifiers of the same classes into one model.

    The energies of two networks have other offsets and other units, so each is standardised on ID
    calibration rows, with mu_m and s_m the mean and standard deviation of E_m(x) there::

        E~_m(x, y) = -log p_m(y|x) + (E_m(x) - mu_m) / s_m
        product    E(x, y) = sum_m w_m E~_m(x, y)
        mixture    E(x, y) = -log sum_m pi_m exp(-E~_m(x, y))

    with p_m = softmax(f_m / T_m) and E_m(x) = -logsumexp f_m(x). The logits are -E(x, y), so the
    ensemble is a classifier like any other: wrap it, calibrate, score and gate it, attack it. A
    product asks all members to agree: its energy is sum_m w_m (E_m - mu_m)/s_m plus
    -log sum_y prod_m p_m(y|x)^w_m >= 0 (for weights that add to 1 or more), which is large where
    members name different classes. Its p(y|x) is, up to a temperature, that of the averaged
    logits, and with weights of 1 it is too sure before calibration. A mixture gives more say to
    the members that know the input. A weak member can leave either below its best member: measure
    both, and the plain mean of logits beside them.

    The input is [0, 1] pixels: each member normalises for itself, and the ensemble's own
    ``pretrained_cfg`` says mean 0 and std 1. Members without a normalisation (where none has one)
    take the input as it is. The members are held, not copied: ``ensemble.to(device)`` moves them.
    There is no common last layer, so scores on features are not available.

    Args:
        members: two or more ``nn.Module`` classifiers, or :class:`EnergyClassifier` around one.
        combine: ``product`` or ``mixture``.
        weights: w_m for a product (default 1 each), pi_m up to their sum for a mixture.
        temperatures: calibrated T_m of each member's p_m; default: 1 each.

    Attributes:
        energy_mean: mu_m (M,), float64; NaN before :meth:`fit`.
        energy_std: s_m (M,), float64; NaN before :meth:`fit`.

    Raises:
        InvalidInputError: fewer than two members, other class names or image sizes, or settings
            out of range.
        UnsupportedModelError: a member is no ``nn.Module``.

    References:
        Hinton, Training Products of Experts by Minimizing Contrastive Divergence, 2002. That the
        energies are standardised first, and p_m kept apart, is ours: a sum of raw logits would be
        ruled by the member with the largest ones.

    Example:
        >>> ensemble = EnergyEnsemble([nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()])
        >>> ensemble.fit([torch.randn(50, 4)])(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    combination: Tensor
    energy_mean: Tensor
    energy_std: Tensor
    temperatures: Tensor
    weights: Tensor

    def __init__(
        self,
        members: Sequence[EnergyClassifier | Callable[..., Any]],
        *,
        combine: str = "product",
        weights: Sequence[float] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(members, Sequence):
            raise InvalidInputError(
                f"got a {type(members).__name__} as members; needed a list of two or more"
            )
        if combine not in COMBINATIONS:
            raise InvalidInputError(
                f"got combine {combine!r}; needed {' or '.join(COMBINATIONS)}"
                f"{suggest(str(combine), COMBINATIONS)}"
            )
        self.combine = combine
        # EnergyClassifier is no module; the module list is what moves, saves and hashes.
        self._classifiers = [_classifier(member) for member in members]
        if len(self._classifiers) < 2:
            raise InvalidInputError(
                f"got {len(self._classifiers)} members; an ensemble needs two or more classifiers"
            )
        self.members = nn.ModuleList(member.model for member in self._classifiers)  # type: ignore[misc]
        # A new module is in train mode; around members that are not, it would only say so wrongly.
        self.training = self.members.training = any(part.training for part in self.members)
        names = _common_names(self._classifiers)
        preprocessing = _common_pixels(self._classifiers)
        self.pretrained_cfg = _config(self._classifiers, combine, names, preprocessing)
        count = len(self._classifiers)
        # With the weights and in their hash: the same numbers mean another model when mixed.
        self.register_buffer("combination", torch.tensor(COMBINATIONS.index(combine)))
        for name, values in (("weights", weights), ("temperatures", temperatures)):
            self.register_buffer(name, _positive(name, values, count))
        for name in ("energy_mean", "energy_std"):
            self.register_buffer(name, torch.full((count,), math.nan, dtype=torch.float64))

    @property
    def classifiers(self) -> tuple[EnergyClassifier, ...]:
        """The members, each with its own normalisation."""
        return tuple(self._classifiers)

    @property
    def fitted(self) -> bool:
        """Whether the energies' means and standard deviations are known."""
        return bool(torch.isfinite(self.energy_mean).all() & torch.isfinite(self.energy_std).all())

    @torch.no_grad()
    def fit(self, data: Iterable[Any]) -> Self:
        """Measure mean and standard deviation of each member's energy on ID calibration rows.

        Args:
            data: batches of [0, 1] pixels (B, C, H, W), or (pixels, labels) pairs; labels are not
                used. Rows that members were trained on look too familiar: use held-out ones.

        Raises:
            DataError: fewer than two rows, or energies that do not vary or are not finite.
            InvalidInputError: pixels outside [0, 1].
            UnsupportedModelError: members of different numbers of classes, or probabilities.

        Example:
            >>> ensemble = EnergyEnsemble([nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()])
            >>> ensemble.fit([torch.randn(20, 4), torch.randn(30, 4)]).fitted
            True
        """
        found: list[list[Tensor]] = []
        with evaluation_mode(self):
            for item in data:
                pixels = _pixels(item)
                if self._classifiers[0].preprocessing is not None:
                    self._classifiers[0].preprocessing.check_pixels(pixels)
                logits = self.member_logits(pixels)
                if not found:
                    for part in logits:
                        check_kind(part)
                found.append([formulas.energy(part).double().cpu() for part in logits])
        if not found:
            raise DataError("got no batches to fit the ensemble on; needed ID calibration rows")
        return self._standardise([torch.cat(parts) for parts in zip(*found, strict=True)])

    @torch.no_grad()
    def fit_logits(self, logits: Sequence[Tensor]) -> Self:
        """Measure the energies on stored logits, one (N, C) tensor for each member.

        Raises:
            DataError: see :meth:`fit`.
            UnsupportedModelError: see :meth:`fit`.

        Example:
            >>> ensemble = EnergyEnsemble([nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()])
            >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
            >>> ensemble.fit_logits([logits, 2 * logits]).fitted
            True
        """
        self._check(logits)
        for part in logits:
            check_kind(part)
        return self._standardise([formulas.energy(part).double().cpu() for part in logits])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits -E(x, y) of the composition, (B, C); gradients flow.

        Args:
            pixels: (B, C, H, W) in [0, 1] where the members normalise.

        Raises:
            NotFittedError: :meth:`fit` has not run.
        """
        self._require_fit()
        return self.compose(self.member_logits(pixels))

    def member_logits(self, pixels: Tensor) -> list[Tensor]:
        """Return the logits (B, C) of each member, on the device of the first.

        Raises:
            UnsupportedModelError: the members' numbers of classes differ.
        """
        logits = []
        for member in self._classifiers:
            known = member.preprocessing
            logits.append(member(pixels if known is None else known.normalize(pixels)))
        logits = [part.to(logits[0].device) for part in logits]
        self._check(logits)
        return logits

    def compose(self, logits: Sequence[Tensor]) -> Tensor:
        """Compose the members' logits, M tensors (B, C), into those of the ensemble, (B, C).

        Raises:
            NotFittedError: :meth:`fit` has not run.
            UnsupportedModelError: the numbers of classes or of members differ.
        """
        self._require_fit()
        self._check(logits)
        energies = [
            -formulas.log_probabilities(part, float(self.temperatures[m]))
            + ((formulas.energy(part) - self.energy_mean[m]) / self.energy_std[m])[:, None]
            for m, part in enumerate(logits)
        ]
        join = composition.product if self.combine == "product" else composition.mixture
        return -join(energies, self.weights.tolist())

    def extra_repr(self) -> str:
        """Say how the members are combined, for ``print``."""
        return f"combine={self.combine!r}, fitted={self.fitted}"

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = state.get(f"{prefix}combination")
        if stored is not None and int(stored) != COMBINATIONS.index(self.combine):
            raise InvalidInputError(
                f"got the state of a {COMBINATIONS[int(stored)]} for a {self.combine}; make the "
                f"ensemble with combine={COMBINATIONS[int(stored)]!r}"
            )
        super()._load_from_state_dict(state, prefix, *rest)

    def _standardise(self, energies: list[Tensor]) -> Self:
        for member, values in zip(self._classifiers, energies, strict=True):
            rows, bad = len(values), int((~torch.isfinite(values)).sum())
            if rows < 2 or bad:
                raise DataError(
                    f"the ensemble cannot be fitted: {member.name} has {rows} energies, {bad} of "
                    "them not finite; needed two or more, all finite"
                )
            if not float(values.std()) > 0:
                raise DataError(
                    f"the ensemble cannot be fitted: {member.name} has the same energy on all "
                    f"{rows} rows, so there is no unit to measure it in"
                )
        for name, found in (
            ("energy_mean", [values.mean() for values in energies]),
            ("energy_std", [values.std() for values in energies]),
        ):
            getattr(self, name).copy_(torch.stack(found))
        return self

    def _require_fit(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                "the ensemble is not fitted: call ensemble.fit(batches of ID calibration pixels), "
                "or load_state_dict() of a fitted one"
            )

    def _check(self, logits: Sequence[Tensor]) -> None:
        shapes = [tuple(part.shape) for part in logits]
        if len(shapes) != len(self._classifiers) or len(set(shapes)) != 1:
            names = ", ".join(member.name for member in self._classifiers)
            raise UnsupportedModelError(
                f"the members' logits have shapes {shapes}; needed one (B, C) from each of {names}"
                ": an ensemble is of classifiers of the same classes"
            )


def _classifier(member: EnergyClassifier | Callable[..., Any]) -> EnergyClassifier:
    found = member if isinstance(member, EnergyClassifier) else EnergyClassifier(member)
    if not isinstance(found.model, nn.Module):
        raise UnsupportedModelError(
            f"got a member of type {type(found.model).__name__}; needed an nn.Module, whose "
            "weights can be moved, saved and hashed with the ensemble"
        )
    return found


def _common_names(members: Sequence[EnergyClassifier]) -> tuple[str, ...] | None:
    named = [(member.name, member.classes) for member in members if member.classes is not None]
    if len({classes for _, classes in named}) > 1:
        lists = "; ".join(f"{name}: {', '.join(classes[:5])}, ..." for name, classes in named)
        raise InvalidInputError(
            f"the members name different classes, or name them in another order ({lists}); an "
            "ensemble needs the same classes in the same order"
        )
    return named[0][1] if named else None


def _common_pixels(members: Sequence[EnergyClassifier]) -> Preprocessing | None:
    """Return the first member's preprocessing, after a check that all take the same images."""
    found = [member.preprocessing for member in members]
    known = [part for part in found if part is not None]
    if not known:
        return None
    if len(known) < len(found):
        unknown = next(member.name for member in members if member.preprocessing is None)
        raise InvalidInputError(
            f"the normalisation of {unknown} is not known and that of other members is; wrap it: "
            "EnergyClassifier(model, preprocessing=Preprocessing(mean, std)), mean 0 and std 1 for "
            "a model that takes [0, 1] pixels"
        )
    sizes = {part.image_size for part in known if part.image_size is not None}
    channels = {part.channels for part in known}
    if len(sizes) > 1 or len(channels) > 1:
        raise InvalidInputError(
            f"the members take images of sizes {sorted(sizes)} with {sorted(channels)} channels; "
            "needed members that take the same pixels"
        )
    return known[0]


def _config(
    members: Sequence[EnergyClassifier],
    combine: str,
    names: tuple[str, ...] | None,
    preprocessing: Preprocessing | None,
) -> dict[str, Any]:
    """Describe the ensemble in timm's words: it takes [0, 1] pixels."""
    inside = ", ".join(member.name for member in members)
    config: dict[str, Any] = {"architecture": f"{combine} of {inside}"}
    if names is not None:
        config |= {"num_classes": len(names), "label_names": names}
    if preprocessing is not None:
        count = preprocessing.channels
        config |= {
            "mean": (0.0,) * count,
            "std": (1.0,) * count,
            "crop_pct": preprocessing.crop_pct,
            "interpolation": preprocessing.interpolation,
            "crop_mode": preprocessing.crop_mode,
        }
        sizes = [
            member.preprocessing.image_size
            for member in members
            if member.preprocessing is not None and member.preprocessing.image_size is not None
        ]
        if sizes:
            config["input_size"] = (count, *sizes[0])
    return config


def _positive(name: str, values: Sequence[float] | None, count: int) -> Tensor:
    found = [1.0] * count if values is None else [float(value) for value in values]
    if len(found) != count or not all(0 < value < math.inf for value in found):
        raise InvalidInputError(
            f"got {name} {found}; needed {count} finite numbers > 0, one for each member"
        )
    return torch.tensor(found, dtype=torch.float64)


def _pixels(item: Any) -> Tensor:
    found = item
    if isinstance(item, Mapping):
        found = item.get("pixel_values", item.get("inputs"))
    elif isinstance(item, (tuple, list)) and item:
        found = item[0]
    elif hasattr(item, "inputs"):
        found = item.inputs
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise InvalidInputError(
            f"got a batch of type {type(item).__name__}; needed a tensor of inputs (B, ...), or a "
            "pair (inputs, labels)"
        )
    return found
