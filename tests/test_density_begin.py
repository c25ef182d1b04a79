"""How a run that learns a density begins, goes back and goes on: rows, head, flow, precision."""

import copy

import numpy as np
import pytest
import torch
from density_cases import (
    batch,
    classifier_around,
    images,
    linear_net,
    start_net,
    toy_context,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_cases import batch_of, context_of, tiny_net

from ebm_guard.errors import InvalidInputError
from ebm_guard.training import TrainingImages, finetune
from ebm_guard.training.context import PixelNet
from ebm_guard.training.density import checks, first_rows
from ebm_guard.training.density.first_rows import by_class, first_batch
from ebm_guard.training.objectives import make_objective
from ebm_guard.training.objectives.flow import FlowDensity
from ebm_guard.training.objectives.nce import Nce

SHAPE = (4, 4)
FEW = {"updates": 1, "batch_size": 16, "outlier_rows": 30, "max_acc_drop": 0.5, "max_nll_rise": 2}


@pytest.fixture(autouse=True)
def short_checks(monkeypatch):
    monkeypatch.setattr(checks, "_TEMPERATURES", (2,))


# --- Rows -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30), st.integers(0, 10**6))
def test_every_class_is_among_the_rows_by_its_share(sizes, seed):
    counts = np.array(sizes)
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), counts))
    picked = by_class(labels, counts)
    found = np.bincount(labels[picked], minlength=len(counts))
    assert len(np.unique(picked)) == len(picked)
    assert (found >= np.minimum(counts, first_rows.LEAST_OF_CLASS)).all()
    share = first_rows.MOST_ROWS * counts / max(1, counts.sum())
    assert (found <= np.maximum(np.ceil(share), first_rows.LEAST_OF_CLASS)).all()
    if counts.sum() <= first_rows.MOST_ROWS:
        assert (found == counts).all()


def with_few_labels(n, kept):
    """Labels are known of a few rows, of all classes."""
    given = images(n, 1)
    labels = torch.full((n,), -1)
    for label in range(3):
        rows = torch.nonzero(given.labels == label)[:kept, 0]
        labels[rows] = label
    return TrainingImages(given.all_pixels(), labels)


def test_a_few_labels_among_many_images_are_found():
    """512 random rows of 3,000 would hold 2 of the 12 labelled ones."""
    train = with_few_labels(3000, 4)
    objective, start = make_objective("nce", base="gaussian"), classifier_around(start_net())
    found = finetune(start, train, images(600, 2), objective=objective, **FEW)
    assert [line["kind"] for line in found.history].count("update") == 1


def test_densities_are_fitted_on_all_labelled_rows_read_a_few_at_a_time(monkeypatch):
    train, net = with_few_labels(2000, 100), linear_net(SHAPE)
    sizes, plain = [], TrainingImages.pixels
    first = batch(16, 3, SHAPE)
    rows = first_batch(first, train, 3, seed=0)
    monkeypatch.setattr(
        TrainingImages, "pixels", lambda self, rows: (sizes.append(len(rows)), plain(self, rows))[1]
    )
    objective = make_objective("nce", head="given")
    objective.begin(toy_context(net), rows)
    assert sum(sizes) == 300
    assert max(sizes) <= 128
    labelled = train.labels >= 0
    classes = train.labels[labelled]
    features = classifier_around(net).pixels(train.all_pixels()[labelled]).flatten(1).double()
    expected = torch.stack([features[classes == label].mean(dim=0) for label in range(3)])
    assert torch.allclose(objective.space.noise.means, expected, atol=1e-5)


def test_the_start_is_measured_with_the_head_that_is_trained():
    """Margins and guards would else compare energies of two heads."""
    seen = []

    class Watched(Nce):
        def loss(self, context, batch):
            energies = context.energies(train.all_pixels())
            seen.append((context.measured.mean, float(energies.mean())))
            return super().loss(context, batch)

    train = images(300, 1)
    finetune(
        classifier_around(start_net()),
        train,
        images(600, 2),
        objective=Watched(base="gaussian"),
        **FEW,
    )
    assert seen[0][0] == pytest.approx(seen[0][1], abs=1e-4)


# --- Head -----------------------------------------------------------------------------------------


