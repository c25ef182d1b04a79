"""The square attack: the paper's algorithms by naive loops, closed forms, and pyautoattack."""

import math

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    Examples,
    Goal,
    Misclassify,
    Query,
    Square,
    climb,
    pixel_forward,
    untouched,
)
from ebm_guard.attacks.engine import image_generators
from ebm_guard.attacks.geometry import TOLERANCE, ball_of
from ebm_guard.attacks.square import bumps
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput

MARGIN = Misclassify("margin")


def pixels_of(shape, seed=0, low=0.0, high=1.0):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * drawn


def row_forward(weights):
    """Two classes with logits (0, w·x), row by row: the same bits in every batch."""

    def forward(pixels):
        # cumsum adds one by one; sums and dot products split rows by their place in memory.
        slopes = torch.stack([(row * weights).double().flatten().cumsum(0)[-1] for row in pixels])
        return ClassifierOutput(torch.stack([torch.zeros(len(pixels)), slopes.float()], 1), None)

    return forward


def demo(images):
    rows = load_demo("evaluation")
    pixels = torch.from_numpy(rows.images[:images]).unsqueeze(1) / 255
    return Examples.of(pixels, torch.from_numpy(rows.labels[:images]))


# The paper by naive loops. Coordinates count from 0.


def naive_rectangle(height, width):
    found = np.zeros((height, width))
    n = width // 2
    for r in range(height):
        for s in range(width):
            m = n - max(abs(r - height // 2), abs(s - width // 2))
            found[r, s] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
    return found


def naive_tile(side):
    upper = side // 2
    found = np.concatenate(
        [naive_rectangle(upper, side), -naive_rectangle(side - upper, side)], axis=0
    )
    return found / np.sqrt((found**2).sum())


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 9, 23])
def test_the_tile_is_that_of_the_paper(side):
    np.testing.assert_allclose(bumps(side).numpy(), naive_tile(side), atol=1e-12)


def naive_linf_proposal(best, x, epsilon, side, rng):
    channels, height, width = x.shape
    r, s = rng.integers(0, [height - side, width - side], endpoint=True)
    for _ in range(10):
        signs = 2 * rng.integers(0, 2, size=(channels, 1, 1)) - 1
        new = best.copy()
        for i in range(channels):
            for a in range(r, r + side):
                for b in range(s, s + side):
                    moved = best[i, a, b] + 2 * epsilon * signs[i, 0, 0]
                    moved = min(max(moved, x[i, a, b] - epsilon), x[i, a, b] + epsilon)
                    new[i, a, b] = min(max(moved, 0), 1)
        if np.abs(new - best).max() > TOLERANCE:
            break
    return new


def naive_l2_proposal(best, x, epsilon, side, rng):
    channels, height, width = x.shape
    limits = [height - side, width - side]
    r1, s1 = rng.integers(0, limits, endpoint=True)
    r2, s2 = rng.integers(0, limits, endpoint=True)
    turned = rng.integers(0, 2, size=(1, 1, 1)).item() == 1
    signs = 2 * rng.integers(0, 2, size=(channels, 1, 1)) - 1
    tile = naive_tile(side).T if turned else naive_tile(side)
    change = best - x
    unused = max(epsilon**2 - (change**2).sum(), 0)
    first, second = np.zeros((2, height, width), dtype=bool)
    first[r1 : r1 + side, s1 : s1 + side] = True
    second[r2 : r2 + side, s2 : s2 + side] = True
    new = change.copy()
    for i in range(channels):
        old = change[i][first].reshape(side, side)
        length = np.sqrt((old**2).sum())
        temp = signs[i, 0, 0] * tile + (old / length if length > 0 else 0)
        available = np.sqrt((change[i][first | second] ** 2).sum() + unused / channels)
        new[i][second] = 0
        new[i][first] = (temp / np.sqrt((temp**2).sum()) * available).ravel()
    return np.clip(x + new, 0, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 7, 10)])
