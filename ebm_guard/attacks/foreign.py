"""Attacks of other libraries, judged by our scorer and never by their own word."""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard.attacks.engine import Query
from ebm_guard.attacks.geometry import TOLERANCE, Ball, ball_of
from ebm_guard.attacks.rows import Examples, Outcome, joined
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.isolation import Forward

# attack(model, x, y, epsilon) -> x_adv
ForeignAttack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
FAULTS = ("", "not finite", "outside [0, 1]", "outside the ball")


@dataclass(frozen=True)
class ForeignOutcome(Outcome):
    """What an attack of another library found, as our scorer sees it.

    ``step`` is 1 where the verdict is about the returned image, and 0 where it is about the clean
    one. Costs of a batch are spread evenly over its images; their sums are exact.

    Args:
        fault: (N,) int64, index into ``FAULTS``; 0 where the returned image was in order.
        source: name of the attack, with its version where it is known.
        messages: what the library warned of.
    """

    fault: Tensor
    source: str = ""
    messages: tuple[str, ...] = ()

    @property
    def errors(self) -> dict[str, int]:
        """Numbers of images that were refused, by fault."""
        counts = torch.bincount(self.fault.cpu(), minlength=len(FAULTS)).tolist()
        return {FAULTS[code]: counts[code] for code in range(1, len(FAULTS)) if counts[code]}


