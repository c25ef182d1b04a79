"""Objectives against their equations: hinges, contrasts, likelihood gradients, attacks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from training_cases import (
    CLASSES,
    Fixed,
    batch_of,
    context_of,
    energies_of,
    gradients,
    noise,
    tiny_net,
)

from ebm_guard.errors import InvalidInputError
from ebm_guard.training.class_losses import make_class_loss
from ebm_guard.training.negatives import Descent, Outliers, Synthetic
from ebm_guard.training.objectives import LossTerms, make_objective
from ebm_guard.training.objectives.hdge import contrastive
from ebm_guard.training.objectives.terms import warmed_up

# --- Terms ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=8), st.integers(0, 100))
def test_class_loss_is_the_mean_over_the_labelled_rows(labels, seed):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(labels), 3)))
    naive = [
        -float(row.log_softmax(0)[label])
        for row, label in zip(logits, labels, strict=True)
        if label >= 0
    ]
    expected = sum(naive) / len(naive) if naive else 0.0
    assert float(make_class_loss()(logits, torch.tensor(labels))) == pytest.approx(
        expected, abs=1e-12
    )


def test_warm_up_rises_to_one_and_never_starts_at_zero():
    factors = [warmed_up(context_of(updates=20, update=update), 0.5) for update in range(20)]
    assert factors[0] == pytest.approx(0.1)
    assert np.allclose(np.diff(factors[:10]), 0.1)
    assert factors[9:] == [1.0] * 11
    assert warmed_up(context_of(updates=20, update=0), 0.0) == 1.0


# --- Cross-entropy and callables ------------------------------------------------------------------


def test_cross_entropy_ignores_rows_without_label():
    context, batch = context_of(), batch_of(6, labels=[0, 1, 2, -1, -1, 0])
    terms = make_objective("cross_entropy").loss(context, batch)
    kept = batch.labels >= 0
    expected = F.cross_entropy(context.logits(batch.pixels[kept]), batch.labels[kept])
    assert torch.allclose(terms.total, expected)
    assert terms.parts["class"] == pytest.approx(float(expected.detach()))
    assert terms.gap is None


def test_a_function_is_an_objective():
    context, batch = context_of(), batch_of()

    def brier(given_context, given_batch):
        logits = given_context.logits(given_batch.augmented)
        target = F.one_hot(given_batch.labels, CLASSES)
        return (logits.softmax(dim=1) - target).square().sum(dim=1).mean()

    objective = make_objective(brier)
    terms = objective(context, batch)
    assert torch.equal(terms.total, brier(context, batch))
    assert objective.settings() == {"objective": "callable", "function": "brier"}
    full = make_objective(lambda c, b: LossTerms(brier(c, b), {"brier": 1.0}))
    assert full.loss(context, batch).parts == {"brier": 1.0}


@pytest.mark.parametrize(
    "result", [3.0, None, torch.zeros(()), torch.zeros(2, requires_grad=True)], ids=str
)
def test_a_function_that_returns_no_loss_is_refused(result):
    objective = make_objective(lambda context, batch: result)
    with pytest.raises(InvalidInputError, match="LossTerms or a scalar tensor"):
        objective.loss(context_of(), batch_of())


# --- Margin ---------------------------------------------------------------------------------------


def naive_margin(context, batch, negatives, objective):
    """Liu et al. 2020, eq. 8 and 9, row by row."""
    data = energies_of(context, batch.pixels).tolist()
    off = energies_of(context, negatives).tolist()
    inside = sum(max(0.0, e - objective.m_in) ** 2 for e in data) / len(data)
    outside = sum(max(0.0, objective.m_out - e) ** 2 for e in off) / len(off)
    gap = objective.m_out - objective.m_in
    cross = float(F.cross_entropy(context.logits(batch.augmented), batch.labels).detach())
    return cross + objective.weight * (inside + outside) / gap**2


def test_margin_equals_the_equation():
    context, batch, off = context_of(), batch_of(), noise(9)
    objective = make_objective("margin", weight=0.7, inside=-0.5, outside=1.5, negatives=Fixed(off))
    objective.begin(context, batch)
    measured = context.measured
    assert objective.m_in == pytest.approx(measured.mean - 0.5 * measured.std)
    assert objective.m_out == pytest.approx(measured.mean + 1.5 * measured.std)
    terms = objective.loss(context, batch)
    assert terms.total.item() == pytest.approx(naive_margin(context, batch, off, objective))
    assert sum(terms.parts.values()) == pytest.approx(terms.total.item())
    assert torch.allclose(terms.energy_negatives, energies_of(context, off))


def test_margin_means_the_same_on_a_shifted_and_on_a_scaled_net():
    """A constant on all logits moves no prediction: it must not move the loss either."""
    batch, off = batch_of(), noise()

    def energy_part(change):
        net = tiny_net()
        with torch.no_grad():
            change(net[4])
        context = context_of(net)
        objective = make_objective("margin", negatives=Fixed(off))
        objective.begin(context, batch)
        parts = objective.loss(context, batch).parts
        return parts["data"] + parts["negatives"]

    plain = energy_part(lambda head: None)
    shifted = energy_part(lambda head: head.bias.add_(40.0))
    assert plain > 1e-3
    assert shifted == pytest.approx(plain, rel=1e-9)


def test_margins_may_be_given_as_energies_and_must_not_cross():
    context, batch = context_of(), batch_of()
    objective = make_objective("margin", m_in=-9.0, m_out=-2.0)
    objective.begin(context, batch)
    assert (objective.m_in, objective.m_out) == (-9.0, -2.0)
    with pytest.raises(InvalidInputError, match="m_in must lie below m_out"):
        make_objective("margin", m_in=99.0).begin(context, batch)
    with pytest.raises(InvalidInputError, match="inside must be less than outside"):
        make_objective("margin", inside=2.0)


def test_margins_that_hold_cost_nothing():
    context, batch = context_of(), batch_of()
    objective = make_objective("margin", m_in=1e3, m_out=2e3, negatives=Fixed(noise()))
    objective.begin(context, batch)
    parts = objective.loss(context, batch).parts
    assert parts["data"] == 0.0
    assert parts["negatives"] > 0


# --- JEM ------------------------------------------------------------------------------------------


def jem_context():
    context, batch = context_of(update=9), batch_of()
    return context, batch


@pytest.mark.parametrize("chains", ["buffer", "data", "noise"])
def test_the_gradient_of_jem_is_the_difference_of_batch_means(chains):
    """dL/dtheta = mean dE(x+)/dtheta - mean dE(x-)/dtheta with x- held fixed."""
    context, batch = jem_context()
    objective = make_objective(
        "jem", weight_y=0.0, weight_x=1.0, alpha=0.0, chains=chains, num_steps=3
    )
    objective.begin(context, batch)
    seen = {}
    draw = objective.chains.draw_labelled

    def spy(*args):
        seen["drawn"] = draw(*args)
        return seen["drawn"]

    objective.chains.draw_labelled = spy
    net = context.net
    found = gradients(net, objective.loss(context, batch).total)
    off = seen["drawn"].pixels
    assert not off.requires_grad
    means = torch.zeros_like(found)
    for pixels, sign in ((batch.pixels, 1), (off, -1)):
        for row in pixels:
            means += sign * gradients(net, energies_of(context, row[None]).sum()) / len(pixels)
    assert found.norm() > 1e-3
    assert torch.allclose(found, means, atol=1e-10)


def test_the_joint_term_of_jem_follows_the_energies_of_the_classes():
    context, batch = jem_context()
    objective = make_objective(
        "jem", weight_y=0.0, weight_x=0.0, weight_xy=2.0, alpha=0.0, num_steps=2
    )
    objective.begin(context, batch)
    assert objective.chains is None
    draw = objective.joint_chains.draw_labelled
    seen = {}
    objective.joint_chains.draw_labelled = lambda *args: seen.setdefault("drawn", draw(*args))
    terms = objective.loss(context, batch)
    drawn = seen["drawn"]
    with torch.no_grad():
        data, off = context.logits(batch.pixels), context.logits(drawn.pixels)
    naive = sum(-float(data[i, y]) for i, y in enumerate(batch.labels)) / len(batch)
    naive -= sum(-float(off[i, y]) for i, y in enumerate(drawn.labels)) / len(off)
    assert terms.total.item() == pytest.approx(2.0 * naive)
    assert sorted(drawn.labels.tolist()) == sorted([0, 1, 2] * 4)


def test_the_penalty_of_jem_is_centred_on_the_energy_of_the_given_net():
    context, batch = jem_context()
    objective = make_objective("jem", weight_y=0.0, weight_x=1e-12, alpha=0.3, num_steps=1)
    objective.begin(context, batch)
    terms = objective.loss(context, batch)
    away = sum(
        float(((part - context.measured.mean) / context.measured.std).square().mean())
        for part in (terms.energy_data, terms.energy_negatives)
    )
    assert terms.parts["penalty"] == pytest.approx(0.3 * away)


def test_jem_warms_up_its_energy_terms_and_not_its_cross_entropy():
    late, early = context_of(updates=100, update=99), context_of(updates=100, update=0)
    batch = batch_of()
    settings_of = {"alpha": 0.0, "chains": "data", "warm_up": 0.2, "num_steps": 0}
    objective = make_objective("jem", **settings_of)
    terms = [objective.loss(context, batch).parts for context in (late, early)]
    assert terms[0]["class"] == pytest.approx(terms[1]["class"])
    # No step: chains stay at the data, and the term is 0 whatever its weight.
    assert terms[0]["x"] == terms[1]["x"] == 0.0
    assert warmed_up(early, 0.2) == pytest.approx(0.05)


# --- HDGE -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(2, 4),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.integers(0, 1000),
)
def test_hdge_equals_a_brute_force_sum(n, queue, classes, temperature, seed):
    rng = np.random.default_rng(seed)
    values, kept = rng.normal(0, 2, (n, classes)), rng.normal(0, 2, (queue, classes))
    labels = rng.integers(0, classes, n)
    total = 0.0
    for row in range(n):
        own = np.exp(values[row, labels[row]] / temperature)
        everyone = sum(np.exp(other[labels[row]] / temperature) for other in [*values, *kept])
        total -= np.log(own / everyone) / n
    found = contrastive(
        torch.from_numpy(values), torch.from_numpy(labels), torch.from_numpy(kept), temperature
    )
    assert float(found) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("form", ["raw", "normalised"])
def test_hdge_remembers_logits_and_lets_no_gradient_through_them(form):
    context, batch = context_of(), batch_of()
    objective = make_objective("hdge", form=form, weight=0.5, queue=20)
    objective.loss(context, batch)
    queue = objective.state_dict()["queue"]
    assert queue.shape == (12, CLASSES)
    values = context.logits(batch.pixels)
    values = F.normalize(values, dim=1) if form == "normalised" else values
    assert torch.allclose(queue.double(), values.detach(), atol=1e-6)
    terms = objective.loss(context, batch)
    expected = contrastive(values, batch.labels, queue.double(), objective.temperature)
    assert terms.parts["contrast"] == pytest.approx(0.5 * float(expected.detach()), rel=1e-6)
    objective.loss(context, batch)
    assert len(objective.state_dict()["queue"]) == 20
    objective.rolled_back(context)
    assert not objective.state_dict()["queue"].numel()


def test_rows_without_label_are_no_anchor_of_hdge_but_are_counted():
    values = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    found = contrastive(values, torch.tensor([0, -1]), torch.empty(0, 0), 1.0)
    assert float(found) == pytest.approx(np.log(np.exp(1) + np.exp(3)) - 1)


# --- DAT ------------------------------------------------------------------------------------------


def test_dat_equals_the_binary_cross_entropy_of_the_energy():
    context, batch, off = context_of(), batch_of(), noise(8)
    objective = make_objective("dat", weight=0.6, centre=0.4, scale=0.8, negatives=Fixed(off))
    objective.begin(context, batch)
    terms = objective.loss(context, batch)
    measured = context.measured
    logit = [
        -(energies_of(context, part) - measured.mean - 0.4 * measured.std) / (0.8 * measured.std)
        for part in (batch.pixels, off)
    ]
    parts = [
        F.binary_cross_entropy_with_logits(values, torch.full_like(values, target))
        for values, target in zip(logit, (1.0, 0.0), strict=True)
    ]
    cross = F.cross_entropy(context.logits(batch.augmented), batch.labels)
    expected = cross + 0.6 * (parts[0] + parts[1]) / 2
    assert terms.total.item() == pytest.approx(expected.item())
    assert sum(terms.parts.values()) == pytest.approx(terms.total.item())


@pytest.mark.parametrize("name", ["dat", "adversarial"])
def test_attacked_rows_cost_more_and_stay_in_the_ball(name):
    context, batch = context_of(), batch_of()
    share = "adversarial_share" if name == "dat" else "share"
    objective = make_objective(name, epsilon=0.1, num_steps=4, **{share: 0.5})
    labels = batch.labels[:6].clone()
    labels[2] = -1
    assert objective.attack.count(12) == 6
    rows = objective.attack.apply(context, batch.pixels[:6], labels)
    assert torch.equal(rows[2], batch.pixels[2])
    rows = objective.attack.apply(context, batch.pixels[:6], batch.labels[:6])
    assert float((rows - batch.pixels[:6]).abs().max()) <= 0.1 + 1e-6
    assert float(rows.min()) >= 0
    assert float(rows.max()) <= 1
    clean, attacked = (
        F.cross_entropy(context.logits(part), batch.labels[:6]) for part in (batch.pixels[:6], rows)
    )
    assert attacked > clean
    terms = objective.loss(context, batch)
    assert terms.parts["attacked"] == pytest.approx(attacked.item() / 2, rel=1e-6)
    assert sum(terms.parts.values()) == pytest.approx(terms.total.item())


def test_dat_attacks_nothing_until_it_is_asked_to():
    objective = make_objective("dat")
    assert objective.attack is None
    assert objective.settings()["attack"] is None


def test_dat_walks_from_any_negatives_and_takes_a_ready_descent():
    assert isinstance(make_objective("dat", negatives=Outliers(noise())).negatives, Descent)
    ready = Descent(Synthetic(["blend"]), max_steps=3)
    assert make_objective("dat", negatives=ready).negatives is ready