def test_proposals_are_those_of_the_paper(norm, shape):
    epsilon = {"linf": 0.1, "l2": 1.0}[norm]
    examples = Examples.of(pixels_of((4, *shape)), torch.zeros(4, dtype=torch.int64))
    rule = Square(num_steps=40, norm=norm)
    query = Query(row_forward(pixels_of(shape, 5) - 0.5), MARGIN)
    naive = naive_linf_proposal if norm == "linf" else naive_l2_proposal
    state = rule.begin(examples, epsilon, None, (3,))
    twins = image_generators(examples.ids, (3,))
    for twin, mine in zip(twins, state.generators, strict=True):
        twin.bit_generator.state = mine.bit_generator.state
    best = objective = None
    for index in range(40):
        answer = query.answer(state.pixels, examples, gradient=False)
        if index == 0:
            best, objective = state.pixels.clone(), answer.objective.clone()
        rises = answer.objective > objective
        best[rises], objective[rises] = state.pixels[rises], answer.objective[rises]
        state = rule.step(state, answer, examples, epsilon, index)
        side = rule.side(index, *shape[1:])
        for row, twin in enumerate(twins):
            expected = naive(
                best[row].double().numpy(),
                examples.pixels[row].double().numpy(),
                epsilon,
                side,
                twin,
            )
            np.testing.assert_allclose(state.pixels[row].numpy(), expected, atol=2e-6)


