"""The net as samplers run it: a copy with batch norm folded into the layer before it.

A sampler asks the same weights for a gradient with respect to pixels, again and again. So the
copy is made lean once: weights frozen, batch norm of eval mode folded into convolutions and linear
layers, memory laid out channels last. After an optimiser step, :meth:`SamplingNet.refresh` takes
the new weights over. Where the net cannot be traced, or the copy's energies differ, the net itself
is run, and the note says so.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.model import ClassifierOutput, EnergyClassifier
from ebm_guard.model.isolation import Forward, pixel_forward, untouched
from ebm_guard.model.wrappers import unwrapped
from ebm_guard.sampling.norms import Fold, fold_norms, refresh_fold
from ebm_guard.sampling.probing import seconds_per_gradient
from ebm_guard.sampling.sampler import energy_and_gradient

Precision = Literal["auto", "float32", "bfloat16"]
# Of energies; folding rounds otherwise than the net does.
TOLERANCE = 1e-4
# The factor that weights are changed by, to see whether a copy follows.
_OTHER = 1.05
# Gradients with respect to a batch of pixels below which a compilation cannot be worth its time.
_COMPILE_STEPS = 2000
# The share of bfloat16's gradients that must point where float32's do.
_COSINE = 0.95


class SamplingNet:
    """Map [0, 1] pixels to the classifier's output, as fast as its weights allow.

    Args:
        classifier: around the net; it is read and never changed.
        probe_pixels: (B, C, H, W) in [0, 1], some real images: energies are compared on them.
        channels_last: lay memory out channels last (convolutions run faster, on CPU too).
        precision: ``float32``; ``bfloat16`` for convolutions and matrix products by autocast,
            energies in float32; ``auto``: float32 on a CPU, so that runs repeat bit by bit, and on
            a GPU bfloat16 where a short measurement finds it faster and its gradients point the
            same way.
        compile: run through ``torch.compile``; ``auto``: only on a GPU, only for a run of at least
            2,000 gradients, and kept only where a measurement finds it faster. On a CPU compiling
            takes longer than a short run saves.
        expected_steps: gradients of a batch that the caller is going to ask for, for ``auto``.

    Attributes:
        note: what was done and why not more, in words.
        folded: norm layers that were folded.
        precision: ``float32`` or ``bfloat16``, as chosen.
        compiled: whether it runs through ``torch.compile``.

    Raises:
        InvalidInputError: the normalisation is not known, or a setting is none of those named.

    Example:
        >>> from ebm_guard.model import Preprocessing
        >>> layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        >>> model = nn.Sequential(*layers, nn.Linear(144, 3)).eval()
        >>> classifier = EnergyClassifier(model, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> net = SamplingNet(classifier, torch.rand(4, 1, 8, 8))
        >>> net(torch.zeros(2, 1, 8, 8)).logits.shape, net.folded
        (torch.Size([2, 3]), 1)
    """

    def __init__(
        self,
        classifier: EnergyClassifier,
        probe_pixels: Tensor,
        *,
        channels_last: bool = True,
        precision: Precision = "auto",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002
        expected_steps: int = 0,
    ) -> None:
        if precision not in get_args(Precision) or compile not in (True, False, "auto"):
            raise InvalidInputError(
                f"got precision={precision!r}, compile={compile!r}; precision is one of "
                f"{', '.join(get_args(Precision))}, compile is True, False or 'auto'"
            )
        self.classifier = classifier
        self.folded, self.compiled, self.precision = 0, False, "float32"
        self.channels_last = False
        self._net: fx.GraphModule | None = None
        self._folds: list[Fold] = []
        # Tensors of the copy that the live net has too, under the same name.
        self._copied: list[str] = []
        self._device = classifier.device or torch.device("cpu")
        self._forward: Forward = pixel_forward(classifier)
        self.note = self._build(probe_pixels.detach().to(self._device), channels_last)
        if self.traced:
            self._choose_precision(probe_pixels, precision)
            self._choose_compile(probe_pixels, compile, expected_steps)
        elif precision == "bfloat16" or compile is True:
            self.note += "; so it runs in its own precision, not compiled"

    @property
    def traced(self) -> bool:
        """Whether a traced, frozen copy is run, and not the net itself."""
        return self._net is not None

    def __call__(self, pixels: Tensor) -> ClassifierOutput:
        """Compute logits (B, C) in float32 or better, differentiable in the pixels."""
        pixels = pixels.to(self._device)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.precision == "bfloat16":
            return ClassifierOutput(self._forward(pixels).logits.float(), None)
        return self._forward(pixels)

    def energy(self, pixels: Tensor) -> Tensor:
        """Compute energies (B,), differentiable in the pixels."""
        return formulas.energy(self(pixels).logits)

    def settings(self) -> dict[str, Any]:
        """Return what is run, as JSON types."""
        return {
            "folded": self.folded,
            "channels_last": self.channels_last,
            "precision": self.precision,
            "compiled": self.compiled,
            "note": self.note,
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights of the net as they are now; nothing is traced again.

        Raises:
            InvalidInputError: the net has other weights than it was traced with.
        """
        if self._net is None:
            return
        try:
            self._take_over(self._net, unwrapped(self.classifier.model))
        except (KeyError, RuntimeError) as error:
            raise InvalidInputError(
                f"the net no longer has the weights it was traced with ({error}); make a new "
                "SamplingNet"
            ) from error

    @torch.no_grad()
    def _take_over(self, net: fx.GraphModule, model: nn.Module) -> None:
        """Write the weights of a model into its traced copy."""
        live, own = tensors_of(model), net.state_dict(keep_vars=True)
        for name in self._copied:
            own[name].copy_(live[name])
        for fold in self._folds:
            refresh_fold(fold, own, live)

    def _build(self, probe: Tensor, channels_last: bool) -> str:
        """Trace, fold and compare; return the note."""
        model = unwrapped(self.classifier.model)
        if not isinstance(model, nn.Module):
            return f"a plain callable ({type(model).__name__}) cannot be folded: run as it is"
        try:
            net, norms = self._traced(model)
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on stand-ins
            return f"not folded, run as it is: the model cannot be traced ({_short(error)})"
        expected = self._energies(model, probe)
        try:
            if reason := self._left_behind(net, model, probe):
                return self._as_it_is(reason)
        except Exception as error:  # noqa: BLE001 - the user's code on other weights
            return self._as_it_is(f"the folded copy fails ({_short(error)})")
        reasons = []
        for last in (True, False) if channels_last else (False,):
            trouble = self._try(net, probe, expected, last)
            if not trouble:
                left = norms - self.folded
                rest = f", {left} left as they are" if left else ""
                layout = ", channels last" if last else ""
                return f"{self.folded} of {norms} norm layers folded{rest}{layout}"
            reasons.append(trouble)
        return self._as_it_is(reasons[-1])

    def _as_it_is(self, reason: str) -> str:
        """Go back to the net itself; return the note."""
        self._net, self._folds, self.folded, self.channels_last = None, [], 0, False
        self._forward = pixel_forward(self.classifier)
        return f"not folded, run as it is: {reason}"

    def _traced(self, model: nn.Module) -> tuple[fx.GraphModule, int]:
        """Trace a frozen copy in eval mode and fold it; also return its number of norm layers."""
        own = _evaluating(model)
        net, self._folds, norms = fold_norms(own.requires_grad_(requires_grad=False))
        self.folded = len(self._folds)
        return net, norms

    def _left_behind(self, net: fx.GraphModule, model: nn.Module, probe: Tensor) -> str:
        """Find what of a traced copy comes from the live net; return what would not follow it.

        Tracing runs the user's code once: a tensor that it makes becomes a constant of the copy.
        One like torch.tensor(2.0) stays right; one made of weights does not follow them. Other
        weights tell the two apart.
        """
        live, own = tensors_of(model), net.state_dict(keep_vars=True)
        folds = {name for fold in self._folds for name in fold.own_names}
        others = {name: value for name, value in own.items() if name not in folds}
        self._copied = [name for name in others if name in live]
        constants = [name for name in others if name not in live]
        if not constants:
            return ""
        other, copied = _evaluating(model), copy.deepcopy(net)
        with torch.no_grad():
            for value in {id(part): part for part in tensors_of(other).values()}.values():
                if value.is_floating_point():
                    value.mul_(_OTHER)
        self._take_over(copied, other)
        expected, found = (self._energies(part, probe) for part in (other, copied))
        if _gap(found, expected) <= TOLERANCE:
            return ""
        return f"{', '.join(constants)} would not follow the weights: made of them in forward"

    def _energies(self, net: nn.Module, probe: Tensor) -> Tensor:
        with untouched(net), torch.no_grad():
            return formulas.energy(pixel_forward(self._around(net))(probe).logits)

    def _try(
        self, net: fx.GraphModule, probe: Tensor, expected: Tensor, channels_last: bool
    ) -> str:
        """Run the copy on the probe; return what is wrong with it, or ''."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._net, self.channels_last = net, channels_last
        self._use(net)
        try:
            net.to(memory_format=layout)
            found, _ = energy_and_gradient(self.energy, probe)
        except Exception as error:  # noqa: BLE001 - whatever the user's layers raise on this layout
            return f"the folded copy fails ({_short(error)})"
        gap = _gap(found, expected)
        if not gap <= TOLERANCE:
            return f"the folded copy's energies differ by {gap:.1e} of their size"
        return ""

    def _use(self, net: nn.Module) -> None:
        self._forward = pixel_forward(self._around(net))

    def _around(self, net: nn.Module) -> EnergyClassifier:
        """Wrap another net, with the user's own way to pick the logits."""
        lean = copy.copy(self.classifier)
        lean.model = net
        return lean

    def _choose_precision(self, probe: Tensor, wanted: Precision) -> None:
        net, on_cpu = self._net, self._device.type == "cpu"
        if net is None or wanted == "float32" or (wanted == "auto" and on_cpu):
            return
        exact = energy_and_gradient(self.energy, probe.to(self._device))[1]
        before = 0.0 if wanted == "bfloat16" else seconds_per_gradient(self.energy, probe)
        plain = self._forward
        self._use(_Autocast(net, self._device.type))
        self.precision = "bfloat16"
        rough = energy_and_gradient(self.energy, probe.to(self._device))[1]
        if wanted == "bfloat16":
            self.note += ", bfloat16 as asked for"
            return
        cosine = torch.cosine_similarity(exact.flatten(1), rough.flatten(1)).median()
        speed = before / seconds_per_gradient(self.energy, probe)
        if speed > 1 and float(cosine) >= _COSINE:
            self.note += f", bfloat16 ({speed:.1f} times as fast on the probe)"
            return
        self._forward, self.precision = plain, "float32"
        self.note += f", float32 (bfloat16: {speed:.1f} times as fast, cosine {float(cosine):.2f})"

    def _choose_compile(
        self, probe: Tensor, wanted: bool | Literal["auto"], expected_steps: int
    ) -> None:
        long_run = self._device.type != "cpu" and expected_steps >= _COMPILE_STEPS
        if wanted is False or (wanted == "auto" and not long_run):
            return
        plain = self._forward
        before = seconds_per_gradient(self.energy, probe)
        net: Any = self._net
        if self.precision == "bfloat16":
            net = _Autocast(net, self._device.type)
        compiled: Any = torch.compile(net)
        self._use(compiled)
        after = seconds_per_gradient(self.energy, probe)
        self.compiled = wanted is True or after < before
        self._forward = self._forward if self.compiled else plain
        kept = "compiled" if self.compiled else "not compiled"
        self.note += f", {kept} ({before / after:.1f} times as fast on the probe)"


class _Autocast(nn.Module):
    """Run a net in bfloat16 by autocast, its output in float32."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind
        self.eval()

    def forward(self, inputs: Tensor) -> Any:
        with torch.autocast(self.kind, dtype=torch.bfloat16):
            return self.net(inputs)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model by name: parameters, buffers, and plain attributes.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1))
        >>> model[0].gain = torch.ones(1)
        >>> sorted(tensors_of(model))
        ['0.bias', '0.gain', '0.weight']
    """
    found: dict[str, Tensor] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for held in (vars(part), part._buffers, part._parameters):
            found |= {prefix + key: each for key, each in held.items() if isinstance(each, Tensor)}
    return found


def _evaluating(model: nn.Module) -> nn.Module:
    """Copy a model and put the copy into eval mode, flag by flag."""
    own = copy.deepcopy(model)
    for part in own.modules():
        part.training = False
    return own


def _gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two sets of energies, as a share of their size."""
    scale = max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / scale


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
