"""Minimal distances: closed forms of linear models, re-scoring, and foolbox."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    Examples,
    Misclassify,
    Query,
    minimal_distance,
    pixel_forward,
    untouched,
)
from ebm_guard.attacks.geometry import ball_of
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput

MARGIN = Misclassify("margin")
SHAPE = (2, 5, 5)


def pixels_of(shape, seed=0, low=0.0, high=1.0):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * drawn


class Linear:
    """Two classes: the margin of class 0 is bias - w·x."""

    def __init__(self, clean, seed=5, share=0.05):
        self.weights = pixels_of(SHAPE, seed) - 0.5
        # Boundaries at a distance that differs from image to image, and is inside the box.
        slopes = (clean * self.weights).flatten(1).sum(dim=1)
        self.bias = slopes.max() + share
        self.margins = self.bias - slopes

    def __call__(self, pixels):
        slopes = (pixels * self.weights).flatten(1).sum(dim=1)
        return ClassifierOutput(torch.stack([self.bias.expand(len(pixels)), slopes], dim=1), None)


def true_distance(model, clean, norm):
    """The smallest distance to the boundary in the box, by bisection over the radius."""
    weights = model.weights.double()
    low, high = torch.zeros(len(clean)).double(), torch.full((len(clean),), 10.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        gain = best_gain(weights, clean.double(), middle, norm)
        reached = gain >= model.margins.double()
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def best_gain(weights, clean, radius, norm):
    """max w·d with ||d|| <= radius and 0 <= x + d <= 1."""
    room = torch.where(weights > 0, 1 - clean, clean)
    radius = radius[:, None, None, None]
    if norm == "linf":
        return (weights.abs() * torch.minimum(room, radius)).flatten(1).sum(dim=1)
    # KKT: d_i = min(room_i, t·|w_i|), with t such that the length is the radius.
    low, high = torch.zeros_like(radius), torch.full_like(radius, 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        length = torch.minimum(room, middle * weights.abs()).square().sum((1, 2, 3), keepdim=True)
        short = length.sqrt() < radius
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (weights.abs() * torch.minimum(room, low * weights.abs())).flatten(1).sum(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("box", [False, True])
def test_the_distance_to_a_linear_boundary(norm, box):
    clean = pixels_of((12, *SHAPE)) if box else pixels_of((12, *SHAPE), low=0.45, high=0.55)
    model = Linear(clean)
    outcome = minimal_distance(
        Query(model, MARGIN), Examples.of(clean, torch.zeros(12).long()), norm=norm
    )
    if not box:
        dual = model.weights.abs().sum() if norm == "linf" else model.weights.norm()
        expected = model.margins / dual
    else:
        expected = true_distance(model, clean, norm).float()
    assert outcome.found.all()
    # Never nearer than the boundary, up to rounding, and at most 1 % farther.
    assert (outcome.distance >= expected * (1 - 1e-4)).all()
    assert (outcome.distance <= expected * 1.01).all()
    torch.testing.assert_close(outcome.distance, ball_of(norm).distance(outcome.pixels, clean))


def naive_search(model, clean, num_steps, norm):
    """Algorithm 1 of the paper, with our three differences, for one image of class 0."""
    weights, bias = model.weights.double().numpy(), float(model.bias)
    size = lambda change: np.linalg.norm(change.ravel(), {"linf": np.inf, "l2": 2}[norm])  # noqa: E731
    x, radius, nearest = clean, np.inf, np.inf
    for k in range(num_steps + 1):
        objective = (x * weights).sum() - bias
        if objective > 0:
            nearest = min(nearest, size(x - clean))
        slope = np.where((x <= 0) & (weights < 0) | (x >= 1) & (weights > 0), 0, weights)
        dual = np.abs(slope).sum() if norm == "linf" else size(slope)
        falling = (1 + math.cos(math.pi * k / num_steps)) / 2
        step, gamma = 0.01 + 0.99 * falling, 0.001 + 0.049 * falling
        if objective > 0:
            radius = min(radius * (1 - gamma), nearest)
        elif nearest < np.inf:
            radius = radius * (1 + gamma)
        else:
            radius = (size(x - clean) + abs(objective) / dual) * 1.001
        change = x + step * slope / np.linalg.norm(slope) - clean
        if norm == "linf":
            change = np.clip(change, -radius, radius)
        else:
            change = change * min(1, radius / size(change))
        x = np.clip(clean + change, 0, 1)
    return nearest


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_search_is_that_of_the_paper(norm):
    clean = pixels_of((6, *SHAPE))
    model = Linear(clean)
    examples = Examples.of(clean, torch.zeros(6, dtype=torch.int64))
    # Few steps: the schedules are still far from their ends.
    for num_steps in (5, 20):
        outcome = minimal_distance(Query(model, MARGIN), examples, norm=norm, num_steps=num_steps)
        expected = [naive_search(model, x, num_steps, norm) for x in clean.double().numpy()]
        np.testing.assert_allclose(outcome.distance.numpy(), expected, rtol=1e-3)


def test_images_that_are_wrong_already_cost_one_forward_pass():
    clean = pixels_of((4, *SHAPE))
    model = Linear(clean)
    labels = torch.tensor([0, 1, 0, 1])
    outcome = minimal_distance(Query(model, MARGIN), Examples.of(clean, labels), num_steps=10)
    assert outcome.distance[[1, 3]].tolist() == [0, 0]
    assert torch.equal(outcome.pixels[[1, 3]], clean[[1, 3]])
    assert outcome.found.all()
    assert outcome.gradients.tolist() == [10, 0, 10, 0]
    # Clean, 10 with a gradient, the last one, and scoring again.
    assert outcome.forwards.tolist() == [13, 1, 13, 1]
    nobody = minimal_distance(Query(model, MARGIN), Examples.of(clean, torch.ones(4).long()))
    assert nobody.curve([0, 1]) == [0, 0]


def test_nothing_is_found_where_nothing_can_be():
    flat = lambda pixels: ClassifierOutput(  # noqa: E731
        torch.tensor([1.0, 0.0]).repeat(len(pixels), 1) + 0 * pixels.sum(), None
    )
    clean = pixels_of((3, *SHAPE))
    outcome = minimal_distance(
        Query(flat, MARGIN), Examples.of(clean, torch.zeros(3).long()), num_steps=5
    )
    assert not outcome.found.any()
    assert outcome.distance.tolist() == [math.inf] * 3
    assert outcome.median == math.inf
    assert torch.equal(outcome.pixels, clean)
    assert outcome.curve([0, 100]) == [1, 1]


@settings(deadline=None, max_examples=25)
@given(
    distances=st.lists(st.floats(0, 1) | st.just(math.inf), min_size=1, max_size=20),
    epsilons=st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_the_curve_counts_the_images_that_stand(distances, epsilons):
    from ebm_guard.attacks.minimal import MinimalOutcome

    held = torch.tensor(distances)
    outcome = MinimalOutcome(held, held, held, held, held)
    epsilons = sorted(epsilons)
    curve = outcome.curve(epsilons)
    kept = [float(value) for value in held]
    assert curve == [sum(d > e for d in kept) / len(kept) for e in epsilons]
    assert curve == sorted(curve, reverse=True)
    assert outcome.median == float(np.median(kept))


class Accepted(Misclassify):
    """Wrong, and a first pixel that stays dark: what a gate could ask for."""

    def success(self, output, examples):
        return super().success(output, examples) & (output.features[:, 0] < 0.5)


def test_the_goal_decides_what_success_is():
    clean = pixels_of((8, *SHAPE), low=0.3, high=0.4)
    model = Linear(clean)
    model.weights[0, 0, 0] = 3.0
    model.bias = (clean * model.weights).flatten(1).sum(dim=1).max() + 1.0

    def forward(pixels):
        return ClassifierOutput(model(pixels).logits, pixels.flatten(1))

    examples = Examples.of(clean, torch.zeros(8, dtype=torch.int64))
    plain = minimal_distance(Query(forward, MARGIN), examples, norm="l2")
    gated = minimal_distance(Query(forward, Accepted("margin")), examples, norm="l2")
    assert (plain.pixels[:, 0, 0, 0] >= 0.5).any()
    assert (gated.pixels[gated.found][:, 0, 0, 0] < 0.5).all()
    assert (gated.distance >= plain.distance * (1 - 0.01)).all()


class Drifting:
    """A model that turns against the attacker at the end of the search, by a given amount."""

    def __init__(self, model, calls, drift):
        self.model, self.calls, self.drift = model, calls, drift

    def __call__(self, pixels):
        self.calls -= 1
        logits = self.model(pixels).logits.clone()
        if self.calls < 0:
            logits[:, 0] += self.drift
        return ClassifierOutput(logits, None)


@pytest.mark.parametrize(("drift", "found"), [(2e-5, True), (0.5, False)])
def test_what_is_returned_was_scored_again(drift, found):
    clean = pixels_of((5, *SHAPE), low=0.4, high=0.6)
    model = Linear(clean, share=0.2)
    examples = Examples.of(clean, torch.zeros(5, dtype=torch.int64))
    # One batch: the clean images, 100 steps, and the last image.
    forward = Drifting(model, 102, drift)
    steady = minimal_distance(Query(model, MARGIN), examples)
    outcome = minimal_distance(Query(forward, MARGIN), examples)
    if found:
        assert outcome.found.all()
        assert MARGIN.success(forward(outcome.pixels), examples).all()
        assert (outcome.distance <= steady.distance * 1.0101).all()
    else:
        assert not outcome.found.any()
        assert torch.isinf(outcome.distance).all()
        assert torch.equal(outcome.pixels, clean)


def test_images_found_are_adversarial_in_every_batch():
    rows = load_demo("evaluation")
    pixels = torch.from_numpy(rows.images[:20]).unsqueeze(1) / 255
    examples = Examples.of(pixels, torch.from_numpy(rows.labels[:20]))
    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        forward = pixel_forward(classifier)
        query = Query(forward, MARGIN, batch_size=8)
        for norm in ("linf", "l2"):
            outcome = minimal_distance(query, examples, norm=norm, num_steps=30)
            assert outcome.found.float().mean() > 0.9
            one_by_one = torch.cat([forward(image[None]).logits for image in outcome.pixels])
            wrong = one_by_one.argmax(dim=1) != examples.labels
            assert torch.equal(wrong, outcome.found)
            assert outcome.pixels.min() >= 0
            assert outcome.pixels.max() <= 1
            distance = ball_of(norm).distance(outcome.pixels, pixels)
            torch.testing.assert_close(outcome.distance[outcome.found], distance[outcome.found])
            clean = query.answer(pixels, examples, gradient=False).success
            assert outcome.curve([0]) == [float((~clean).double().mean())]


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"norm": "l1"}, {"step_size": 0}, {"gamma": 0}, {"gamma": 1}]
)
def test_settings_out_of_range_are_refused(wrong):
    clean = pixels_of((1, *SHAPE))
    with pytest.raises(InvalidInputError):
        minimal_distance(
            Query(Linear(clean), MARGIN), Examples.of(clean, torch.zeros(1).long()), **wrong
        )


# Against foolbox, from the same images.


def foolbox_distances(model, pixels, labels, norm, mean, std):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox", reason="foolbox is the `bench` extra")

    class ProjectedL2(foolbox.attacks.L2FMNAttack):
        """In foolbox 3.3.4 the factor of the projection is norms / norms = 1: it does nothing."""

        def project(self, x, x0, epsilon):
            change = x - x0
            norms = change.flatten(start=1).norms.l2(axis=-1)
            factor = (epsilon / norms.maximum(1e-12)).minimum(1.0)
            return x0 + change * factor.reshape((-1, 1, 1, 1))

    attack = (foolbox.attacks.LInfFMNAttack if norm == "linf" else ProjectedL2)(steps=100)
    wrapped = foolbox.PyTorchModel(
        model, (0, 1), device="cpu", preprocessing={"mean": mean, "std": std, "axis": -3}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, found, _ = attack(wrapped, pixels, labels, epsilons=None)
    return ball_of(norm).distance(found, pixels)


def compare(model, pixels, labels, norm):
    classifier = EnergyClassifier(model)
    with untouched(model):
        query = Query(pixel_forward(classifier), MARGIN, batch_size=len(pixels))
        outcome = minimal_distance(query, Examples.of(pixels, labels), norm=norm)
        settings = classifier.preprocessing
        theirs = foolbox_distances(
            model, pixels, labels, norm, list(settings.mean), list(settings.std)
        )
    return outcome, float(np.median(theirs.double().numpy())), theirs


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distances_are_those_of_foolbox(norm):
    rows = load_demo("evaluation")
    pixels = torch.from_numpy(rows.images[:31]).unsqueeze(1) / 255
    outcome, median, theirs = compare(
        demo_classifier(), pixels, torch.from_numpy(rows.labels[:31]), norm
    )
    assert outcome.found.all()
    # Foolbox returns the clean image where it finds nothing: in l2 most of these images, whose
    # pixels lie at 0 and 1, because it steps against the box.
    both = theirs > 0
    assert both.sum() >= 5
    assert float((outcome.distance / theirs)[both].median()) <= 1.02
    if norm == "linf":
        assert outcome.median <= 1.02 * median


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "images"), [("linf", 50), ("l2", 10)])
def test_distances_of_resnet20_are_those_of_foolbox(data_dir, norm, images):
    from ebm_guard.model.loading import load_model

    rows = np.load(data_dir / "cifar10_test.npz")
    pixels = torch.from_numpy(rows["images"][:images]).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(rows["labels"][:images])
    weights = data_dir / "cifar10_resnet20.safetensors"
    model = load_model(f"{EXAMPLES / 'published_nets.py'}:cifar10_resnet20", checkpoint=weights)
    outcome, median, _ = compare(model, pixels, labels, norm)
    assert outcome.found.all()
    assert abs(outcome.median / median - 1) <= 0.02