def test_the_linf_start_is_vertical_stripes_at_the_edge():
    examples = Examples.of(pixels_of((5, 3, 8, 6), low=0.2, high=0.8), torch.zeros(5).long())
    change = Square().begin(examples, 0.1, None, (0,)).pixels - examples.pixels
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1))
    assert torch.equal(change.sign(), change[:, :, :1].sign().expand_as(change))
    # 90 stripes by fair coins: not all of one sign but with a chance of 2^-89.
    assert len(change.sign().unique()) == 2


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32), (2, 8, 11), (1, 3, 3)])
def test_the_l2_start_is_a_grid_of_tiles_of_the_whole_radius(shape):
    examples = Examples.of(torch.full((3, *shape), 0.5), torch.zeros(3).long())
    start = Square(norm="l2").begin(examples, 0.4, None, (0,)).pixels
    torch.testing.assert_close(
        ball_of("l2").distance(start, examples.pixels), torch.full((3,), 0.4), rtol=1e-5, atol=0
    )
    side = max(1, min(shape[1:]) // 5)
    top, left = (shape[1] % side) // 2, (shape[2] % side) // 2
    tile = naive_tile(side)
    corner = (start - 0.5)[:, :, top : top + side, left : left + side]
    for part in corner.reshape(-1, side, side).double().numpy():
        found = part / np.linalg.norm(part)
        assert any(
            np.allclose(found, sign * turned, atol=1e-4)
            for sign in (1, -1)
            for turned in (tile, tile.T)
        )


def test_the_squares_shrink_as_in_the_paper():
    rule = Square(num_steps=10_000, p_init=0.8)
    # p is halved after the queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000.
    for halvings, index in enumerate([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 9999]):
        p = 0.8 / 2**halvings
        assert rule.side(index, 224, 224) == round(math.sqrt(p) * 224)
        assert Square(num_steps=1000).side(index // 10, 224, 224) == rule.side(
            index // 10 * 10, 224, 224
        )
    sides = [Square(norm="l2").side(index, 32, 32) for index in range(5000)]
    assert min(sides) == 3
    assert all(side % 2 == 1 for side in sides)


@settings(deadline=None, max_examples=20)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(0.001, 2.0),
    channels=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_every_image_lies_in_ball_and_box(norm, epsilon, channels, height, width, seed):
    shape = (channels, height, width)
    clean = pixels_of((3, *shape), seed).round(decimals=1)  # with pixels at 0 and 1
    examples = Examples.of(clean, torch.zeros(3, dtype=torch.int64))
    seen, best = [], torch.full((3,), -math.inf)

    def observe(step, rows, answer):
        seen.append(answer.objective.clone())

    class Watched(Square):
        def step(self, state, answer, examples, epsilon, index):
            check(state.pixels)
            state = super().step(state, answer, examples, epsilon, index)
            check(state.pixels)
            # The objective of what is kept never falls.
            assert (state.objective >= best).all()
            best.copy_(state.objective)
            return state

    def check(pixels):
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        assert (ball_of(norm).distance(pixels, clean) <= epsilon + TOLERANCE).all()

    query = Query(row_forward(pixels_of(shape, 5) - 0.6), MARGIN)
    rule = Watched(num_steps=25, norm=norm)
    outcome = climb(rule, query, examples, epsilon, until="best", observe=observe)
    check(outcome.pixels)
    every = torch.stack(seen)
    assert torch.equal(outcome.objective, every.max(dim=0).values)
    assert (outcome.objective >= every[0]).all()
    scored = query.answer(outcome.pixels, examples, gradient=False)
    assert torch.equal(scored.objective, outcome.objective)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("until", ["success", "best"])
def test_the_batch_size_changes_nothing(norm, until):
    shape = (2, 7, 7)
    examples = Examples.of(pixels_of((9, *shape)), torch.zeros(9, dtype=torch.int64))
    forward = row_forward(pixels_of(shape, 5) - 0.53)

    def run(rows, batch_size):
        query = Query(forward, MARGIN, batch_size=batch_size)
        epsilon = {"linf": 0.03, "l2": 0.3}[norm]
        return climb(
            Square(60, norm), query, examples.select(rows), epsilon, until=until, seed=(7,)
        )

    whole = run(slice(None), 9)
    assert torch.equal(whole.pixels, run(slice(None), 2).pixels)
    one_by_one = [run(slice(row, row + 1), 1) for row in range(9)]
    for name in ("pixels", "objective", "step", "forwards", "success"):
        together = torch.cat([getattr(one, name) for one in one_by_one])
        assert torch.equal(getattr(whole, name), together), name
    assert (whole.gradients == 0).all()


def test_linf_reaches_the_optimum_of_a_linear_model():
    # max over the ball of w·x = w·x0 + epsilon·||w||_1, here away from the box. Most squares of a
    # 4x4 image are single pixels; each is tried 30 times or more: one is missed with chance 1e-11.
    weights = pixels_of((1, 4, 4), 5) - 0.5
    examples = Examples.of(pixels_of((6, 1, 4, 4), low=0.3, high=0.7), torch.zeros(6).long())
    outcome = climb(Square(600), Query(row_forward(weights), MARGIN), examples, 0.1, until="best")
    best = examples.pixels.flatten(1) @ weights.flatten() + 0.1 * weights.abs().sum()
    torch.testing.assert_close(outcome.objective, best, rtol=0, atol=1e-5)


def test_l2_comes_near_the_optimum_of_a_linear_model_and_not_above_it():
    weights = pixels_of((1, 6, 6), 5) - 0.5
    examples = Examples.of(pixels_of((6, 1, 6, 6), low=0.4, high=0.6), torch.zeros(6).long())
    clean = examples.pixels.flatten(1) @ weights.flatten()
    query = Query(row_forward(weights), MARGIN)
    outcome = climb(Square(500, "l2"), query, examples, 0.3, until="best")
    gained = (outcome.objective - clean) / (0.3 * weights.norm())
    assert (gained <= 1 + 1e-5).all()
    # A random direction in 36 dimensions gains 1/6 or less; bumps of 3x3 pixels cannot reach 1.
    assert float(gained.mean()) >= 0.5


def test_it_needs_no_gradient_and_takes_any_goal():
    class Accepted(Goal):
        """Wrong and refused by nobody, where the score counts whole steps: no slope anywhere."""

        def objective(self, output, examples):
            return (output.logits[:, 1] * 20).floor()

        def success(self, output, examples):
            return (output.logits[:, 1] * 20).floor() >= 30

    weights = pixels_of((1, 5, 5), 5) - 0.3
    examples = Examples.of(torch.full((4, 1, 5, 5), 0.5), torch.zeros(4).long())
    plain = row_forward(weights)
    query = Query(lambda pixels: plain(pixels.detach()), Accepted())
    highest = float((0.5 + 0.3 * weights.sign()).flatten() @ weights.flatten())
    assert highest > 1.55  # 31 steps are in reach, 30 are wanted
    outcome = climb(Square(600), query, examples, 0.3)
    assert outcome.success.all()
    assert (outcome.objective >= 30).all()


def test_a_nan_objective_is_never_kept():
    class Sometimes(Misclassify):
        def objective(self, output, examples):
            found = super().objective(output, examples)
            return torch.where(found > found.new_tensor(-0.2), math.nan, found)

    weights = pixels_of((1, 5, 5), 5) - 0.5
    examples = Examples.of(pixels_of((5, 1, 5, 5)), torch.zeros(5, dtype=torch.int64))
    rule = Square(40)
    query = Query(row_forward(weights), Sometimes("margin"))
    state = rule.begin(examples, 0.3, None, (0,))
    for index in range(40):
        answer = query.answer(state.pixels, examples, gradient=False)
        state = rule.step(state, answer, examples, 0.3, index)
    assert not state.objective.isnan().any()
    assert (state.objective <= -0.2).all()


def test_it_goes_on_from_a_given_start():
    examples = Examples.of(pixels_of((2, 1, 5, 5)), torch.zeros(2, dtype=torch.int64))
    start = (examples.pixels + 0.5).clamp(0, 1)
    found = Square(norm="linf").begin(examples, 0.1, start, (0,)).pixels
    torch.testing.assert_close(found, (examples.pixels + 0.1).clamp(0, 1))


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"norm": "l1"}, {"p_init": 0}, {"p_init": 2}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidInputError):
        Square(**wrong)
    assert Square(7, "l2", 0.5).settings() == {"norm": "l2", "num_steps": 7, "p_init": 0.5}


