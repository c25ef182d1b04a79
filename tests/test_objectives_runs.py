"""Objectives and negatives from run to run: identities, fresh starts, what the safeguard sees."""

import json

import pytest
import torch
from training_cases import Fixed, batch_of, context_of, noise

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling import SGLD
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.negatives import (
    DataChains,
    Descent,
    Mixed,
    NoiseChains,
    Outliers,
    Replay,
    Synthetic,
    given_negatives,
    make_negatives,
)
from ebm_guard.training.negatives.descent import descend
from ebm_guard.training.objectives import make_objective

STEEP = {"window": 12, "target": 0.51, "step_size": 0.05}


def far():
    """Images that the tiny net tells from the data: walks from them grow."""
    pixels = noise(200)
    return pixels[context_of().energies(pixels).argsort()[-12:]]


NEGATIVES = {
    "synthetic": Synthetic,
    "outliers": lambda: Outliers(noise(20)),
    "descent": lambda: Descent(Replay(SGLD.short_run(1)), **STEEP),
    "replay": lambda: Replay(SGLD.short_run(2)),
    "data_chains": lambda: DataChains(SGLD.short_run(2)),
    "noise_chains": lambda: NoiseChains(SGLD.short_run(2)),
    "mixed": lambda: Mixed([(Replay(SGLD.short_run(1)), 1), (Descent(**STEEP), 2)]),
}
OBJECTIVES = {
    **{row.name: (row.name, {}) for row in registry.methods("objective")},
    "jem_xy": ("jem", {"weight_xy": 0.1, "num_steps": 2}),
    "jem_joint_alone": ("jem", {"weight_x": 0.0, "weight_xy": 0.1, "num_steps": 2}),
    "jem_noise": ("jem", {"chains": "noise", "num_steps": 2}),
    "hdge_long": ("hdge", {"weight": 1.0, "queue": 30}),
    **{
        f"margin_{name}": ("margin", {"negatives": name})
        for name in ("descent", "replay", "noise_chains", "mixed")
    },
}


def made(name):
    kind, settings = OBJECTIVES[name]
    settings = dict(settings)
    if kind == "dat":
        settings["negatives"] = Descent(Fixed(far()), **STEEP)
    elif "negatives" in settings:
        settings["negatives"] = NEGATIVES[settings["negatives"]]()
    return make_objective(kind, **settings)


def run(objective, updates=4, **settings):
    """Losses of a short run."""
    context = context_of(update=0, scope=objective.default_scope, **settings)
    objective.begin(context, batch_of(30, seed=99))
    losses = []
    for update in range(updates):
        context.update = update
        losses.append(objective.loss(context, batch_of(seed=update)).total.item())
    return losses


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_object_starts_afresh_with_every_run(name):
    objective = made(name)
    first = run(objective)
    assert run(objective) == first
    assert run(made(name)) == first


def test_a_curriculum_starts_afresh_with_every_run():
    objective = made("dat")
    context, batch = context_of(update=0), batch_of(30, seed=99)
    objective.begin(context, batch)
    for _ in range(3):
        objective.loss(context, batch_of())
    assert objective.negatives.steps == 3
    objective.begin(context, batch)
    assert objective.negatives.steps == 0
    # Half a window of an earlier run is not counted either.
    objective.negatives.observe(torch.zeros(6), torch.ones(6))
    objective.begin(context, batch)
    objective.negatives.observe(torch.zeros(6), torch.ones(6))
    assert objective.negatives.steps == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_identity_is_what_was_given(name):
    """Nothing that a run measures or makes changes it, and it is JSON."""
    objective = made(name)
    before = objective.identity()
    assert json.loads(json.dumps(before, allow_nan=False)) == before
    run(objective, updates=3)
    assert objective.identity() == before == made(name).identity()
    assert before["objective"] == objective.name


@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives_have_an_identity_too(name):
    negatives, context, batch = NEGATIVES[name](), context_of(update=0), batch_of()
    before = negatives.identity()
    assert json.loads(json.dumps(before, allow_nan=False)) == before
    negatives.begin(context, batch)
    negatives.draw(context, batch)
    assert negatives.identity() == before == NEGATIVES[name]().identity()


def test_identities_tell_settings_apart():
    assert make_objective("margin").identity()["m_in"] is None
    assert make_objective("margin", m_in=-3).identity()["m_in"] == -3.0
    assert make_objective("jem").identity()["chains"]["capacity"] is None
    assert Replay(capacity=7).identity() != Replay().identity()
    for one, two in [
        (make_objective("margin"), make_objective("margin", weight=1.0)),
        (make_objective("dat"), make_objective("dat", max_steps=3)),
        (make_objective("jem"), make_objective("jem", chains="data")),
    ]:
        assert one.identity() != two.identity()


# --- Saturation -----------------------------------------------------------------------------------


def black_and_white():
    return noise(20).round()


@pytest.mark.parametrize("name", ["margin", "dat"])
@pytest.mark.parametrize("own", [Outliers, Fixed, given_negatives], ids=lambda make: make.__name__)
def test_images_that_nothing_moved_say_nothing_about_the_net(name, own):
    """Sketches and digits lie on the edge of [0, 1] as they are."""
    context, batch = context_of(), batch_of()
    objective = make_objective(name, negatives=own(black_and_white()))
    objective.begin(context, batch)
    assert objective.loss(context, batch).saturation is None


