"""Let attacks of other libraries loose on a classifier, and judge what they return.

Any callable ``attack(model, x, y, epsilon) -> x_adv`` will do. The model it gets takes pixels in
[0, 1] and normalises inside; what it returns is checked and scored again, so that no library's own
word on success, and no image outside the ball, enters a report. The functions below wrap foolbox,
torchattacks, ART and adv-lib (none of them comes with ebm_guard), with what to watch for in each.

    pip install foolbox
    python examples/foreign_attacks.py --attack foolbox_pgd foolbox_fmn --epsilon 0.1
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import Examples, Misclassify, Query, pixel_forward, untouched
from ebm_guard.attacks.foreign import judge_callable
from ebm_guard.data.demo import demo_classifier, load_demo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ebm_guard.attacks.foreign import ForeignOutcome

STEPS = 20


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Run foolbox's linf PGD.

    Of the triple (raw, clipped, success) return the clipped images: raw ones may lie outside the
    ball. Name the device: the default moves the model to the first GPU there is.
    """
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=2.5 / STEPS)
    _, clipped, _ = attack(wrapped, x, y, epsilons=epsilon)
    return clipped


def foolbox_fmn(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Run foolbox's minimal-norm attack FMN in linf, and cut its images to the ball.

    With one epsilon a minimal-norm attack returns, clipped to the ball, the nearest images that it
    found; those that were farther away are no longer adversarial, which scoring again finds out.
    (Its l2 twin does not project in 3.3.4, and finds distances ten times too large.)
    """
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, clipped, _ = foolbox.attacks.LInfFMNAttack(steps=100)(wrapped, x, y, epsilons=epsilon)
    return clipped


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Run torchattacks' PGD.

    Its ``AutoAttack`` takes 10 steps in each part instead of 100: for that number use
    ``ebm_guard.attacks.foreign.autoattack``. Leave its normalisation off, ours is inside. It pins
    ``requests~=2.25.1`` and overwrites a ``robustbench`` package: install it with ``--no-deps``.
    """
    import torchattacks

    attack = torchattacks.PGD(model, eps=epsilon, alpha=2.5 * epsilon / STEPS, steps=STEPS)
    return attack(x, y)


def art_pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Run ART's PGD.

    It takes and returns numpy arrays, draws from numpy's global random numbers, needs the step
    size (its default 0.1 is for eps 0.3), and attacks predicted labels where none are given.
    """
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    wrapped = PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        wrapped,
        norm=np.inf,
        eps=epsilon,
        eps_step=2.5 * epsilon / STEPS,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    found = attack.generate(x.cpu().numpy(), y.cpu().numpy())
    return torch.from_numpy(found).to(x)


def adv_lib_pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Run adv-lib's PGD.

    It never scores its last iterate: k steps are k - 1 useful ones, and ``steps=1`` returns the
    clean images. It imports visdom and torchvision.
    """
    from adv_lib.attacks import pgd_linf

    return pgd_linf(model, x, y, epsilon, steps=STEPS + 1, relative_step_size=2.5 / STEPS)


ATTACKS = {
    attack.__name__: attack
    for attack in (foolbox_pgd, foolbox_fmn, torchattacks_pgd, art_pgd, adv_lib_pgd)
}


def judge(name: str, epsilon: float, images: int) -> tuple[ForeignOutcome, float]:
    """Attack the demo classifier: what was found, and the accuracy that is left."""
    demo = load_demo("evaluation")
    pixels = torch.from_numpy(demo.images[:images]).unsqueeze(1) / 255
    examples = Examples.of(pixels, torch.from_numpy(demo.labels[:images]))
    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        query = Query(pixel_forward(classifier), Misclassify("margin"))
        outcome = judge_callable(ATTACKS[name], query, examples, epsilon)
    return outcome, 1 - float(outcome.success.double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attack", nargs="+", choices=sorted(ATTACKS), default=["foolbox_pgd"])
    parser.add_argument("--epsilon", type=float, default=0.1, help="in pixel units of [0, 1]")
    parser.add_argument("--images", type=int, default=128)
    settings = parser.parse_args(arguments)
    print(f"linf {settings.epsilon:g}, {settings.images} images of the demo classifier")
    for name in settings.attack:
        outcome, accuracy = judge(name, settings.epsilon, settings.images)
        cost = float(outcome.gradients.double().mean())
        refused = ", ".join(f"{n} {fault}" for fault, n in outcome.errors.items()) or "none"
        print(f"{name}: accuracy {accuracy:.3f}, {cost:.1f} gradients an image, refused: {refused}")


if __name__ == "__main__":
    main()