# Against the authors' code. Squares of theirs are shared by a batch, so images go one by one: the
# verdicts of different images are then independent, and a paired exact test applies.


def theirs(forward, examples, epsilon, queries, norm="linf"):
    library = pytest.importorskip("pyautoattack.square", reason="the `attacks` extra")

    def fooled(row):
        tool = library.SquareAttack(
            lambda pixels: forward(pixels).logits.clone(),
            norm={"linf": "Linf", "l2": "L2"}[norm],
            n_queries=queries,
            eps=epsilon,
            seed=row,
        )
        one = examples.select(slice(row, row + 1))
        with torch.random.fork_rng():
            adversarial = tool.perturb(one.pixels, one.labels)
        with torch.no_grad():
            return bool(MARGIN.success(forward(adversarial), one))

    return np.array([fooled(row) for row in range(len(examples))])


def not_weaker(ours, theirs):
    """One-sided exact sign test on the images that one of both fooled alone."""
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if not only_ours + only_theirs:
        return 1.0
    return stats.binomtest(only_theirs, only_ours + only_theirs, alternative="greater").pvalue


class Forgetful(Square):
    """A deliberate slip: every proposal is kept."""

    def step(self, state, answer, examples, epsilon, index):
        worst = torch.full_like(state.objective, -math.inf)
        state = type(state)(state.pixels, state.best, worst, state.generators)
        return super().step(state, answer, examples, epsilon, index)


def compare(model, examples, epsilon, queries, norm):
    classifier = EnergyClassifier(model)
    with untouched(model):
        forward = pixel_forward(classifier)
        query = Query(forward, MARGIN, batch_size=256)
        right = ~query.answer(examples.pixels, examples, gradient=False).success
        examples = examples.select(right)
        reference = theirs(forward, examples, epsilon, queries, norm)
        found = [
            climb(rule, query, examples, epsilon).success.numpy()
            for rule in (Square(queries, norm), Forgetful(queries, norm))
        ]
    return reference, *found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("norm", "epsilon", "images"), [("linf", 0.12, 80), ("l2", 0.7, 120)])
def test_it_is_not_weaker_than_the_authors_code(norm, epsilon, images):
    reference, ours, forgetful = compare(demo_classifier(), demo(images), epsilon, 100, norm)
    assert 0.2 < reference.mean() < 0.9  # a budget at which there is something to compare
    assert not_weaker(ours, reference) > 1e-3
    assert not_weaker(forgetful, reference) <= 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_is_not_weaker_on_a_robust_net(data_dir):
    from ebm_guard.model.loading import load_model

    rows = np.load(data_dir / "mnist.npz")
    pixels = torch.from_numpy(rows["test_images"][:60]).unsqueeze(1) / 255
    examples = Examples.of(pixels, torch.from_numpy(rows["test_labels"][:60]))
    weights = data_dir / "mnist_lenet5_pgd_eps03.safetensors"
    model = load_model(f"{EXAMPLES / 'published_nets.py'}:mnist_lenet5", checkpoint=weights)
    reference, ours, forgetful = compare(model, examples, 0.35, 100, "linf")
    assert 0.1 < reference.mean() < 0.95
    assert not_weaker(ours, reference) > 1e-3
    assert not_weaker(forgetful, reference) <= 1e-3