def walked_to_the_edge(steps, start, step_size=0.2):
    descent = Descent(Fixed(start), step_size=step_size)
    descent.load_state_dict({**descent.state_dict(), "steps": steps})
    return descent


def test_walks_are_judged_by_the_values_that_they_moved_to_the_edge():
    context, batch = context_of(), batch_of()
    start = noise()
    start[:6] = start[:6].round()
    for steps, size in ((1, 0.02), (4, 0.2), (30, 0.5)):
        descent = walked_to_the_edge(steps, start, size)
        objective = make_objective("dat", negatives=descent)
        found = objective.loss(context, batch).saturation
        end = descend(context, start, steps, size)
        pairs = zip(start.flatten().tolist(), end.flatten().tolist(), strict=True)
        moved = [0 < before < 1 and after in (0, 1) for before, after in pairs]
        assert found == pytest.approx(sum(moved) / len(moved))
        assert steps == 1 or sum(moved) > 0
    descent = walked_to_the_edge(3, black_and_white()[:12])
    descent.draw(context, batch)
    assert descent.saturation() == 0.0


def test_chains_are_judged_by_all_of_their_values():
    context, pixels = context_of(), black_and_white()[:12]
    labels = batch_of().labels
    batch = TrainingBatch(pixels, labels, pixels, labels)
    objective = make_objective("jem", chains="data", num_steps=0)
    assert objective.loss(context, batch).saturation == 1.0
    chains = DataChains(SGLD.short_run(0))
    assert make_objective("margin", negatives=chains).loss(context, batch).saturation == 1.0
    mixed = Mixed([(Outliers(black_and_white()), 3), (DataChains(SGLD.short_run(0)), 1)])
    assert mixed.saturation() is None
    mixed.draw(context, batch_of())
    share = float((batch_of().pixels <= 0).double().mean())
    assert mixed.saturation() == share


# --- Settings that mean nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "needed"),
    [
        ("dat", {"centre": "abc"}, "centre='abc'; needed a finite number"),
        ("dat", {"centre": float("nan")}, "centre=nan; needed a finite number"),
        ("dat", {"max_steps": "abc"}, "max_steps='abc'; needed a whole number >= 0"),
        ("dat", {"epsilon": 0.1, "num_steps": "2"}, "num_steps='2'; needed a whole number >= 1"),
        ("dat", {"negatives": "outliers"}, "without pixels.*give Outliers.*the images as outliers"),
        ("margin", {"negatives": "mixed"}, "without parts"),
        ("margin", {"inside": "abc"}, "inside='abc'; needed a finite number"),
        ("margin", {"outside": None}, "outside=None"),
        ("margin", {"m_in": "low"}, "m_in='low'"),
        ("margin", {"m_out": True}, "m_out=True"),
        ("hdge", {"queue": "x"}, "queue='x'; needed a whole number >= 0"),
        ("hdge", {"queue": 2.5}, "queue=2.5"),
        ("hdge", {"form": ["raw"]}, "known are raw, normalised"),
        ("jem", {"clip": "x"}, "clip='x'; needed a finite number > 0"),
        ("jem", {"num_steps": "ten"}, "num_steps='ten'; needed a whole number >= 0"),
        ("jem", {"step_size": None}, "step_size=None"),
        ("jem", {"chains": ["data"]}, "known are buffer, data, noise"),
        ("jem", {"sampler": "sgld"}, "a str as sampler"),
        ("adversarial", {"num_steps": 1.5}, "num_steps=1.5; needed a whole number >= 1"),
        ("adversarial", {"norm": 2}, "norm=2; known are linf, l2"),
        ("adversarial", {"epsilon": "8/255"}, "epsilon='8/255'; needed a finite number > 0"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_are_explained(name, bad, needed):
    with pytest.raises(InvalidInputError, match=needed):
        make_objective(name, **bad)


@pytest.mark.parametrize(
    ("make", "needed"),
    [
        (lambda: Outliers(noise(), per_image="2"), "per_image='2'; needed a whole number >= 1"),
        (lambda: Synthetic(per_image=None), "per_image=None"),
        (lambda: Synthetic(3), "kinds=3; needed the names"),
        (lambda: Replay(capacity="many"), "capacity='many'; needed a whole number >= 1"),
        (lambda: Replay(capacity=0), "capacity=0"),
        (lambda: Replay(reinit_prob="often"), "reinit_prob='often'"),
        (lambda: Mixed([1, 2]), "pairs with shares > 0"),
        (lambda: Mixed(3), "pairs with shares > 0"),
        (lambda: Mixed([(Synthetic(), "half")]), "share='half'"),
        (lambda: given_negatives(noise(), share=0), "share=0; needed a finite number > 0 and <= 1"),
        (lambda: make_negatives("synthetic", kind="blend"), "did you mean 'kinds'"),
        (lambda: Descent(target="0.8"), "target='0.8'; needed a finite number > 0.5 and < 1"),
    ],
)
def test_negatives_explain_theirs(make, needed):
    with pytest.raises(InvalidInputError, match=needed):
        make()


def test_numbers_of_numpy_are_numbers():
    settings = make_objective("dat", weight=torch.ones(1).numpy()[0], max_steps=3.0).settings()
    assert settings["weight"] == 1.0
    assert settings["negatives"]["max_steps"] == 3
    json.dumps(settings)
