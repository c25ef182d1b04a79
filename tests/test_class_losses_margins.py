"""The margin that a class loss claims against the least of it over the plane of energies.

LeCun et al. 2006 call a loss good where its least values lie at E_C + m < E_I. Here the plane is a
grid of binary fractions, so sums and the least value are exact: the margin of a loss in a box is
the smallest gap E_I - E_C among its minimisers.
"""

import pytest
import torch
from torch.nn import functional as F

from ebm_guard import registry
from ebm_guard.training.class_losses import ClassLoss, make_class_loss

REACH = 4.0
LOSSES = (
    *((method.name, {}) for method in registry.methods("class_loss")),
    ("hinge", {"m": 2.0}),
    ("square_square", {"m": 3.0, "centre": -1.0}),
    ("square_square", {"form": "softplus"}),
    ("square_exponential", {"form": "softplus"}),
    ("bromley", {"m": 2.0, "centre": 1.0}),
    ("additive_margin", {"m": 2.0}),
    ("additive_margin", {"form": "squared_hinge"}),
    ("additive_margin", {"form": "log"}),
    ("nll", {"beta": 0.25}),
)


def grid(reach, classes, low=None):
    """All energies (N, classes) of a box, the correct one first.

    The wrong ones reach twice as far: in a square box the wall at its low end would stop a wrong
    energy from falling below the correct one, and lend every loss a margin of 0.
    """
    step = 1 / 4 if classes == 2 else 1.0
    axes = [
        torch.arange(-far if low is None else low, far + step, step, dtype=torch.float64)
        for far in (reach, *[2 * reach] * (classes - 1))
    ]
    return torch.cartesian_prod(*axes)


def row_losses(loss, energies):
    labels = torch.zeros(len(energies), dtype=torch.long)
    if loss.name == "info_nce":
        # The plane is that of one image; a loss over the batch must see it alone.
        return torch.cat([loss.rows(row, labels[:1]) for row in energies.split(1)])
    return loss.rows(energies, labels)


def measured_margin(loss, reach, classes=2, low=None):
    """The smallest gap between the lowest wrong and the correct energy where the loss is least."""
    energies = grid(reach, classes, low)
    values = row_losses(loss, energies)
    least = energies[values == values.min()]
    return float((least[:, 1:].amin(dim=1) - least[:, 0]).min())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("name", "given_settings"), LOSSES, ids=str)
def test_the_margin_is_the_one_that_is_claimed(name, given_settings, classes):
    loss = make_class_loss(name, **given_settings)
    reach = 1.0 if name == "info_nce" else REACH
    near, far = (measured_margin(loss, side, classes) for side in (reach, 2 * reach))
    if loss.margin == "none":
        assert near <= -reach
        assert far == 2 * near
    elif loss.margin == "0":
        assert (near, far) == (0.0, 0.0)
    elif loss.margin == "positive":
        # As wide as the box allows, so wider than any number.
        assert near >= reach
        assert far >= 2 * reach
    elif given_settings.get("form") == "softplus":
        # The correct energy falls for ever, the wrong one stops at log(e^m - 1).
        assert far > near > loss.settings()["m"]
    else:
        assert (near, far) == (loss.settings()["m"],) * 2


class Printed(ClassLoss):
    """E_C^2 - max(0, m - E_I)^2: the sign of table 1."""

    name, margin = "printed", "m"

    def rows(self, energies, labels):
        return energies[:, 0] ** 2 - F.relu(1 - energies[:, 1]) ** 2


class Squared(ClassLoss):
    """E_C^2 + max(0, m - E_I)^2 on signed energies."""

    name, margin = "squared", "m"

    def rows(self, energies, labels):
        return energies[:, 0] ** 2 + F.relu(1 - energies[:, 1]) ** 2


class Cut(ClassLoss):
    """([E_C]+)^2 + max(0, m - [E_I]+)^2: both energies cut at zero."""

    name, margin = "cut", "m"

    def rows(self, energies, labels):
        cut = F.relu(energies)
        return cut[:, 0] ** 2 + F.relu(1 - cut[:, 1]) ** 2


def test_the_printed_sign_of_square_square_has_no_margin():
    """On distances, for which the table is written, and on signed energies."""
    assert measured_margin(Printed(), REACH, low=0.0) == 0.0
    assert measured_margin(Printed(), REACH) < 0
    assert measured_margin(make_class_loss("square_square"), REACH, low=0.0) == 1.0


def gradient_at(loss, own, wrong):
    energies = torch.tensor([[own, wrong]], dtype=torch.float64, requires_grad=True)
    value = loss.rows(energies, torch.tensor([0])).sum()
    return torch.autograd.grad(value, energies)[0][0].tolist()


def test_square_square_leaves_a_low_correct_energy_alone_and_lifts_a_low_wrong_one():
    ours = make_class_loss("square_square")
    assert gradient_at(ours, -10.0, 5.0) == [0.0, 0.0]
    assert gradient_at(Squared(), -10.0, 5.0) == [-20.0, 0.0]
    assert gradient_at(ours, -10.0, -12.0) == [0.0, -26.0]
    assert gradient_at(Cut(), -10.0, -12.0) == [0.0, 0.0]


def test_the_square_losses_are_the_equations_on_distances():
    """On non-negative energies nothing is cut and no tangent is used."""
    energies = grid(REACH, 2, low=0.0)
    own, wrong = energies.T
    square = make_class_loss("square_square", m=2.0)
    assert torch.equal(row_losses(square, energies), own**2 + F.relu(2.0 - wrong) ** 2)
    exponential = make_class_loss("square_exponential", gamma=3.0)
    expected = own**2 + 3.0 * torch.exp(-wrong)
    assert torch.allclose(row_losses(exponential, energies), expected, rtol=1e-14)
    assert measured_margin(exponential, REACH, low=0.0) == 2 * REACH


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_tangent_of_square_exponential_has_no_step(gamma):
    loss = make_class_loss("square_exponential", gamma=gamma)
    slopes = [gradient_at(loss, -1.0, place)[1] for place in (-1e-9, 0.0, 1e-9)]
    assert slopes == pytest.approx([-gamma] * 3, rel=1e-6)


def descend(loss, steps, rate=0.1):
    """Free energies of three images and classes, all 0 at first; the gaps at the end."""
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(3)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss.rows(-logits, labels).sum(), logits)
        with torch.no_grad():
            logits -= rate * gradient
    own = logits.detach().gather(1, labels[:, None])
    return own.squeeze(1) - logits.detach().scatter(1, labels[:, None], -torch.inf).amax(dim=1)


@pytest.mark.parametrize(("name", "given_settings"), LOSSES, ids=str)
def test_descent_on_free_energies_ends_at_the_claimed_gap(name, given_settings):
    """What the plane says is what an optimiser does: 0 stops at once, m stops at m."""
    loss = make_class_loss(name, **given_settings)
    early, late = descend(loss, 50), descend(loss, 150)
    step = 0.1
    if loss.margin == "0":
        assert torch.equal(early, late)
        assert bool((late > 0).all() and (late <= 2 * step).all())
    elif loss.margin == "m":
        # Squares reach it in the limit, hinges within a step; a correct energy that starts below
        # the centre stays there.
        m, beyond = loss.settings()["m"], max(0.0, loss.settings().get("centre", 0.0))
        assert bool((late >= m + beyond - 1e-2).all())
        assert given_settings.get("form") == "softplus" or bool((late <= m + beyond + 0.3).all())
    else:
        assert bool((late > early).all() and (early > 0).all())