class PixelModel(nn.Module):
    """What other libraries attack: a module from [0, 1] pixels to logits, normalisation inside.

    It stays in eval mode whatever is asked of it. The user's model is not registered in it: no
    ``.to``, ``.half``, ``.train`` or optimiser of a library reaches its parameters. The one
    parameter tells libraries the device, and needs no gradient.

    Args:
        forward: from pixels in [0, 1] to the output.
        device: of the pixels.

    Example:
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> model = PixelModel(lambda pixels: ClassifierOutput(pixels.flatten(1), None))
        >>> model.train()(torch.zeros(5, 1, 1, 2)).shape, model.training, model.forwards
        (torch.Size([5, 2]), False, 5)
    """

    def __init__(self, forward: Forward, device: torch.device | None = None) -> None:
        super().__init__()
        # In a tuple: an nn.Module as an attribute would be registered.
        self._held = (forward,)
        self.place = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.forwards = self.gradients = 0
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, C, H, W) in [0, 1] to logits (B, classes) in float32 or better; counts rows."""
        rows = len(pixels)
        self.forwards += rows
        # A copy: some attacks write into the logits.
        logits = self._held[0](pixels).logits.to(pixels.device).clone()
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if logits.requires_grad:

            def count(_: Tensor) -> None:
                self.gradients += rows

            logits.register_hook(count)  # type: ignore[no-untyped-call]
        return logits

    def train(self, mode: bool = True) -> PixelModel:
        """Stay in eval mode: what is deployed is what is attacked."""
        del mode
        super().train(False)
        return self


def judge_callable(
    attack: ForeignAttack,
    query: Query,
    examples: Examples,
    epsilon: float,
    *,
    norm: str = "linf",
    seed: Sequence[int] = (0,),
    batch_size: int | None = None,
    name: str = "",
) -> ForeignOutcome:
    """Run any attack of another library, and judge the images that it returns.

    The library's own word on success is never asked for. An image that is not finite, or outside
    the box or the ball by more than 1e-6, is an error row: the verdict is then about the clean
    image, so that it counts as robust where the clean image is right. The global random numbers
    of torch, numpy and Python start from the seed, and are restored afterwards. They are of each
    batch: unlike those of our own attacks, results hang on the batch size.

    Args:
        attack: ``attack(model, x, y, epsilon) -> x_adv``. The model is a :class:`PixelModel`; x is
            (B, C, H, W) float32 in [0, 1], y (B,) int64, and x_adv a floating tensor like x.
        query: the model and the goal that judges.
        examples: the images.
        epsilon: radius in pixel units of [0, 1]; at 0 the clean images are judged.
        norm: ``linf`` or ``l2``.
        seed: whole numbers >= 0.
        batch_size: images that the attack gets at once; default the query's.
        name: of the attack, for messages and reports.

    Raises:
        InvalidInputError: epsilon is out of range, or the attack returned something that is not
            a floating tensor of the shape of x.

    Whatever the attack raises comes through, with a note which images it was at.

    Example:
        >>> from ebm_guard.attacks import Misclassify
        >>> from ebm_guard.model.classifier import ClassifierOutput
        >>> forward = lambda pixels: ClassifierOutput(
        ...     torch.cat([pixels.flatten(1), 1 - pixels.flatten(1)], dim=1), None)
        >>> examples = Examples.of(torch.full((1, 1, 1, 1), 0.6), torch.tensor([0]))
        >>> darker = lambda model, x, y, epsilon: x - epsilon
        >>> judge_callable(darker, Query(forward, Misclassify()), examples, 0.2).success
        tensor([True])
        >>> much_darker = lambda model, x, y, epsilon: x - 2 * epsilon
        >>> judge_callable(much_darker, Query(forward, Misclassify()), examples, 0.2).errors
        {'outside the ball': 1}
    """
    if not 0 <= epsilon < math.inf:
        raise InvalidInputError(f"got epsilon {epsilon!r}; needed a number >= 0 in pixel units")
    ball = ball_of(norm)
    name = name or getattr(attack, "__name__", type(attack).__name__)
    examples = query.goal.prepare(query.forward, examples)
    size = query.batch_size if batch_size is None else batch_size
    parts = []
    for first in range(0, len(examples), size):
        part = examples.select(slice(first, first + size))
        model = PixelModel(query.forward, part.pixels.device)
        returned = part.pixels
        if epsilon > 0:
            with _own_random_numbers([*seed, int(part.ids[0])]):
                returned = _asked(attack, model, part, epsilon, name)
        parts.append(_judged(query, part, returned, ball, epsilon, model))
    return replace(joined(parts), source=name)


def autoattack(
    query: Query,
    examples: Examples,
    epsilon: float,
    *,
    norm: str = "linf",
    seed: Sequence[int] = (0,),
) -> ForeignOutcome:
    """Run the authors' AutoAttack (pyautoattack, version ``standard``): the reference number.

    Give it the images that our own attacks left standing: it costs the more the more of them are
    robust. APGD-CE, APGD-T and FAB-T with 100 steps, Square with 5,000 queries; targeted parts aim
    at 9 classes, or at all wrong ones where there are fewer. APGD-T needs 4 classes, and is left
    out below. It attacks the class alone; ``query.goal`` judges what it returns.

    Args:
        query: the model and the goal that judges.
        examples: the images.
        epsilon: radius in pixel units of [0, 1].
        norm: ``linf`` or ``l2``.
        seed: whole numbers >= 0.

    Returns:
        One row for each image; ``source`` tells the version and the parts that ran, ``messages``
        what its checks say of the model.

    Raises:
        InvalidInputError: pyautoattack is not installed, or epsilon is out of range.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness, ICML 2020.
    """
    try:
        import pyautoattack  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise InvalidInputError(
            f"the reference AutoAttack needs pyautoattack, which cannot be imported ({error}): "
            'pip install "ebm-guard[attacks]". Our own APGD and square attacks need no extra'
        ) from error
    with torch.no_grad():
        classes = query.forward(examples.pixels[:1]).logits.shape[1]
    parts = ["apgd-ce", "apgd-t", "fab-t", "square"]
    if classes < 4:
        parts.remove("apgd-t")
    messages: list[str] = []

    def run(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
        tool = pyautoattack.AutoAttack(
            model,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=radius,
            seed=_number([*seed, 1]),
            device=str(x.device),
        )
        tool.attacks_to_run = parts
        tool.apgd_targeted.n_target_classes = tool.fab.n_target_classes = min(9, classes - 1)
        with _quiet_logger("auto-attack", messages):
            adversarial, _ = tool.run_standard_evaluation(x, y, batch_size=query.batch_size)
        return torch.as_tensor(adversarial)

    ball_of(norm)
    found = judge_callable(
        run, query, examples, epsilon, norm=norm, seed=seed, batch_size=len(examples)
    )
    source = f"pyautoattack {metadata.version('pyautoattack')}: {', '.join(parts)}"
    return replace(found, source=source, messages=tuple(dict.fromkeys(messages)))


def _asked(
    attack: ForeignAttack, model: nn.Module, part: Examples, epsilon: float, name: str
) -> Tensor:
    """Call the attack with copies of the images, and check what it returns as a whole."""
    pixels, labels = part.pixels.clone(), part.labels.to(part.pixels.device, copy=True)
    rows = f"images {int(part.ids[0])} to {int(part.ids[-1])} at epsilon {epsilon:.4g}"
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            returned = attack(model, pixels, labels, epsilon)
    except Exception as error:
        error.add_note(f"raised by the attack {name!r}, at {rows}")
        raise
    got = f"{type(returned).__name__}"
    if isinstance(returned, Tensor):
        got = f"{returned.dtype} of shape {tuple(returned.shape)}"
        if returned.is_floating_point() and returned.shape == part.pixels.shape:
            return returned.detach().to(part.pixels)
    raise InvalidInputError(
        f"the attack {name!r} returned {got} for {rows}; needed a floating tensor of pixels in "
        f"[0, 1] of shape {tuple(part.pixels.shape)}. Return the images alone (of foolbox's triple "
        "the clipped ones), numpy arrays through torch.from_numpy, uint8 divided by 255"
    )


def _judged(
    query: Query,
    part: Examples,
    returned: Tensor,
    ball: Ball,
    epsilon: float,
    model: PixelModel,
) -> ForeignOutcome:
    fault = _faults(returned, part.pixels, ball, epsilon)
    sound = fault == 0
    pixels = torch.where(sound[:, None, None, None], returned, part.pixels).clamp(0, 1)
    answer = query.answer(pixels, part, gradient=False)
    fooled = answer.success.to(pixels.device)
    moved = (pixels != part.pixels).flatten(1).any(dim=1)
    plain = query.forwards_per_answer[0]
    return ForeignOutcome(
        pixels=pixels,
        success=fooled,
        objective=answer.objective.to(pixels.device),
        step=moved.long().cpu(),
        gradients=_shared(model.gradients, len(part)),
        forwards=_shared(model.forwards, len(part)) + plain,
        zero_gradients=torch.zeros(len(part), dtype=torch.int64),
        fault=fault,
    )


def _faults(returned: Tensor, centre: Tensor, ball: Ball, epsilon: float) -> Tensor:
    """Return the index into ``FAULTS`` of each image, (B,)."""
    finite = returned.isfinite().flatten(1).all(dim=1)
    # Float64: sums over many pixels must not use up the tolerance.
    images = returned.double().nan_to_num(0, 0, 0)
    lowest, highest = images.flatten(1).amin(dim=1), images.flatten(1).amax(dim=1)
    boxed = (lowest >= -TOLERANCE) & (highest <= 1 + TOLERANCE)
    near = ball.distance(images, centre.double()) <= epsilon + TOLERANCE
    fault = torch.where(near, 0, 3)
    fault = torch.where(boxed, fault, 2)
    return torch.where(finite, fault, 1)


def _shared(total: int, rows: int) -> Tensor:
    """Spread a count over rows, (rows,) int64, so that the sum is exact."""
    share = torch.full((rows,), total // rows, dtype=torch.int64)
    share[: total % rows] += 1
    return share


def _number(seed: Sequence[int]) -> int:
    return int(np.random.SeedSequence(list(seed)).generate_state(1)[0])


@contextmanager
def _own_random_numbers(seed: Sequence[int]) -> Iterator[None]:
    """Seed what other libraries draw from, and restore all of it, also a debugger's hook."""
    number = _number(seed)
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    # pyautoattack sets sys.settrace, which ends debuggers and coverage.
    kept, kept_numpy, trace = random.getstate(), np.random.get_state(), sys.gettrace()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        try:
            yield
        finally:
            sys.settrace(trace)
            np.random.set_state(kept_numpy)  # noqa: NPY002
            random.setstate(kept)


@contextmanager
def _quiet_logger(name: str, messages: list[str]) -> Iterator[None]:
    """Collect a logger's warnings instead of printing them."""

    class Collect(logging.Handler):
        def emit(self, record: Any) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collect(logging.WARNING)
    kept = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = kept[0]
        logger.setLevel(kept[1])
