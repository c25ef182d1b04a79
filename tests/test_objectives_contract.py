"""What every objective must do: signs, one pass, seeds, states, and how one is made."""

import pytest
import torch
from torch import nn
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

from ebm_guard import registry
from ebm_guard.energy import energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.negatives import DataChains, Descent, NoiseChains, Replay
from ebm_guard.training.negatives.chains import Drawn
from ebm_guard.training.objectives import make_objective


def moved(net, direction, length=1e-4):
    """Walk all weights down a gradient."""
    with torch.no_grad():
        start = torch.cat([part.flatten() for part in net.parameters()])
        torch.nn.utils.vector_to_parameters(start - length * direction, net.parameters())


# --- Signs, one pass, states ----------------------------------------------------------------------


def with_fixed_negatives(name, off):
    """An objective whose energy term outweighs its cross-entropy, on given negatives."""
    if name == "margin":
        return make_objective("margin", weight=50.0, outside=6.0, negatives=Fixed(off))
    if name == "dat":
        return make_objective("dat", weight=50.0, negatives=Fixed(off))
    weights = {"jem": {"weight_x": 50.0}, "jem_xy": {"weight_x": 0.0, "weight_xy": 50.0}}[name]
    objective = make_objective("jem", alpha=0.0, num_steps=2, **weights)
    labels = None if name == "jem" else torch.arange(len(off)) % CLASSES
    for chains in (objective.chains, objective.joint_chains):
        if chains is not None:
            chains.draw_labelled = lambda *args: Drawn(off, labels)
    return objective


SIGNED = ["margin", "dat", "jem", "jem_xy"]


@pytest.mark.parametrize("name", SIGNED)
def test_the_loss_falls_with_the_energy_of_negatives_and_rises_with_that_of_data(name):
    """A constant on a row's logits moves its energy alone: the slope there is -dL/dE."""
    context, batch, off = context_of(), batch_of(), noise()
    objective = with_fixed_negatives(name, off)
    objective.begin(context, batch)
    inner, seen = context.net, []
    context.net = lambda pixels: (seen.append(inner(pixels)), seen[-1])[1]
    terms = objective.loss(context, batch)
    (slope,) = torch.autograd.grad(terms.total, seen[0], retain_graph=True)
    by_energy = -slope.sum(dim=1)
    data, negatives = by_energy[:12], by_energy[12:]
    assert float(data.min()) >= -1e-12
    assert float(data.sum()) > 1
    assert float(negatives.max()) <= 1e-12
    assert float(negatives.sum()) < -1
    # The same by finite differences of the whole loss.
    step = 1e-6
    rows = torch.arange(24) >= 12
    context.net = lambda pixels: inner(pixels) - step * rows[:, None]
    fall = (objective.loss(context, batch).total - terms.total).item() / step
    assert fall == pytest.approx(float(negatives.sum()), rel=1e-3)