def test_a_head_that_is_trained_in_part_is_not_replaced():
    """A checkpoint holds what is trained alone: the rest would be the old head after a resume."""
    net = linear_net()
    net[1].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InvalidInputError, match="does not train bias of the head 1"):
        make_objective("nce", base="gaussian").begin(toy_context(net), batch(64, seed=0))
    assert all(torch.equal(part, before[key]) for key, part in net.state_dict().items())
    make_objective("nce", head="given").begin(toy_context(net), batch(64, seed=0))


@pytest.mark.parametrize(
    "wrapped", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
def test_a_head_whose_weights_are_computed_is_not_replaced(wrapped):
    net = linear_net()
    net[1] = wrapped(net[1])
    net.eval()
    with pytest.raises(InvalidInputError, match=r"computed from others.*head='given'"):
        make_objective("nce", base="gaussian").begin(toy_context(net), batch(64, seed=0))
    objective, context = make_objective("nce", head="given"), toy_context(net)
    objective.begin(context, batch(64, seed=0))
    objective.loss(context, batch(64, seed=1)).total.backward()
    assert all(part.grad is not None for part in net.parameters())


# --- Precision ------------------------------------------------------------------------------------


def test_under_autocast_both_energies_are_float32s_of_the_same_features():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    for part in net[1].parameters():
        part.requires_grad_(False)
    context = toy_context(net)
    context.net = PixelNet(context.classifier, torch.bfloat16)
    objective, rows = make_objective("nce"), batch(256, 3, SHAPE)
    objective.begin(context, rows)
    drawn = objective.space.noise.draw(64, torch.Generator().manual_seed(0))
    found = objective.space.contrast(context, rows, drawn)
    exact = objective.space.energy(context.classifier)
    for points, energies in ((found.points, found.energy_data), (drawn, found.energy_noise)):
        size = float(exact(points).abs().max())
        assert torch.allclose(energies.double(), exact(points), atol=1e-5 * max(1.0, size))
    # The densities were fitted on features of that precision.
    middle = objective.space.noise.weights @ objective.space.noise.means
    assert torch.allclose(middle, found.points.mean(dim=0), atol=1e-12)


# --- Flow -----------------------------------------------------------------------------------------


@pytest.fixture
def begun():
    pytest.importorskip("zuko")
    context = toy_context(linear_net())
    objective = make_objective("fce", head="given", flow_steps=1)
    objective.begin(context, batch(64, seed=0))
    return objective, context


def rate(objective):
    return objective.flow._optimizer.param_groups[0]["lr"]


def test_a_rollback_takes_the_flow_back_and_slows_it_down(begun):
    objective, context = begun
    before, first = objective.state_dict()["flow"]["flow"], rate(objective)
    objective.loss(context, batch(64, seed=1))
    again = make_objective("fce", head="given", flow_steps=1)
    again.load_state_dict(copy.deepcopy(objective.state_dict()))
    for each in (objective, again):
        with torch.no_grad():
            for part in each.flow.flow.parameters():
                part.add_(torch.nan)
        for attempt in (1, 2):
            context.attempt = attempt
            each.rolled_back(context)
            after = each.flow.flow.state_dict()
            assert all(torch.equal(part, after[key]) for key, part in before.items())
            assert rate(each) == pytest.approx(first * 0.5**attempt)
        each.loss(context, batch(64, seed=1))


def test_a_flow_moves_with_its_optimiser_and_keeps_its_rate(begun):
    objective, context = begun
    objective.loss(context, batch(64, seed=1))
    objective.flow.restart(0.25)
    objective.loss(context, batch(64, seed=2))
    slow = rate(objective)
    resumed = make_objective("fce", head="given")
    resumed.load_state_dict(objective.state_dict())
    # The points of a resumed run are on its device, here one that holds no values.
    flow = resumed.flow
    assert flow.log_density(torch.zeros(2, 2, device="meta")).device.type == "meta"
    state = flow._optimizer.state[next(flow.flow.parameters())]
    assert {part.device.type for part in flow.flow.parameters()} == {"meta"}
    assert state["exp_avg"].device.type == "meta"
    assert rate(resumed) == slow


def test_making_a_flow_seeds_no_generator_of_a_gpu(monkeypatch):
    pytest.importorskip("zuko")
    context, objective = context_of(tiny_net(), scope="head"), make_objective("nce", head="given")
    objective.begin(context, batch_of(60, seed=5))
    seeds, state = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    first, second = (FlowDensity(objective.space.noise, seed=3) for _ in range(2))
    assert seeds == []
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(first.flow.parameters(), second.flow.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