@pytest.mark.parametrize("name", SIGNED)
def test_one_update_lowers_the_data_and_raises_the_negatives(name):
    """Data lie on the left half, negatives on the right: a linear net can move them apart."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES, bias=False)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-0.1, 0.1, 48).reshape(CLASSES, 16))
    context, batch, off = context_of(net), batch_of(), noise()
    off[..., :2] = 0
    batch.pixels[..., 2:] = 0
    objective = with_fixed_negatives(name, off)
    objective.begin(context, batch)

    def means():
        with torch.no_grad():
            return [float(energies_of(context, part).mean()) for part in (batch.pixels, off)]

    data, negatives = means()
    direction = gradients(net, objective.loss(context, batch).total)
    moved(net, direction / direction.norm(), length=1e-3)
    after = means()
    assert after[0] < data - 1e-5
    assert after[1] > negatives + 1e-5


ALL = [row.name for row in registry.methods("objective")]


def context_for(name, net=None, **settings):
    """A context in which the weights move that the objective moves by default."""
    known = name if name in ALL else "jem"
    scope = registry.get("objective", known).load().default_scope
    return context_of(net, scope=scope, **settings)


@pytest.mark.parametrize("name", ALL)
def test_the_net_is_asked_once_and_without_side_effects(name):
    net = tiny_net()
    context, batch = context_for(name, net), batch_of()
    trained = [part.requires_grad for part in net.parameters()]
    inner, calls = context.net, []

    def counted(pixels):
        calls.append(len(pixels))
        return inner(pixels)

    context.net = counted
    objective = make_objective(name)
    objective.begin(context, batch)
    calls.clear()
    state, random = [part.clone() for part in net.buffers()], torch.get_rng_state()
    pixels = batch.pixels.clone()
    objective.loss(context, batch)
    assert len(calls) == 1
    assert all(part.grad is None for part in net.parameters())
    assert [part.requires_grad for part in net.parameters()] == trained
    assert all(map(torch.equal, state, net.buffers()))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(pixels, batch.pixels)
    assert not net.training


def test_data_are_run_once_where_nothing_is_augmented():
    context, batch = context_of(), batch_of()
    inner, seen = context.net, []
    context.net = lambda pixels: (seen.append(len(pixels)), inner(pixels))[1]
    objective = make_objective("margin", negatives=Fixed(noise(5)))
    objective.begin(context, batch)
    objective.loss(context, batch)
    augmented = TrainingBatch(batch.pixels, batch.labels, batch.pixels.flip(3), batch.rows)
    objective.loss(context, augmented)
    assert seen == [17, 29]


def energies_equal(first, second):
    return torch.equal(first.energy_data, second.energy_data) and (
        first.energy_negatives is None
        or torch.equal(first.energy_negatives, second.energy_negatives)
    )


@pytest.mark.parametrize("name", [*ALL, "jem_xy", "jem_noise"])
def test_a_state_goes_on_bit_by_bit(name, tmp_path):
    made = {
        "jem_xy": lambda: make_objective("jem", weight_xy=0.1, num_steps=2),
        "jem_noise": lambda: make_objective("jem", chains="noise", num_steps=2),
        "jem": lambda: make_objective("jem", num_steps=2),
        "dat": lambda: make_objective("dat", negatives=Descent(window=12, target=0.51)),
        "hdge": lambda: make_objective("hdge", queue=30),
    }.get(name, lambda: make_objective(name))
    context = context_for(name)

    def update(objective, number):
        context.update = number
        return objective.loss(context, batch_of(seed=number))

    first = made()
    context.update = 0
    first.begin(context, batch_of(30, seed=99))
    for number in range(3):
        update(first, number)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = made()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for number in range(3, 6):
        expected, found = update(first, number), update(second, number)
        assert torch.equal(expected.total, found.total)
        assert energies_equal(expected, found)
    assert first.settings() == second.settings()


@pytest.mark.parametrize("name", ALL)
def test_updates_hang_on_seed_and_number_alone(name):
    def energies(seed, update, before):
        context = context_for(name, seed=seed)
        context.update = 0
        objective = make_objective(name, **({"num_steps": 2} if name == "jem" else {}))
        if name == "jem":
            objective = make_objective(name, num_steps=2, chains="noise")
        objective.begin(context, batch_of(30, seed=9))
        for earlier in before:
            context.update = earlier
            if name not in ("hdge", "dat", "nce", "fce"):
                objective.loss(context, batch_of())
        context.update = update
        return objective.loss(context, batch_of())

    assert energies_equal(energies(3, 4, [0, 1]), energies(3, 4, []))
    assert torch.equal(energies(3, 4, [0, 1]).total, energies(3, 4, []).total)


# --- Making them ----------------------------------------------------------------------------------


def test_settings_that_nothing_takes_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean 'weight'"):
        make_objective("margin", wieght=2.0)
    with pytest.raises(InvalidInputError, match="no settings"):
        make_objective("cross_entropy", weight=2.0)
    with pytest.raises(InvalidInputError, match="did you mean 'margin'"):
        make_objective("margn")
    with pytest.raises(InvalidInputError, match="beside a ready objective"):
        make_objective(make_objective("margin"), weight=1.0)


@pytest.mark.parametrize("name", ["margin", "dat"])
def test_given_outliers_are_half_of_the_negatives(name):
    objective = make_objective(name, outliers=noise(20))
    context, batch = context_of(), batch_of()
    objective.begin(context, batch)
    drawn = objective.negatives.draw(context, batch)
    known = (drawn[:, None] == noise(20)[None]).flatten(2).all(dim=2).any(dim=1)
    assert known.tolist() == [True] * 6 + [False] * 6
    assert "blend" in objective.negative_kinds


@pytest.mark.parametrize("name", ["cross_entropy", "hdge", "jem", "adversarial"])
def test_outliers_for_an_objective_without_them_are_refused(name):
    with pytest.raises(InvalidInputError, match="which trains on none"):
        make_objective(name, outliers=noise())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("margin", {"weight": -1}),
        ("margin", {"weight": float("nan")}),
        ("margin", {"warm_up": 2}),
        ("dat", {"scale": 0}),
        ("dat", {"epsilon": -0.1}),
        ("jem", {"chains": "bufer"}),
        ("jem", {"weight_y": 0, "weight_x": 0}),
        ("hdge", {"form": "cosine"}),
        ("hdge", {"temperature": 0}),
        ("hdge", {"queue": -1}),
        ("adversarial", {"share": 0}),
        ("adversarial", {"num_steps": 0}),
        ("adversarial", {"norm": "l7"}),
    ],
    ids=str,
)
def test_bad_settings_are_refused_when_an_objective_is_made(name, bad):
    with pytest.raises(InvalidInputError, match="got"):
        make_objective(name, **bad)


def test_jem_keeps_the_settings_of_given_chains_for_its_joint_term():
    replay = Replay(start="uniform", capacity=33, reinit_prob=0.5)
    objective = make_objective("jem", chains=replay, weight_xy=1.0)
    assert objective.chains is replay
    joint = objective.joint_chains.settings()
    assert joint["conditional"]
    assert (joint["start"], joint["capacity"], joint["reinit_prob"]) == ("uniform", 33, 0.5)
    assert not replay.conditional
    assert isinstance(make_objective("jem", chains="data").chains, DataChains)
    assert isinstance(make_objective("jem", chains="noise").chains, NoiseChains)


def test_energies_of_the_data_are_those_of_the_clean_images():
    context, batch = context_of(), batch_of()
    augmented = TrainingBatch(batch.pixels, batch.labels, batch.pixels.flip(2), batch.rows)
    for name in ("margin", "hdge", "dat"):
        objective = make_objective(name)
        objective.begin(context, augmented)
        found = objective.loss(context, augmented).energy_data
        assert torch.allclose(found, energy(context.logits(batch.pixels)).detach())
